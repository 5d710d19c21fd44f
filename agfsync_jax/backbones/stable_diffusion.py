"""Stable Diffusion 1.x and 2.x (Rombach et al., arXiv:2112.10752): a diffusers folder, whole.

`params` is {"unet", "vae", "text_encoder"}, each a pytree; every method is a pure function of it.
"""

import functools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt8

from agfsync_jax.data.tokenizers import ClipTokenizer
from agfsync_jax.diffusion.schedules import Schedule
from agfsync_jax.models.clip import CLIPTextModel
from agfsync_jax.models.unet import UNet2DConditionModel
from agfsync_jax.models.vae import AutoencoderKL
from agfsync_jax.parallel.sharding import infer_shardings
from agfsync_jax.utils.weights import apply, load_model, read_json, resolve_path, save_model

NETWORKS = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}


class StableDiffusion:
    """Tokenizer, text encoder, autoencoder, denoiser and noise schedule of one folder.

    Attributes:
        params: {"unet", "vae", "text_encoder"}: parameters as loaded.
        denoiser_name: the one that is trained.
        schedule: the noise schedule that the denoiser was trained with.
    """

    denoiser_name = "unet"

    def __init__(self, folder: Path, graphs: dict[str, Any], params: dict[str, Any]):
        self.folder = folder
        self.params = params
        self.schedule = Schedule.from_config(read_json(folder / "scheduler/scheduler_config.json"))
        self._graphs = graphs
        self._tokenizer = ClipTokenizer(folder / "tokenizer")
        self._unet, self._vae = (
            NETWORKS[name].config_class.from_dict(read_json(folder / name / "config.json"))
            for name in ("unet", "vae")
        )
        if not self._unet.in_channels == self._unet.out_channels == self._vae.latent_channels:
            raise ValueError(
                f"{folder}: the UNet takes {self._unet.in_channels} and gives "
                f"{self._unet.out_channels} channels, the latents have "
                f"{self._vae.latent_channels}: expected a text-to-image model, where all are equal."
            )

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        dtype: Any = jnp.float32,
        mesh: Mesh | None = None,
        rules: Sequence[tuple[str, Sequence[Any]]] = (),
    ) -> "StableDiffusion":
        """Loads a diffusers folder.

        Args:
            path: the folder, or "micro:NAME".
            dtype: of the computation; parameters are float32.
            mesh, rules: where parameters go (parallel/sharding.py); one device without a mesh.

        Raises:
            FileNotFoundError, ValueError: the folder is not one of a Stable Diffusion 1.x or 2.x.
        """
        folder = resolve_path(path)
        kind = read_json(folder / "model_index.json").get("_class_name")
        if kind != "StableDiffusionPipeline":
            raise ValueError(
                f"{folder}/model_index.json is of a {kind}: the backbone stable_diffusion reads "
                "a StableDiffusionPipeline. Set config.backbone.name to the backbone of that kind."
            )
        shardings = functools.partial(infer_shardings, mesh=mesh, rules=rules) if mesh else None
        loaded = {
            name: load_model(network, folder / name, dtype=jnp.dtype(dtype), shardings=shardings)
            for name, network in NETWORKS.items()
        }
        graphs = {name: graph for name, (graph, _) in loaded.items()}
        return cls(folder, graphs, {name: params for name, (_, params) in loaded.items()})

    def save(self, path: str | Path, params: dict[str, Any], *, dtype: Any = np.float32) -> None:
        """Writes a folder that `StableDiffusionPipeline.from_pretrained` loads, without a filter.

        Raises:
            FileExistsError: the folder is there and holds something.
        """
        path = Path(path)
        if path.exists() and any(path.iterdir()):
            raise FileExistsError(f"{path} is not empty: give a new folder to save to.")
        for name, network in NETWORKS.items():
            config = read_json(self.folder / name / "config.json")
            save_model(network, path / name, params[name], config, dtype=dtype)
        for name in ("tokenizer", "scheduler"):
            shutil.copytree(self.folder / name, path / name)
        index = read_json(self.folder / "model_index.json")
        for name in ("safety_checker", "feature_extractor", "image_encoder"):
            index[name] = [None, None]
        index["requires_safety_checker"] = False
        (path / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")

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
        return self._tokenizer(prompts)

    def encode_prompt(self, params: dict, tokens: Int[Array, "b n"]) -> dict[str, Array]:
        """What `denoise` is conditioned on: {"encoder_hidden_states": [b, n, d]}."""
        hidden, _ = apply(self._graphs["text_encoder"], params["text_encoder"])(tokens)
        return {"encoder_hidden_states": hidden}

    def encode_image(
        self, params: dict, images: UInt8[Array, "b H W 3"]
    ) -> Float[Array, "b h w c"]:
        """Scaled latents, float32: the mean of the posterior."""
        pixels = images.astype(jnp.float32) / 127.5 - 1.0
        mean, _ = apply(self._graphs["vae"], params["vae"]).encode(pixels)
        return mean.astype(jnp.float32) * self._vae.scaling_factor

    def decode_latents(
        self, params: dict, latents: Float[Array, "b h w c"]
    ) -> UInt8[Array, "b H W 3"]:
        """Images of scaled latents."""
        vae = apply(self._graphs["vae"], params["vae"])
        pixels = vae.decode(latents / self._vae.scaling_factor).astype(jnp.float32)
        return jnp.round(jnp.clip(pixels / 2 + 0.5, 0.0, 1.0) * 255).astype(jnp.uint8)

    def denoise(
        self,
        params: dict,
        latents: Float[Array, "b h w c"],
        timesteps: Array,
        conditioning: dict[str, Array],
    ) -> Float[Array, "b h w c"]:
        """The denoiser's prediction, float32, of the kind that `schedule.prediction_type` says."""
        unet = apply(self._graphs["unet"], params["unet"])
        prediction = unet(latents, timesteps, conditioning["encoder_hidden_states"])
        return prediction.astype(jnp.float32)


Backbone = StableDiffusion
