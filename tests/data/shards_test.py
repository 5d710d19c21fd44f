"""A folder of shards is whole, or the error says what is missing and which verb makes it."""

import pytest

from agfsync_jax.data import records
from agfsync_jax.data.shards import read_rows, shard_paths


def touch(folder, *names):
    for name in names:
        (folder / name).touch()


def test_all_shards_in_order(tmp_path):
    touch(tmp_path, "00001-of-00002.parquet", "00000-of-00002.parquet")
    touch(tmp_path, "answers-00000-of-00002.parquet", "00001-of-00002.parquet.aside")
    names = [path.name for path in shard_paths(tmp_path, ".parquet", "score")]
    assert names == ["00000-of-00002.parquet", "00001-of-00002.parquet"]


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="run `agfsync score` first"):
        shard_paths(tmp_path / "nowhere", ".parquet", "score")
    touch(tmp_path, "00000-of-00003.tfrecord", "00002-of-00003.tfrecord")
    with pytest.raises(FileNotFoundError, match="lacks 1 of 3 shards, the first is 00001-of-00003"):
        shard_paths(tmp_path, ".tfrecord", "sample")
    touch(tmp_path, "00000-of-00002.tfrecord")
    with pytest.raises(ValueError, match="shards of 2 and of 3"):
        shard_paths(tmp_path, ".tfrecord", "sample")


def test_rows(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no rows\.jsonl: run `agfsync prompts` first"):
        read_rows(tmp_path / "rows.jsonl", "prompts")
    records.write_jsonl(tmp_path / "rows.jsonl", [{"id": "a"}])
    assert read_rows(tmp_path / "rows.jsonl", "prompts") == [{"id": "a"}]
