"""PickScore (Kirstain et al. 2023): a CLIP ViT-H/14 tuned on what people picked.

The score is exp(logit_scale) times the cosine of image and prompt, about 20 to 23; the softmax of
two images' scores is the probability that the first is picked.
"""

from typing import Any

from jax.sharding import Mesh

from agfsync_jax.data.columns import Column
from agfsync_jax.scorers import clip


class Scorer(clip.Scorer):
    """Column pickscore, float32 [b]. See `ClipEncoder` for the settings."""

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
        batch_size: int = 64,
        **settings: Any,
    ):
        super().__init__(mesh, path=path, batch_size=batch_size, **settings)
        self.scale = self._encoder.logit_scale
