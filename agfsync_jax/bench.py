"""Bench: throughput and memory on this machine, of real-size models and random weights.

--stage=load times loading the model's files. --stage=sample draws batches of images, each of other
prompts: images/s, seconds per step of the denoiser, model FLOP utilization, peak memory, seconds of
compiling. --against=diffusers measures its pipeline too, as fast as it is known to run: channels
last, torch's scaled_dot_product_attention, torch.compile on a GPU. Both sides have the same files,
steps, sampler, guidance and batch, one device, and a process each; they take turns.

The ratio is of speeds, ours to theirs, a pair of turns: above 1 is faster. A step is a call of the
denoiser with guidance. Utilization is of the device's bfloat16 peak (utils/flops.py), unknown for
CPUs. Peak memory counts from before loading: of the host for --stage=load and on CPUs, else of the
device. Compiling is what the first batch takes longer than the fastest one. Figures are kept in
bench/STAGE-MODEL.json of the workdir, if one is given; the weights are removed.
"""

import contextlib
import importlib.util
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from json import dumps
from pathlib import Path
from typing import Any

import jax
import jax.extend.backend
import jax.numpy as jnp
import numpy as np

from agfsync_jax.data import records, skeletons
from agfsync_jax.diffusion import samplers
from agfsync_jax.diffusion.denoising import guide
from agfsync_jax.diffusion.generation import Generator
from agfsync_jax.diffusion.trajectories import SAMPLERS
from agfsync_jax.parallel import multihost
from agfsync_jax.parallel.mesh import create_mesh
from agfsync_jax.utils import flops, modules
from agfsync_jax.utils.clock import Stage
from agfsync_jax.utils.memory import keep_freed_memory
from agfsync_jax.utils.peers import Diffusers
from agfsync_jax.utils.processes import HostMemory, Process, processor_name
from agfsync_jax.utils.tensor_files import FLOATING, Tensor, write_tensors
from agfsync_jax.utils.weights import abstract_model, checkpoint_table, read_json

_DRAWING = ("height", "width", "num_inference_steps", "guidance_scale", "batch_size", "sampler")


def main(
    config: Any,
    workdir: Path | None,
    *,
    round_index: int = 0,
    repair: bool = False,
    stage: str = "load",
    against: str | None = None,
    json: bool = False,
) -> None:
    """Measures `config.bench.model`, prints a table and, with `json`, one line of JSON.

    Raises:
        ValueError: settings that cannot be; a side that failed; not Linux, whose /proc tells the
            memory.
        OSError: no space left for the weights.
    """
    spec, platform = config.bench, jax.default_backend()
    _check(spec, stage, against, platform)
    if not multihost.is_main():
        return
    if platform != "cpu":  # the device goes to those that are measured
        jax.extend.backend.clear_backends()
        jax.config.update("jax_platforms", "cpu")
    settings = spec.to_dict() | {"dtype": spec.dtype or _default_dtype(platform)}
    sides = ["agfsync", *([against] if against else [])]
    with contextlib.ExitStack() as stack:
        home = workdir or stack.enter_context(tempfile.TemporaryDirectory(prefix="agfsync-"))
        bench = Path(home) / "bench"
        unit = {"load": "loads", "sample": "images"}[stage]
        clock = stack.enter_context(Stage(bench, "bench", unit=unit))
        folder = bench / spec.model
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        size = write_random(spec.model, folder, spec.file_dtype, seed=config.seed)
        clock.print(f"{spec.model}: {size / 1e9:.2f} GB of {spec.file_dtype} in files")
        measure = {"load": _load, "sample": _sample}[stage]
        rows, about, flop = measure(settings, folder, sides, clock)
        items = spec.batch_size if stage == "sample" else 1
        result = {
            "stage": stage,
            **_result(rows, sides, device=about["device"], items=items, flop=flop),
        }
        result |= about
        if workdir:
            kept = {"settings": settings, "turns": rows, "result": result}
            text = dumps(kept, indent=2) + "\n"
            records.write_file(bench / f"{stage}-{spec.model}.json", [text.encode()])
    print(table(result, against))
    if json:
        print(dumps(result))


def _check(spec: Any, stage: str, against: str | None, platform: str) -> None:
    if not Path("/proc/self/clear_refs").exists():
        raise ValueError("agfsync bench reads peak memory from /proc: it runs on Linux")
    for key in ("file_dtype", "param_dtype", "dtype"):
        if spec[key] not in (*FLOATING, *([""] if key == "dtype" else [])):
            raise ValueError(
                f"config.bench.{key}={spec[key]}: expected one of {', '.join(FLOATING)}"
            )
    if spec.model not in skeletons.KINDS:
        raise ValueError(
            f"config.bench.model={spec.model}: expected one of {', '.join(skeletons.KINDS)}"
        )
    if spec.repeats < 1:
        raise ValueError(f"config.bench.repeats={spec.repeats}: expected at least 1")
    if against not in (None, "diffusers"):
        raise ValueError(f"--against={against}: expected diffusers, or nothing")
    for library in ("torch", "diffusers") if against else ():
        if not importlib.util.find_spec(library):
            raise ValueError(
                f"--against=diffusers needs {library}: pip install 'agfsync_jax[torch]'"
            )
    if stage == "sample":
        samplers.find(spec.sampler)
        if against and platform not in ("cpu", "gpu"):
            raise ValueError(
                f"--against=diffusers draws on a CPU or a GPU, and JAX on a {platform}"
            )
        if jax.process_count() > 1:
            raise ValueError("agfsync bench --stage=sample measures one device: run one process")


def _default_dtype(platform: str) -> str:
    return "float32" if platform == "cpu" else "bfloat16"


Measured = tuple[list[dict], dict, int]  # a row a turn, device and versions, FLOP of a turn


def _load(settings: dict, folder: Path, sides: list[str], clock: Stage) -> Measured:
    """Every load in a fresh process; the files are read before, so that all find them cached."""
    rows, about, held = [], {}, 0
    for _ in range(settings["repeats"]):
        for side in sides:
            _warm(folder, held)
            with Process(_SIDES[side], side) as process:
                row = {"by": side, **process.ask("load", folder, settings["param_dtype"])}
                about[side] = process.ask("about")
            rows.append(row)
            held = row["held_bytes"]
            clock.print(
                f"{side}: {row['seconds']:.1f} s, peak {row['peak_bytes'] / 1e9:.2f} GB of host "
                f"memory, {row['peak_bytes'] / held:.2f} of the {held / 1e9:.2f} GB held"
            )
    return rows, _joined(about), 0


def _sample(settings: dict, folder: Path, sides: list[str], clock: Stage) -> Measured:
    """Each side stays alive, so that it compiles once, and waits while the other draws."""
    pipeline = read_json(folder / "model_index.json")["_class_name"]
    if "Img2Img" in pipeline:
        raise ValueError(
            f"config.bench.model={settings['model']} draws from images, not from texts"
        )
    drawing = {key: settings[key] for key in _DRAWING}
    batch = drawing["batch_size"]
    for key in ("height", "width"):
        drawing[key] = drawing[key] or _trained_size(folder)
    flop = _flop(folder, **drawing)  # raises for sizes and steps that cannot be
    clock.print(
        f"{drawing['height']}x{drawing['width']} pixels, {drawing['num_inference_steps']} steps, "
        f"guidance {drawing['guidance_scale']:g}, {settings['dtype']}: a batch of {batch} is "
        f"{flop / 1e12:.3g} TFLOP"
    )
    asked = {
        "agfsync": drawing,
        "diffusers": drawing | {"scheduler": SAMPLERS[drawing["sampler"]][0]},
    }
    rows, about, first = [], {}, {}
    with contextlib.ExitStack() as stack, clock.progress(settings["repeats"] * batch) as progress:
        processes = {side: stack.enter_context(Process(_SIDES[side], side)) for side in sides}
        for side, process in processes.items():
            process.ask("load", folder, settings["dtype"])
            first[side] = process.ask("prepare", _prompts(batch, 0), asked[side])
            about[side] = process.ask("about")
            clock.print(f"{side}: the first batch took {first[side]:.1f} s")
        for turn in range(1, 1 + settings["repeats"]):
            for side, process in processes.items():
                row = process.ask("draw", _prompts(batch, turn), turn)
                rows.append({"by": side, "first_seconds": first[side], **row})
                clock.print(
                    f"{side}: {batch} images in {row['seconds']:.2f} s, "
                    f"{row['step_seconds']:.3f} s a step"
                )
            progress.update(batch)
    return rows, _joined(about), flop


def _joined(about: dict[str, dict]) -> dict[str, Any]:
    """Our device, and what all sides are made of."""
    versions = {name: v for each in about.values() for name, v in each["versions"].items()}
    return {"device": about["agfsync"]["device"], "versions": versions}


def _prompts(batch: int, turn: int) -> list[str]:
    return [f"photograph {turn * batch + i} of an astronaut on a horse" for i in range(batch)]


def _trained_size(folder: Path) -> int:
    """Pixels a side of the images that the model was trained on."""
    levels = len(read_json(folder / "vae/config.json")["block_out_channels"])
    return read_json(folder / "unet/config.json")["sample_size"] * 2 ** (levels - 1)


def _flop(
    folder: Path,
    *,
    height: int,
    width: int,
    num_inference_steps: int,
    guidance_scale: float,
    batch_size: int,
    sampler: str,
) -> int:
    """What a batch takes: its texts and the empty one, the steps, the decoded images.

    Raises:
        ValueError: a size or a number of steps that the model cannot do.
    """
    cls = modules.load("backbones", _backbone_of(folder)).Backbone
    files, fitted = cls.inspect(folder)
    params = {name: each.abstract for name, each in fitted.items()}
    graphs = {name: each.graph for name, each in fitted.items()}
    backbone = cls(files, graphs, params, attention="plain")  # whose products are all counted
    num_calls = samplers.check(sampler, backbone.schedule, num_inference_steps)
    guided = guidance_scale != 1
    rows = batch_size * (2 if guided else 1)

    def abstract(rows, shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((rows, *shape), dtype)

    shape, length = backbone.latent_shape(height, width), backbone.tokenize([""]).shape[1:]
    given = jax.eval_shape(backbone.encode_prompt, params, abstract(rows, length, jnp.int32))
    texts = abstract(batch_size + guided, length, jnp.int32)
    step = (params, abstract(rows, shape), abstract(rows, (), jnp.int32), given)
    return (
        flops.count(backbone.encode_prompt, params, texts)
        + num_calls * flops.count(backbone.denoise, *step)
        + flops.count(backbone.decode_latents, params, abstract(batch_size, shape))
    )


def _result(rows: list[dict], sides: list[str], *, device: str, items: int, flop: int) -> dict:
    """Each side's median speed and largest peak, and the ratio of speeds a pair of turns."""
    turns = {side: [row for row in rows if row["by"] == side] for side in sides}
    peak = flops.peak(device)

    def figures(turns):
        def median(key):
            return statistics.median(row[key] for row in turns) if key in turns[0] else None

        seconds, first = median("seconds"), median("first_seconds")
        fastest = min(row["seconds"] for row in turns)
        return {
            "items_per_second": items / seconds,
            "seconds_per_step": median("step_seconds"),
            "mfu": flop / seconds / peak if flop and peak else None,
            "peak_bytes": max(row["peak_bytes"] for row in turns),
            "compile_seconds": None if first is None else max(first - fastest, 0.0),
        }

    ours, *peers = (figures(each) for each in turns.values())
    ratio = None
    if peers:
        pairs = zip(*turns.values(), strict=True)
        ratios = [theirs["seconds"] / ours["seconds"] for ours, theirs in pairs]
        ratio = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    return {"ours": ours, "peer": peers[0] if peers else None, "ratio": ratio}


def table(result: dict, against: str | None = None) -> str:
    """Markdown: a row a side, and below it the ratio of their speeds."""
    items = "loads" if result["stage"] == "load" else "images"
    lines = [
        f"| {result['device']} | {items}/s | s/step | MFU | peak GB | compile s |",
        "|---|---|---|---|---|---|",
    ]
    formats = {
        "items_per_second": "{:.4g}",
        "seconds_per_step": "{:.4g}",
        "mfu": "{:.1%}",
        "peak_bytes": "{:.2f}",
        "compile_seconds": "{:.1f}",
    }
    for name, side in (("agfsync", result["ours"]), (against, result["peer"])):
        if side:
            shown = side | {"peak_bytes": side["peak_bytes"] / 1e9}
            cells = [
                "" if shown[key] is None else f.format(shown[key]) for key, f in formats.items()
            ]
            lines.append(f"| {' | '.join([name, *cells])} |")
    if ratio := result["ratio"]:
        lines += ["", "agfsync / {}: {median:.2f} times as fast ({min:.2f} to {max:.2f})"]
        lines[-1] = lines[-1].format(against, **ratio)
    return "\n".join(lines)


class _Agfsync:
    """This package on one device. Made where it is measured, as its peer is."""

    def __init__(self):
        keep_freed_memory()  # as the command line does
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # leaves the peer its part of a GPU
        jax.config.update("jax_enable_compilation_cache", False)  # its time is a figure
        from transformers import CLIPTokenizer  # noqa: F401 - imports are not measured

        self._device = jax.local_devices()[0]
        jax.device_put(0.0).block_until_ready()

    def load(self, folder: Path, dtype: str) -> dict[str, float]:
        cls = modules.load("backbones", _backbone_of(folder)).Backbone
        self._memory = HostMemory()
        start = time.perf_counter()
        mesh = create_mesh(devices=[self._device])
        self._backbone = cls.load(folder, dtype=dtype, param_dtype=dtype, mesh=mesh)
        jax.block_until_ready(self._backbone.params)
        seconds = time.perf_counter() - start
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(self._backbone.params))
        return {"seconds": seconds, "held_bytes": held, "peak_bytes": self._memory.peak()}

    def prepare(self, prompts: Sequence[str], drawing: dict[str, Any]) -> float:
        """Compiles; seconds of the first batch."""
        backbone, params, guidance = (
            self._backbone,
            self._backbone.params,
            drawing["guidance_scale"],
        )
        mesh = create_mesh(devices=[self._device])
        self._generator = Generator(backbone, mesh, **drawing)
        start = time.perf_counter()
        self._generator(params, prompts, range(len(prompts)), [False] * len(prompts))
        seconds = time.perf_counter() - start

        @jax.jit
        def step(params, latents, timesteps, given):
            denoise = guide(lambda *args: backbone.denoise(params, *args), given, given, guidance)
            return denoise(latents, timesteps)

        shape = backbone.latent_shape(drawing["height"], drawing["width"])
        given = jax.eval_shape(backbone.encode_prompt, params, backbone.tokenize(prompts))
        inputs = (
            jnp.ones((len(prompts), *shape)),
            jnp.ones(len(prompts), jnp.int32),
            jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), given),
        )
        self._step = lambda: step(params, *inputs).block_until_ready()
        self._step()
        return seconds

    def draw(self, prompts: Sequence[str], seed: int) -> dict[str, float]:
        """Seconds of a batch and of one guided call of the denoiser; peak memory so far."""
        seeds = range(seed, seed + len(prompts))
        self._step()  # the system may have laid pages aside while the other side drew
        start = time.perf_counter()
        self._generator(self._backbone.params, prompts, seeds, [False] * len(prompts))
        seconds = time.perf_counter() - start
        start = time.perf_counter()
        self._step()
        step_seconds = time.perf_counter() - start
        found = self._device.memory_stats() or {}
        peak = found.get("peak_bytes_in_use") or self._memory.peak()
        return {"seconds": seconds, "step_seconds": step_seconds, "peak_bytes": peak}

    def about(self) -> dict[str, Any]:
        cpu = self._device.platform == "cpu"
        return {
            "device": processor_name() if cpu else self._device.device_kind,
            "versions": {name: version(name) for name in ("jax", "flax")},
        }


_SIDES = {"agfsync": _Agfsync, "diffusers": Diffusers}


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
