"""The LAION aesthetic predictor: a CLIP image embedding in, one number out.

Five linear layers with no activation between them, so the whole is one affine map.
Source: christophschuhmann/improved-aesthetic-predictor, whose weights
sac+logos+ava1-l14-linearMSE take the 768 numbers of CLIP ViT-L/14.
"""

import dataclasses
import itertools

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from agfsync_jax.models.layers import Linear, ModelConfig


@dataclasses.dataclass(frozen=True)
class AestheticConfig(ModelConfig):
    """The only size of the LAION aesthetic predictor that is not fixed."""

    input_size: int = 768  # of the CLIP image embedding


class AestheticPredictor(nnx.Module):
    """Score of an embedding of length one; on real photographs it lies between about 1 and 10."""

    config_class = AestheticConfig

    def __init__(self, config: AestheticConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        sizes = [config.input_size, 1024, 128, 64, 16, 1]
        dense = [Linear(*pair, dtype=dtype, rngs=rngs) for pair in itertools.pairwise(sizes)]
        # Nothing is dropped here: dropout keeps its place in the checkpoint's numbering.
        dropout = [nnx.Dropout(0.0, deterministic=True) for _ in range(3)]
        first = [dense[0], dropout[0], dense[1], dropout[1], dense[2], dropout[2]]
        self.layers = nnx.List([*first, *dense[3:]])

    def __call__(self, x: Float[Array, "b c"]) -> Float[Array, " b"]:
        for layer in self.layers:
            x = layer(x)
        return x[:, 0]  # [b, 1] -> [b]
