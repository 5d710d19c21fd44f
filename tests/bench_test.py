"""The benchmark of loading, on a model of a few kilobytes: what it writes, prints and refuses."""

import json
import shutil

import pytest

from agfsync_jax import bench
from configs import micro
from tests.twins import tiny_stable_diffusion


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A skeleton of a tiny model among the kinds."""
    tiny_stable_diffusion(tmp_path / "tiny")

    def write_skeleton(kind, folder):
        ignore = shutil.ignore_patterns("*.safetensors")
        shutil.copytree(tmp_path / "tiny", folder, ignore=ignore)

    monkeypatch.setattr(bench.skeletons, "KINDS", ("tiny",))
    monkeypatch.setattr(bench.skeletons, "write_skeleton", write_skeleton)
    config = micro.get_config()
    config.bench.models = ("tiny",)
    config.bench.repeats = 1
    return config


def test_both_sides_are_measured(config, tmp_path, capsys):
    config.bench.against = "diffusers"
    bench.main(config, tmp_path)
    found = json.loads((tmp_path / "bench" / "load.json").read_text())
    ours, theirs = found["loads"]
    assert (ours["by"], theirs["by"]) == ("agfsync", "diffusers")
    # Both hold every parameter of the files, in twice their precision.
    assert ours["held"] == theirs["held"] == 2 * ours["files"] > 100_000
    for row in (ours, theirs):
        assert row["seconds"] > 0 and row["peak"] > 0
    table = capsys.readouterr().out.strip().splitlines()
    assert [line.split("|")[2].strip() for line in table[2:]] == ["agfsync", "diffusers"]
    assert not (tmp_path / "bench" / "tiny").exists()  # the weights are removed


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("models", ("sd9",), r"models has \['sd9'\]; known: tiny"),
        ("file_dtype", "int8", "file_dtype=int8: expected one of float32"),
        ("against", "keras", "against=keras: expected diffusers, or nothing"),
    ],
)
def test_settings_that_cannot_be(config, tmp_path, key, value, message):
    config.bench[key] = value
    with pytest.raises(ValueError, match=message):
        bench.main(config, tmp_path)
    assert not (tmp_path / "bench").exists()


def test_a_load_that_fails_says_why(config, tmp_path, monkeypatch):
    monkeypatch.setitem(bench._LOADERS["agfsync"], "load", "raise ValueError('no such weights')")
    with pytest.raises(ValueError, match="agfsync could not load .*tiny:(.|\n)*no such weights"):
        bench.main(config, tmp_path)
    assert not (tmp_path / "bench" / "tiny").exists()
