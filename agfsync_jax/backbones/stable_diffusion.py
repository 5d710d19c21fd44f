"""Stable Diffusion 1.x and 2.x (Rombach et al., arXiv:2112.10752), whole.

`params` is {"unet", "vae", "text_encoder"}, each a pytree; every method is a pure function of it.
"""

import contextlib
import copy
import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt8

from agfsync_jax.data.tokenizers import ClipTokenizer
from agfsync_jax.diffusion.schedules import Schedule
from agfsync_jax.models import hooks
from agfsync_jax.models.clip import CLIPTextModel
from agfsync_jax.models.lora import merge
from agfsync_jax.models.unet import UNet2DConditionModel
from agfsync_jax.models.vae import AutoencoderKL
from agfsync_jax.parallel import multihost
from agfsync_jax.parallel.mesh import create_mesh
from agfsync_jax.parallel.placement import Placement
from agfsync_jax.parallel.sharding import infer_shardings
from agfsync_jax.samplers import read_schedule
from agfsync_jax.weights.lora_files import load_lora
from agfsync_jax.weights.networks import Fitted, apply, fit, read_json, save_model
from agfsync_jax.weights.pipeline_files import PipelineFiles


class StableDiffusion:
    """Tokenizer, text encoder, autoencoder, denoiser and noise schedule of one checkpoint.

    Attributes:
        params: {"unet", "vae", "text_encoder"}: parameters as loaded.
        denoiser_name: the one that is trained.
        schedule: the noise schedule that the denoiser was trained with.
    """

    denoiser_name = "unet"
    pipelines = ("StableDiffusionPipeline",)
    # What guidance steers away from has these values instead of those that `encode_prompt` gives.
    negative_conditioning: dict[str, float] = {}
    heeds_force_upcast = False  # diffusers' pipelines of SD 1 and 2 do not either
    networks = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}

    def __init__(
        self,
        files: PipelineFiles,
        graphs: dict[str, Any],
        params: dict[str, Any],
        *,
        dtype: Any = jnp.float32,
        mesh: Mesh | None = None,
        attention: str = "auto",
    ):
        self.params = params
        self._files, self._graphs, self.dtype = files, graphs, jnp.dtype(dtype)
        mesh = create_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
        self._placement = Placement(mesh, attention)
        self._tokenize = self._tokenizers(files)
        self.schedule = _schedule(files)
        self._unet, self._vae = (_config(files, name, self.networks) for name in ("unet", "vae"))

    def plain(self) -> "StableDiffusion":
        """The same with plain attention, all of whose FLOP can be counted."""
        twin = copy.copy(self)
        twin._placement = dataclasses.replace(self._placement, kernel="plain")
        return twin

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
    ) -> "StableDiffusion":
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
        files, fitted = cls.inspect(path, dtype=dtype, variant=variant, kind=kind)
        problems: list[str] = []
        adapters = []
        for file, scale in lora:
            with _collect(problems):
                abstract = {name: each.abstract for name, each in fitted.items()}
                adapters.append((load_lora(file, abstract), scale))
        _raise(problems)
        shardings = functools.partial(infer_shardings, mesh=mesh, rules=rules) if mesh else None
        params = {}
        for name, each in fitted.items():
            if only and name not in only:
                continue
            params[name] = each.read(
                param_dtype=jnp.dtype(param_dtype),
                shardings=shardings,
                label=f"{Path(path).name} {name}",
            )
            for by_network, scale in adapters:
                if name in by_network:
                    places = jax.tree.map(lambda leaf: leaf.sharding, params[name])
                    add = jax.jit(merge, donate_argnums=0, out_shardings=places)
                    params[name] = add(params[name], by_network[name], scale=scale)
        graphs = {name: each.graph for name, each in fitted.items()}
        return cls(files, graphs, params, dtype=dtype, mesh=mesh, attention=attention)

    @classmethod
    def inspect(
        cls, path: str | Path, *, dtype: Any = jnp.float32, variant: str = "", kind: str = ""
    ) -> tuple[PipelineFiles, dict[str, Fitted]]:
        """Compares every part of a checkpoint with its network, from the files' headers alone.

        Raises:
            FileNotFoundError, ValueError: as `load`.
        """
        files = cls._open(path, variant=variant, kind=kind)
        fitted, problems = {}, []
        for name in cls._parts(files):
            with _collect(problems):
                config = _config(files, name, cls.networks)
                where = f"{files.source} ({name})"
                fitted[name] = fit(
                    cls.networks[name],
                    config,
                    files.tensors(name),
                    dtype=cls.dtype_of(name, config, dtype),
                    where=where,
                )
        with _collect(problems):
            cls._tokenizers(files)
        with _collect(problems):
            _schedule(files)
        with _collect(problems):
            unet, vae = (_config(files, name, cls.networks) for name in ("unet", "vae"))
            if not unet.in_channels == unet.out_channels == vae.latent_channels:
                raise ValueError(
                    f"{files.source}: the UNet takes {unet.in_channels} and gives "
                    f"{unet.out_channels} channels, the latents have {vae.latent_channels}: "
                    "expected a text-to-image model, where all are equal."
                )
        _raise(problems)
        return files, fitted

    @classmethod
    def dtype_of(cls, name: str, config: Any, dtype: Any) -> np.dtype:
        """What a network computes in, where `dtype` is wanted."""
        dtype = jnp.dtype(dtype)
        overflows = name == "vae" and cls.heeds_force_upcast and config.force_upcast
        return jnp.dtype(jnp.float32) if overflows and dtype == jnp.float16 else dtype

    @classmethod
    def tokenizer(
        cls, path: str | Path, *, variant: str = "", kind: str = ""
    ) -> Callable[[Sequence[str]], Int[np.ndarray, "b n"]]:
        """`tokenize` without the networks."""
        return cls._tokenizers(cls._open(path, variant=variant, kind=kind))

    @classmethod
    def read_schedule(cls, path: str | Path, *, variant: str = "", kind: str = "") -> Schedule:
        """`schedule` without the networks."""
        return _schedule(cls._open(path, variant=variant, kind=kind))

    @classmethod
    def _open(cls, path: str | Path, *, variant: str, kind: str) -> PipelineFiles:
        files = PipelineFiles(path, variant=variant, kind=kind)
        found = files.index.get("_class_name")
        if found not in cls.pipelines:
            raise ValueError(
                f"{files.source} holds a {found}: the backbone {cls.__module__.split('.')[-1]} "
                f"reads {' or '.join(cls.pipelines)}. Set config.backbone.name to the backbone of "
                "that kind."
            )
        return files

    @classmethod
    def _parts(cls, files: PipelineFiles) -> list[str]:
        """The networks that this checkpoint has."""
        return list(cls.networks)

    @classmethod
    def _tokenizers(cls, files: PipelineFiles) -> Callable:
        return ClipTokenizer(files.folder / "tokenizer")

    def save(self, path: str | Path, params: dict[str, Any], *, dtype: Any = np.float32) -> None:
        """Writes a folder that diffusers' `from_pretrained` loads, without a safety checker.

        Every process calls it, the main one writes.

        Raises:
            FileExistsError: the folder is there and holds something.
        """
        path = Path(path)
        if path.exists() and any(path.iterdir()):
            raise FileExistsError(f"{path} is not empty: give a new folder to save to.")
        multihost.barrier("save")  # every process has looked before the main one writes
        folder, index = self._files.folder, dict(self._files.index)
        for name in self._parts(self._files):
            config = self._files.config(name)
            save_model(self.networks[name], path / name, params[name], config, dtype=dtype)
        if not multihost.is_main():
            return
        for name in ("tokenizer", "tokenizer_2", "scheduler"):
            if (folder / name).is_dir():
                shutil.copytree(folder / name, path / name)
        for name in ("safety_checker", "feature_extractor", "image_encoder"):
            if name in index:
                index[name] = [None, None]
        if "safety_checker" in index:
            index["requires_safety_checker"] = False
        (path / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")

    def describe(self) -> list[str]:
        """What was chosen for this machine, a line each."""
        dtype = self.dtype_of("vae", self._vae, self.dtype)
        why = "as all else"
        if dtype != self.dtype:
            why = f"as it would overflow in {self.dtype} (force_upcast in its config.json)"
        return [
            self._placement.describe(),
            f"autoencoder in {dtype}, {why}",
        ]

    def count_truncated(self, prompts: Sequence[str]) -> int:
        """How many prompts have more tokens than the text encoder takes; the rest is cut off."""
        return self._tokenize.count_truncated(prompts)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(h, w, c) of the latents of an image; ValueError for a size that cannot be drawn."""
        multiple = self._vae.downscale * 2 ** (len(self._unet.block_out_channels) - 1)
        if height % multiple or width % multiple or min(height, width) < multiple:
            raise ValueError(
                f"Images of {height}x{width} pixels cannot be drawn: this model needs multiples of "
                f"{multiple} (config.sample.height, config.sample.width)."
            )
        scale = self._vae.downscale
        return height // scale, width // scale, self._vae.latent_channels

    def tokenize(self, prompts: Sequence[str]) -> Int[np.ndarray, "b n"]:
        """Token ids, int32, cut and padded to the text encoder's length."""
        return self._tokenize(prompts)

    def encode_prompt(self, params: dict, tokens: Int[Array, "b n"]) -> dict[str, Array]:
        """What `denoise` is conditioned on: {"encoder_hidden_states": [b, n, d]}."""
        output = self._run("text_encoder", params, tokens)
        return {"encoder_hidden_states": output.last_hidden_state}

    def encode_image(
        self, params: dict, images: UInt8[Array, "b H W 3"]
    ) -> Float[Array, "b h w c"]:
        """Scaled latents, float32: the mean of the posterior."""
        pixels = images.astype(jnp.float32) / 127.5 - 1.0
        mean, _ = self._run("vae", params, pixels, method="encode")
        return mean.astype(jnp.float32) * self._vae.scaling_factor

    def decode_latents(
        self, params: dict, latents: Float[Array, "b h w c"]
    ) -> UInt8[Array, "b H W 3"]:
        """Images of scaled latents."""
        latents = latents / self._vae.scaling_factor
        pixels = self._run("vae", params, latents, method="decode").astype(jnp.float32)
        return jnp.round(jnp.clip(pixels / 2 + 0.5, 0.0, 1.0) * 255).astype(jnp.uint8)

    def denoise(
        self,
        params: dict,
        latents: Float[Array, "b h w c"],
        timesteps: Array,
        conditioning: dict[str, Array],
    ) -> Float[Array, "b h w c"]:
        """The denoiser's prediction, float32, of the kind that `schedule.prediction_type` says."""
        hidden = conditioning["encoder_hidden_states"]
        return self._run("unet", params, latents, timesteps, hidden).astype(jnp.float32)

    def _run(self, name: str, params: dict, *arguments: Array, method: str = "__call__") -> Any:
        """A network's output, placed on the mesh."""
        network = apply(self._graphs[name], params[name])
        with hooks.using(self._placement):
            return getattr(network, method)(*arguments)


@contextlib.contextmanager
def _collect(problems: list[str]) -> Iterator[None]:
    """Notes what the block raises, and goes on behind it."""
    try:
        yield
    except (FileNotFoundError, ValueError) as error:
        if str(error) not in problems:
            problems.append(str(error))


def _raise(problems: list[str]) -> None:
    if problems:
        raise ValueError("\n".join(problems))


def _config(files: PipelineFiles, name: str, networks: dict[str, type]) -> Any:
    return networks[name].config_class.from_dict(files.config(name))


def _schedule(files: PipelineFiles) -> Schedule:
    return read_schedule(read_json(files.folder / "scheduler/scheduler_config.json"))


Backbone = StableDiffusion
