"""A workdir belongs to the config that made it."""

import fnmatch
import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
from ml_collections import ConfigDict

from agfsync_jax import run
from agfsync_jax.steps import settings
from agfsync_jax.utils import configs

MICRO = "configs/micro.py"


def steps():
    return [module.main for module in run.ROUND]


def _claim(workdir, **overrides):
    settings.claim(workdir, configs.load(MICRO, overrides), steps)


def make(folder):
    folder.mkdir(parents=True)
    (folder / "made").touch()


def test_what_holds_nothing_holds_no_key(tmp_path):
    """Training that is stopped before its first checkpoint leaves an empty folder, or logs."""
    _claim(tmp_path)
    (tmp_path / "round_000" / "checkpoints" / "tensorboard").mkdir(parents=True)
    (tmp_path / "round_000" / "checkpoints" / "metrics.jsonl").touch()
    _claim(tmp_path, **{"train.batch_size": "16"})
    (tmp_path / "round_000" / "checkpoints" / "2").mkdir()
    with pytest.raises(ValueError, match="train.batch_size: 16 there, 32 now"):
        _claim(tmp_path)


def test_an_earlier_version_did_what_a_new_key_has_as_its_default(tmp_path):
    _claim(tmp_path)
    make(tmp_path / "round_000" / "checkpoints" / "2")
    path = tmp_path / "config.json"
    stored = json.loads(path.read_text())
    del stored["train"]["flip"], stored["evaluate"]["sample"]
    path.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="train.flip: false there, true now"):
        _claim(tmp_path, **{"train.flip": "true"})
    _claim(tmp_path)
    assert json.loads(path.read_text())["train"]["flip"] is False


def test_a_workdir_belongs_to_its_config(tmp_path):
    workdir = tmp_path / "a" / "b"
    _claim(workdir)
    _claim(workdir, **{"sample.height": "128"})  # nothing is made yet
    stored = json.loads((workdir / "config.json").read_text())
    assert stored["sample"]["height"] == 128 and stored["sharding"] == []
    make(workdir / "round_000" / "candidates")
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
    make(tmp_path / "round_001" / "pairs")
    _claim(tmp_path, **{"pair.min_margin": "0.75"})
    _claim(tmp_path, **{"pair.min_margin": "0.25"})  # pairs are made anew from the same scores
    make(tmp_path / "round_001" / "checkpoints")
    with pytest.raises(ValueError, match="pair.min_margin: 0.25 there, 0.5 now"):
        _claim(tmp_path, **{"pair.min_margin": "0.5"})
    _claim(tmp_path, **{"pair.min_margin": "0.25", "evaluate.num_seeds": "5"})


def test_more_steps_go_on_with_a_training(tmp_path):
    """With a constant learning rate; what was made from the end of the shorter one is stale."""
    few, many, fewer = ({"train.num_steps": str(count)} for count in (100, 150, 50))
    make(tmp_path / "round_000" / "pairs")
    make(tmp_path / "round_000" / "checkpoints")
    _claim(tmp_path, **few)
    _claim(tmp_path, **many)
    with pytest.raises(
        ValueError, match=r"(?s)num_steps: 150 there, 50 now.*remove .*: checkpoints$"
    ):
        _claim(tmp_path, **fewer)
    make(tmp_path / "round_000" / "evals")
    make(tmp_path / "round_001" / "candidates")
    with pytest.raises(ValueError, match="remove from its rounds: evals, round_001$"):
        _claim(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["train"]["num_steps"] == 150
    shutil.rmtree(tmp_path / "round_000" / "evals")
    shutil.rmtree(tmp_path / "round_001")
    _claim(tmp_path)
    with pytest.raises(ValueError, match="train.learning_rate"):
        _claim(tmp_path, **{"train.num_steps": "300", "train.learning_rate": "1.0"})


def test_a_cosine_cannot_be_extended(tmp_path):
    cosine = {"train.schedule": "cosine"}
    make(tmp_path / "round_000" / "checkpoints")
    _claim(tmp_path, **cosine)
    message = "remove from its rounds: checkpoints\nMore steps go on with .*constant; a cosine"
    with pytest.raises(ValueError, match=message):
        _claim(tmp_path, **cosine, **{"train.num_steps": "300"})


def test_secrets_stay_out(tmp_path):
    config = ConfigDict({"llm": {"api_key": "abc", "model": "m"}, "seed": 0})
    settings.claim(tmp_path, config, steps)
    stored = (tmp_path / "config.json").read_text()
    assert "abc" not in stored and json.loads(stored)["llm"] == {"model": "m"}
    settings.claim(tmp_path, config, steps)


def test_a_file_is_no_workdir(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="is a file"):
        _claim(tmp_path / "file")


def test_only_the_main_process_writes(tmp_path):
    settings.claim(tmp_path / "new", configs.load(MICRO, {}), steps, write=False)
    assert os.listdir(tmp_path) == []


def test_every_setting_is_of_one_kind():
    """A key that no step reads would make everything stale, and no pattern may name nothing."""
    read = {block for step in steps() for block in step.settings}
    asked = ("base_url", "api_key_env", "concurrency", "timeout", "max_requests")
    asked = dict.fromkeys((*asked, "price_in", "price_out"), "9")  # of a language model
    llm = {"prompts.source": "llm"} | {f"prompts.{name}": value for name, value in asked.items()}
    keys = configs.flatten(configs.load(MICRO, llm))
    free = {key for key in keys if settings.is_run_time(key)}
    assert {key.partition(".")[0] for key in keys if key not in free} <= read
    assert read <= {key.partition(".")[0] for key in keys}
    for pattern in settings.RUN_TIME:
        assert any(fnmatch.fnmatchcase(key, pattern) for key in keys), pattern


HOLD = """
import sys, time
from agfsync_jax.steps import settings
with settings.held(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_two_runs_do_not_share_a_workdir(tmp_path):
    """A process that is killed leaves nothing that must be cleared away."""
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "held\n"
        message = f"in use by another run .host {socket.gethostname()}, pid {other.pid}, since 20"
        with pytest.raises(ValueError, match=message), settings.held(tmp_path):
            raise AssertionError
    finally:
        other.kill()
        other.wait()
    assert (tmp_path / ".running.json").exists()  # of the one that was killed
    with settings.held(tmp_path):
        assert json.loads((tmp_path / ".running.json").read_text())["pid"] == os.getpid()
    assert not (tmp_path / ".running.json").exists()
