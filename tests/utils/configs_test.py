import json
import os

import pytest
from ml_collections import ConfigDict

from agfsync_jax.utils import configs

MICRO = "configs/micro.py"


def test_finds_the_shipped_config_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert configs.load(MICRO, {}).sample.height == 64
    assert configs.load(f"{MICRO}:tiny", {}).sample.num_candidates == 3


def test_a_file_here_goes_first(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / MICRO).write_text(
        "from configs import common\n"
        "def get_config(arg=None):\n"
        "    c = common.get_config()\n"
        "    c.seed = 7\n"
        "    return c\n"
    )
    monkeypatch.chdir(tmp_path)
    assert configs.load(MICRO, {}).seed == 7


@pytest.mark.parametrize(
    ("signature", "returned", "arg", "message"),
    [
        ("", "common.get_config()", "", ""),
        ("", "common.get_config()", ":tiny", "get_config of .*own.py takes no argument"),
        ("arg", "common.get_config()", "", "wants an argument, as in FILE.py:arg"),
        ("arg", "None", ":tiny", "returns no ConfigDict"),
    ],
)
def test_a_config_of_ones_own(signature, returned, arg, message, tmp_path):
    path = tmp_path / "own.py"
    path.write_text(
        f"from configs import common\ndef get_config({signature}):\n    return {returned}\n"
    )
    if message:
        with pytest.raises(ValueError, match=message):
            configs.load(f"{path}{arg}", {})
    else:
        assert configs.load(f"{path}{arg}", {}).rounds == 1


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("configs/nano.py", FileNotFoundError, "no file configs/nano.py; shipped: .*micro.py"),
        ("micro", ValueError, "expected FILE.py"),
        (f"{MICRO}:tinny", ValueError, "'tinny' is unknown; known: tiny"),
        (f"{MICRO}:tiny=yes", ValueError, "expected true or false"),
    ],
)
def test_what_is_no_config(spec, error, message):
    with pytest.raises(error, match=message):
        configs.load(spec, {})


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("sample.height", "128", 128),
        ("train.learning_rate", "1e-3", 1e-3),
        ("loss.beta", "500", 500.0),
        ("pair.shuffle_labels", "true", True),
        ("pair.normalize", "rank", "rank"),
        ("backbone.path", "", ""),
        ("sharding", "(('.*kernel', ('fsdp', None)),)", ((".*kernel", ("fsdp", None)),)),
        ("evaluate.evaluators", "()", ()),
    ],
)
def test_overrides_keep_the_type(key, text, value):
    found = configs.flatten(configs.load(MICRO, {key: text}))[key]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("sample.hieght", "1", "no key of the config; close: sample.height"),
        ("num_steps", "1", "close: train.num_steps"),
        ("xyzzy", "1", "the blocks are: .*sample"),
        ("sample", "1", "is a block; set one of: .*sample.height"),
        ("sample.height", "64.5", "sample.height=64.5: expected int, as in 64"),
        ("train.learning_rate", "fast", "expected float"),
        ("pair.shuffle_labels", "maybe", "expected bool"),
        ("sharding", "5", "expected tuple"),
    ],
)
def test_bad_overrides(key, text, message):
    with pytest.raises(ValueError, match=message):
        configs.load(MICRO, {key: text})


def _claim(workdir, **overrides):
    configs.claim(workdir, configs.load(MICRO, overrides))


def test_a_workdir_belongs_to_its_config(tmp_path):
    workdir = tmp_path / "a" / "b"
    _claim(workdir)
    _claim(workdir, **{"sample.height": "128"})  # nothing is made yet
    stored = json.loads((workdir / "config.json").read_text())
    assert stored["sample"]["height"] == 128 and stored["sharding"] == []
    (workdir / "round_000" / "candidates").mkdir(parents=True)
    _claim(workdir, **{"sample.height": "128", "rounds": "3", "report.num_examples": "1"})
    _claim(workdir, **{"sample.height": "128", "pair.normalize": "rank"})  # no pairs are made yet
    assert json.loads((workdir / "config.json").read_text())["pair"]["normalize"] == "rank"
    with pytest.raises(ValueError) as error:
        _claim(workdir, **{"seed": "5", "pair.normalize": "none"})
    message = str(error.value)
    assert "seed: 0 there, 5 now" in message
    assert "sample.height: 128 there, 64 now" in message
    assert "pair.normalize" not in message
    assert "remove from its rounds: candidates" in message
    assert json.loads((workdir / "config.json").read_text())["seed"] == 0


def test_later_outputs_hold_a_key_too(tmp_path):
    (tmp_path / "round_001" / "pairs").mkdir(parents=True)
    _claim(tmp_path, **{"pair.min_margin": "0.75"})
    _claim(tmp_path, **{"pair.min_margin": "0.25"})  # pairs are made anew from the same scores
    (tmp_path / "round_001" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="pair.min_margin: 0.25 there, 0.5 now"):
        _claim(tmp_path, **{"pair.min_margin": "0.5"})
    _claim(tmp_path, **{"pair.min_margin": "0.25", "evaluate.num_seeds": "5"})


def test_secrets_stay_out(tmp_path):
    config = ConfigDict({"llm": {"api_key": "abc", "model": "m"}, "seed": 0})
    configs.claim(tmp_path, config)
    stored = (tmp_path / "config.json").read_text()
    assert "abc" not in stored and json.loads(stored)["llm"] == {"model": "m"}
    configs.claim(tmp_path, config)


def test_a_file_is_no_workdir(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="is a file"):
        _claim(tmp_path / "file")


def test_only_the_main_process_writes(tmp_path):
    configs.claim(tmp_path / "new", configs.load(MICRO, {}), write=False)
    assert os.listdir(tmp_path) == []
