"""TensorFlow SavedModels that read encoded images, run on the host's CPU."""

import os
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

_SIGNATURE, _OUTPUT = "serving_default", "predictions"


def load_image_model(path: str) -> Callable[[Sequence[bytes]], Float[np.ndarray, " n"]]:
    """A SavedModel as a function from encoded images (PNG, JPEG) to one number each.

    Its signature "serving_default" takes one tensor of strings, of shape [] (one image a call) or
    [None] (a batch), and returns "predictions", one number an image.

    Args:
        path: a folder with saved_model.pb, local or a URL that TensorFlow reads (gs://).

    Raises:
        FileNotFoundError: the folder holds no SavedModel.
        ValueError: another signature. The function raises it for other than one number an image.
    """
    import tensorflow as tf

    path = os.path.expanduser(path)
    if not tf.saved_model.contains_saved_model(path):
        raise FileNotFoundError(
            f"No TensorFlow SavedModel in {path}: expected saved_model.pb there. Give the folder"
            " that the downloaded archive unpacks to."
        )
    tf.config.set_visible_devices([], "GPU")  # TensorFlow would take all of a GPU's memory
    model = tf.saved_model.load(path)
    if _SIGNATURE not in model.signatures:
        raise ValueError(
            f"{path} has no signature {_SIGNATURE!r}, only {sorted(model.signatures) or 'none'}:"
            " export it with one."
        )
    predict = model.signatures[_SIGNATURE]
    inputs, outputs = predict.structured_input_signature[1], predict.structured_outputs
    shapes = [spec.shape for spec in inputs.values() if spec.dtype == tf.string]
    # a shape that is not known takes one image too
    rank = shapes[0].rank or 0 if len(shapes) == len(inputs) == 1 else None
    takes_any = rank == 0 or rank == 1 and shapes[0][0] is None
    if not takes_any or _OUTPUT not in outputs:
        raise ValueError(
            f"the signature {_SIGNATURE!r} of {path} takes {_describe(inputs)} and returns"
            f" {_describe(outputs)}: expected one input, string [] or [None] (encoded images), and"
            f" {_OUTPUT!r} among the outputs."
        )
    (name,) = inputs

    def call(images: bytes | list[bytes], count: int) -> np.ndarray:
        values = predict(**{name: tf.constant(images, tf.string)})[_OUTPUT].numpy()
        if values.size != count:
            raise ValueError(
                f"{path} returned {_OUTPUT} of shape {list(values.shape)} for {count} images:"
                " expected one number an image."
            )
        return values.reshape(count).astype(np.float32)

    def run(images: Sequence[bytes]) -> Float[np.ndarray, " n"]:
        if not len(images):
            return np.zeros(0, np.float32)
        if rank == 1:
            return call(list(images), len(images))
        return np.concatenate([call(image, 1) for image in images])

    run.model = model  # its variables live as long as the model does
    return run


def _describe(tensors: dict) -> str:
    """Names, dtypes and shapes of a signature's side."""
    described = (f"{name}: {t.dtype.name} {t.shape}" for name, t in tensors.items())
    return ", ".join(described) or "nothing"
