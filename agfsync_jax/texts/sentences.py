"""Sentence embeddings (Reimers & Gurevych 2019), by a BERT or an MPNet.

An embedding is the mean of the hidden states over a text's tokens, or the first token's state,
divided by its length. TIFA (Hu et al. 2023) finds so which choice an answer in free words means,
with sentence-transformers/all-mpnet-base-v2.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from agfsync_jax.data.tokenizers import TextTokenizer
from agfsync_jax.models.bert import BertModel
from agfsync_jax.models.layers import unit
from agfsync_jax.models.mpnet import MPNetModel
from agfsync_jax.parallel.sharding import (
    batch_sharding,
    batch_shards,
    filled,
    infer_shardings,
    round_up,
)
from agfsync_jax.weights.networks import load_model, read_json
from agfsync_jax.weights.places import local_files, resolve_path

_NETWORKS = {"bert": BertModel, "mpnet": MPNetModel}
_POOLING = {"pooling_mode_cls_token": "first", "pooling_mode_mean_tokens": "mean"}
_MODULES = {"Transformer", "Pooling", "Normalize"}
_MULTIPLE = 16  # of padded lengths, so that few shapes are compiled
_SORTED = 64  # batches whose texts are sorted by length


def check(folder: Path) -> None:
    """Does nothing for a folder that `SentenceEncoder` takes.

    Raises:
        FileNotFoundError, ValueError: weights of another kind, or other steps to an embedding.
    """
    kind = read_json(folder / "config.json").get("model_type")
    if kind not in _NETWORKS:
        raise ValueError(
            f"{folder} holds a {kind!r}: expected a BERT or an MPNet, such as"
            " sentence-transformers/all-MiniLM-L6-v2 or sentence-transformers/all-mpnet-base-v2."
        )
    if (path := folder / "modules.json").exists():
        steps = [step["type"].rpartition(".")[2] for step in read_json(path)]
        if other := [step for step in steps if step not in _MODULES]:
            raise ValueError(
                f"{path} has {', '.join(other)}: only {', '.join(sorted(_MODULES))} are supported."
            )
    _pooling(folder)


def _pooling(folder: Path) -> str:
    """The value of `_POOLING` that the folder asks for; "mean" where it says nothing."""
    if not (path := folder / "1_Pooling" / "config.json").exists():
        return "mean"
    modes = [k for k, on in read_json(path).items() if k.startswith("pooling_mode") and on]
    if len(modes) != 1 or modes[0] not in _POOLING:
        raise ValueError(
            f"{path} asks for {' and '.join(modes) or 'no pooling_mode'}: expected one of"
            f" {', '.join(_POOLING)}."
        )
    return _POOLING[modes[0]]


class SentenceEncoder:
    """Texts to embeddings of length one.

    Texts are cut at the tokenizer's `model_max_length` (512 tokens for all-mpnet-base-v2), as
    TIFA's code does. The sentence-transformers library would cut them at 384.

    Args:
        path: a folder of a BERT or an MPNet in transformers' layout, with tokenizer.json; its
            1_Pooling/config.json says which states are taken, the mean if there is none.
        mesh: batches are split over its data and fsdp axes, weights are whole on every device.
        batch_size: texts at a time, rounded up to what the mesh divides.

    Raises:
        FileNotFoundError, ValueError: the folder is not there, or holds no tokenizer, another
            network or other steps to an embedding.
    """

    def __init__(self, path: str, *, mesh: Mesh, batch_size: int = 64):
        source = resolve_path(path)
        folder = local_files(source)
        check(folder)
        pooling, written = _pooling(folder), read_json(folder / "config.json")
        network = _NETWORKS[written["model_type"]]
        config = network.config_class.from_dict(written)
        self._tokenizer = TextTokenizer(folder)
        everywhere = functools.partial(infer_shardings, mesh=mesh)
        graph, self._params = load_model(network, source, shardings=everywhere)
        limit = read_json(folder / "tokenizer_config.json").get("model_max_length")
        self._max_length = min(limit or config.max_length, config.max_length)
        self._batch_size = round_up(batch_size, batch_shards(mesh))
        self._sharding = batch_sharding(mesh)
        self._size = config.hidden_size
        self._texts: dict[str, np.ndarray] = {}

        def embed(params: nnx.State, ids: Int[Array, "b n"], mask: Int[Array, "b n"]):
            states = nnx.merge(graph, params)(ids, mask).astype(jnp.float32)
            if pooling == "first":
                return unit(states[:, 0])
            kept = mask[:, :, None].astype(jnp.float32)
            return unit(jnp.sum(states * kept, axis=1) / jnp.sum(kept, axis=1))

        self._embed = jax.jit(embed)

    def embed(self, sentences: Iterable[str]) -> Float[np.ndarray, "n d"]:
        """Embeddings of texts, float32; all are remembered and none is computed twice."""
        sentences = list(sentences)
        new = [text for text in dict.fromkeys(sentences) if text not in self._texts]
        if new:
            made = (row for part in self.stream(new) for row in part)
            self._texts.update(zip(new, made, strict=True))
        made = [self._texts[text] for text in sentences]
        return np.stack(made) if made else np.zeros((0, self._size), np.float32)

    def stream(self, sentences: Sequence[str]) -> Iterator[Float[np.ndarray, "m d"]]:
        """Embeddings of texts in their order, some batches at a time; none is remembered."""
        size = _SORTED * self._batch_size
        for start in range(0, len(sentences), size):
            yield self._compute(sentences[start : start + size])

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
