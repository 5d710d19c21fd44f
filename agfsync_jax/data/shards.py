"""What a verb needs of the verbs before it: whole folders of shards, and files of rows."""

from collections.abc import Iterable
from pathlib import Path

from agfsync_jax.data.records import read_jsonl, repair_shard, shard_name
from agfsync_jax.utils.files import to_path


def read_rows(path: Path, made_by: str) -> list[dict]:
    """The rows of a .jsonl file.

    Raises:
        FileNotFoundError: it is not there; the message names the verb that makes it.
        RecordError: a broken line.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path.parent} has no {path.name}: run `agfsync {made_by}` first.")
    return read_jsonl(path)


def repair_files(paths: Iterable[Path]) -> None:
    """Drops those that are damaged."""
    for path in paths:
        if path.exists():
            repair_shard(path)


def shard_paths(folder: Path, ending: str, made_by: str) -> list[Path]:
    """The paths of all shards of a folder, in order, such as candidates/00003-of-00010.tfrecord.

    How many there must be is in their own names. `made_by` is the verb that makes them.

    Raises:
        FileNotFoundError: no shard, or not all of them.
        ValueError: shards of two different counts.
    """
    folder = to_path(folder)
    found = sorted(folder.glob(f"[0-9]*-of-[0-9]*{ending}"))
    if not found:
        raise FileNotFoundError(f"No shard in {folder}: run `agfsync {made_by}` first.")
    counts = sorted({int(path.stem.split("-of-")[1]) for path in found})
    if len(counts) > 1:
        raise ValueError(
            f"{folder} mixes shards of {' and of '.join(map(str, counts))}: remove the stale ones."
        )
    wanted = [folder / f"{shard_name(i, counts[0])}{ending}" for i in range(counts[0])]
    missing = [path.stem for path in wanted if path not in found]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {len(missing)} of {counts[0]} shards, the first is {missing[0]}:"
            f" run `agfsync {made_by}` to make them."
        )
    return wanted
