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
from agfsync_jax.weights.pipeline_files import PipelineFiles
from agfsync_jax.weights.tensor_files import FLOATING, Tensor, write_tensors


def check(config: Any) -> None:
    """Raises ValueError for an unknown model or dtype."""
    spec = config.bench
    known = dict.fromkeys(("file_dtype", "param_dtype", "dtype"), FLOATING)
    for key, values in (known | {"model": skeletons.KINDS}).items():
        if spec[key] not in values and (key, spec[key]) != ("dtype", ""):
            raise ValueError(f"config.bench.{key}={spec[key]}: expected one of {', '.join(values)}")


@contextlib.contextmanager
def random_weights(config: Any, home: Path, clock: Stage) -> Iterator[tuple[Path, int]]:
    """The folder of `config.bench.model` with random weights, which is removed afterwards, and the
    bytes of its tensors."""
    spec = config.bench
    folder = home / spec.model
    try:
        skeletons.write_skeleton(spec.model, folder)
        if spec.unet_width != 1:
            _narrow(folder / "unet/config.json", spec.unet_width)
        size = _write_random(folder, spec.file_dtype, config.seed)
        clock.print(f"{spec.model}: {size / 1e9:.2f} GB of {spec.file_dtype} in files")
        yield folder, size
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_random(folder: Path, dtype: str, seed: int) -> int:
    """Writes the weights of a folder that has none, one random tensor at a time; their bytes."""
    files, networks = PipelineFiles(folder), backbone_class(folder).networks
    rng, size = np.random.default_rng(seed), 0
    for name in filter(files.has, networks):
        network = networks[name]
        config = network.config_class.from_dict(files.config(name))
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
    heads = np.broadcast_to(config["attention_head_dim"], len(widths))  # one number, or one a level
    for width, count in zip(widths, heads, strict=True):
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
    files = cls.open(folder)
    fitted = cls.inspect(files)
    graphs = {name: each.graph for name, each in fitted.items()}
    params = {name: each.abstract for name, each in fitted.items()}
    return cls(files, graphs, params, **settings)
