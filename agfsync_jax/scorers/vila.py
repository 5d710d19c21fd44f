"""VILA score: how beautiful people found an image, from what they wrote about such ones.

VILA-R (Ke et al. 2023, arXiv 2303.14302), the aesthetic score of AGFSync: 100 times the model's
number in 0..1. Google publishes it as a TensorFlow SavedModel: google/vila/tensorFlow2/image on
Kaggle Models, once https://tfhub.dev/google/vila/image/1 on TensorFlow Hub.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, UInt8

from agfsync_jax import scorers
from agfsync_jax.data.columns import Column
from agfsync_jax.data.images import encode_pngs
from agfsync_jax.weights.saved_models import load_image_model


class Scorer(scorers.Scorer):
    """Column vila, float32 [b] in 0..100.

    It runs in TensorFlow on the host's CPU, whatever the mesh, and so is the slowest of the
    scorers; `aesthetic` is the one that runs on the device.

    Args:
        mesh: not used.
        path: the folder of the SavedModel, with saved_model.pb.
        batch_size: images that are encoded at a time, and read at a time if the model can.

    Raises:
        FileNotFoundError, ValueError: no SavedModel there, or one of another signature.
    """

    reads_prompt = False
    columns = {"vila": Column("how beautiful people would find the image, by VILA, of 100", ".2f")}

    def __init__(self, mesh: Mesh, *, path: str, batch_size: int = 64):
        self._predict = load_image_model(path)
        self._batch_size = batch_size

    def __call__(
        self, images: UInt8[np.ndarray, "b h w 3"], prompts: Sequence[str], questions: Any
    ) -> dict[str, Float[np.ndarray, " b"]]:
        """Scores images of any one size."""
        made = np.empty(len(images), np.float32)
        for start in range(0, len(images), self._batch_size):
            part = slice(start, start + self._batch_size)
            made[part] = self._predict(encode_pngs(images[part]))
        return {"vila": 100 * made}
