"""Score: candidates, questions -> scores/, every scorer of config.scorers on every image.

A shard of candidates gives scores/<shard>.parquet, one column a scorer, and, where a scorer answers
questions, scores/answers-<shard>.parquet. Each process scores its share of the shards, on its own
devices (`config.score.mesh`).

What cannot be scored is left out, and the rest goes on: damaged shards, broken images, prompts
without questions, questions that cannot be asked or answered, scores that are not finite. They are
named in scores/problems-<shard>.jsonl and counted in score.json, beside the share of right answers;
more than `config.score.max_bad` of any of them stops the stage.
"""

import json
from pathlib import Path
from typing import NamedTuple

from agfsync_jax.data import records
from agfsync_jax.data.problems import Problems
from agfsync_jax.data.questions import askable
from agfsync_jax.data.scores import (
    answered,
    problems_path,
    repair_scores,
    scores_path,
    write_scores,
)
from agfsync_jax.data.shards import read_rows, shard_paths
from agfsync_jax.parallel.mesh import local_mesh
from agfsync_jax.scoring import engine
from agfsync_jax.scoring.columns import asks_questions, check_weights
from agfsync_jax.steps.runner import Job, Step, of_process


class Plan(NamedTuple):
    """What a round scores."""

    candidates: list[Path]  # all shards
    images: dict[Path, int]  # how many each of them holds
    prompts: dict[str, str]  # prompt id -> text
    questions: dict[str, list]  # prompt id -> question rows; {} where no scorer asks any
    unasked: list[dict]  # what is wrong with the questions, as rows of data/problems.py


def plan(job: Job) -> Plan:
    """Reads prompts and questions, and looks for the candidates.

    Raises:
        FileNotFoundError: questions or candidates are not there.
        ValueError: a weight of `config.pair.weights` for a column that no scorer makes.
    """
    config, specs = job.config, job.config.scorers.to_dict()
    check_weights(config.pair.weights, specs)
    prompt_rows = read_rows(job.folder / "prompts.jsonl", "prompts")
    questions, unasked = {}, []
    if asks_questions(specs):
        question_rows = read_rows(job.folder / "questions.jsonl", "questions")
        questions, unasked = askable(prompt_rows, question_rows)
    candidates = shard_paths(job.folder / "candidates", ".tfrecord", "sample")
    size, number = config.sample.prompts_per_shard, config.sample.num_candidates
    images = {
        path: number * min(size, max(len(prompt_rows) - index * size, 0))
        for index, path in enumerate(candidates)
    }
    prompts = {row["id"]: row["prompt"] for row in prompt_rows}
    return Plan(candidates, images, prompts, questions, unasked)


def score(job: Job) -> None:
    """Scores this process's share of the shards, on its own devices.

    Raises:
        FileNotFoundError: weights are not there.
        ValueError: too much that cannot be scored.
    """
    config, plan = job.config, job.plan
    mine = of_process(plan.candidates)
    problems = _problems(job, mine)
    todo = [path for path in mine if scores_path(path) in job.missing]
    if not todo:
        return
    mesh = local_mesh(config.score.mesh)
    size = engine.batch_size(config, mesh, max(plan.images.values(), default=1))
    models = engine.load_scorers(mesh, config.scorers.to_dict(), batch_size=size)
    with job.stage.progress(sum(plan.images[path] for path in todo)) as progress:
        for path, rows, answers, left_out in engine.score_shards(
            models,
            todo,
            plan.prompts,
            plan.questions,
            batch_size=size,
            scored=progress.update,
            expected=plan.images.__getitem__,
            leave_out=True,
        ):
            write_scores(scores_path(path), rows, answers, left_out)
            problems.add(left_out)


def summarize(job: Job) -> None:
    """Writes score.json, when the shards of all processes are there."""
    plan, stage = job.plan, job.stage
    found = _problems(job, plan.candidates)
    answers = answered(map(scores_path, plan.candidates))
    summary = {"images": sum(plan.images.values()), **found.counts(), "left_out": found.told()}
    text = json.dumps(summary | {"answers": answers}, indent=2, ensure_ascii=False)
    records.write_file(job.folder / "score.json", [text.encode(), b"\n"])
    for name, figures in answers.items():
        stage.print(f"{name}: {figures['tifa_average']:.1%} of an image's answers are right")
    for line in found.told():
        stage.print(line)


def _problems(job: Job, candidates: list[Path]) -> Problems:
    """Those of the questions, and of the shards that are scored; raises where they are too many."""
    config, plan = job.config, job.plan
    total = sum(plan.images[path] for path in candidates)
    num_questions = sum(map(len, plan.questions.values()))
    share = total / max(sum(plan.images.values()), 1)
    empty = sum(row["count"] for row in plan.unasked if row["kind"] == "bad_questions")
    problems = Problems(
        {
            "prompts": len(plan.prompts),
            "questions": num_questions + empty,
            "images": total,
            "scores": total * len(config.scorers),
            "answers": round(num_questions * config.sample.num_candidates * share),
        },
        config.score.max_bad,
        "config.score.max_bad",
    )
    problems.add(plan.unasked)
    for scores in map(scores_path, candidates):
        if scores.exists() and problems_path(scores).exists():
            problems.add(records.read_jsonl(problems_path(scores)))
    return problems


def repair(job: Job) -> None:
    """Drops damaged tables, and damaged candidates, which must then be drawn anew."""
    images, paths = job.plan.images, of_process(job.plan.candidates)
    dropped = [path.name for path in paths if repair_scores(path, scores_path(path), images[path])]
    if dropped:
        raise ValueError(
            f"damaged candidates were dropped: {', '.join(dropped)}. Run `agfsync sample`, then"
            " `agfsync score` again."
        )


main = Step(
    "score",
    score,
    inputs={"prompts.jsonl": "prompts"},
    optional_inputs=("questions.jsonl",),
    outputs=("scores",),
    settings=("scorers", "score"),
    plan=plan,
    files=lambda job: [scores_path(path) for path in job.plan.candidates],
    finish=summarize,
    repair=repair,
)
