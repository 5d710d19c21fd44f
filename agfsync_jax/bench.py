"""Bench: time and memory of loading real-size models on this machine, beside diffusers.

Writes random weights of the released models' sizes to the workdir, loads each in a process of its
own, and prints seconds and peak host memory; `--config.bench.against=diffusers` does the same with
`from_pretrained` in turn. Files are read once before, so that both find them in the page cache.
Results are kept in bench/load.json; the weights are removed.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from agfsync_jax.data import records, skeletons
from agfsync_jax.parallel import multihost
from agfsync_jax.utils import modules
from agfsync_jax.utils.clock import Stage
from agfsync_jax.utils.tensor_files import FLOATING, Tensor, write_tensors
from agfsync_jax.utils.weights import abstract_model, checkpoint_table, read_json

_DTYPE_KEYS = ("file_dtype", "param_dtype")

# What the process that is measured runs. Peak memory is counted from when the imports are done; the
# kernel's mark is reset there.
_MEASURE = """
import json, sys, time
folder, dtype, backbone = sys.argv[1:]
def memory(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))
{imports}
before = memory("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
start = time.perf_counter()
{load}
seconds = time.perf_counter() - start
peak = memory("VmHWM") - before
print(json.dumps(dict(seconds=seconds, peak=peak, held=held)))
"""
_LOADERS = {
    "agfsync": {
        "imports": (
            "from agfsync_jax.utils.memory import keep_freed_memory\n"
            "keep_freed_memory()\n"  # as the command line does
            "import jax, jax.numpy as jnp\n"
            "from transformers import CLIPTokenizer\n"
            "from agfsync_jax.utils import modules\n"
            "Backbone = modules.load('backbones', backbone).Backbone\n"
            "jax.device_put(0.0).block_until_ready()"
        ),
        "load": (
            "loaded = Backbone.load(folder, param_dtype=dtype)\n"
            "held = sum(leaf.nbytes for leaf in jax.tree.leaves(loaded.params))"
        ),
    },
    "diffusers": {
        "imports": (
            "import torch, transformers, diffusers\n"
            "from diffusers import DiffusionPipeline\n"
            "from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer\n"
            "from diffusers import UNet2DConditionModel, AutoencoderKL\n"
            "from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline\n"
            "diffusers.utils.logging.disable_progress_bar()\n"
            "transformers.utils.logging.disable_progress_bar()\n"
            "torch.ones(1).sum()"
        ),
        # A mapped file is in memory once its pages are touched, as the first image would.
        "load": (
            "kind = getattr(torch, dtype)\n"
            "loaded = DiffusionPipeline.from_pretrained(folder, dtype=kind)\n"
            "modules = [m for m in loaded.components.values() if isinstance(m, torch.nn.Module)]\n"
            "values = [p.detach() for m in modules for p in m.parameters()]\n"
            "touched = sum(float(v.view(-1)[:: 4096 // v.element_size()].sum()) for v in values)\n"
            "held = sum(v.numel() * v.element_size() for v in values)"
        ),
    },
}


def main(config: Any, workdir: Path, *, round_index: int = 0, repair: bool = False) -> None:
    """Measures `config.bench.models` and writes bench/load.json.

    Raises:
        ValueError: an unknown model, dtype or peer; or not Linux, whose /proc tells the memory.
        OSError: no space left for the weights.
    """
    spec = config.bench
    if not Path("/proc/self/clear_refs").exists():
        raise ValueError("agfsync bench reads peak memory from /proc: it runs on Linux")
    for key in _DTYPE_KEYS:
        if spec[key] not in FLOATING:
            raise ValueError(
                f"config.bench.{key}={spec[key]}: expected one of {', '.join(FLOATING)}"
            )
    if unknown := set(spec.models) - set(skeletons.KINDS):
        raise ValueError(
            f"config.bench.models has {sorted(unknown)}; known: {', '.join(skeletons.KINDS)}"
        )
    if spec.against not in ("", *_LOADERS):
        raise ValueError(f"config.bench.against={spec.against}: expected diffusers, or nothing")
    if not multihost.is_main():
        return
    sides = ["agfsync", *([spec.against] if spec.against else [])]
    bench = Path(workdir) / "bench"
    results = []
    with Stage(bench, "bench", unit="loads") as stage:
        for model in spec.models:
            folder = bench / model
            try:
                size = write_random(model, folder, spec.file_dtype, seed=config.seed)
                itemsize = [jnp.dtype(spec[key]).itemsize for key in _DTYPE_KEYS]
                held = size * itemsize[1] // itemsize[0]
                stage.print(f"{model}: {size / 1e9:.2f} GB of {spec.file_dtype} in files")
                for _ in range(spec.repeats):
                    for side in sides:
                        _warm(folder, held)
                        figures = _measure(side, folder, spec.param_dtype)
                        results.append({"model": model, "by": side, "files": size, **figures})
                        stage.print(_told(results[-1]))
            finally:
                shutil.rmtree(folder, ignore_errors=True)
        setting = {"file_dtype": spec.file_dtype, "param_dtype": spec.param_dtype}
        text = json.dumps({"settings": setting, "loads": results}, indent=2)
        records.write_file(bench / "load.json", [text.encode(), b"\n"])
    print(table(results))


def table(results: list[dict]) -> str:
    """Markdown: the best seconds and the largest peak of each model and loader."""
    lines = ["| model | by | seconds | peak GB | of what is held |", "|---|---|---|---|---|"]
    for model, side in dict.fromkeys((row["model"], row["by"]) for row in results):
        rows = [row for row in results if (row["model"], row["by"]) == (model, side)]
        peak = max(row["peak"] for row in rows)
        seconds = min(row["seconds"] for row in rows)
        share = peak / rows[0]["held"]
        lines.append(f"| {model} | {side} | {seconds:.1f} | {peak / 1e9:.2f} | {share:.2f} |")
    return "\n".join(lines)


def write_random(kind: str, folder: Path, dtype: str, *, seed: int) -> int:
    """Writes a diffusers folder of a released model's shapes, one random tensor at a time.

    Returns:
        The size of its tensors in bytes.
    """
    skeletons.write_skeleton(kind, folder)
    index = read_json(folder / "model_index.json")
    backbone = modules.load("backbones", _backbone_of(folder)).Backbone
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


def _backbone_of(folder: Path) -> str:
    """The file of backbones/ that reads this pipeline."""
    kind = read_json(folder / "model_index.json")["_class_name"]
    rooms = {name: modules.load("backbones", name).Backbone for name in modules.names("backbones")}
    return next(name for name, backbone in rooms.items() if kind in backbone.pipelines)


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


def _measure(side: str, folder: Path, dtype: str) -> dict[str, float]:
    """Seconds, peak and held bytes of one load in a fresh process."""
    program = _MEASURE.format(**_LOADERS[side])
    command = [sys.executable, "-c", program, str(folder), dtype, _backbone_of(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{side} could not load {folder}:\n{done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _told(row: dict) -> str:
    return (
        f"{row['model']} by {row['by']}: {row['seconds']:.1f} s, peak {row['peak'] / 1e9:.2f} GB, "
        f"{row['peak'] / row['held']:.2f} of the {row['held'] / 1e9:.2f} GB held"
    )
