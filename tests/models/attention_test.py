"""Every kernel of attention equals the plain formula: shapes, dtypes, gradients.

The TPU's kernel runs here in Pallas' interpreter; meshes and platforms are placement_test.py's.
"""

import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from agfsync_jax.models import attention as module
from agfsync_jax.models import hooks
from agfsync_jax.models.attention import attention, chunked, plain
from tests.qkv import assert_equals_plain, both, inputs
from tests.twins import relative_error


class Chunked(hooks.Hooks):
    def attention(self, kernels, *qkv, scale):
        return kernels["chunked"](*qkv, scale=scale)


def test_plain_equals_torch():
    q, k, v = inputs(2, 50, 77, 3, 40)
    mask = jnp.asarray(np.random.default_rng(1).random((2, 1, 50, 77)) < 0.5)
    bias = jnp.asarray(np.random.default_rng(2).standard_normal((1, 3, 50, 77), np.float32))

    def expected(mask=None, scale=None):
        tensors = [torch.from_numpy(np.array(x)).transpose(1, 2) for x in (q, k, v)]
        mask = None if mask is None else torch.from_numpy(np.array(mask))
        sdpa = torch.nn.functional.scaled_dot_product_attention
        return sdpa(*tensors, attn_mask=mask, scale=scale).transpose(1, 2)

    assert relative_error(attention(q, k, v), expected()) <= 1e-5
    assert relative_error(attention(q, k, v, scale=0.3), expected(scale=0.3)) <= 1e-5
    assert relative_error(attention(q, k, v, mask=mask), expected(mask)) <= 1e-5
    assert relative_error(attention(q, k, v, bias=bias), expected(bias)) <= 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("s, t, size", [(64, 64, 40), (64, 77, 64), (101, 101, 80), (33, 77, 160)])
def test_chunked_equals_plain(monkeypatch, s, t, size, dtype):
    monkeypatch.setattr(module, "CHUNK_SCORES", 16 * t)  # chunks of at most 16 queries
    function = functools.partial(chunked, scale=size**-0.5)
    assert_equals_plain(function, inputs(2, s, t, 2, size, dtype))


def test_chunked_keeps_one_chunk_of_scores():
    """Forward and gradient: all scores would be 64 MB, a chunk is 8."""
    arrays = inputs(1, 4096, 4096, 1, 8)
    run = both(lambda q, k, v: chunked(q, k, v, scale=1.0)).lower(*arrays).compile()
    assert run.memory_analysis().temp_size_in_bytes < 40e6
    run = both(lambda q, k, v: plain(q, k, v, scale=1.0)).lower(*arrays).compile()
    assert run.memory_analysis().temp_size_in_bytes > 64e6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "s, t, size", [(128, 128, 40), (128, 77, 64), (130, 128, 80), (130, 140, 160)]
)
def test_flash_equals_plain(interpreter, s, t, size, dtype):
    """Whole blocks, then padded keys, padded queries, and both."""
    arrays = inputs(1, s, t, 1, size, dtype)
    assert_equals_plain(lambda *qkv: module.flash(*qkv, scale=size**-0.5), arrays)


def test_flash_equals_plain_over_several_blocks(interpreter, monkeypatch):
    monkeypatch.setattr(module, "MAX_BLOCK", 128)
    arrays = inputs(2, 260, 300, 2, 40)
    assert_equals_plain(lambda *qkv: module.flash(*qkv, scale=40**-0.5), arrays)


def test_blocks_of_flash_fit_the_length():
    blocks = {length: module._block(length, 40) for length in (64, 77, 256, 1024, 4096, 16384)}
    assert blocks == {64: 128, 77: 128, 256: 256, 1024: 1024, 4096: 1024, 16384: 1024}
    assert [module._block(length, 64) for length in (9216, 1280)] == [1024, 640]  # whole blocks
    assert [module._block(9216, size) for size in (128, 160, 512)] == [1024, 512, 256]
    for length in range(1, 5000, 37):
        block = module._block(length, 80)
        assert block % 128 == 0 and -length % block < max(128, 0.2 * length)


def test_a_mask_or_a_bias_is_plain():
    q, k, v = inputs(2, 8, 8, 2, 4)
    mask = jnp.tril(jnp.ones((1, 1, 8, 8), bool))
    expected = (
        plain(q, k, v, mask=mask, scale=0.5),
        plain(q, k, v, bias=jnp.where(mask, 1.0, -1.0), scale=0.5),
    )
    with hooks.using(Chunked()):
        actual = attention(q, k, v, mask=mask), attention(q, k, v, bias=jnp.where(mask, 1.0, -1.0))
        assert "scan" in str(jax.make_jaxpr(attention)(q, k, v))
        assert "scan" not in str(jax.make_jaxpr(lambda *x: attention(*x, mask=mask))(q, k, v))
    for ours, plainly in zip(actual, expected, strict=True):
        assert relative_error(ours, plainly) <= 1e-6


def test_a_function_jitted_once_is_traced_anew_under_other_hooks():
    arrays = inputs(2, 8, 8, 2, 4)
    function = jax.jit(lambda q, k, v: attention(q, k, v))

    def loops():
        return "while" in function.lower(*arrays).as_text()

    assert not loops()
    with hooks.using(Chunked()):
        assert loops()
        with hooks.using(hooks.Hooks()):
            assert not loops()
        assert loops()
        with pytest.raises(RuntimeError, match="inside"), hooks.using(hooks.Hooks()):
            raise RuntimeError("inside")
        assert loops()
        seen = []
        thread = threading.Thread(target=lambda: seen.append(loops()))
        thread.start()
        thread.join()
        assert seen == [False]
    assert not loops()
