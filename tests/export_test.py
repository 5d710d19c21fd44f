"""Export: what diffusers loads from it draws what we draw."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from agfsync_jax import backbones, export
from agfsync_jax.diffusion.schedules import NOISE
from agfsync_jax.models import lora
from agfsync_jax.training.checkpoints import (
    Checkpoints,
    restore_adapters,
    restore_denoiser,
    restore_trained,
)
from agfsync_jax.training.program import step_spec
from agfsync_jax.training.step import init_state
from agfsync_jax.weights.networks import read_json
from configs import micro
from tests.processes import run_processes
from tests.schedulers import SAMPLERS
from tests.twins import tiny_stable_diffusion, tiny_stable_diffusion_xl

_BACKBONES = ["stable_diffusion", "stable_diffusion_xl"]
# What a backbone has no part in.
of_one_backbone = pytest.mark.parametrize(
    "config", [_BACKBONES[0], pytest.param(_BACKBONES[1], marks=pytest.mark.slow)], indirect=True
)


@pytest.fixture(scope="module", params=_BACKBONES)
def config(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "model"
    make = tiny_stable_diffusion_xl if request.param.endswith("xl") else tiny_stable_diffusion
    make(folder)
    config = micro.get_config("tiny")
    config.backbone.name, config.backbone.path = request.param, str(folder)
    config.sample.update(height=32, width=32, num_inference_steps=5, guidance_scale=3.0)
    config.sample.sampler = "euler" if request.param.endswith("xl") else "ddim"
    config.train.num_steps = 3
    return config


@pytest.fixture
def trained(config, tmp_path):
    """A workdir whose round 0 ends with every parameter of the denoiser a little larger."""
    params = backbones.backbone_class(config).load(config.backbone.path).params["unet"]
    params = jax.tree.map(lambda leaf: leaf * 1.1, params)
    with Checkpoints(tmp_path / "round_000" / "checkpoints") as checkpoints:
        checkpoints.save(3, {"params": params})
    return tmp_path


@pytest.fixture
def adapted(config, tmp_path, request):
    """A workdir whose round 0 ends with adapters of rank 4 and the merged denoiser."""
    params = backbones.backbone_class(config).load(config.backbone.path).params["unet"]
    targets = lora.TARGETS[getattr(request, "param", "attention")]
    adapters = lora.init_adapters(jax.random.key(0), params, rank=4, targets=targets)
    adapters = {
        name: pair | {"B": 0.2 * jnp.ones_like(pair["B"])} for name, pair in adapters.items()
    }
    state = {"params": lora.merge(params, adapters), "adapters": adapters}
    with Checkpoints(tmp_path / "round_000" / "checkpoints") as checkpoints:
        checkpoints.save(3, state)
    return tmp_path


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_pipeline_draws_the_same_in_diffusers(config, trained, dtype, capsys):
    config = config.copy_and_resolve_references()
    config.export.dtype = dtype
    config.export.output = str(trained / "out")
    export.main(config, trained, verify=True)
    assert "verified" in capsys.readouterr().err
    assert (trained / "out" / "verify.png").stat().st_size > 1000
    weights = load_file(trained / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in weights.values()} == {getattr(torch, dtype)}
    with pytest.raises(FileExistsError, match="is not empty"):
        export.main(config, trained)


@of_one_backbone
@pytest.mark.parametrize("sampler", ["lcm", "dpmsolver_sde"])
def test_the_folder_draws_with_the_sampler_of_the_config(config, trained, sampler, capsys):
    """Its files alone say so; one that draws noise at each step draws the same in diffusers."""
    config = config.copy_and_resolve_references()
    config.sample.update(sampler=sampler, guidance_scale=1.0)
    export.main(config, trained, verify=True)
    assert "verified" in capsys.readouterr().err
    folder, found = trained / "round_000" / "export", SAMPLERS[sampler]
    scheduler = DiffusionPipeline.from_pretrained(folder).scheduler
    assert type(scheduler).__name__ == found.scheduler
    assert scheduler.config.items() >= found.variant.items()
    before = read_json(Path(config.backbone.path) / "scheduler/scheduler_config.json")
    noise = {name: before[name] for name in before if name in NOISE}
    assert len(noise) > 4 and scheduler.config.items() >= noise.items()


@pytest.mark.parametrize("layout", ["diffusers", "kohya", "peft"])
def test_a_lora_draws_the_same_in_diffusers(config, adapted, layout, capsys):
    if config.backbone.name.endswith("xl") and layout == "peft":
        pytest.skip("PEFT's layout names no network")
    config = config.copy_and_resolve_references()
    config.train.lora_rank = 4
    config.export.lora = layout
    export.main(config, adapted, verify=True)
    assert "verified" in capsys.readouterr().err
    assert not list((adapted / "round_000" / "export").glob("*/"))  # no network of the base


@pytest.mark.parametrize("adapted", ["all"], indirect=True)
def test_a_lora_of_other_layers_draws_the_same_in_diffusers(config, adapted, capsys):
    if config.backbone.name.endswith("xl"):
        pytest.skip("the layers have the same names")
    config = config.copy_and_resolve_references()
    config.train.lora_rank, config.export.lora = 4, "kohya"
    export.main(config, adapted, verify=True)
    assert "verified" in capsys.readouterr().err


@pytest.mark.parametrize(
    "layout", ["diffusers", "kohya", pytest.param("peft", marks=pytest.mark.slow)]
)
def test_a_lora_holds_all_rounds(config, adapted, layout, capsys):
    """Round 1 begins where round 0 ended: base + file = what round 1 has made."""
    if config.backbone.name.endswith("xl") != (layout == "kohya"):
        pytest.skip("the other backbone shows it")
    config = config.copy_and_resolve_references()
    config.train.lora_rank, config.export.lora = 4, layout
    load = backbones.backbone_class(config).load
    base = load(config.backbone.path).params["unet"]
    first = restore_denoiser([(adapted / "round_000/checkpoints", 3)], base)
    second = lora.init_adapters(jax.random.key(1), base, rank=4)
    second = {name: pair | {"B": 0.1 * jnp.ones_like(pair["B"])} for name, pair in second.items()}
    tuned = lora.merge(first, second)
    with Checkpoints(adapted / "round_001" / "checkpoints") as checkpoints:
        checkpoints.save(3, {"params": tuned, "adapters": second})
    export.main(config, adapted, round_index=1, verify=True)
    assert "verified" in capsys.readouterr().err
    file = adapted / "round_001/export"
    ours = load(config.backbone.path, lora=[(file, 1.0)]).params["unet"]
    assert distance(ours, tuned) < 1e-5 * distance(base, tuned)
    assert distance(first, base) > 0.1 * distance(base, tuned)


@of_one_backbone
def test_adapters_of_text_encoders_are_written(config, tmp_path, capsys):
    """Of two rounds; and a step of the second that holds adapters alone, as a whole model."""
    config = config.copy_and_resolve_references()
    config.train.update(lora_rank=4, lora_text_encoder=True, embeddings="step")
    load = backbones.backbone_class(config).load
    base, ends, made = load(config.backbone.path).params, [], None
    names = [name for name in base if name.startswith(("unet", "text_encoder"))]
    text = {name: base[name] for name in names[1:]}
    for index, size in enumerate((0.1, 0.2)):
        spec = step_spec(config, round_index=index)
        made = jax.jit(lambda base, spec=spec: init_state(base, spec, text).params)(base["unet"])
        made = {name: pair | {"B": pair["B"] + size} for name, pair in made.items()}
        start = ends[-1] if ends else base
        parts = [lora.of_network(made, name if name != "unet" else "") for name in names]
        tuned = map(jax.jit(lora.merge), (start[name] for name in names), parts)
        ends.append(dict(zip(names, tuned, strict=True)))
        with Checkpoints(tmp_path / f"round_{index:03d}" / "checkpoints") as checkpoints:
            if index:
                checkpoints.save(2, {"params": made})
            checkpoints.save(3, {"params": ends[-1]["unet"], "adapters": made})
    for layout, step in (("", "2"), ("kohya" if len(names) > 2 else "diffusers", "last")):
        config.export.lora, config.export.output = layout, str(tmp_path / f"as {layout}")
        export.main(config, tmp_path, round_index=1, step=step, verify=True)
        assert "verified" in capsys.readouterr().err
        given = {"lora": [(config.export.output, 1.0)]} if layout else {}
        written = load(config.backbone.path if layout else config.export.output, **given).params
        for network in names:
            way = distance(base[network], ends[1][network])
            assert distance(ends[0][network], base[network]) > 0.1 * way
            assert distance(written[network], ends[1][network]) <= 1e-5 * way, network
        assert distance(written["vae"], base["vae"]) == 0


def distance(left, right):
    pairs = zip(*map(jax.tree.leaves, (left, right)), strict=True)
    return sum(float(np.sum((np.asarray(a) - np.asarray(b)) ** 2)) for a, b in pairs) ** 0.5


@of_one_backbone
def test_a_verification_fails_when_a_round_is_left_out(config, adapted, monkeypatch):
    config = config.copy_and_resolve_references()
    config.train.lora_rank, config.export.lora = 4, "kohya"
    monkeypatch.setattr(
        export,
        "restore_adapters",
        lambda *args: jax.tree.map(jnp.zeros_like, restore_adapters(*args)),
    )
    with pytest.raises(ValueError, match="lacks 100.00% of what was trained"):
        export.main(config, adapted, verify=True)


@of_one_backbone
def test_a_verification_fails_when_the_base_is_written(config, trained, monkeypatch):
    """diffusers and we would draw the same from it."""
    config = config.copy_and_resolve_references()
    seen = []

    def restore(trained, params, name, alone=False):
        seen.append(1)
        return params if len(seen) == 1 else restore_trained(trained, params, name, alone)

    monkeypatch.setattr(export, "restore_trained", restore)
    with pytest.raises(ValueError, match="does not hold the checkpoint's model: .* tensors diff"):
        export.main(config, trained, verify=True)


@of_one_backbone
def test_a_step_that_is_named_is_exported(config, trained):
    params = backbones.backbone_class(config).load(config.backbone.path).params["unet"]
    with Checkpoints(trained / "round_000/checkpoints", keep=3, best="vqa") as checkpoints:
        for step, scale, vqa in ((4, 1.2, 0.9), (5, 1.3, 0.8)):
            scaled = jax.tree.map(lambda leaf, by=scale: leaf * by, params)
            checkpoints.save(step, {"params": scaled}, metrics={"vqa": vqa})
    config = config.copy_and_resolve_references()
    config.train.update(num_steps=5, best="vqa")
    for step, scale in (("last", 1.3), ("best", 1.2), ("3", 1.1)):
        config.export.output = str(trained / step)
        export.main(config, trained, step=step)
        file = trained / step / "unet/diffusion_pytorch_model.safetensors"
        weight = load_file(file)["conv_in.bias"].numpy()
        np.testing.assert_allclose(weight, scale * params["conv_in"]["bias"][...], rtol=1e-6)


@of_one_backbone
def test_a_verification_fails_when_the_images_differ(config, trained, monkeypatch):
    draw = export._draw

    def dark(*args):
        image, noise = draw(*args)
        return image // 2, noise

    monkeypatch.setattr(export, "_draw", dark)
    with pytest.raises(ValueError, match=r"of 255 gray levels.*at most 2.*verify\.png"):
        export.main(config, trained, verify=True)


TOGETHER = """
import json, sys
from pathlib import Path
from agfsync_jax.parallel import multihost
multihost.initialize()
from ml_collections import ConfigDict
from agfsync_jax import export
config = ConfigDict(json.loads(Path(sys.argv[1]).read_text()))
export.main(config, Path(sys.argv[2]), verify=True)
print(json.dumps(multihost.is_main()))
"""


@pytest.mark.parametrize("layout", [pytest.param("", marks=pytest.mark.slow), "kohya"])
def test_two_processes_write_and_verify_one_model(config, adapted, layout):
    if config.backbone.name.endswith("xl"):
        pytest.skip("the other backbone shows it")
    config = config.copy_and_resolve_references()
    config.train.lora_rank, config.export.lora = 4, layout
    (adapted / "config.json").write_text(config.to_json())
    assert run_processes(TOGETHER, adapted / "config.json", adapted) == [True, False]
    assert (adapted / "round_000/export/verify.png").stat().st_size > 1000


def test_errors_come_before_any_work(config, trained, tmp_path):
    def attempt(**changes):
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
        export.main(changed, trained)

    with pytest.raises(ValueError, match="export.dtype=int8: expected one of float32"):
        attempt(export__dtype="int8")
    with pytest.raises(ValueError, match="export.lora=x: expected one of diffusers, kohya, peft"):
        attempt(export__lora="x")
    with pytest.raises(ValueError, match="lora_rank is 0: all of the denoiser was trained"):
        attempt(export__lora="kohya")
    with pytest.raises(ValueError, match="ends at step 3 of config.train.num_steps=4"):
        attempt(train__num_steps=4)
    with pytest.raises(FileNotFoundError, match="run `agfsync train` first"):
        export.main(config, tmp_path / "other")
