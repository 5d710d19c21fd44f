"""Prompts: a prompt source -> prompts.jsonl, what the model will be asked to draw in this round.

`config.prompts.source` names a file of agfsync_jax/prompt_sources; the other keys of the block go
to it. Each round gets other prompts, drawn from (config.seed, round).
"""

from pathlib import Path

from agfsync_jax.data import records
from agfsync_jax.parallel import multihost
from agfsync_jax.utils import modules
from agfsync_jax.utils.clock import Stage
from agfsync_jax.utils.files import to_path

FIELDS = ("id", "prompt", "category", "source")


def main(config, workdir: Path, *, round_index: int = 0, repair: bool = False) -> None:
    """Writes round_NNN/prompts.jsonl, unless it is there.

    Raises:
        ValueError: the source does not exist, or cannot give that many prompts.
    """
    del repair  # one small file, whole or absent
    round_dir = to_path(workdir) / f"round_{round_index:03d}"
    path = round_dir / "prompts.jsonl"
    if multihost.is_main():
        with Stage(round_dir, "prompts", unit="prompts") as stage:
            if path.exists():
                stage.skipped(1, 1, "files")
            else:
                rows = draw(config, round_index)
                records.write_jsonl(path, rows)
                stage.items += len(rows)
    multihost.barrier("prompts")


def draw(config, round_index: int) -> list[dict]:
    """The round's rows {id, prompt, category, source}, `num_prompts` of them, all different."""
    spec = config.prompts.to_dict()
    source = modules.load("prompt_sources", spec.pop("source"))
    rows = source.prompts(**spec, seed=config.seed, round_index=round_index)
    ids = {row["id"] for row in rows}
    if len(ids) < len(rows) or len(rows) != config.prompts.num_prompts:
        raise ValueError(
            f"prompt source {config.prompts.source!r} gave {len(rows)} rows with {len(ids)} ids:"
            f" expected {config.prompts.num_prompts} rows, each with its own id."
        )
    return [{field: row[field] for field in FIELDS} for row in rows]
