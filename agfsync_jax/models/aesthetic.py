"""The LAION aesthetic predictor: a CLIP image embedding in, one number out.

Five linear layers with no activation between them, so the whole is one affine map.
Source: christophschuhmann/improved-aesthetic-predictor, whose weights
sac+logos+ava1-l14-linearMSE take the 768 numbers of CLIP ViT-L/14.
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from agfsync_jax.models.layers import Linear, ModelConfig


@dataclasses.dataclass(frozen=True)
class AestheticConfig(ModelConfig):
    input_size: int = 768  # of the CLIP image embedding


class AestheticPredictor(nnx.Module):
    """Score of an embedding of length one; on real photographs it lies between about 1 and 10."""

    config_class = AestheticConfig

    def __init__(self, config: AestheticConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        def dense(size_in: int, size_out: int) -> nnx.Linear:
            return Linear(size_in, size_out, rngs=rngs, dtype=dtype)

        # Nothing is dropped here: dropout keeps its place in the checkpoint's numbering.
        dropout = functools.partial(nnx.Dropout, 0.0, deterministic=True)
        self.layers = nnx.List(
            [
                dense(config.input_size, 1024),
                dropout(),
                dense(1024, 128),
                dropout(),
                dense(128, 64),
                dropout(),
                dense(64, 16),
                dense(16, 1),
            ]
        )

    def __call__(self, x: Float[Array, "b c"]) -> Float[Array, " b"]:
        for layer in self.layers:
            x = layer(x)
        return x[:, 0]  # [b, 1] -> [b]
