"""Models of real size with random weights, and what their folders say."""

import contextlib
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from agfsync_jax.utils import modules
from agfsync_jax.utils.clock import Stage
from agfsync_jax.weights import skeletons
from agfsync_jax.weights.networks import abstract_model, checkpoint_table, read_json
from agfsync_jax.weights.tensor_files import FLOATING, Tensor, write_tensors


def check(config: Any) -> None:
    """Raises ValueError for an unknown model or dtype."""
    spec = config.bench
    for key in ("file_dtype", "param_dtype", "dtype"):
        if spec[key] not in (*FLOATING, *([""] if key == "dtype" else [])):
            raise ValueError(
                f"config.bench.{key}={spec[key]}: expected one of {', '.join(FLOATING)}"
            )
    if spec.model not in skeletons.KINDS:
        raise ValueError(
            f"config.bench.model={spec.model}: expected one of {', '.join(skeletons.KINDS)}"
        )


@contextlib.contextmanager
def random_weights(config: Any, home: Path, clock: Stage) -> Iterator[tuple[Path, int]]:
    """The folder of `config.bench.model` with random weights, which is removed afterwards, and the
    bytes of its tensors."""
    spec = config.bench
    folder = home / spec.model
    try:
        size = write_random(
            spec.model, folder, spec.file_dtype, seed=config.seed, unet_width=spec.unet_width
        )
        clock.print(f"{spec.model}: {size / 1e9:.2f} GB of {spec.file_dtype} in files")
        yield folder, size
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_random(kind: str, folder: Path, dtype: str, *, seed: int, unet_width: float = 1.0) -> int:
    """Writes a diffusers folder of a released model's shapes, one random tensor at a time.

    Args:
        unet_width: the share of the UNet's channels that are left.

    Returns:
        The size of its tensors in bytes.
    """
    skeletons.write_skeleton(kind, folder)
    if unet_width != 1:
        _narrow(folder / "unet/config.json", unet_width)
    index = read_json(folder / "model_index.json")
    backbone = backbone_class(folder)
    rng, size = np.random.default_rng(seed), 0
    for name, network in backbone.networks.items():
        if not isinstance(index.get(name), list) or index[name][0] is None:
            continue
        config = network.config_class.from_dict(read_json(folder / name / "config.json"))
        tensors = {}
        for key, (_, _, shape) in checkpoint_table(abstract_model(network, config)[1]).items():

            def fetch(_, shape=shape):
                return (rng.standard_normal(shape, np.float32) * 0.02).astype(jnp.dtype(dtype))

            tensors[key] = Tensor(key, shape, jnp.dtype(dtype), fetch)
        stem = "model" if name.startswith("text_encoder") else "diffusion_pytorch_model"
        write_tensors(folder / name / f"{stem}.safetensors", tensors)
        size += sum(tensor.nbytes for tensor in tensors.values())
    return size


def _narrow(path: Path, share: float) -> None:
    """Takes a share of a UNet's channels, and groups and heads that still divide them."""
    config = read_json(path)
    widths = [round(width * share) for width in config["block_out_channels"]]
    heads = config["attention_head_dim"]
    for level, width in enumerate(widths):
        count = heads if isinstance(heads, int) else heads[level]
        if width < 1 or width % count:
            raise ValueError(
                f"config.bench.unet_width={share} leaves {width} channels, which {count} heads do"
                " not divide: try 0.5 or 0.25."
            )
    groups = math.gcd(32, *widths)
    path.write_text(
        json.dumps(config | {"block_out_channels": widths, "norm_num_groups": groups}, indent=2)
    )


def trained_size(folder: Path) -> int:
    """Pixels a side of the images that the model was trained on."""
    levels = len(read_json(folder / "vae/config.json")["block_out_channels"])
    return read_json(folder / "unet/config.json")["sample_size"] * 2 ** (levels - 1)


def backbone_class(folder: Path) -> Any:
    """The backbone that reads this pipeline."""
    kind = read_json(folder / "model_index.json")["_class_name"]
    found = (modules.load("backbones", name).Backbone for name in modules.names("backbones"))
    return next(backbone for backbone in found if kind in backbone.pipelines)


def abstract_backbone(folder: Path, **settings: Any) -> Any:
    """A backbone whose parameters are shapes alone."""
    cls = backbone_class(folder)
    files, fitted = cls.inspect(folder)
    graphs = {name: each.graph for name, each in fitted.items()}
    params = {name: each.abstract for name, each in fitted.items()}
    return cls(files, graphs, params, **settings)
