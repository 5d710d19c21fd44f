"""The VILA score of images: each goes through PNG unharmed, in batches, times 100.

A SavedModel in place of the function below is in tests/weights/saved_models_test.py.
"""

import numpy as np

from agfsync_jax.data.images import decode_png
from agfsync_jax.parallel.mesh import create_mesh
from agfsync_jax.scorers import vila


def test_images_go_in_as_png(monkeypatch):
    asked, batches = [], []

    def load(path):
        asked.append(path)
        return predict

    def predict(images):
        batches.append(len(images))
        return np.array([decode_png(image)[1, 2, 0] / 255 for image in images], np.float32)

    monkeypatch.setattr(vila, "load_image_model", load)
    scorer = vila.Scorer(create_mesh({"data": -1}), path="somewhere", batch_size=4)
    images = np.random.default_rng(0).integers(0, 256, (6, 5, 8, 3)).astype(np.uint8)
    scores = scorer(images, [""] * 6, [[]] * 6)["vila"]
    assert asked == ["somewhere"] and batches == [4, 2]
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, images[:, 1, 2, 0] / 2.55, rtol=1e-6)
