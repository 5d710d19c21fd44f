"""PickScore (Kirstain et al. 2023): a CLIP ViT-H/14 tuned on what people picked.

The score is exp(logit_scale) times the cosine of image and prompt, about 20 to 23; the softmax of
two images' scores is the probability that the first is picked.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, UInt8

from agfsync_jax import scorers
from agfsync_jax.data.columns import Column
from agfsync_jax.scorers._shared import shared
from agfsync_jax.scorers.clip import ClipEncoder


class Scorer(scorers.Scorer):
    """Column pickscore, float32 [b]. See `ClipEncoder` for the arguments."""

    columns = {
        "pickscore": Column(
            "how likely people would pick the image for its prompt, by PickScore", ".2f"
        )
    }

    def __init__(
        self,
        mesh: Mesh,
        *,
        path: str = "yuvalkirstain/PickScore_v1",
        architecture: str = "",
        batch_size: int = 64,
        dtype: str = "float32",
    ):
        self._encoder = shared(
            ClipEncoder,
            mesh,
            path=path,
            batch_size=batch_size,
            dtype=dtype,
            architecture=architecture,
        )

    def __call__(
        self, images: UInt8[np.ndarray, "b h w 3"], prompts: Sequence[str], questions: Any
    ) -> dict[str, Float[np.ndarray, " b"]]:
        scores = self._encoder.logit_scale * self._encoder.cosines(images, prompts)
        return {"pickscore": scores.astype(np.float32)}
