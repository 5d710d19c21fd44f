"""Plan: does a stage fit these chips, and how long would it take? Compiled ahead of time.

    agfsync plan --config=configs/sd15.py --topology=v5e:4x4,v5p:2x2x4,v6e:4x4 [--json]

compiles what `agfsync sample` would run for chips that need not be here: a host with libtpu
(`pip install jax[tpu]`) is enough, and `JAX_PLATFORMS=cpu` leaves a TPU that is here alone. Without
--topology it is for the devices that are here. Weights are not read: where config.backbone.path is
not on this disk, config.backbone.kind says the sizes. `config.sample.batch_size` is of all chips
together. A large model takes minutes a topology.

Memory, FLOP and collectives are read from the compiled program; time is the most that the chips'
published numbers allow, so hours are a lower bound and MFU is an upper one: arithmetic, memory and
network at full speed, all at once, of which the slowest counts (Williams et al., "Roofline", 2009).
"""

import json as json_lib
import math
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from agfsync_jax import backbones
from agfsync_jax.data import skeletons
from agfsync_jax.data.pipeline_files import PipelineFiles
from agfsync_jax.parallel import multihost, topologies
from agfsync_jax.parallel.mesh import create_mesh
from agfsync_jax.parallel.sharding import infer_shardings, path_string
from agfsync_jax.utils import flops
from agfsync_jax.utils.weights import abstract_model

_LOCAL = r"micro:.*|\w+:/.*"  # besides what is on this disk


class Work(NamedTuple):
    """What a verb runs over and over.

    Attributes:
        lowered: the program, with a loop over steps.
        params: its first argument, which lies on the chips all the time, with shardings.
        images: of one run of the program, on all chips together.
        num_steps: of the loop.
        step_flops: of one pass of it, on all chips together, as the model's formulas count.
        rest_flops: the same of what the program does once.
        total: images of the configured run.
        help: what would need less memory.
    """

    lowered: jax.stages.Lowered
    params: Any
    images: int
    num_steps: int
    step_flops: int
    rest_flops: int
    total: int
    help: list[str]


def main(
    config: Any,
    workdir: Path | None,
    *,
    round_index: int = 0,
    repair: bool = False,
    topology: str = "",
    verb: str = "sample",
    json: bool = False,
) -> None:
    """Compiles for each topology and prints a row each.

    Raises:
        ValueError: an unknown topology, no libtpu, or a config that the verb cannot run.
        FileNotFoundError: a model that is neither on this disk nor of a known kind.
    """
    names = [name.strip() for name in topology.split(",") if name.strip()]
    chips = {name: topologies.devices(name) for name in names}
    if not names:
        here = jax.devices()
        chips = {f"{len(here)} x {here[0].device_kind} here": here}
    rows = [plan(config, name, devices, verb) for name, devices in chips.items()]
    if not multihost.is_main():
        return
    print(table(rows))
    for row in rows:
        for note in row["notes"]:
            print(f"{row['topology']}: {note}")
    print("Seconds and MFU are what the chips' published numbers allow at best, not a measurement.")
    if json:
        print(json_lib.dumps({"rows": [{key: row[key] for key in KEYS} for row in rows]}))


KEYS = (
    *("topology", "verb", "batch_per_chip", "fits", "bytes_per_chip", "hbm_bytes"),
    *("flops_per_step", "analytic_flops_per_step", "collective_bytes", "step_seconds"),
    *("bound", "mfu"),
)


def plan(config: Any, name: str, devices: list[jax.Device], verb: str) -> dict[str, Any]:
    """The row of one topology: `KEYS`, and what the table tells besides."""
    say = _progress(name)
    mesh = create_mesh(config.mesh, devices=devices)
    work = VERBS[verb](config, mesh)
    say("compiling")
    chip, kind = topologies.chip(devices[0]), devices[0].device_kind
    row = dict.fromkeys(KEYS) | {
        "topology": name,
        "verb": verb,
        "batch_per_chip": work.images * mesh.shape["tensor"] // mesh.size,
        "hbm_bytes": _memory(devices[0], chip),
        "analytic_flops_per_step": round(work.step_flops / mesh.size),
        "chips": mesh.size,
        "param_bytes": param_bytes(work.params),
        "hours": None,
        "notes": [],
    }
    try:
        compiled = work.lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        say("does not fit")
        needed = re.search(r"([\d.]+)([KMGT])\)? (?:exceeds|of) ", str(error))
        if needed:
            scale = 2 ** (10 * (1 + "KMGT".index(needed[2])))
            row["bytes_per_chip"] = round(float(needed[1]) * scale)
        return row | {"fits": False, "notes": too_large(row, work)}
    say("compiled")
    memory = compiled.memory_analysis()
    row["bytes_per_chip"] = _idle_bytes(compiled, work.params) + (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
        - memory.alias_size_in_bytes
    )
    if row["hbm_bytes"]:
        row["fits"] = row["bytes_per_chip"] <= row["hbm_bytes"]
        if not row["fits"]:
            row["notes"] += too_large(row, work)
    step = step_cost(topologies.Program(compiled.as_text()), work, mesh.size)
    row |= {"flops_per_step": step.flops, "collective_bytes": dict(step.collectives)}
    for target, count in step.uncounted.items():
        row["notes"].append(
            f"{count} calls of {target} do not tell their FLOP: they are missing in what is "
            "measured, and the time is by formula."
        )
    row |= estimate(row, step, work, flops.peak(kind), chip)
    say(f"{_gib(row['bytes_per_chip'])} a chip, {_number(row['step_seconds'], 1e-3)} ms a step")
    return row


def sample(config: Any, mesh: Mesh) -> Work:
    """The trajectory of `agfsync sample`, from conditioning to images."""
    backbone, plain = abstract_backbone(config, mesh, config.backbone.path, config.backbone.kind)
    refiner, params = None, (backbone.params,)
    if path := config.sample.refiner:
        kind = "" if _is_here(path) else "stable-diffusion-xl-refiner"
        refiner, _ = abstract_backbone(config, mesh, path, kind)
        params += (refiner.params,)
    generator = backbones.generator(config, mesh, backbone, refiner=refiner)

    def abstract(rows, shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((rows, *shape), dtype)

    rows = generator.batch_size * (1 if generator.guidance_scale == 1 else 2)
    tokens = abstract(rows, plain.tokenize([""]).shape[1:], jnp.int32)
    conditioning = jax.eval_shape(plain.encode_prompt, plain.params, tokens)
    latents, timesteps = abstract(rows, generator.latent_shape), abstract(rows, ())
    decoded = abstract(generator.batch_size, generator.latent_shape)
    return Work(
        lowered=generator.lower(backbone.params),
        params=params,
        images=generator.batch_size,
        num_steps=generator.num_inference_steps,
        step_flops=flops.count(plain.denoise, plain.params, latents, timesteps, conditioning),
        rest_flops=flops.count(plain.decode_latents, plain.params, decoded),
        total=config.prompts.num_prompts * config.sample.num_candidates,
        help=[
            f"a smaller --config.sample.batch_size (now {generator.batch_size} on all chips)",
            *(
                ["--config.sample.param_dtype=bfloat16, which halves the parameters"]
                if jnp.dtype(config.sample.param_dtype).itemsize > 2
                else []
            ),
            *(
                ["--config.backbone.dtype=bfloat16, which halves the activations"]
                if jnp.dtype(config.backbone.dtype).itemsize > 2
                else []
            ),
            *(
                ["--config.backbone.attention=auto, which keeps attention's scores off the memory"]
                if config.backbone.attention == "plain"
                else []
            ),
            "parameters split by config.sharding over --config.mesh.fsdp or tensor chips",
        ],
    )


# A verb -> what it would compile; a new one is a function here and a choice in cli.py.
VERBS: dict[str, Callable[[Any, Mesh], Work]] = {"sample": sample}


def abstract_backbone(config: Any, mesh: Mesh, path: str, kind: str) -> tuple[Any, Any]:
    """A backbone whose parameters are `jax.ShapeDtypeStruct`s with shardings.

    Returns:
        It, and the same with plain attention on one device, whose FLOP are those of the formulas.

    Raises:
        FileNotFoundError: neither files nor a kind.
        ValueError: another backbone's checkpoint, or rules that do not fit.
    """
    cls = backbones.backbone_class(config)
    with tempfile.TemporaryDirectory(prefix="agfsync-") as folder:
        if not _is_here(path):
            if not kind:
                raise FileNotFoundError(
                    f"{path!r} is not on this disk, and plan downloads nothing: say its sizes with "
                    f"config.backbone.kind: one of {', '.join(skeletons.KINDS)}."
                )
            skeletons.write_skeleton(kind, folder)
            path = folder
        files = PipelineFiles(path, variant=config.backbone.variant, kind=kind)
        pipeline = files.index.get("_class_name")
        if pipeline not in cls.pipelines:
            raise ValueError(
                f"{config.backbone.path or kind} is a {pipeline}: config.backbone.name="
                f"{config.backbone.name} reads {' or '.join(cls.pipelines)}."
            )
        graphs, params = {}, {}
        for name in filter(files.has, cls.networks):
            network = cls.networks[name]
            sizes = network.config_class.from_dict(files.config(name))
            dtype = cls.dtype_of(name, sizes, jnp.dtype(config.backbone.dtype))
            graphs[name], abstract = abstract_model(network, sizes, dtype=dtype)
            places = infer_shardings(abstract, mesh, config.sharding)
            params[name] = jax.tree.map(_placed(config.sample.param_dtype), abstract, places)
        of = {"dtype": config.backbone.dtype}
        return (
            cls(files, graphs, params, mesh=mesh, attention=config.backbone.attention, **of),
            cls(files, graphs, params, attention="plain", **of),
        )


def _placed(dtype: str) -> Callable:
    def placed(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype), sharding=sharding)

    return placed


def _is_here(path: str) -> bool:
    """Whether a checkpoint needs no download."""
    return bool(path) and (bool(re.fullmatch(_LOCAL, path)) or Path(path).expanduser().exists())


def param_bytes(params: Any) -> int:
    """Bytes of a pytree on one device."""
    leaves = jax.tree.leaves(params)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def _idle_bytes(compiled: jax.stages.Compiled, params: Any) -> int:
    """Bytes a chip of the parameters that the program, whose first argument they are, has no use
    for: they lie there all the same."""
    places = jax.tree.leaves(compiled.input_shardings[0][0], is_leaf=lambda x: x is None)
    leaves = zip(jax.tree.leaves(params), places, strict=True)
    return param_bytes([leaf for leaf, place in leaves if place is None])


def _memory(device: jax.Device, chip: topologies.Chip | None) -> int | None:
    """Bytes that a program may use: what a device that is here says, else the published number."""
    try:
        return device.memory_stats()["bytes_limit"]
    except (jax.errors.JaxRuntimeError, KeyError, TypeError):
        return chip.memory if chip else None


def step_cost(program: topologies.Program, work: Work, num_devices: int) -> topologies.Cost:
    """Of one pass of the loop that does about what a step should; another one may decode.

    A trajectory of one step has no loop: then it is all of the program.
    """
    expected = work.step_flops / num_devices

    def distance(cost):
        return abs(math.log((cost.flops + 1) / (expected + 1)))

    return min(program.loops if work.num_steps > 1 else [program.cost], key=distance)


def estimate(
    row: dict, step: topologies.Cost, work: Work, peak: float | None, chip: topologies.Chip | None
) -> dict[str, Any]:
    """{"step_seconds", "bound", "mfu", "hours"}; None where the chip is not known."""
    if peak is None or chip is None:
        return {"step_seconds": None, "bound": None, "mfu": None, "hours": None}
    seconds = {
        # A program's count leaves out products with padding, which take their time all the same.
        "compute": max(step.flops, row["analytic_flops_per_step"]) / peak,
        "memory": step.bytes_accessed / chip.memory_bandwidth,
        "network": step.collectives.total() / chip.network_bandwidth,
    }
    bound = max(seconds, key=seconds.get)
    a_run = work.num_steps * seconds[bound] + work.rest_flops / row["chips"] / peak
    return {
        "step_seconds": seconds[bound],
        "bound": bound,
        "mfu": row["analytic_flops_per_step"] / peak / seconds[bound],
        "hours": math.ceil(work.total / work.images) * a_run / 3600,
    }


def too_large(row: dict, work: Work) -> list[str]:
    """What takes the memory, and what would help."""
    groups: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(work.params):
        name = ".".join(path_string(path).split(".")[1:3])
        groups[name] = groups.get(name, 0) + param_bytes(leaf)
    largest = sorted(groups.items(), key=lambda item: -item[1])[:4]
    told = ", ".join(f"{name} {_gib(size)}" for name, size in largest)
    rest = ""
    if row["bytes_per_chip"]:
        rest = (
            f"; activations and the rest, of {row['batch_per_chip']} images a chip: "
            f"{_gib(row['bytes_per_chip'] - row['param_bytes'])}"
        )
    needed = f"needs {_gib(row['bytes_per_chip'])} a chip" if row["bytes_per_chip"] else "too large"
    return [
        f"does not fit: {needed}, there are {_gib(row['hbm_bytes'])}. "
        f"Parameters: {_gib(row['param_bytes'])} ({told}){rest}.",
        f"would help: {'; '.join(work.help)}.",
    ]


def table(rows: list[dict]) -> str:
    """Markdown."""
    columns = {
        "topology": lambda r: r["topology"],
        "chips": lambda r: str(r["chips"]),
        "images a chip": lambda r: str(r["batch_per_chip"]),
        "parameters": lambda r: _gib(r["param_bytes"]),
        "peak a chip": lambda r: f"{_gib(r['bytes_per_chip'])} of {_gib(r['hbm_bytes'])}",
        "fits": lambda r: {True: "yes", False: "NO", None: "?"}[r["fits"]],
        "TFLOP a step": lambda r: _number(r["flops_per_step"], 1e12),
        "by formula": lambda r: _number(r["analytic_flops_per_step"], 1e12),
        "collectives a step": _collectives,
        "ms a step": lambda r: _number(r["step_seconds"], 1e-3),
        "bound by": lambda r: r["bound"] or "?",
        "MFU": lambda r: "?" if r["mfu"] is None else f"{r['mfu']:.0%}",
        "hours": lambda r: _number(r["hours"], 1),
    }
    lines = [list(columns), ["---"] * len(columns)]
    lines += [[cell(row) for cell in columns.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _collectives(row: dict) -> str:
    found = row["collective_bytes"]
    if found is None:
        return "?"
    return ", ".join(f"{kind} {size / 1e6:.3g} MB" for kind, size in found.items()) or "none"


def _gib(size: int | None) -> str:
    if size is None:
        return "?"
    return f"{size / 2**30:.2f} GiB" if size >= 2**26 else f"{size / 2**20:.2f} MiB"


def _number(value: float | None, unit: float) -> str:
    return "?" if value is None else f"{value / unit:.3g}"


def _progress(name: str) -> Callable[[str], None]:
    start = time.monotonic()

    def say(what: str) -> None:
        if multihost.is_main():
            print(f"[{time.monotonic() - start:4.0f} s] {name}: {what}", flush=True)

    return say
