import jax
import numpy as np
import pytest

from agfsync_jax.data.embeddings import BatchEncoder, PromptEmbeddings, to_half
from agfsync_jax.parallel.mesh import create_mesh


class Doubling:
    """Encodes a prompt to twice its token ids."""

    params = 2

    def encode_prompt(self, params, tokens):
        return {"hidden": tokens[:, :, None] * params, "first": tokens[:, 0] * params}


def test_any_number_of_rows_is_one_program():
    encode = BatchEncoder(lambda params, rows: {"a": rows * params}, 3, 8, create_mesh())
    for n in (1, 5, 8, 20):
        rows = np.arange(2 * n).reshape(n, 2)
        np.testing.assert_array_equal(encode(rows)["a"], 3 * rows)
        np.testing.assert_array_equal(encode.start(rows[:8])["a"][:n], 3 * rows[:8])


@pytest.mark.parametrize("stored", [False, True])
def test_a_row_gets_what_its_prompt_is_encoded_to(stored):
    mesh = create_mesh()
    tokens = np.random.default_rng(0).integers(0, 3, (40, 2))
    if stored:
        distinct, index = np.unique(tokens, axis=0, return_inverse=True)
        table = Doubling().encode_prompt(2, distinct.astype(np.float16))
        embeddings = PromptEmbeddings(table, index, mesh)
    else:
        embeddings = PromptEmbeddings.encode(Doubling(), tokens, 8, mesh)
    rows = np.array([3, 3, 39, 0, 7, 8, 20, 1])
    found = embeddings(rows)
    assert found["hidden"].dtype == (np.float32 if stored else np.int32)
    assert len(found["first"].sharding.device_set) == len(jax.devices())
    np.testing.assert_array_equal(found["hidden"][:, :, 0], 2 * tokens[rows])
    np.testing.assert_array_equal(found["first"], 2 * tokens[rows, 0])


def test_what_does_not_fit_half_precision_is_told():
    assert to_half(np.float32([1, 65504]), "numbers", "use others").dtype == np.float16
    for value in (7e4, np.nan):
        with pytest.raises(ValueError, match="numbers do not fit float16 .*: use others."):
            to_half(np.float32([1, value]), "numbers", "use others")
