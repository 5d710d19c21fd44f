"""Prompts to images in fixed-size batches over a mesh; an image depends on its own seed alone."""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Float16, Int, UInt8, UInt32

from agfsync_jax.diffusion.denoising import guide
from agfsync_jax.parallel.sharding import (
    batch_sharding,
    batch_shards,
    filled,
    replicated,
    round_up,
)

Batch = tuple[Int[np.ndarray, " b"], Float16[np.ndarray, "b h w c"], UInt8[np.ndarray, "b H W 3"]]
Conditioning = dict[str, Array]

_PERTURBED = ("encoder_hidden_states", "text_embeds")
_DECODED_PIXELS = 2**20  # a device at a time: a decoder's activations take 50 times its output


def row_seed(seed: int, round_index: int, prompt_id: str, candidate: int) -> int:
    """The 32-bit seed of one candidate: the same on every machine, in any order."""
    text = json.dumps([int(seed), int(round_index), str(prompt_id), int(candidate)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


@dataclasses.dataclass(eq=False)
class Generator:
    """Draws candidates with a backbone; one depends on (params, prompt, seed, perturb) alone.

    Two programs, each compiled once: one encodes prompts, each of them once; the other takes a
    batch of candidates, of several prompts, through the whole trajectory and the decoder. Batches
    lie at fixed places in the list of all candidates, so that a run that goes on draws the very
    batches of one that was never stopped.

    Perturbation is AGFSync's (arXiv:2403.13352, c + n): Gaussian noise on what the text encoders
    give, hidden states and pooled embedding, all of one strength and from the candidate's own seed.
    (The released script adds noise of unit variance to every candidate's pooled embedding, and
    draws all noise from one generator, so that an image depends on those before it.)

    Args:
        backbone: see backbones/; its `params` are given at the call.
        mesh: batches are split over its axes `data` and `fsdp`.
        height, width: of the images, in pixels.
        num_inference_steps, guidance_scale: guidance 1 means none, at half the cost.
        batch_size: images on all devices together; rounded up to a multiple of their number.
        sampler: a value of samplers/.
        guidance_rescale: 0 (none) to 1 (arXiv:2305.08891, section 3.4).
        conditioning_noise: standard deviation of the noise on a perturbed candidate's
            conditioning. What guidance steers away from stays clean.
        negative_prompt: the text that guidance steers away from.
        refiner: a second backbone, which takes over after the fraction `refiner_start` of the
            trajectory; it is used with its own `params`.

    Raises:
        ValueError: a size that the backbone cannot draw; steps that the sampler cannot make.
    """

    backbone: Any
    mesh: Mesh
    _: dataclasses.KW_ONLY
    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    batch_size: int
    sampler: Any
    guidance_rescale: float = 0.0
    conditioning_noise: float = 0.0
    negative_prompt: str = ""
    refiner: Any = None
    refiner_start: float = 0.8

    def __post_init__(self):
        if self.refiner is not None and not 0 < self.refiner_start < 1:
            raise ValueError(f"config.sample.refiner_start={self.refiner_start}: expected 0 to 1.")
        self.latent_shape = self.backbone.latent_shape(self.height, self.width)
        self._backbones = [each for each in (self.backbone, self.refiner) if each is not None]
        ends = [0.0, 1.0] if self.refiner is None else [0.0, self.refiner_start, 1.0]
        self._spans = [*itertools.pairwise(ends)]
        self.num_calls = sum(
            self.sampler.num_calls(each.schedule, self.num_inference_steps, span)
            for each, span in zip(self._backbones, self._spans, strict=True)
        )

        self._num_shards = batch_shards(self.mesh)
        self.batch_size = round_up(self.batch_size, self._num_shards)
        # Every process of the mesh fills its part of a batch with rows of its own.
        self.num_processes = len({device.process_index for device in self.mesh.devices.flat})
        self.rows_per_batch = self.batch_size // self.num_processes
        self._replicated, self._batch = replicated(self.mesh), batch_sharding(self.mesh)
        self._encode_program = jax.jit(
            self._encode, in_shardings=(None, self._batch), out_shardings=self._batch
        )
        self._draw_program = jax.jit(
            self._draw,
            in_shardings=(None, self._replicated, self._batch, self._batch, self._batch),
            out_shardings=(self._batch, self._batch),
        )

    def __call__(
        self, params: Any, prompts: Sequence[str], seeds: Any, perturb: Any
    ) -> tuple[Float16[np.ndarray, "n h w c"], UInt8[np.ndarray, "n H W 3"]]:
        """Latents as the sampler left them, and images; arguments as for `stream`."""
        if not len(prompts):
            raise ValueError("There are no prompts to draw.")
        batches = list(self.stream(params, prompts, seeds, perturb))
        return tuple(np.concatenate([batch[i] for batch in batches]) for i in (1, 2))

    def stream(
        self,
        params: Any,
        prompts: Sequence[str],
        seeds: UInt32[np.ndarray, "p k"] | Sequence[int],
        perturb: Bool[np.ndarray, "p k"] | Sequence[bool],
        *,
        wanted: Bool[np.ndarray, " n"] | None = None,
    ) -> Iterator[Batch]:
        """Yields (rows, latents, images) batch by batch, while the next one runs.

        Row r is candidate r % k of prompt r // k, and there are n = p * k rows; one seed and one
        flag a prompt mean one candidate each. In a mesh over several processes each gives prompts
        of its own, as many candidates a prompt as the others, and all must call this alike.

        Args:
            params: of the backbone.
            wanted: the rows to draw; all by default. Others that share their batch are not given.
        """
        seeds, perturb = np.asarray(seeds, np.uint32), np.asarray(perturb, bool)
        if len(prompts) != len(seeds) or seeds.shape != perturb.shape:
            given = f"{len(prompts)} prompts, {len(seeds)} seeds, {len(perturb)} perturb"
            raise ValueError(f"Each candidate needs one of each, got {given}.")
        count = seeds.shape[1] if seeds.ndim == 2 else 1
        seeds, perturb = seeds.reshape(-1), perturb.reshape(-1)
        wanted = np.ones(seeds.size, bool) if wanted is None else np.asarray(wanted, bool)
        # Some batches make a group of whole prompts, which are encoded together.
        group_rows = math.lcm(count, self.rows_per_batch)
        group_prompts = group_rows // count
        groups = self._agree(wanted, group_rows)
        if not groups:
            return
        params = self._place((params, *(each.params for each in self._backbones[1:])))
        tokens = [each.tokenize(list(prompts) or [""]) for each in self._backbones]
        unconditional = self._unconditional(params, group_prompts)

        def encode(group):
            start = group * group_prompts
            own = [ids[start : min(start + group_prompts, len(prompts))] for ids in tokens]
            return self._encode_program(params, self._put(own, group_prompts))

        waiting, following = None, encode(groups[0][0])
        for index, (group, num_batches) in enumerate(groups):
            # The next prompts are encoded before this group's batches, and ready when these are.
            encoded = jax.tree.map(_local_rows, following)
            if index + 1 < len(groups):
                following = encode(groups[index + 1][0])
            for batch in range(num_batches):
                start = group * group_rows + batch * self.rows_per_batch
                rows = np.arange(start, min(start + self.rows_per_batch, wanted.size))
                prompt = rows // count - group * group_prompts
                arrays = [jax.tree.map(lambda leaf, own=prompt: leaf[own], encoded)]
                arrays += seeds[rows], perturb[rows]
                result = self._draw_program(
                    params, unconditional, *self._put(arrays, self.rows_per_batch)
                )
                if waiting:
                    yield _fetch(*waiting)
                waiting = (rows, wanted[rows], result) if wanted[rows].any() else None
        if waiting:
            yield _fetch(*waiting)

    def lower(self, params: Any) -> jax.stages.Lowered:
        """The program of a batch, from abstract parameters; nothing is run.

        Args:
            params: of the backbone, jax.ShapeDtypeStructs with their shardings.
        """
        params = (params, *(each.params for each in self._backbones[1:]))
        tokens = [each.tokenize([""]) for each in self._backbones]
        encoded = jax.eval_shape(self._encode, params, tokens)

        def rows(count, sharding, tree):
            def placed(leaf):
                shape = (count, *leaf.shape[1:])
                return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)

            return jax.tree.map(placed, tree)

        unconditional = None if self.guidance_scale == 1 else rows(1, self._replicated, encoded)
        of_rows = [encoded, np.empty(1, np.uint32), np.empty(1, bool)]
        batch = rows(self.batch_size, self._batch, of_rows)
        return self._draw_program.lower(params, unconditional, *batch)

    def _encode(
        self, params: tuple[Any, ...], tokens: list[Int[Array, "b n"]]
    ) -> list[Conditioning]:
        parts = zip(self._backbones, params, tokens, strict=True)
        return [dict(each.encode_prompt(own, ids)) for each, own, ids in parts]

    def _unconditional(self, params: tuple[Any, ...], num_prompts: int) -> Any:
        """What guidance steers away from, one row; None where there is no guidance."""
        if self.guidance_scale == 1:
            return None
        tokens = [each.tokenize([self.negative_prompt]) for each in self._backbones]
        encoded = self._encode_program(params, self._put(tokens, num_prompts))
        encoded = jax.tree.map(lambda leaf: _local_rows(leaf)[:1], encoded)
        for each, own in zip(self._backbones, encoded, strict=True):
            fixed = getattr(each, "negative_conditioning", {})
            own.update({name: np.full_like(own[name], value) for name, value in fixed.items()})
        return jax.tree.map(
            lambda leaf: jax.make_array_from_process_local_data(self._replicated, leaf), encoded
        )

    def _draw(
        self,
        params: tuple[Any, ...],
        unconditional: list[Conditioning] | None,
        conditioning: list[Conditioning],
        seeds: UInt32[Array, " b"],
        perturb: Bool[Array, " b"],
    ) -> tuple[Array, Array]:
        keys = jax.vmap(jax.random.key)(seeds)
        latents = jax.vmap(lambda key: jax.random.normal(key, self.latent_shape))(keys)
        of_steps = jax.vmap(lambda key: jax.random.fold_in(key, 0))(keys)
        if self.conditioning_noise:
            strength = self.conditioning_noise * perturb.astype(jnp.float32)
            conditioning = _perturb(conditioning, keys, strength)
        for index, backbone in enumerate(self._backbones):
            unguided = None
            if unconditional is not None:
                unguided = jax.tree.map(
                    lambda leaf: jnp.broadcast_to(leaf, seeds.shape + leaf.shape[1:]),
                    unconditional[index],
                )
            denoise = guide(
                functools.partial(backbone.denoise, params[index]),
                *(conditioning[index], unguided, self.guidance_scale, self.guidance_rescale),
            )
            latents = self.sampler(
                *(denoise, backbone.schedule, latents, self.num_inference_steps),
                keys=of_steps,
                span=self._spans[index],
            )
        return latents, self._decode(params[0], latents)

    def _decode(self, params: Any, latents: Float[Array, "b h w c"]) -> UInt8[Array, "b H W 3"]:
        """Images, of each device so many at a time that the decoder's activations stay small."""
        decode = functools.partial(self.backbone.decode_latents, params)
        most = max(1, _DECODED_PIXELS // (self.height * self.width))
        own = self.batch_size // self._num_shards  # rows of a device
        size = next(n for n in range(min(most, own), 0, -1) if own % n == 0)
        if size == own:
            return decode(latents)
        # [devices, chunks, size, ...] -> [chunks, devices * size, ...]: rows stay on their device
        chunks = latents.reshape(self._num_shards, own // size, size, *latents.shape[1:])
        chunks = chunks.swapaxes(0, 1).reshape(own // size, -1, *latents.shape[1:])
        images = jax.lax.map(decode, chunks)
        images = images.reshape(own // size, self._num_shards, size, *images.shape[2:])
        return images.swapaxes(0, 1).reshape(-1, *images.shape[3:])

    def _agree(self, wanted: Bool[np.ndarray, " n"], group_rows: int) -> list[tuple[int, int]]:
        """The groups to draw and the batches to draw of each; as many on every process."""
        groups = []
        for start in range(0, wanted.size, group_rows):
            rows = np.flatnonzero(wanted[start : start + group_rows])
            if rows.size:
                groups.append((start // group_rows, int(rows[-1]) // self.rows_per_batch + 1))
        if self.num_processes > 1:  # one with less to do draws padding along with the others
            length = int(multihost_utils.process_allgather(np.int32(len(groups))).max())
            beyond = math.ceil(wanted.size / group_rows)
            groups += [(beyond, 0)] * (length - len(groups))
            if length:
                own = np.array([batches for _, batches in groups], np.int32)
                most = multihost_utils.process_allgather(own).max(axis=0)
                groups = [(group, int(n)) for (group, _), n in zip(groups, most, strict=True)]
        return groups

    def _place(self, params: Any) -> Any:
        """Parameters that are not on the mesh go to all of it, once, and not at every batch."""
        devices = set(self.mesh.devices.flat)

        def place(leaf):
            is_there = leaf.sharding.device_set == devices
            return leaf if is_there else jax.device_put(leaf, self._replicated)

        return jax.tree.map(place, params)

    def _put(self, arrays: Any, num_rows: int) -> Any:
        """This process's rows of a pytree, filled up to `num_rows`, or to what the mesh divides."""
        size = round_up(num_rows, self._num_shards // self.num_processes)
        return jax.tree.map(
            lambda leaf: jax.make_array_from_process_local_data(self._batch, filled(leaf, size)),
            arrays,
        )


def _perturb(
    conditioning: list[Conditioning], keys: Array, strength: Float[Array, " b"]
) -> list[Conditioning]:
    """Adds noise of a standard deviation a row; each array's is of its own."""
    noisy = [dict(part) for part in conditioning]
    places = [(part, name) for part in noisy for name in _PERTURBED if name in part]
    for stream, (part, name) in enumerate(places, 1):  # 0 is of the sampler
        clean = part[name]

        def draw(key, stream=stream, shape=clean.shape[1:]):
            return jax.random.normal(jax.random.fold_in(key, stream), shape)

        scale = strength.reshape(strength.shape + (1,) * (clean.ndim - 1))
        added = clean.astype(jnp.float32) + scale * jax.vmap(draw)(keys)
        part[name] = added.astype(clean.dtype)
    return noisy


def _fetch(rows: np.ndarray, wanted: np.ndarray, arrays: tuple[Array, Array]) -> Batch:
    """Waits for a batch and takes this process's rows, without padding and what nobody wants."""
    latents, images = (_local_rows(array)[: len(rows)][wanted] for array in arrays)
    return rows[wanted], latents.astype(np.float16), images


def _local_rows(array: Array) -> np.ndarray:
    """The rows of a batch that lie on this process, in order."""
    parts = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])
