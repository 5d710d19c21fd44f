"""A rehearsal of `agfsync run`: every verb at its real sizes with the least work, measured.

The config is the one that will run: its weights, shapes, batches, devices and processes. Prompts
are as few as fill one batch of every verb, and training takes two steps. Everything lies in
WORKDIR/rehearsal, which the next rehearsal makes anew.
"""

import gc
import json
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax import monitoring
from ml_collections import ConfigDict

from agfsync_jax import backbones, checks, export, report, run
from agfsync_jax.data.imports import PreferenceSet
from agfsync_jax.data.pairs import is_pairs
from agfsync_jax.data.scores import scored_round
from agfsync_jax.evaluation.prompts import num_held_out
from agfsync_jax.parallel import multihost
from agfsync_jax.parallel.mesh import create_mesh, local_mesh
from agfsync_jax.parallel.sharding import batch_shards
from agfsync_jax.plans import _chips
from agfsync_jax.plans._estimates import estimate
from agfsync_jax.plans._tables import gib
from agfsync_jax.utils import modules
from agfsync_jax.utils.clock import duration, read_stages
from agfsync_jax.utils.configs import public
from agfsync_jax.utils.files import remove_tree, to_path, write_text
from agfsync_jax.weights import random_weights
from agfsync_jax.weights.networks import READ_EVENT
from agfsync_jax.weights.places import is_local

STEPS = 2  # of training: one that compiles, and one more
_UNITS = {
    **dict.fromkeys(("prompts", "questions"), "prompts"),
    **dict.fromkeys(("sample", "score", "pair", "evaluate"), "images"),
    "train": "steps",
}
_HELD_OUT = 300  # prompts, where no file says how many
_STAND_INS = {
    block: f"  config.{block}: the micro world's, as no file is named"
    for block in ("prompts", "questions", "evaluate")
}
_STARTING = (READ_EVENT, "/jax/core/compile/")  # events whose time is not an item's


class Measured(NamedTuple):
    """What one verb took.

    Attributes:
        verb: its name.
        seconds: of the work alone.
        start_seconds: of what is done once, however much work there is: reading weights,
            compiling, opening and closing.
        host_bytes: the process's most, while the verb ran; None where the system does not tell.
        device_bytes: a device's most until then; None where it does not tell.
    """

    verb: str
    seconds: float
    start_seconds: float
    host_bytes: int | None
    device_bytes: int | None


def main(config: ConfigDict, workdir: Path, *, random_weights: bool) -> None:
    """Rehearses a round and prints what the whole run will take.

    Args:
        random_weights: weights that are not on this disk have random numbers instead, in networks
            of their sizes.

    Raises:
        ValueError: what is wrong with the config, all of it; weights of sizes that are not known.
    """
    folder = to_path(workdir) / "rehearsal"
    if multihost.is_main() and folder.exists():
        remove_tree(folder)
    multihost.barrier("rehearsal begins")
    with tempfile.TemporaryDirectory(prefix="agfsync-") as weights:  # of each process its own
        notes: list[str] = []
        if random_weights:
            config, notes = invent(config, Path(weights))
        _rehearse(config, folder, notes)


def _rehearse(config: ConfigDict, folder: Path, notes: Sequence[str]) -> None:
    small = shrink(config)
    # of prompts that are stand-ins there are not as many as the run will have
    whole = [] if _STAND_INS["prompts"] in notes else [config]
    for each in (*whole, small):
        checks.check(each, "run", num_devices=jax.device_count(), workdir=folder)
    if multihost.is_main():
        write_text(folder / "config.json", json.dumps(public(small.to_dict()), indent=2) + "\n")
        print("\n".join([f"rehearsal: a round with the least work, in {folder}", *notes]))
    rows: list[Measured] = []
    for verb in (*run.verbs(small), report, export):
        with measured(rows, verb.__name__.rpartition(".")[2], folder):
            verb.main(small, folder)
        jax.clear_caches()
        gc.collect()
    bounds = best_hours(config)
    if multihost.is_main():
        print(table(rows, amounts(config), amounts(small), bounds, config.rounds))


def shrink(config: ConfigDict) -> ConfigDict:
    """The config with the least work that fills a batch of every verb."""
    c = config.copy_and_resolve_references().unlock()
    processes = jax.process_count()
    drawn = c.sample.device_batch_size * batch_shards(create_mesh(c.mesh))
    scored = c.score.device_batch_size * batch_shards(local_mesh(c.score.mesh)) * processes
    prompts = math.ceil(max(drawn, scored) / c.sample.num_candidates)
    prompts = max(processes, min(prompts, c.prompts.num_prompts))
    c.rounds = 1
    c.prompts.num_prompts = prompts
    # a shard a process, which a batch of scores does not go beyond
    per_shard = min(c.sample.prompts_per_shard, math.ceil(prompts / processes))
    c.sample.prompts_per_shard = per_shard
    c.pair.min_margin, c.pair.min_questions = 0.0, 0
    c.pair.max_rows = min(c.pair.max_rows or prompts, prompts)
    c.train.num_steps = c.train.save_every = STEPS
    c.train.warmup_steps = 0
    c.train.validate_every = min(c.train.validate_every, STEPS)
    if c.train.held_out:  # of so few prompts it may be none, or all
        c.train.held_out, c.train.best, c.train.patience = 0.0, "", 0
        c.train.validate_every *= bool(c.train.num_validation_prompts)
    c.train.wandb, c.export.output = "", ""
    judged = max(processes, math.ceil(drawn / c.evaluate.num_seeds))
    c.evaluate.num_prompts = min(judged, num_held_out(config))
    return c.lock()


def invent(config: ConfigDict, folder: Path) -> tuple[ConfigDict, list[str]]:
    """The config with random weights in place of those that are not here, and what was changed.

    Raises:
        ValueError: networks of sizes that are not known; all are listed.
    """
    c = config.copy_and_resolve_references().unlock()
    notes: list[str] = []
    problems: list[str] = []

    def note(key: str, old: str, new: str) -> None:
        notes.append(f"  config.{key}: {new} in place of {old}")

    spec = c.backbone
    if not is_local(spec.path):
        place = folder / "backbone"
        if not spec.kind:
            problems.append("config.backbone.kind is empty: it says the sizes of random weights.")
        else:
            networks = backbones.backbone_class(c).networks
            random_weights.write_pipeline(spec.kind, place, networks)
        note("backbone.path", spec.path, f"random numbers in a {spec.kind}")
        spec.path, spec.variant = str(place), ""
    for block in ("backbone", "sample"):
        if away := [path for path, _ in c[block].lora if not is_local(path)]:
            note(f"{block}.lora", ", ".join(away), "nothing")
            c[block].lora = tuple(each for each in c[block].lora if each[0] not in away)
    if c.sample.refiner and not is_local(c.sample.refiner):
        place = folder / "refiner"
        networks = backbones.backbone_class(c).networks
        random_weights.write_pipeline("stable-diffusion-xl-refiner", place, networks)
        note("sample.refiner", c.sample.refiner, "random numbers in SDXL's refiner")
        c.sample.refiner = str(place)
    for block, scorer in c.scorers.items():
        if scorer.get("path") and not is_local(scorer.path):
            name = scorer.path.rpartition("/")[2]
            place = folder / name
            if name not in random_weights.NAMES:
                known = ", ".join(random_weights.NAMES)
                problems.append(
                    f"config.scorers.{block}.path={scorer.path}: --random_weights knows the sizes"
                    f" of {known}; give a local folder of this one."
                )
            else:
                random_weights.write_model(name, place)
            note(f"scorers.{block}.path", scorer.path, f"random numbers in a {name}")
            scorer.path = str(place)
        if scorer.get("head") and not is_local(scorer.head):
            note(f"scorers.{block}.head", scorer.head.partition("#")[0], "random numbers")
            scorer.head = str(random_weights.write_head(folder / "head"))
    sources = {block: c[block].source or c.prompts.source for block in _STAND_INS}
    for block, told in _STAND_INS.items():
        if sources[block] == "jsonl" and not c[block].path:
            if block == "questions":
                c[block] = ConfigDict({"source": "micro"})
            else:
                c[block].source = "micro"
                c[block].split = "train" if block == "prompts" else "heldout"
                c[block].num_prompts = c[block].num_prompts or _HELD_OUT
                del c[block]["path"]
            notes.append(told)
    if problems:
        raise ValueError("\n".join(problems))
    return c.lock(), notes


@contextmanager
def measured(rows: list[Measured], verb: str, folder: Path) -> Iterator[None]:
    """Adds what the verb that runs inside takes, and says it."""
    spans: list[tuple[float, float]] = []

    def listen(event: str, seconds: float, **_: Any) -> None:
        if event.startswith(_STARTING):
            now = time.monotonic()
            spans.append((now - seconds, now))

    _forget_peak()
    monitoring.register_event_duration_secs_listener(listen)
    began = time.monotonic()
    try:
        yield
    finally:
        monitoring.unregister_event_duration_listener(listen)
    whole = time.monotonic() - began
    stage = read_stages(folder / "round_000" / "stages.json").get(verb, {})
    seconds = max(stage.get("seconds", whole) - _union(spans), 0.0)
    rows.append(
        Measured(
            verb,
            seconds,
            whole - seconds,
            _host_peak(),
            _device_peak(),
        )
    )


def amounts(config: ConfigDict) -> dict[str, int]:
    """Verb -> how much it does in a round: prompts, images, steps."""
    judged = 2 * num_held_out(config) * config.evaluate.num_seeds
    rest = {"train": config.train.num_steps, "evaluate": judged}
    if config.pair.path:  # other people's, or another workdir's, which are read where they lie
        if is_pairs(config.pair.path):
            return rest
        if scored_round(config.pair.path, Path()):  # all of it, in a rehearsal too
            return rest | {"pair": 1}
        return rest | {"pair": 2 * PreferenceSet(config.pair).num_rows}
    prompts = config.prompts.num_prompts
    images = prompts * config.sample.num_candidates
    return {
        **dict.fromkeys(("prompts", "questions"), prompts),
        **dict.fromkeys(("sample", "score", "pair"), images),
        **rest,
    }


def table(
    rows: Sequence[Measured],
    whole: Mapping[str, int],
    least: Mapping[str, int],
    bounds: Mapping[str, float],
    rounds: int,
) -> str:
    """A line a verb: its speed, memory, and the hours of the whole run.

    Args:
        whole, least: `amounts` of the run and of its rehearsal.
        bounds: verb -> hours of a round at best.
        rounds: of the whole run.
    """
    told = any(row.device_bytes for row in rows)
    head = ["", "did", "a second", "start", "host memory", *["device memory"] * told, "whole run"]
    head += ["plan: at best"] * bool(bounds)
    lines, total = [head], 0.0
    for row in rows:
        ratio = whole[row.verb] / least[row.verb] if row.verb in whole else 1
        own = rounds * (row.start_seconds + ratio * row.seconds)
        total += own
        did = f"{least[row.verb]} {_UNITS[row.verb]}" if row.verb in least else ""
        rate = f"{least[row.verb] / row.seconds:.3g}" if did and row.seconds else ""
        line = [row.verb, did, rate, f"{row.start_seconds:.0f} s", gib(row.host_bytes)]
        line += [gib(row.device_bytes)] * told + [duration(own)]
        best = bounds.get(row.verb)
        lines.append(line + ["" if best is None else duration(best * rounds * 3600)] * bool(bounds))
    lines.append(["together", *[""] * (4 + told), duration(total)] + [""] * bool(bounds))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    text.append(
        "start: what is done once a round, such as reading weights and compiling; the whole run is"
        " that and the rest as many times as it has more to do."
    )
    return "\n".join(text)


def best_hours(config: ConfigDict) -> dict[str, float]:
    """Verb -> hours of a round by `plan`; nothing where the devices have no published numbers."""
    if not _chips.chip(jax.devices()[0]):
        return {}
    rows = [estimate(config, "here", jax.devices(), verb) for verb in modules.names("plans")]
    return {row["verb"]: row["hours"] for row in rows if row["hours"] is not None}


def _union(spans: list[tuple[float, float]]) -> float:
    """Seconds that lie in any of the spans: tracing holds the tracing of what it calls."""
    total, end = 0.0, -math.inf
    for first, last in sorted(spans):
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total


def _forget_peak() -> None:
    """Linux then counts the process's largest memory from here."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def _host_peak() -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)


def _device_peak() -> int | None:
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return max((each.get("peak_bytes_in_use", 0) for each in stats), default=0) or None
