"""What the README says can be typed, and the figures that it quotes are those that ship."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from agfsync_jax import cli
from agfsync_jax.micro import suite
from agfsync_jax.utils import configs
from configs import micro

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_every_script_module_verb_and_file_exists():
    for script in re.findall(r"\blaunch/\w+\.sh", README):
        assert (ROOT / script).is_file(), script
    for module in re.findall(r"python -m ([\w.]+)", README):
        assert importlib.util.find_spec(module), module
    named = set(re.findall(r"`?agfsync ([a-z]+)\b", README))
    assert named == set(cli.verbs())
    for target in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / target).exists(), target
    for folder in re.findall(r"^(?:agfsync_jax|configs)/\S*", README, re.M):
        assert (ROOT / folder).exists(), folder


def test_every_flag_and_key_is_known():
    flags = dict(re.findall(r"--config\.([\w.]+)=([^\s`,]+)", README))
    assert len(flags) >= 4
    configs.load("configs/micro.py", flags)
    config = micro.get_config()
    for key in re.findall(r"`(?:c|config)\.([a-z_]+(?:\.[a-z_]+)*)`", README):
        node = config
        for part in key.split("."):
            assert part in node, key
            node = node[part]


def test_the_suites_command_runs(tmp_path, monkeypatch):
    command = re.search(r"python -m agfsync_jax\.micro\.suite (.+)", README)[1].split()
    assert [flag.split("=")[0] for flag in command] == ["--workdir", "--output"]
    ran = []
    stages = {
        name: lambda workdir, output, name=name: ran.append(name) or {} for name in suite.STAGES
    }
    monkeypatch.setattr(suite, "STAGES", stages)
    suite.main([f"--workdir={tmp_path}", f"--output={tmp_path}"])
    assert ran == list(stages)
    suite.main([f"--workdir={tmp_path}", f"--output={tmp_path}"])
    assert ran == list(stages)  # all of it was done before


@pytest.mark.parametrize(
    "model, key, wording",
    [
        ("aesthetic", "retrieval_of_100", "right caption among 100: {:.0%}"),
        ("vae", "referee_strict", "referee-strict on reconstructions: {:.1%}"),
        ("unet", "referee_strict", "referee-strict {:.1%}"),
        ("aesthetic", "clean_above_degraded", "clean above spoiled in {:.1%} of pairs"),
        ("blip2_generated", "all", "right answers {:.1%}"),
        ("blip2_generated", "correlation_probability", "correlation of {:.2f}"),
    ],
)
def test_the_suites_figures_are_those_that_ship(model, key, wording):
    figures = json.loads((ROOT / "agfsync_jax/micro/weights/figures.json").read_text())
    assert wording.format(figures[model][key]) in README
