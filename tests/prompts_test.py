"""`agfsync prompts`: one file a round, other prompts each round, and nothing done twice."""

import json

import pytest

from agfsync_jax import prompts
from agfsync_jax.data import records
from configs import micro


@pytest.fixture
def config():
    return micro.get_config("tiny")


def read(workdir, round_index=0):
    return records.read_jsonl(workdir / f"round_{round_index:03d}" / "prompts.jsonl")


def test_rounds(config, tmp_path):
    for round_index in (0, 1):
        prompts.main(config, tmp_path, round_index=round_index)
    first, second = read(tmp_path), read(tmp_path, 1)
    assert len(first) == config.prompts.num_prompts
    assert list(first[0]) == ["id", "prompt", "category", "source"]
    assert [row["id"] for row in first][:2] == ["r000-00000", "r000-00001"]
    assert {row["prompt"] for row in first} != {row["prompt"] for row in second}
    assert not {row["id"] for row in first} & {row["id"] for row in second}
    stages = json.loads((tmp_path / "round_000/stages.json").read_text())
    assert stages["prompts"]["items"] == config.prompts.num_prompts


def test_what_is_there_stays(config, tmp_path, capsys):
    prompts.main(config, tmp_path)
    path = tmp_path / "round_000/prompts.jsonl"
    before = path.stat().st_mtime_ns
    prompts.main(config, tmp_path)
    assert path.stat().st_mtime_ns == before
    assert "skipped 1 of 1" in capsys.readouterr().err


def test_own_file(config, tmp_path):
    (tmp_path / "p.txt").write_text("a cat\na dog\n")
    config.prompts = {"source": "jsonl", "path": str(tmp_path / "p.txt"), "split": "all"}
    config.prompts.num_prompts = 2
    prompts.main(config, tmp_path)
    assert {row["prompt"] for row in read(tmp_path)} == {"a cat", "a dog"}


def test_nothing_is_written_on_an_error(config, tmp_path):
    config.prompts.source = "jsonnl"
    with pytest.raises(ValueError, match="Did you mean 'jsonl'"):
        prompts.main(config, tmp_path)
    config.prompts.source = "micro"
    config.prompts.num_prompts = 10**7
    with pytest.raises(ValueError, match="unique"):
        prompts.main(config, tmp_path)
    assert not (tmp_path / "round_000/prompts.jsonl").exists()
