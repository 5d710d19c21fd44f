"""Scoring: questions and images a second, by the models of `config.scorers`.

The images are scenes of the micro world, `config.bench.num_candidates` a prompt, each with
`config.bench.num_questions` yes/no questions, and others in every turn. Answers are compared: they
must be the same. What is measured is the scorers' work on images in memory, not reading files.
"""

import functools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from agfsync_jax.benches import Bench, Measured, Sides, Task
from agfsync_jax.benches._peers import Reference
from agfsync_jax.benches._processes import HostMemory
from agfsync_jax.benches._sides import Batch
from agfsync_jax.benches._turns import Ours, in_turns
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


def check(config: Any) -> None:
    """Raises ValueError for a config without the scorers."""
    named = {spec["name"] for spec in config.scorers.to_dict().values()}
    if not named & {"vqa", "clip", "aesthetic"}:
        raise ValueError(
            "agfsync bench --stage=score measures the scorers vqa, clip and aesthetic:"
            f" config.scorers has {', '.join(sorted(named)) or 'none'}."
        )


def measure(config: Any, home: Path, sides: Sides, clock: Stage) -> Measured:
    """Each side loads once, then they take turns with every task."""
    spec = config.bench
    configured = {each["name"]: each for each in config.scorers.to_dict().values()}
    parts = {name: [n for n in names if n in configured] for name, names in TASKS.items()}
    specs = {n: configured[n] for names in parts.values() for n in names}
    images = spec.num_prompts * spec.num_candidates
    counted = {"vqa": ("questions", images * spec.num_questions)}
    present = [name for name, names in parts.items() if names]
    tasks = [Task(name, *counted.get(name, ("images", images)), 0, []) for name in present]
    found: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    size = config.sample.height, config.sample.width
    prompt = specs.get("vqa", {}).get("prompt", vqa.PROMPT)
    batch = functools.lru_cache(maxsize=1)(lambda turn: inputs(spec, turn, size, prompt))

    def start(side, ask):
        own = specs if side == "agfsync" else described(specs)
        ask("load", own, config.score.device_batch_size)
        return [ask("score", parts[task.name], batch(0))["seconds"] for task in tasks]

    def turn(side, ask, task, number):
        row = ask("score", parts[task.name], batch(number))
        for name, values in row.pop("columns").items():
            found[name][side].append(values)
        return row

    turns = {"turns": spec.repeats, "items": images}
    about = in_turns(sides, tasks, clock, start=start, turn=turn, **turns)
    return [task._replace(notes=_same(parts[task.name], found)) for task in tasks], about


def described(specs: Mapping[str, dict]) -> dict[str, dict]:
    """The scorers' blocks with what a peer must know besides: where files are."""
    made = {}
    for name, each in specs.items():
        made[name] = each | {"folder": str(local_files(resolve_path(each["path"])))}
        if name == "aesthetic":
            made[name]["head_file"] = str(resolve_path(each["head"]))
    return made


def inputs(spec: Any, turn: int, size: tuple[int, int], prompt: str) -> Batch:
    """The images of a turn, and what is asked about them."""
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


def _same(parts: Sequence[str], found: Mapping[str, dict[str, list]]) -> tuple[str, ...]:
    """How many answers are the same, how far scores are apart; nothing of one side alone."""
    notes = []
    for name in parts:
        first, *second = (
            np.concatenate([np.ravel(t) for t in side]) for side in found[name].values()
        )
        if second and name == "vqa":
            notes.append(f"{np.sum(first == second[0])} of {len(first)} answers are the same")
        elif second:
            apart = np.abs(first - second[0]).max()
            notes.append(f"{name}: {len(first)} scores, at most {apart:.2g} apart")
    return tuple(notes)


class Agfsync(Ours):
    """This package's scorers."""

    def load(self, specs: Mapping[str, dict], batch_size: int) -> None:
        self.memory = HostMemory()
        mesh = create_mesh(devices=[self.device])
        self._scorers = load_scorers(mesh, specs, batch_size=batch_size)

    def score(self, parts: Sequence[str], batch: Batch) -> dict[str, Any]:
        """Seconds, peak memory so far and, a scorer, answers or scores."""
        scorers = {name: self._scorers[name] for name in parts}
        seconds, (columns, answers) = self.timed(score_images, scorers, *batch)
        for name, given in answers.items():
            columns[name] = np.array([[str(a["answer"]) for a in each] for each in given])
        return {"seconds": seconds, "peak_bytes": self.peak_bytes(), "columns": columns}


BENCH = Bench(
    unit="images",
    sides={"agfsync": Agfsync, "reference": Reference},
    check=check,
    measure=measure,
    counts=("num_prompts", "num_candidates", "num_questions"),
    label="scorers",
)
