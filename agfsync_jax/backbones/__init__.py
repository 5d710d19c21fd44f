"""Whole text-to-image systems, a file each; and here the one that `config.backbone` names."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt8

from agfsync_jax import samplers
from agfsync_jax.diffusion.generation import Generator
from agfsync_jax.diffusion.schedules import Schedule
from agfsync_jax.parallel.sharding import batch_shards
from agfsync_jax.utils import modules
from agfsync_jax.weights.networks import Fitted
from agfsync_jax.weights.pipeline_files import PipelineFiles

# Keys of config.sample that are not the Generator's.
_OF_THE_VERB = ("num_candidates", "prompts_per_shard", "param_dtype", "device_batch_size", "lora")


class Backbone(Protocol):
    """All that verbs know of a text-to-image system; a file's own is its class `Backbone`.

    Methods that take `params` are pure functions of them, to be compiled.

    Attributes:
        pipelines: diffusers' names of the checkpoints that it reads.
        networks: name -> class of every network that such a checkpoint may have.
        denoiser_name: the network that is trained.
        negative_conditioning: what guidance steers away from has these values instead of those
            that `encode_prompt` gives.
        params: the networks' parameters, as loaded.
        dtype: of the computation.
        schedule: the noise schedule that the denoiser was trained with.
    """

    pipelines: tuple[str, ...]
    networks: Mapping[str, type]
    denoiser_name: str
    negative_conditioning: Mapping[str, float]
    params: dict[str, Any]
    dtype: np.dtype
    schedule: Schedule

    def __init__(
        self,
        files: PipelineFiles,
        graphs: dict[str, nnx.GraphDef],
        params: dict[str, Any],
        *,
        dtype: Any = jnp.float32,
        mesh: Mesh | None = None,
        attention: str = "auto",
    ):
        """One whose networks are there; `load` says what the arguments are."""

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        mesh: Mesh | None = None,
        rules: Sequence[tuple[str, Sequence[Any]]] = (),
        variant: str = "",
        kind: str = "",
        lora: Sequence[tuple[str, float]] = (),
        attention: str = "auto",
        only: Sequence[str] = (),
    ) -> Self:
        """Loads a checkpoint; every part is looked at before the first tensor is read.

        Args:
            path: a diffusers folder, a repository of the Hub, gs://, a single file, or "micro:NAME"
                (weights/places.py).
            dtype: of the computation.
            param_dtype: the one that parameters are kept in.
            mesh, rules: where parameters go (parallel/sharding.py); one device without a mesh.
            variant: of the files in a folder: "fp16" for model.fp16.safetensors.
            kind: of a single file that does not tell: one of weights/skeletons.py.
            lora: (path, scale) of LoRA files, whose products are added to the weights.
            attention: one of parallel/placement.py's KERNELS.
            only: the networks whose parameters are read, where not all are needed.

        Raises:
            FileNotFoundError: nothing is there.
            ValueError: another kind of pipeline, parts that are missing, files that are not whole,
                tensors that do not fit, a LoRA of another model: all are listed.
        """

    @classmethod
    def open(cls, path: str | Path, *, variant: str = "", kind: str = "") -> PipelineFiles:
        """The files of a checkpoint; raises as `load`."""

    @classmethod
    def inspect(cls, files: PipelineFiles, *, dtype: Any = jnp.float32) -> dict[str, Fitted]:
        """Compares every part with its network, from headers alone; raises as `load`."""

    @classmethod
    def tokenizer(cls, files: PipelineFiles) -> Callable[[Sequence[str]], Int[np.ndarray, "b n"]]:
        """`tokenize` without the networks."""

    @classmethod
    def read_schedule(cls, files: PipelineFiles) -> Schedule:
        """`schedule` without the networks."""

    @classmethod
    def dtype_of(cls, name: str, config: Any, dtype: Any) -> np.dtype:
        """What a network, of which `config` says the sizes, computes in where `dtype` is wanted."""

    def add_lora(self, params: dict[str, Any], lora: Sequence[tuple[str, float]]) -> dict[str, Any]:
        """`params` with LoRA files added, as `load` adds them, in the memory of those that change;
        raises as `load`."""

    def plain(self) -> Self:
        """The same with plain attention, all of whose FLOP can be counted."""

    def save(
        self,
        path: str | Path,
        params: dict[str, Any],
        *,
        dtype: Any = np.float32,
        scheduler: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes a folder that diffusers' `from_pretrained` loads, without a safety checker.

        Every process calls it, the main one writes.

        Args:
            dtype: of the files.
            scheduler: its scheduler_config.json, instead of the checkpoint's own.

        Raises:
            FileExistsError: the folder is there and holds something.
        """

    def describe(self) -> list[str]:
        """What was chosen for this machine, a line each."""

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(h, w, c) of the latents of an image; ValueError for a size that cannot be drawn."""

    def count_truncated(self, prompts: Sequence[str]) -> int:
        """How many prompts have more tokens than the text encoder takes; the rest is cut off."""

    def tokenize(self, prompts: Sequence[str]) -> Int[np.ndarray, "b n"]:
        """Token ids, int32, cut and padded to the text encoder's length."""

    def encode_prompt(self, params: dict, tokens: Int[Array, "b n"]) -> dict[str, Array]:
        """What `denoise` is conditioned on, each [b, ...]."""

    def encode_image(
        self, params: dict, images: UInt8[Array, "b H W 3"]
    ) -> Float[Array, "b h w c"]:
        """Scaled latents, float32: the mean of the posterior."""

    def decode_latents(
        self, params: dict, latents: Float[Array, "b h w c"]
    ) -> UInt8[Array, "b H W 3"]:
        """Images of scaled latents."""

    def denoise(
        self,
        params: dict,
        latents: Float[Array, "b h w c"],
        timesteps: Array,
        conditioning: dict[str, Array],
    ) -> Float[Array, "b h w c"]:
        """The denoiser's prediction, float32, of the kind that `schedule.prediction_type` says."""


def backbone_class(config: Any) -> type[Backbone]:
    """The class that `config.backbone.name` names."""
    return modules.load("backbones", config.backbone.name).Backbone


def load(config: Any, mesh: Mesh, **changes: Any) -> Backbone:
    """The backbone of `config.backbone`, its parameters on `mesh` as `config.sharding` says.

    Args:
        **changes: arguments of the backbone's own `load`, which says what is raised, that the
            config does not say, or says otherwise.
    """
    spec = config.backbone.to_dict() | changes
    del spec["name"]
    return backbone_class(config).load(mesh=mesh, rules=config.sharding, **spec)


def as_judged(config: Any) -> Any:
    """The config of pictures that a model is judged by, and exported to make: what candidates alone
    are drawn with is not in it, and `config.evaluate.sample` goes before `config.sample`."""
    judged = config.copy_and_resolve_references().unlock()
    judged.sample.lora = ()
    judged.sample.update(judged.evaluate.sample)
    return judged.lock()


def generator(
    config: Any,
    mesh: Mesh,
    backbone: Backbone,
    *,
    num_images: int | None = None,
    refiner: Backbone | None = None,
    **changes: Any,
) -> Generator:
    """The generator of `config.sample`, with the refiner if one is named.

    Args:
        num_images: that all processes have to draw at once, at most; what a batch holds beyond that
            would be padding.
        refiner: the backbone that is named, where it need not be loaded.
        **changes: arguments of the Generator that the config says otherwise.

    Raises:
        FileNotFoundError, ValueError: see the Generator, and the backbone's `load` for a refiner;
            a sampler that does not exist, or two that differ.
    """
    size = config.sample.device_batch_size * batch_shards(mesh)
    spec = {"batch_size": min(size, num_images or size), **config.sample.to_dict(), **changes}
    dtype = spec["param_dtype"]
    for key in _OF_THE_VERB:
        del spec[key]
    if (path := spec.pop("refiner")) and refiner is None:
        refiner = load(config, mesh, path=path, kind="", lora=(), param_dtype=dtype)
    name = spec.pop("sampler")
    used = {samplers.find(name, each.schedule) for each in (backbone, refiner) if each}
    if len(used) > 1:
        raise ValueError(
            "The schedulers of base and refiner differ, and so do their latents' scales: name "
            "one sampler for both as config.sample.sampler."
        )
    return Generator(backbone, mesh, sampler=used.pop(), refiner=refiner, **spec)


def open_files(config: Any) -> PipelineFiles:
    """The files of the checkpoint of `config.backbone`; no tensor is read."""
    spec = config.backbone
    return backbone_class(config).open(spec.path, variant=spec.variant, kind=spec.kind)


def inspect(config: Any) -> dict[str, Fitted]:
    """The shapes of its networks; no tensor is read."""
    return backbone_class(config).inspect(open_files(config))


def schedule(config: Any) -> Schedule:
    """Its noise schedule alone; FileNotFoundError, ValueError: no checkpoint."""
    return backbone_class(config).read_schedule(open_files(config))


def sampler(config: Any) -> samplers.Sampler:
    """The sampler of `config.sample`, or that of the checkpoint's scheduler if it names none.

    Raises:
        FileNotFoundError, ValueError: no checkpoint; no such sampler; steps that it cannot make.
    """
    own = schedule(config)
    found = samplers.find(config.sample.sampler, own)
    found.steps(own, config.sample.num_inference_steps)
    return found


def tokenizer(config: Any) -> Callable:
    """Its tokenizer alone: texts -> int32 [b, n]."""
    return backbone_class(config).tokenizer(open_files(config))
