"""Scoring: questions and images a second, by the models of `config.scorers`.

The images are scenes of the micro world, `config.bench.num_candidates` a prompt, each with
`config.bench.num_questions` yes/no questions, and others in every turn. Answers are compared: they
must be the same. What is measured is the scorers' work on images in memory, not reading files.
"""

import contextlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from agfsync_jax.benches import Bench, Measured, Task, joined
from agfsync_jax.benches._ours import Ours, check_one_device
from agfsync_jax.benches._peers import Reference
from agfsync_jax.benches._processes import HostMemory, Process
from agfsync_jax.micro.drawing import render
from agfsync_jax.micro.questions import training_questions
from agfsync_jax.micro.scenes import sample_scenes
from agfsync_jax.parallel.mesh import create_mesh
from agfsync_jax.scorers import vqa
from agfsync_jax.scoring.engine import load_scorers, score_images
from agfsync_jax.utils.clock import Stage
from agfsync_jax.weights.places import local_files, resolve_path

# Scorers that are measured together: what shares a tower is one task.
TASKS = {"vqa": ("vqa",), "clip, aesthetic": ("clip", "aesthetic")}


def check(config: Any, against: str | None, platform: str) -> None:
    """Raises ValueError for a config without the scorers, or another device than the peer's."""
    named = {spec["name"] for spec in config.scorers.to_dict().values()}
    if not named & {"vqa", "clip", "aesthetic"}:
        raise ValueError(
            "agfsync bench --stage=score measures the scorers vqa, clip and aesthetic:"
            f" config.scorers has {', '.join(sorted(named)) or 'none'}."
        )
    for key in ("num_prompts", "num_candidates", "num_questions"):
        if config.bench[key] < 1:
            raise ValueError(f"config.bench.{key}={config.bench[key]}: expected at least 1")
    check_one_device("score", against, platform)


def measure(config: Any, home: Path, against: str | None, clock: Stage) -> Measured:
    """Each side loads once, then they take turns with every task."""
    spec = config.bench
    specs = {each["name"]: each for each in config.scorers.to_dict().values()}
    tasks = {name: [n for n in parts if n in specs] for name, parts in TASKS.items()}
    tasks = {name: parts for name, parts in tasks.items() if parts}
    specs = {name: specs[name] for parts in tasks.values() for name in parts}
    size = config.sample.height, config.sample.width
    rows: dict[str, list[dict]] = {name: [] for name in tasks}
    found: dict[str, list] = {}
    about = {}
    sides = BENCH.sides(against)
    num_images = spec.num_prompts * spec.num_candidates
    with contextlib.ExitStack() as stack, clock.progress(spec.repeats * num_images) as progress:
        processes = {s: stack.enter_context(Process(make, s)) for s, make in sides.items()}
        settings = described(specs) if against else specs
        prompt = specs.get("vqa", {}).get("prompt", vqa.PROMPT)
        first = {}
        for side, process in processes.items():
            process.ask("load", settings, config.score.batch_size)
            about[side] = process.ask("about")
            for name, parts in tasks.items():
                made = process.ask("score", parts, *inputs(spec, 0, size, prompt))
                first[side, name] = made["seconds"]
        for turn in range(1, 1 + spec.repeats):
            given = inputs(spec, turn, size, prompt)
            for name, parts in tasks.items():
                for side, process in processes.items():
                    made = process.ask("score", parts, *given)
                    found.setdefault(side, []).append(made.pop("columns"))
                    rows[name].append({"by": side, "first_seconds": first[side, name], **made})
                    clock.print(f"{side}: {name} of {num_images} images in {made['seconds']:.2f} s")
            progress.update(num_images)
    counted = {"vqa": ("questions", num_images * spec.num_questions)}
    measured = [
        Task(name, *counted.get(name, ("images", num_images)), 0, rows[name], _same(parts, found))
        for name, parts in tasks.items()
    ]
    return Measured(measured, joined(about), spec.to_dict(), "scorers")


def described(specs: Mapping[str, dict]) -> dict[str, dict]:
    """The scorers' blocks with what a peer must know besides: where their files are."""
    made = {}
    for name, each in specs.items():
        made[name] = each | {"folder": str(local_files(resolve_path(each["path"])))}
        if name == "aesthetic":
            made[name]["head_file"] = str(resolve_path(each["head"]))
    return made


def inputs(
    spec: Any, turn: int, size: tuple[int, int], prompt: str
) -> tuple[np.ndarray, list[str], list[list[dict]]]:
    """Images uint8 [b, h, w, 3], their prompts, and their questions with the whole "text"."""
    rng = np.random.default_rng(turn)
    images, prompts, questions = [], [], []
    for scene in sample_scenes(rng, spec.num_prompts):
        asked: list[dict] = []
        while len(asked) < spec.num_questions:
            for question, answer, _ in training_questions(scene, rng, spec.num_questions):
                if answer in ("yes", "no"):
                    row = {"question": question, "answer": answer, "choices": ["yes", "no"]}
                    asked.append(row | {"text": vqa.ask(prompt, row)})
        for _ in range(spec.num_candidates):
            image = Image.fromarray(render(scene, rng))
            images.append(np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC)))
            prompts.append(scene.caption())
            questions.append(asked[: spec.num_questions])
    return np.stack(images), prompts, questions


def _same(parts: Sequence[str], found: Mapping[str, list]) -> tuple[str, ...]:
    """How many answers are the same, how far scores are apart."""
    if len(found) < 2:
        return ()
    ours, theirs = found.values()
    notes = []
    for name in parts:
        first, second = (
            np.concatenate([np.ravel(turn[name]) for turn in side if name in turn])
            for side in (ours, theirs)
        )
        if name == "vqa":
            notes.append(f"{np.sum(first == second)} of {len(first)} answers are the same")
        else:
            apart = np.abs(first - second).max()
            notes.append(f"{name}: {len(first)} scores, at most {apart:.2g} apart")
    return tuple(notes)


class Agfsync(Ours):
    """This package's scorers."""

    def load(self, specs: Mapping[str, dict], batch_size: int) -> None:
        self.memory = HostMemory()
        mesh = create_mesh(devices=[self.device])
        own = {
            name: {k: v for k, v in each.items() if k not in ("folder", "head_file")}
            for name, each in specs.items()
        }
        self._scorers = load_scorers(mesh, own, batch_size=batch_size)

    def score(
        self,
        parts: Sequence[str],
        images: np.ndarray,
        prompts: Sequence[str],
        questions: Sequence[Sequence[Mapping]],
    ) -> dict[str, Any]:
        """Seconds, peak memory so far and, a scorer, answers or scores."""
        start = time.perf_counter()
        columns, answers = score_images(
            {name: self._scorers[name] for name in parts}, images, prompts, questions
        )
        seconds = time.perf_counter() - start
        for name, given in answers.items():
            columns[name] = np.array([[str(a["answer"]) for a in each] for each in given])
        return {"seconds": seconds, "peak_bytes": self.peak_bytes(), "columns": columns}


BENCH = Bench(
    unit="images",
    ours=Agfsync,
    peers={"reference": Reference},
    libraries=("torch", "transformers"),
    check=check,
    measure=measure,
)
