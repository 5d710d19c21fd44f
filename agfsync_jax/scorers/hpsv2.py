"""Human Preference Score v2 and v2.1 (Wu et al. 2023): a CLIP ViT-H/14 tuned on rankings by people.

The score is the plain cosine of image and prompt, as `hpsv2.score` returns it; the benchmark's
tables multiply it by 100. An image's longer edge is resized to 224 and the rest is black.
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
    """Column hpsv2, float32 [b] in -1..1.

    Args:
        mesh: see `ClipEncoder`.
        path: HPS_v2_compressed.pt or HPS_v2.1_compressed.pt (which need torch to be read), or the
            same weights in another file or folder that weights/clip_files.py knows.
        architecture: of a file.
        antialias: as torchvision resizes since 0.17. False is what it did when the tables of the
            paper were made.
        batch_size: images at a time.
        dtype: of the computation.

    Raises:
        FileNotFoundError, ValueError: no such weights.
    """

    columns = {
        "hpsv2": Column("how well people would like the image for its prompt, by HPSv2", ".4f")
    }

    def __init__(
        self,
        mesh: Mesh,
        *,
        path: str,
        architecture: str = "ViT-H-14",
        antialias: bool = True,
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
            pad=True,
            antialias=antialias,
        )

    def __call__(
        self, images: UInt8[np.ndarray, "b h w 3"], prompts: Sequence[str], questions: Any
    ) -> dict[str, Float[np.ndarray, " b"]]:
        return {"hpsv2": self._encoder.cosines(images, prompts)}
