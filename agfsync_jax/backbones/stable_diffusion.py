"""Stable Diffusion 1.x and 2.x (Rombach et al., arXiv:2112.10752), whole.

`params` is {"unet", "vae", "text_encoder"}, each a pytree. What the methods are for, and what they
raise, is said once for all backbones in backbones/__init__.py.
"""

import contextlib
import copy
import dataclasses
import functools
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
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
from agfsync_jax.weights.networks import Fitted, fit, read_json, save_model
from agfsync_jax.weights.pipeline_files import PipelineFiles


class StableDiffusion:
    """Tokenizer, text encoder, autoencoder, denoiser and noise schedule of one checkpoint."""

    pipelines = ("StableDiffusionPipeline",)
    networks = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
    denoiser_name = "unet"
    negative_conditioning: dict[str, float] = {}
    heeds_force_upcast = False  # diffusers' pipelines of SD 1 and 2 do not either
    optional: tuple[str, ...] = ()  # networks that a checkpoint may lack
    # What diffusers' pipelines of SD 1 and 2 take whatever scheduler_config.json says: files of
    # 2022 may lack both.
    scheduler_fields: Mapping[str, Any] = {"steps_offset": 1, "clip_sample": False}

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
        self._tokenize, self.schedule = self.tokenizer(files), self.read_schedule(files)
        self._unet, self._vae = (self._config(files, name) for name in ("unet", "vae"))

    def plain(self) -> "StableDiffusion":
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
        files = cls.open(path, variant=variant, kind=kind)
        fitted = cls.inspect(files, dtype=dtype)
        abstract = {name: each.abstract for name, each in fitted.items()}
        adapters = _load_loras(lora, abstract)
        shardings = functools.partial(infer_shardings, mesh=mesh, rules=rules) if mesh else None
        params = {}
        for name in [name for name in fitted if name in only or not only]:
            label = f"{Path(path).name} {name}"
            own = fitted[name].read(
                param_dtype=jnp.dtype(param_dtype), shardings=shardings, label=label
            )
            params[name] = _merged(name, own, adapters)
        graphs = {name: each.graph for name, each in fitted.items()}
        return cls(files, graphs, params, dtype=dtype, mesh=mesh, attention=attention)

    def add_lora(self, params: dict[str, Any], lora: Sequence[tuple[str, float]]) -> dict[str, Any]:
        adapters = _load_loras(lora, params)
        return {name: _merged(name, own, adapters) for name, own in params.items()}

    @classmethod
    def open(cls, path: str | Path, *, variant: str = "", kind: str = "") -> PipelineFiles:
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
    def inspect(cls, files: PipelineFiles, *, dtype: Any = jnp.float32) -> dict[str, Fitted]:
        fitted, problems = {}, []
        for name in cls._parts(files):
            with _collect(problems):
                config = cls._config(files, name)
                settings = {"dtype": cls.dtype_of(name, config, dtype)}
                settings["where"] = f"{files.source} ({name})"
                fitted[name] = fit(cls.networks[name], config, files.tensors(name), **settings)
        for read in (cls.tokenizer, cls.read_schedule):
            with _collect(problems):
                read(files)
        with _collect(problems):
            unet, vae = (cls._config(files, name) for name in ("unet", "vae"))
            if not unet.in_channels == unet.out_channels == vae.latent_channels:
                raise ValueError(
                    f"{files.source}: the UNet takes {unet.in_channels} and gives "
                    f"{unet.out_channels} channels, the latents have {vae.latent_channels}: "
                    "expected a text-to-image model, where all are equal."
                )
        _raise(problems)
        return fitted

    @classmethod
    def dtype_of(cls, name: str, config: Any, dtype: Any) -> np.dtype:
        dtype = jnp.dtype(dtype)
        overflows = name == "vae" and cls.heeds_force_upcast and config.force_upcast
        return jnp.dtype(jnp.float32) if overflows and dtype == jnp.float16 else dtype

    @classmethod
    def tokenizer(cls, files: PipelineFiles) -> "Tokenizers":
        names = (name.replace("text_encoder", "tokenizer") for name in cls._encoders(files))
        return Tokenizers([ClipTokenizer(files.folder / name) for name in names])

    @classmethod
    def read_schedule(cls, files: PipelineFiles) -> Schedule:
        config = read_json(files.folder / "scheduler/scheduler_config.json")
        return read_schedule(config | cls.scheduler_fields)

    @classmethod
    def _config(cls, files: PipelineFiles, name: str) -> Any:
        return cls.networks[name].config_class.from_dict(files.config(name))

    @classmethod
    def _parts(cls, files: PipelineFiles) -> list[str]:
        """The networks that this checkpoint has."""
        return [name for name in cls.networks if name not in cls.optional or files.has(name)]

    @classmethod
    def _encoders(cls, files: PipelineFiles) -> list[str]:
        return [name for name in cls._parts(files) if name.startswith("text_encoder")]

    def save(
        self,
        path: str | Path,
        params: dict[str, Any],
        *,
        dtype: Any = np.float32,
        scheduler: Mapping[str, Any] | None = None,
    ) -> None:
        path, folder, index = Path(path), self._files.folder, dict(self._files.index)
        if path.exists() and any(path.iterdir()):
            raise FileExistsError(f"{path} is not empty: give a new folder to save to.")
        multihost.barrier("save")  # every process has looked before the main one writes
        for name in self._parts(self._files):
            config = self._files.config(name)
            save_model(self.networks[name], path / name, params[name], config, dtype=dtype)
        if not multihost.is_main():
            return
        for name in ("tokenizer", "tokenizer_2", "scheduler"):
            if (folder / name).is_dir():
                shutil.copytree(folder / name, path / name)
        if scheduler:
            index["scheduler"] = ["diffusers", scheduler["_class_name"]]
            text = json.dumps(dict(scheduler), indent=2)
            (path / "scheduler/scheduler_config.json").write_text(text + "\n")
        left_out = index.keys() & {"safety_checker", "feature_extractor", "image_encoder"}
        index |= dict.fromkeys(left_out, [None, None])
        if "safety_checker" in index:
            index["requires_safety_checker"] = False
        (path / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")

    def describe(self) -> list[str]:
        dtype = self.dtype_of("vae", self._vae, self.dtype)
        why = "as all else"
        if dtype != self.dtype:
            why = f"as it would overflow in {self.dtype} (force_upcast in its config.json)"
        return [self._placement.describe(), f"autoencoder in {dtype}, {why}"]

    def count_truncated(self, prompts: Sequence[str]) -> int:
        return self._tokenize.count_truncated(prompts)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        scale = self._vae.downscale
        multiple = scale * 2 ** (len(self._unet.block_out_channels) - 1)
        if height % multiple or width % multiple or min(height, width) < multiple:
            raise ValueError(
                f"Images of {height}x{width} pixels cannot be drawn: this model needs multiples of "
                f"{multiple} (config.sample.height, config.sample.width, or config.pair.buckets)."
            )
        return height // scale, width // scale, self._vae.latent_channels

    def tokenize(self, prompts: Sequence[str]) -> Int[np.ndarray, "b n"]:
        return self._tokenize(prompts)

    def encode_prompt(self, params: dict, tokens: Int[Array, "b n"]) -> dict[str, Array]:
        """What `denoise` is conditioned on: {"encoder_hidden_states": [b, n, d]}."""
        output = self._run("text_encoder", params, tokens)
        return {"encoder_hidden_states": output.last_hidden_state}

    def encode_image(
        self, params: dict, images: UInt8[Array, "b H W 3"]
    ) -> Float[Array, "b h w c"]:
        pixels = images.astype(jnp.float32) / 127.5 - 1.0
        mean, _ = self._run("vae", params, pixels, method="encode")
        return mean.astype(jnp.float32) * self._vae.scaling_factor

    def decode_latents(
        self, params: dict, latents: Float[Array, "b h w c"]
    ) -> UInt8[Array, "b H W 3"]:
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
        hidden = conditioning["encoder_hidden_states"]
        return self._run("unet", params, latents, timesteps, hidden).astype(jnp.float32)

    def _run(self, name: str, params: dict, *arguments: Array, method: str = "__call__") -> Any:
        """A network's output, placed on the mesh."""
        network = nnx.merge(self._graphs[name], params[name])
        with hooks.using(self._placement):
            return getattr(network, method)(*arguments)


class Tokenizers:
    """The ids that the tokenizers of all text encoders give, side by side."""

    def __init__(self, tokenizers: Sequence[ClipTokenizer]):
        self._tokenizers = tokenizers

    def __call__(self, prompts: Sequence[str]) -> Int[np.ndarray, "b n"]:
        return np.concatenate([each(prompts) for each in self._tokenizers], axis=-1)

    def count_truncated(self, prompts: Sequence[str]) -> int:
        return max(each.count_truncated(prompts) for each in self._tokenizers)


_Loras = list[tuple[dict[str, Any], float]]  # of each file its adapters by network, and its scale


def _load_loras(lora: Sequence[tuple[str, float]], params: dict[str, Any]) -> _Loras:
    """The adapters of files; ValueError for what does not fit `params`, arrays or their shapes."""
    adapters, problems = [], []
    for file, scale in lora:
        with _collect(problems):
            adapters.append((load_lora(file, params), scale))
    _raise(problems)
    return adapters


def _merged(name: str, params: Any, adapters: _Loras) -> Any:
    """A network's parameters with its adapters added, in the same memory."""
    for by_network, scale in adapters:
        if name in by_network:
            places = jax.tree.map(lambda leaf: leaf.sharding, params)
            add = jax.jit(merge, donate_argnums=0, out_shardings=places)
            params = add(params, by_network[name], scale=scale)
    return params


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


Backbone = StableDiffusion
