"""SavedModels that tests make give the numbers that they compute; others are refused at once."""

import numpy as np
import pytest

from agfsync_jax.data.images import encode_pngs
from agfsync_jax.parallel.mesh import create_mesh
from agfsync_jax.scorers import vila
from agfsync_jax.weights.saved_models import load_image_model

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 6, 7, 3)).astype(np.uint8)
# what the models below compute of an image: the mean of red less that of blue
EXPECTED = (IMAGES[..., 0] / 255 - IMAGES[..., 2] / 255).mean((1, 2)).astype(np.float32)


def write(
    folder,
    *,
    shape=(),
    dtype=None,
    output="predictions",
    signature="serving_default",
    repeats=1,
):
    """Saves a model of one input that returns [images, repeats]; VILA's returns [1, 1]."""
    import tensorflow as tf

    class Model(tf.Module):
        def __init__(self):
            super().__init__()
            self.weights = tf.Variable([1.0, 0.0, -1.0])

        @tf.function(input_signature=[tf.TensorSpec(shape, dtype or tf.string, "image_bytes")])
        def __call__(self, data):
            if dtype:
                return {output: data}
            return {output: tf.map_fn(self.score, tf.reshape(data, [-1]), tf.float32)}

        def score(self, data):
            pixels = tf.cast(tf.io.decode_image(data, 3, expand_animations=False), tf.float32)
            score = tf.reduce_sum(tf.reduce_mean(pixels / 255, (0, 1)) * self.weights)
            return tf.repeat(score, repeats)

    model = Model()
    tf.saved_model.save(model, str(folder), signatures={signature: model.__call__})
    return str(folder)


@pytest.mark.parametrize("shape", [(), [None], None], ids=["one", "batch", "unknown"])
def test_values(tmp_path, shape):
    run = load_image_model(write(tmp_path, shape=shape))
    values = run(encode_pngs(IMAGES))
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, EXPECTED, atol=1e-6)
    assert EXPECTED.std() > 0.01
    assert run([]).shape == (0,)


def test_the_vila_scorer_on_one(tmp_path):
    scorer = vila.Scorer(create_mesh({"data": -1}), path=write(tmp_path), batch_size=2)
    columns = scorer(IMAGES, [""] * 5, [[]] * 5)
    assert columns.keys() == {"vila"} and not scorer.asks_questions
    np.testing.assert_allclose(columns["vila"], 100 * EXPECTED, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output": "logits"}, r"returns logits: float32 .*'predictions' among the outputs"),
        ({"dtype": "float32"}, r"takes image_bytes: float32 \(\) .*expected one input, string"),
        ({"shape": [4]}, r"takes image_bytes: string \(4,\) .*expected one input, string"),
        ({"signature": "other"}, r"no signature 'serving_default', only \['other'\]"),
    ],
    ids=["output", "dtype", "shape", "signature"],
)
def test_another_signature(tmp_path, changes, message):
    folder = write(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        load_image_model(folder)


@pytest.mark.parametrize(("shape", "images"), [((), 1), ([None], 5)], ids=["one", "batch"])
def test_more_than_one_number_an_image(tmp_path, shape, images):
    run = load_image_model(write(tmp_path, shape=shape, repeats=10))
    with pytest.raises(ValueError, match=rf"shape \[{images}, 10\] for {images} images"):
        run(encode_pngs(IMAGES))


def test_no_saved_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No TensorFlow SavedModel in .*saved_model.pb"):
        load_image_model(str(tmp_path))
