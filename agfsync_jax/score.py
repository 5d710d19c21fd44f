"""Score: candidates, questions -> scores/, every scorer of config.scorers on every image.

A shard of candidates gives scores/<shard>.parquet, one column a scorer, and, where a scorer answers
questions, scores/answers-<shard>.parquet. Each process scores its share of the shards.
"""

from pathlib import Path

from agfsync_jax import scorers
from agfsync_jax.data import records
from agfsync_jax.data.shards import read_rows, shard_paths
from agfsync_jax.parallel import multihost
from agfsync_jax.utils.clock import Stage


def main(config, workdir: Path, *, round_index: int = 0, repair: bool = False) -> None:
    """Fills round_NNN/scores/, leaving out shards that are there.

    Raises:
        FileNotFoundError: prompts, questions, candidates or weights are not there.
        RecordError: a damaged shard; `repair` drops it.
        ValueError: a prompt without a question that a scorer would ask, or a weight of
            `config.pair.weights` for a column that no scorer makes.
    """
    round_dir = Path(workdir) / f"round_{round_index:03d}"
    specs = config.scorers.to_dict()
    prompts, questions = read_inputs(round_dir, specs)
    scorers.check_weights(config.pair.weights, specs)
    candidates = shard_paths(round_dir / "candidates", ".tfrecord", "sample")
    mine = [candidates[index] for index in multihost.shards_of_process(len(candidates))]
    if repair:
        _repair(mine)
    todo = [path for path in mine if not scores_path(path).exists()]
    with Stage(round_dir, "score") as stage:
        stage.skipped(len(mine) - len(todo), len(mine))
        if todo:
            images = len(prompts) * config.sample.num_candidates * len(todo) // len(candidates)
            _score(config, todo, images, prompts, questions, stage)
        multihost.barrier("score")


def read_inputs(round_dir: Path, specs: dict) -> tuple[dict[str, str], dict[str, list]]:
    """Prompt id -> text, and prompt id -> question rows ({} where no scorer asks any)."""
    prompt_rows = read_rows(round_dir / "prompts.jsonl", "prompts")
    questions = {}
    if scorers.asks_questions(specs):
        question_rows = read_rows(round_dir / "questions.jsonl", "questions")
        scorers.check_questions(prompt_rows, question_rows)
        questions = scorers.by_prompt(question_rows)
    return {row["id"]: row["prompt"] for row in prompt_rows}, questions


def scores_path(candidates: Path) -> Path:
    """candidates/NAME.tfrecord -> scores/NAME.parquet."""
    return candidates.parents[1] / "scores" / f"{candidates.stem}.parquet"


def answers_path(candidates: Path) -> Path:
    """candidates/NAME.tfrecord -> scores/answers-NAME.parquet."""
    return candidates.parents[1] / "scores" / f"answers-{candidates.stem}.parquet"


def _score(config, todo: list[Path], images: int, prompts, questions, stage: Stage) -> None:
    size = config.score.batch_size
    mesh = scorers.local_mesh(config.mesh)
    models = scorers.load_scorers(mesh, config.scorers.to_dict(), batch_size=size)
    with stage.progress(images) as progress:
        for path, rows, answers in scorers.score_shards(
            models, todo, prompts, questions, batch_size=size, scored=progress.update
        ):
            if answers:
                records.write_parquet(answers_path(path), answers)
            records.write_parquet(scores_path(path), rows)  # last: it says that the shard is done


def _repair(candidates: list[Path]) -> None:
    """Drops damaged tables, and damaged candidates, which must then be drawn anew."""
    dropped = [path for path in candidates if records.repair_shard(path)]
    for path in candidates:
        scores, answers = scores_path(path), answers_path(path)
        if answers.exists() and records.repair_shard(answers):
            scores.unlink(missing_ok=True)  # the scorer that answered must run again
        if scores.exists():
            records.repair_shard(scores)
    if dropped:
        names = ", ".join(path.name for path in dropped)
        raise ValueError(
            f"damaged candidates were dropped: {names}. Run `agfsync sample`, then"
            " `agfsync score` again."
        )
