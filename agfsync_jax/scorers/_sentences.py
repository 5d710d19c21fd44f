"""Which choice an answer in free words means: the one whose sentence embedding is nearest.

As TIFA (Hu et al. 2023) does it with sentence-transformers/all-mpnet-base-v2 (Reimers & Gurevych
2019): an embedding is the mean of MPNet's hidden states over the tokens, divided by its length.
"""

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from agfsync_jax.data.tokenizers import TextTokenizer
from agfsync_jax.models.mpnet import MPNetModel
from agfsync_jax.parallel.sharding import (
    batch_sharding,
    batch_shards,
    filled,
    infer_shardings,
    round_up,
)
from agfsync_jax.scorers.clip import unit
from agfsync_jax.weights.networks import load_model, read_json
from agfsync_jax.weights.places import local_files, resolve_path

_MULTIPLE = 16  # of padded lengths, so that few shapes are compiled


def check_is_mpnet(folder: Path) -> None:
    """Raises FileNotFoundError or ValueError for a folder of weights of another kind."""
    kind = read_json(folder / "config.json").get("model_type")
    if kind != "mpnet":
        raise ValueError(
            f"{folder} holds a {kind!r}: expected an MPNet, such as"
            " sentence-transformers/all-mpnet-base-v2."
        )


class SentenceEncoder:
    """Texts to embeddings of length one; none is computed twice.

    Texts are cut at the tokenizer's `model_max_length` (512 tokens for all-mpnet-base-v2), as
    TIFA's code does. The sentence-transformers library would cut them at 384.

    Args:
        path: a folder of an MPNet in transformers' layout, with tokenizer.json.
        mesh: batches are split over its data and fsdp axes, weights are whole on every device.
        batch_size: texts at a time, rounded up to what the mesh divides.

    Raises:
        FileNotFoundError, ValueError: the folder is not there, or holds no MPNet or no tokenizer.
    """

    def __init__(self, path: str, *, mesh: Mesh, batch_size: int = 64):
        source = resolve_path(path)
        folder = local_files(source)
        check_is_mpnet(folder)
        self._tokenizer = TextTokenizer(folder)
        everywhere = functools.partial(infer_shardings, mesh=mesh)
        graph, self._params = load_model(MPNetModel, source, shardings=everywhere)
        config = MPNetModel.config_class.from_dict(read_json(folder / "config.json"))
        limit = read_json(folder / "tokenizer_config.json").get("model_max_length")
        self._max_length = min(limit or config.max_length, config.max_length)
        self._batch_size = round_up(batch_size, batch_shards(mesh))
        self._sharding = batch_sharding(mesh)
        self._size = config.hidden_size
        self._texts: dict[str, np.ndarray] = {}

        def embed(params: nnx.State, ids: Int[Array, "b n"], mask: Int[Array, "b n"]):
            states = nnx.merge(graph, params)(ids, mask).astype(jnp.float32)
            kept = mask[:, :, None].astype(jnp.float32)
            return unit(jnp.sum(states * kept, axis=1) / jnp.sum(kept, axis=1))

        self._embed = jax.jit(embed)

    def embed(self, sentences: Iterable[str]) -> Float[np.ndarray, "n d"]:
        """Embeddings of texts, float32."""
        sentences = list(sentences)
        new = [text for text in dict.fromkeys(sentences) if text not in self._texts]
        if new:
            self._texts.update(zip(new, self._compute(new), strict=True))
        made = [self._texts[text] for text in sentences]
        return np.stack(made) if made else np.zeros((0, self._size), np.float32)

    def closest(self, pairs: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
        """Of each (answer, choices) the choice with the largest cosine, the first of equal ones.

        Raises:
            ValueError: an answer without choices.
        """
        for answer, choices in pairs:
            if not choices:
                raise ValueError(f"the answer {answer!r} has no choices: give at least one.")
        self.embed(text for answer, choices in pairs for text in (answer, *choices))
        found = []
        for answer, choices in pairs:
            # not a matrix product, which may round equal rows differently
            cosines = np.sum(self.embed(choices) * self._texts[answer], axis=-1)
            found.append(choices[int(np.argmax(cosines))])
        return found

    def _compute(self, texts: Sequence[str]) -> Float[np.ndarray, "n d"]:
        """Batches of texts of about one length, filled up; results are read at the end."""
        ids, mask = self._tokenizer(texts, self._max_length)
        lengths = mask.sum(axis=1)
        order = np.argsort(lengths, kind="stable")
        pending = []
        for start in range(0, len(order), self._batch_size):
            part = order[start : start + self._batch_size]
            rows = filled(part, self._batch_size)
            length = round_up(int(lengths[part[-1]]), _MULTIPLE)
            batch = jax.device_put((ids[rows, :length], mask[rows, :length]), self._sharding)
            pending.append((part, self._embed(self._params, *batch)))
        embeddings = np.empty((len(texts), self._size), np.float32)
        for part, values in pending:
            embeddings[part] = np.asarray(values)[: len(part)]
        return embeddings
