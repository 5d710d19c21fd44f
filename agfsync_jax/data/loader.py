"""Preference pairs as sharded batches, in an order that depends on (seed, step) alone."""

import bisect
import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Float, Int

from agfsync_jax.parallel.sharding import batch_sharding, batch_shards

# What a batch holds, of pairs and of rankings.
FIELDS = ("chosen_latents", "rejected_latents", "latents", "scores", "mask", "token_ids")
_FLIPPED = "_flipped"  # of a field: the latents of the mirrored images


class Noise(Protocol):
    """Noise of each example at some timesteps, in place of random noise."""

    timesteps: Int[np.ndarray, " n"]
    shape: tuple[int, ...]  #: of an example's, [k, h, w, c]

    def __call__(
        self, examples: Int[np.ndarray, " b"], places: Int[np.ndarray, " b"]
    ) -> Float[np.ndarray, "b k h w c"]:
        """That of examples, each at the timestep of a place among `timesteps`."""


class PairLoader:
    """Batches of preference pairs: `loader.batch(step)` has no state to save or restore.

    Step s holds rows s*b to (s+1)*b of an endless stream: one permutation of the pairs after
    another, each drawn from (seed, epoch). A batch may span two epochs, so no pair is left out.
    Where latents have several shapes, a batch has one of them: each shape has a stream of its own,
    and its share of an epoch's steps, in an order drawn from (seed, epoch). Over the epochs every
    pair is seen equally often; a shape with fewer pairs than a batch has a turn in some of them.

    Args:
      pairs: what `pairs.read_pairs` gives: at least pair_id, token_ids and latents (those of chosen
        and rejected, or of rankings as `pad_rankings` makes them), one row per pair; and stored
        embeddings with prompt_row.
      batch_size: rows of the global batch, over all processes.
      seed: of the order.
      mesh: batches are split over its data and fsdp axes.
      parts: that a step takes a batch in, each of which the mesh must divide.
      empty: the token ids of the empty prompt.
      empty_prompts: the share of examples that have it instead of their own prompt.
      flip: half of the images are mirrored, each by itself; the pairs hold their latents too.
      whole: in every epoch each pair has its turn, though its shape has fewer than a batch; see
        `weights`.

    Raises:
      ValueError: a batch that the mesh does not divide.
    """

    def __init__(
        self,
        pairs: Mapping[str, Any],
        batch_size: int,
        seed: int,
        mesh: Mesh,
        *,
        parts: int = 1,
        empty: Int[np.ndarray, " n"] | None = None,
        empty_prompts: float = 0.0,
        flip: bool = False,
        whole: bool = False,
    ):
        if batch_size < 1 or batch_size % (batch_shards(mesh) * parts):
            taken = f" in {parts} parts" if parts > 1 else ""
            raise ValueError(
                f"A batch of {batch_size} cannot be split over {batch_shards(mesh)} devices "
                f"(data x fsdp of the mesh {dict(mesh.shape)}){taken}: make it a multiple."
            )
        self.num_pairs = len(pairs["pair_id"])
        self.batch_size, self.part_size = batch_size, batch_size // parts
        self.seed = seed
        self._sharding = batch_sharding(mesh)
        self._arrays = {name: np.asarray(pairs[name]) for name in FIELDS if name in pairs}
        self._arrays["example"] = example_ids(pairs["pair_id"])
        self._flipped = {
            name: np.asarray(pairs[name + _FLIPPED]) for name in FIELDS if name + _FLIPPED in pairs
        }
        self.empty_prompts, self.flip = empty_prompts, flip
        self.token_ids = self._arrays.pop("token_ids")  # of each pair, then of the empty prompt
        if empty_prompts:
            self.token_ids = np.concatenate([self.token_ids, empty[None]])
        self.stored_embeddings = {
            name.removeprefix("embeddings/"): values
            for name, values in pairs.items()
            if name.startswith("embeddings/")
        }
        self.prompt_row = pairs.get("prompt_row")  # [n], which row of them is a pair's
        self.noise: Noise | None = None  # random: each step draws it
        latents = self._arrays.get("latents", self._arrays.get("chosen_latents"))
        every = [latents.shape[1:]] * self.num_pairs
        if latents.dtype == object:
            every = [each.shape for each in latents]
        self.shapes = sorted(set(every))  # of latents
        self._of_shape = [np.flatnonzero([e == shape for e in every]) for shape in self.shapes]
        self._counts = np.array([len(pairs) for pairs in self._of_shape])
        self.fewest = int(self._counts.min())  # pairs of a shape
        # Rows that shapes are ahead of their share, at random: else those of few would come late.
        ahead = self._generator(0, 6).integers(batch_size, size=len(self.shapes))
        self._ahead = np.full_like(ahead, batch_size - 1) if whole else ahead
        self._permutation = functools.lru_cache(2 * len(self.shapes))(self._draw_permutation)

    @property
    def latents_shape(self) -> tuple[int, ...]:
        """Of an example's images where all have one, [k, h, w, c]."""
        (shape,) = self.shapes
        return shape if "latents" in self._arrays else (2, *shape)

    def rows(self, step: int) -> np.ndarray:
        """Which pairs the global batch of a step holds, int64 [batch_size]."""
        shape, index = self._turn(step)
        pairs = self._of_shape[shape]
        stream = np.arange(index * self.batch_size, (index + 1) * self.batch_size)
        epochs, positions = np.divmod(stream, len(pairs))
        orders = (self._permutation(epoch, shape) for epoch in epochs.tolist())
        drawn = zip(orders, positions, strict=True)
        return pairs[[order[position] for order, position in drawn]]

    def shape(self, step: int) -> tuple[int, ...]:
        """Of the latents of a step's examples, one of `shapes`."""
        return self.shapes[self._turn(step)[0]]

    def weights(self, epochs: int) -> Float[np.ndarray, " steps"]:
        """Of the first steps, with which their mean counts each pair alike: the loader is `whole`.

        They are so many that each pair is seen at least `epochs` times.
        """
        turns = self._turns(epochs)
        shapes = [self._turn(step)[0] for step in range(turns.sum())]
        return (self._counts / turns)[shapes]

    def _turns(self, epochs: int) -> np.ndarray:
        """How many turns each shape has had after so many epochs."""
        return (epochs * self._counts + self._ahead) // self.batch_size

    def _turn(self, step: int) -> tuple[int, int]:
        """Which shape's turn a step is, and how many it has had before."""
        if len(self.shapes) == 1:
            return 0, step
        enough = range((step + len(self.shapes) + 1) * self.batch_size // self.num_pairs + 2)
        epoch = bisect.bisect_right(enough, step, key=lambda e: self._turns(e).sum()) - 1
        before, after = self._turns(epoch), self._turns(epoch + 1)
        order = np.repeat(np.arange(len(self.shapes)), after - before)
        order, at = self._generator(epoch, 4).permutation(order), step - before.sum()
        return int(order[at]), int(before[order[at]] + (order[:at] == order[at]).sum())

    def prompt_rows(self, step: int) -> np.ndarray:
        """Which of `token_ids` the global batch of a step has, int64 [batch_size]."""
        rows = self.rows(step)
        left_out = self._generator(step, 1).random(len(rows)) < self.empty_prompts
        return np.where(left_out, self.num_pairs, rows)

    def batch(self, step: int) -> dict[str, jax.Array]:
        """The global batch of a step.

        Returns:
          chosen_latents, rejected_latents float32 [b, h, w, c], or latents [b, k, h, w, c]; scores
          float32 and mask bool [b, k] if the pairs have them; token_ids int32 [b, n]; example int32
          [b], a number that belongs to the pair wherever it turns up (for noise keys). If the
          examples have noise of their own, noise float32 [b, k, h, w, c] and timesteps int [b].
        """
        rows = self.rows(step)
        mirrors, batch = self._generator(step, 2), {}
        for name, each in self._arrays.items():
            flipped = None
            if self.flip and name in self._flipped:
                images = (len(rows), *each[rows[0]].shape[:-3])  # of a ranking, each candidate's
                flipped = self._flipped[name], mirrors.random(images) < 0.5
            batch[name] = put_rows(each, rows, self._sharding, flipped)
        batch["token_ids"] = put_rows(self.token_ids, self.prompt_rows(step), self._sharding)
        if noise := self.noise:
            places = self._generator(step, 3).integers(len(noise.timesteps), size=len(rows))
            batch["timesteps"] = put_rows(noise.timesteps, places, self._sharding)
            batch["noise"] = jax.make_array_from_callback(
                (len(rows), *noise.shape),
                self._sharding,
                lambda part: noise(rows[part[0]], places[part[0]]),
            )
        return batch

    def examples(self, rows: np.ndarray) -> dict[str, jax.Array]:
        """`batch` of these pairs, each with its prompt and as it is."""
        named = self._arrays.items()
        batch = {name: put_rows(each, rows, self._sharding) for name, each in named}
        return batch | {"token_ids": put_rows(self.token_ids, rows, self._sharding)}

    def fingerprint(self) -> str:
        """Of the pairs, their prompts and latents, in their order; latents have one shape."""
        found = hashlib.blake2b(digest_size=16)
        named = self._arrays | {"token_ids": self.token_ids[: self.num_pairs]}
        for name, array in sorted(named.items()):
            found.update(name.encode() + np.ascontiguousarray(array).data)
        return found.hexdigest()

    def _generator(self, step: int, use: int) -> np.random.Generator:
        """Of what is drawn for a step; the order of an epoch is use 0."""
        return np.random.default_rng((self.seed, step, use))

    def _draw_permutation(self, epoch: int, shape: int) -> np.ndarray:
        several = (5, shape) if len(self.shapes) > 1 else ()
        generator = np.random.default_rng((self.seed, epoch, *several))
        return generator.permutation(len(self._of_shape[shape]))


def put_rows(
    array: np.ndarray,
    rows: np.ndarray,
    sharding: NamedSharding,
    instead: tuple[np.ndarray, np.ndarray] | None = None,
) -> jax.Array:
    """The rows of an array, or an array of arrays, as a batch; each process fills its devices.

    float16 becomes float32, which is exact: a denoiser casts to what it computes in.

    Args:
      instead: another array, and where in the batch its rows are taken, bool [b] or [b, k].
    """
    one = array[rows[0]]
    dtype = np.float32 if one.dtype == np.float16 else one.dtype

    def take(array, own):
        return np.stack(array[own]) if array.dtype == object else array[own]

    def fill(part):  # asked once per device of this process, for that device's rows only
        own = rows[part[0]]
        found = take(array, own).astype(dtype)
        if instead:
            other, where = instead[0], instead[1][part[0]]
            found[where] = take(other, own)[where]
        return found

    return jax.make_array_from_callback((len(rows), *one.shape), sharding, fill)


def example_ids(pair_ids: Sequence[str]) -> np.ndarray:
    """Non-negative int32 [b] from each pair's name, so that other pairs cannot shift them."""
    digests = [hashlib.sha256(pair_id.encode()).digest() for pair_id in pair_ids]
    return np.array([int.from_bytes(d[:4], "big") >> 1 for d in digests], np.int32)


def pad_rankings(
    latents: Sequence[np.ndarray], scores: Sequence[np.ndarray]
) -> dict[str, np.ndarray]:
    """Rankings of different lengths as arrays: latents [m, n, h, w, c], scores and mask [m, n].

    What is beyond a ranking's own length has the mask False and is zero.

    Raises:
      ValueError: latents of two shapes.
    """
    shapes = {each.shape[1:] for each in latents}
    if len(shapes) > 1:
        raise ValueError(f"Rankings differ in the shape of their latents: {sorted(shapes)}.")
    size = len(latents), max(map(len, latents))
    made = {
        "latents": np.zeros((*size, *shapes.pop()), latents[0].dtype),
        "scores": np.zeros(size, np.float32),
        "mask": np.zeros(size, bool),
    }
    for row, (each, values) in enumerate(zip(latents, scores, strict=True)):
        made["latents"][row, : len(each)] = each
        made["scores"][row, : len(each)] = values
        made["mask"][row, : len(each)] = True
    return made
