"""The suite trains from nothing, in order, each stage on what the ones before it wrote."""

import functools
import json

import pytest

from agfsync_jax.backbones.stable_diffusion import StableDiffusion
from agfsync_jax.micro import suite
from agfsync_jax.models.blip2 import Blip2ForConditionalGeneration
from agfsync_jax.models.clip import CLIPModel
from agfsync_jax.weights import networks as weights
from agfsync_jax.weights import places as paths

SHORT = {
    "clip": {"text_steps": 2, "steps": 2},
    "vae": {"steps": 2},
    "unet": {"steps": 2, "careless_steps": 2},
    "blip2": {"see_steps": 2, "answer_steps": 2},
    "blip2_generated": {"steps": 2},
    "aesthetic": {"steps": 2},
}


@pytest.mark.slow
def test_a_few_steps_of_every_stage(tmp_path, monkeypatch):
    stages = {name: functools.partial(stage, **SHORT[name]) for name, stage in suite.STAGES.items()}
    monkeypatch.setattr(suite, "STAGES", stages)
    output = tmp_path / "weights"
    suite.main([f"--workdir={tmp_path / 'work'}", f"--output={output}"])
    figures = json.loads((output / "figures.json").read_text())
    shipped = json.loads((paths.resolve_path("micro:figures.json")).read_text())
    assert {name: set(each) for name, each in figures.items()} == {
        name: set(each) for name, each in shipped.items()
    }

    StableDiffusion.load(output / "stable-diffusion")
    weights.load_model(CLIPModel, output / "clip")
    weights.load_model(Blip2ForConditionalGeneration, output / "blip2")
    for name in ("vocab.json", "merges.txt"):  # one tokenizer for both
        one, other = (
            (output / folder / name).read_text()
            for folder in ("clip", "stable-diffusion/tokenizer")
        )
        assert one == other
