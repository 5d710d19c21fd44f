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
from collections.abc import Mapping, Sequence
from pathlib import Path

from agfsync_jax import scorers
from agfsync_jax.data import records
from agfsync_jax.data.problems import Problems
from agfsync_jax.data.scores import answered
from agfsync_jax.data.shards import read_rows, shard_paths
from agfsync_jax.parallel import multihost
from agfsync_jax.utils.clock import Stage
from agfsync_jax.utils.files import to_path


def main(config, workdir: Path, *, round_index: int = 0, repair: bool = False) -> None:
    """Fills round_NNN/scores/, leaving out shards that are there.

    Raises:
        FileNotFoundError: prompts, questions, candidates or weights are not there.
        ValueError: too much that cannot be scored; a weight of `config.pair.weights` for a column
            that no scorer makes; with `repair`, damaged candidates, which were dropped.
    """
    round_dir = to_path(workdir) / f"round_{round_index:03d}"
    specs = config.scorers.to_dict()
    prompts, questions, unasked = read_inputs(round_dir, specs)
    scorers.check_weights(config.pair.weights, specs)
    candidates = shard_paths(round_dir / "candidates", ".tfrecord", "sample")
    images = images_of(candidates, len(prompts), config.sample)
    mine = [candidates[index] for index in multihost.shards_of_process(len(candidates))]
    if repair:
        _repair(mine)
    todo = [path for path in mine if not scores_path(path).exists()]
    with Stage(round_dir, "score") as stage:
        stage.skipped(len(mine) - len(todo), len(mine))
        problems = _problems(config, images, mine, prompts, questions, unasked)
        if todo:
            _score(config, todo, images, prompts, questions, problems, stage)
        multihost.barrier("score shards")
        if multihost.is_main():
            found = _problems(config, images, candidates, prompts, questions, unasked)
            answers = answered(map(answers_path, candidates))
            summary = {"images": sum(images.values()), **found.counts(), "left_out": found.told()}
            text = json.dumps(summary | {"answers": answers}, indent=2, ensure_ascii=False)
            records.write_file(round_dir / "score.json", [text.encode(), b"\n"])
            for name, figures in answers.items():
                stage.print(
                    f"{name}: {figures['tifa_average']:.1%} of an image's answers are right"
                )
            for line in found.told():
                stage.print(line)
        multihost.barrier("score")


def read_inputs(round_dir: Path, specs: dict) -> tuple[dict[str, str], dict[str, list], list[dict]]:
    """Prompt id -> text; prompt id -> question rows ({} where no scorer asks any); problems."""
    prompt_rows = read_rows(round_dir / "prompts.jsonl", "prompts")
    questions, unasked = {}, []
    if scorers.asks_questions(specs):
        question_rows = read_rows(round_dir / "questions.jsonl", "questions")
        questions, unasked = scorers.askable(prompt_rows, question_rows)
    return {row["id"]: row["prompt"] for row in prompt_rows}, questions, unasked


def images_of(candidates: Sequence[Path], num_prompts: int, sample) -> dict[Path, int]:
    """How many images each shard holds, as `agfsync sample` draws them."""
    size = sample.prompts_per_shard
    return {
        path: sample.num_candidates * min(size, max(num_prompts - index * size, 0))
        for index, path in enumerate(candidates)
    }


def scores_path(candidates: Path) -> Path:
    """candidates/NAME.tfrecord -> scores/NAME.parquet."""
    return candidates.parents[1] / "scores" / f"{candidates.stem}.parquet"


def answers_path(candidates: Path) -> Path:
    """candidates/NAME.tfrecord -> scores/answers-NAME.parquet."""
    return candidates.parents[1] / "scores" / f"answers-{candidates.stem}.parquet"


def problems_path(candidates: Path) -> Path:
    """candidates/NAME.tfrecord -> scores/problems-NAME.jsonl, which is there if there are any."""
    return candidates.parents[1] / "scores" / f"problems-{candidates.stem}.jsonl"


def _problems(
    config,
    images: Mapping[Path, int],
    candidates: Sequence[Path],
    prompts: Mapping[str, str],
    questions: Mapping[str, list],
    unasked: list[dict],
) -> Problems:
    """Those of the questions, and of the shards that are scored; raises where they are too many."""
    total = sum(images[path] for path in candidates)
    num_questions = sum(map(len, questions.values()))
    share = total / max(sum(images.values()), 1)
    empty = sum(row["count"] for row in unasked if row["kind"] == "bad_questions")
    problems = Problems(
        {
            "prompts": len(prompts),
            "questions": num_questions + empty,
            "images": total,
            "scores": total * len(config.scorers),
            "answers": round(num_questions * config.sample.num_candidates * share),
        },
        config.score.max_bad,
        "config.score.max_bad",
    )
    problems.add(unasked)
    for path in candidates:
        if scores_path(path).exists() and problems_path(path).exists():
            problems.add(records.read_jsonl(problems_path(path)))
    return problems


def _score(
    config,
    todo: list[Path],
    images: Mapping[Path, int],
    prompts: Mapping[str, str],
    questions: Mapping[str, list],
    problems: Problems,
    stage: Stage,
) -> None:
    size = config.score.batch_size
    mesh = scorers.local_mesh(config.score.mesh)
    models = scorers.load_scorers(mesh, config.scorers.to_dict(), batch_size=size)
    with stage.progress(sum(images[path] for path in todo)) as progress:
        for path, rows, answers, left_out in scorers.score_shards(
            models,
            todo,
            prompts,
            questions,
            batch_size=size,
            scored=progress.update,
            expected=images.__getitem__,
        ):
            problems_path(path).unlink(missing_ok=True)
            if left_out:
                records.write_jsonl(problems_path(path), left_out)
            if answers:
                records.write_parquet(answers_path(path), answers)
            records.write_parquet(scores_path(path), rows)  # last: it says that the shard is done
            problems.add(left_out)


def _repair(candidates: list[Path]) -> None:
    """Drops damaged tables, and damaged candidates, which must then be drawn anew."""
    dropped = []
    for path in candidates:
        scores, answers, problems = scores_path(path), answers_path(path), problems_path(path)
        if records.repair_shard(path):
            dropped.append(path.name)
        if problems.exists() and not records.repair_shard(problems):
            scores.unlink(missing_ok=True)  # what was left out may have been mended
            if any(row["kind"] == "undecodable" for row in records.read_jsonl(problems)):
                path.unlink(missing_ok=True)
                dropped.append(path.name)
            problems.unlink()
        if answers.exists() and records.repair_shard(answers):
            scores.unlink(missing_ok=True)  # the scorer that answered must run again
        if scores.exists():
            records.repair_shard(scores)
    if dropped:
        raise ValueError(
            f"damaged candidates were dropped: {', '.join(dropped)}. Run `agfsync sample`, then"
            " `agfsync score` again."
        )
