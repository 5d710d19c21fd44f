"""Loading: from a model's files to its parameters on the device, of real size and random.

Every load is in a fresh process; the files are read before, so that all find them cached.
"""

import contextlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from agfsync_jax.benches import Measured, Task, joined
from agfsync_jax.benches._peers import Diffusers
from agfsync_jax.benches._processes import HostMemory, Process, processor_name
from agfsync_jax.parallel.mesh import create_mesh
from agfsync_jax.utils import modules
from agfsync_jax.utils.clock import Stage
from agfsync_jax.weights import skeletons
from agfsync_jax.weights.networks import abstract_model, checkpoint_table, read_json
from agfsync_jax.weights.tensor_files import FLOATING, Tensor, write_tensors

PEERS = {"diffusers": Diffusers}
LIBRARIES = ("torch", "diffusers")
UNIT = "loads"


def check(config: Any, against: str | None, platform: str) -> None:
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


def measure(config: Any, home: Path, against: str | None, clock: Stage) -> Measured:
    """Loads in turn, each time in a fresh process."""
    spec = config.bench
    sides = {"agfsync": Agfsync} | ({against: PEERS[against]} if against else {})
    rows, about = [], {}
    with random_weights(config, home, clock) as (folder, size):
        held = size * jnp.dtype(spec.param_dtype).itemsize // jnp.dtype(spec.file_dtype).itemsize
        for _ in range(spec.repeats):
            for side, make in sides.items():
                _warm(folder, held)
                with Process(make, side) as process:
                    row = {"by": side, **process.ask("load", folder, spec.param_dtype)}
                    about[side] = process.ask("about")
                rows.append(row)
                held = row["held_bytes"]
                clock.print(
                    f"{side}: {row['seconds']:.1f} s, peak {row['peak_bytes'] / 1e9:.2f} GB of host"
                    f" memory, {row['peak_bytes'] / held:.2f} of the {held / 1e9:.2f} GB held"
                )
    return Measured([Task("", "loads", 1, 0, rows)], joined(about), spec.to_dict(), spec.model)


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


class Agfsync:
    """This package on one device. Made where it is measured, as its peer is."""

    def __init__(self):
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # leaves the peer its part of a GPU
        jax.config.update("jax_enable_compilation_cache", False)  # its time is a figure
        from transformers import CLIPTokenizer  # noqa: F401 - imports are not measured

        self.device = jax.local_devices()[0]
        jax.device_put(0.0).block_until_ready()

    def load(self, folder: Path, dtype: str) -> dict[str, float]:
        cls = modules.load("backbones", backbone_of(folder)).Backbone
        self.memory = HostMemory()
        start = time.perf_counter()
        mesh = create_mesh(devices=[self.device])
        self.backbone = cls.load(folder, dtype=dtype, param_dtype=dtype, mesh=mesh)
        jax.block_until_ready(self.backbone.params)
        seconds = time.perf_counter() - start
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(self.backbone.params))
        return {"seconds": seconds, "held_bytes": held, "peak_bytes": self.memory.peak()}

    def about(self) -> dict[str, Any]:
        cpu = self.device.platform == "cpu"
        return {
            "device": processor_name() if cpu else self.device.device_kind,
            "versions": {name: version(name) for name in ("jax", "flax")},
        }


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
    backbone = modules.load("backbones", backbone_of(folder)).Backbone
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


def trained_size(folder: Path) -> int:
    """Pixels a side of the images that the model was trained on."""
    levels = len(read_json(folder / "vae/config.json")["block_out_channels"])
    return read_json(folder / "unet/config.json")["sample_size"] * 2 ** (levels - 1)


def backbone_of(folder: Path) -> str:
    """The file of backbones/ that reads this pipeline."""
    kind = read_json(folder / "model_index.json")["_class_name"]
    rooms = {name: modules.load("backbones", name).Backbone for name in modules.names("backbones")}
    return next(name for name, backbone in rooms.items() if kind in backbone.pipelines)


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


def _warm(folder: Path, held: int) -> None:
    """Makes the start alike for whoever comes next: files in the page cache, memory touched.

    A virtual machine may have given memory back to its host, and taking it again is slow.
    """
    buffer = bytearray(2**24)
    for path in folder.rglob("*.safetensors"):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    np.ones(held, np.uint8)
