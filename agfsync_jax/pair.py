"""Pair: scores -> pairs/, the candidate that the scores prefer against the one that they do not.

Within a prompt every score column is normalized, the columns are summed with the weights of
`config.pair.weights`, and `config.pair.strategy` picks pairs by that sum. Ties, margins below
`config.pair.min_margin` and scores that are not finite are dropped, and pair.json counts them.
Nothing is scored again: with other settings the same scores make other pairs in seconds.
"""

import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from agfsync_jax import backbones
from agfsync_jax.data import preferences, records
from agfsync_jax.data.preferences import Choice
from agfsync_jax.data.shards import read_rows, shard_paths
from agfsync_jax.parallel import multihost
from agfsync_jax.utils.clock import Stage


def main(config, workdir: Path, *, round_index: int = 0, repair: bool = False) -> None:
    """Writes round_NNN/pairs/ and pair.json, unless the same scores and settings made them.

    Raises:
        FileNotFoundError: prompts, candidates or scores are not there.
        RecordError: a damaged shard; `repair` drops damaged pairs.
        ValueError: bad settings, or no pair is left.
    """
    round_dir = Path(workdir) / f"round_{round_index:03d}"
    if multihost.is_main():
        with Stage(round_dir, "pair", unit="pairs") as stage:
            if repair and (round_dir / "pairs").exists():
                records.repair_pairs(round_dir / "pairs")
            _pair(config, round_dir, round_index, stage)
    multihost.barrier("pair")


def _pair(config, round_dir: Path, round_index: int, stage: Stage) -> None:
    preferences.check_settings(config.pair)
    prompt_rows = read_rows(round_dir / "prompts.jsonl", "prompts")
    prompts = {row["id"]: row["prompt"] for row in prompt_rows}
    shards = shard_paths(round_dir / "scores", ".parquet", "score")
    scores = {path.stem: records.read_parquet(path) for path in shards}
    choices, counts = preferences.choose(scores, prompts, config.pair)
    if config.pair.shuffle_labels:
        choices = preferences.shuffle_labels(choices, config.seed, round_index)
    settings = config.pair.to_dict() | {"backbone": config.backbone.path, "seed": config.seed}
    made_from = hashlib.sha256(repr((choices, sorted(settings.items()))).encode()).hexdigest()
    summary, folder = round_dir / "pair.json", round_dir / "pairs"
    if folder.exists() and summary.exists():
        if json.loads(summary.read_text())["made_from"] == made_from:
            stage.skipped(1, 1, "sets of pairs")
            return
    if not choices:
        raise ValueError(
            f"no pair is left of {counts['prompts']} prompts ({told(counts)}):"
            f" lower config.pair.min_margin ({config.pair.min_margin}) or draw more candidates."
        )
    summary.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    tokenize = backbones.tokenizer(config)
    with stage.progress(len(choices)) as progress:
        rows = pair_rows(round_dir / "candidates", choices, prompts, tokenize, progress.update)
        records.write_pairs(folder, rows, {"prompts": counts["prompts"], **settings})
    result = {**counts, "settings": settings, "made_from": made_from}
    records.write_file(summary, [json.dumps(result, indent=2).encode(), b"\n"])
    stage.print(told(counts))


def pair_rows(
    candidates: Path,
    choices: Sequence[Choice],
    prompts: Mapping[str, str],
    tokenize: Callable[[list[str]], np.ndarray],
    done: Callable[[int], None] = lambda count: None,
) -> Iterator[dict]:
    """The rows of records.PAIR_FEATURES; one shard of candidates is in memory at a time.

    Raises:
        ValueError: a shard of candidates lacks an image that has a score.
    """
    for shard, group in itertools.groupby(choices, key=lambda choice: choice.shard):
        group = list(group)
        wanted = {(c.prompt_id, i) for c in group for i in (c.chosen, c.rejected)}
        path = candidates / f"{shard}.tfrecord"
        images = {
            key: row
            for row in records.read_shard(path, records.CANDIDATE_FEATURES)
            if (key := (row["prompt_id"], row["candidate"])) in wanted
        }
        if missing := wanted - set(images):
            raise ValueError(
                f"{path} lacks {len(missing)} images that have scores, such as {min(missing)}:"
                " remove its scores and run `agfsync score` again."
            )
        token_ids = tokenize([prompts[c.prompt_id] for c in group])
        for choice, tokens in zip(group, token_ids, strict=True):
            chosen = images[choice.prompt_id, choice.chosen]
            rejected = images[choice.prompt_id, choice.rejected]
            yield {
                "pair_id": choice.pair_id,
                "prompt_id": choice.prompt_id,
                "prompt": prompts[choice.prompt_id],
                "token_ids": tokens,
                "chosen_latents": chosen["latents"],
                "rejected_latents": rejected["latents"],
                "chosen_candidate": choice.chosen,
                "rejected_candidate": choice.rejected,
                "chosen_image": chosen["image"],
                "rejected_image": rejected["image"],
                "chosen_score": choice.chosen_score,
                "rejected_score": choice.rejected_score,
                "margin": choice.chosen_score - choice.rejected_score,
            }
            done(1)


def told(counts: Mapping[str, int]) -> str:
    """The counts in one line."""
    return (
        f"{counts['pairs']} pairs from {counts['prompts']} prompts; dropped: {counts['ties']} ties,"
        f" {counts['margin']} below the margin, {counts['limit']} above the limit,"
        f" {counts['nonfinite']} scores not finite, {counts['too_few']} prompts without two images"
    )
