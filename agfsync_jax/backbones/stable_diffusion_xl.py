"""Stable Diffusion XL, base and refiner (Podell et al., arXiv:2307.01952).

`params` is {"unet", "vae", "text_encoder", "text_encoder_2"}; the refiner has no "text_encoder".
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from agfsync_jax.backbones.stable_diffusion import StableDiffusion
from agfsync_jax.models.clip import CLIPTextModelWithProjection
from agfsync_jax.weights.pipeline_files import PipelineFiles

# What the refiner is told of the image it shall make and of what it shall avoid, as in diffusers.
_AESTHETIC_SCORE, _NEGATIVE_AESTHETIC_SCORE = 6.0, 2.5


class StableDiffusionXL(StableDiffusion):
    """Two text encoders; their last but one hidden states, side by side, are the conditioning.

    Token ids are those of each encoder in turn, as their tokenizers pad differently. The second
    one's projected embedding and the image's size and crop go in with the timestep.
    """

    pipelines = ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline")
    networks = StableDiffusion.networks | {"text_encoder_2": CLIPTextModelWithProjection}
    heeds_force_upcast = True
    scheduler_fields: Mapping[str, Any] = {}
    optional = ("text_encoder", "text_encoder_2")

    def __init__(self, files: PipelineFiles, graphs: dict[str, Any], params: dict, **kwargs: Any):
        super().__init__(files, graphs, params, **kwargs)
        self._is_scored = bool(files.index.get("requires_aesthetics_score"))
        if self._is_scored:
            self.negative_conditioning = {"aesthetic_score": _NEGATIVE_AESTHETIC_SCORE}
        zeros = files.index.get("force_zeros_for_empty_prompt")
        self._empty = self.tokenize([""]) if zeros else None

    def encode_prompt(self, params: dict, tokens: Int[Array, "b n"]) -> dict[str, Array]:
        """What `denoise` is conditioned on.

        The base model was trained with zeros for an empty prompt, so that is what it gets
        (`force_zeros_for_empty_prompt` in model_index.json).

        Returns:
            {"encoder_hidden_states": [b, n, d], "text_embeds": [b, p]}, and for the refiner
            "aesthetic_score" [b].
        """
        encoders, states = self._encoders(self._files), []
        for name, ids in zip(encoders, jnp.split(tokens, len(encoders), axis=-1), strict=True):
            output = self._run(name, params, ids)
            states.append(output.penultimate_hidden_state)
        hidden, pooled = jnp.concatenate(states, axis=-1), output.text_embeds
        if self._empty is not None:
            given = jnp.any(tokens != self._empty, axis=-1)
            hidden = jnp.where(given[:, None, None], hidden, 0)
            pooled = jnp.where(given[:, None], pooled, 0)
        conditioning = {"encoder_hidden_states": hidden, "text_embeds": pooled}
        if self._is_scored:
            conditioning["aesthetic_score"] = jnp.full(len(tokens), _AESTHETIC_SCORE)
        return conditioning

    def denoise(
        self,
        params: dict,
        latents: Float[Array, "b h w c"],
        timesteps: Array,
        conditioning: dict[str, Array],
    ) -> Float[Array, "b h w c"]:
        """As in StableDiffusion, for an uncropped image of the latents' own size."""
        size = [side * self._vae.downscale for side in latents.shape[1:3]]
        time_ids = jnp.asarray([*size, 0, 0] + ([] if self._is_scored else size), jnp.float32)
        time_ids = jnp.broadcast_to(time_ids, (len(latents), time_ids.shape[0]))
        if self._is_scored:
            score = conditioning["aesthetic_score"].astype(jnp.float32)
            time_ids = jnp.concatenate([time_ids, score[:, None]], axis=1)
        hidden, pooled = conditioning["encoder_hidden_states"], conditioning["text_embeds"]
        prediction = self._run("unet", params, latents, timesteps, hidden, pooled, time_ids)
        return prediction.astype(jnp.float32)


Backbone = StableDiffusionXL
