"""Human Preference Score v2 and v2.1 (Wu et al. 2023): a CLIP ViT-H/14 tuned on rankings by people.

The score is the plain cosine of image and prompt, as `hpsv2.score` returns it; the benchmark's
tables multiply it by 100. An image's longer edge is resized to 224 and the rest is black.
"""

from typing import Any

from jax.sharding import Mesh

from agfsync_jax.data.columns import Column
from agfsync_jax.scorers import clip


class Scorer(clip.Scorer):
    """Column hpsv2, float32 [b] in -1..1.

    Args:
        path: HPS_v2_compressed.pt or HPS_v2.1_compressed.pt, or the same weights in another file
            or folder that weights/clip_files.py knows.
        architecture: of a file.
        antialias: as torchvision resizes since 0.17. False is what it did when the tables of the
            paper were made.
        mesh, batch_size, dtype: see `ClipEncoder`.

    Raises:
        FileNotFoundError, ValueError: no such weights.
    """

    columns = {
        "hpsv2": Column("how well people would like the image for its prompt, by HPSv2", ".4f")
    }
    scale = 1.0

    def __init__(
        self, mesh: Mesh, *, architecture: str = "ViT-H-14", batch_size: int = 64, **settings: Any
    ):
        super().__init__(
            mesh, architecture=architecture, pad=True, batch_size=batch_size, **settings
        )
