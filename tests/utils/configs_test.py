import inspect

import pytest

from agfsync_jax import backbones
from agfsync_jax.training import program
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
        ("sample.height", "64.5", "sample.height=64.5: expected a whole number of at least 8"),
        ("train.learning_rate", "fast", "expected a finite number above 0"),
        ("pair.shuffle_labels", "maybe", "expected true or false"),
        ("sharding", "5", r"expected .path regex, axes. rules"),
    ],
)
def test_bad_overrides(key, text, message):
    with pytest.raises(ValueError, match=message):
        configs.load(MICRO, {key: text})


def test_every_key_has_a_meaning():
    """Which --help and the table of keys show."""
    told = configs.meanings()
    keys = configs.flatten(configs.load("configs/common.py", {}))
    together = ("mesh", "score.mesh", "pair.columns")  # blocks that are told in one comment
    assert not [key for key in keys if key not in told and key.rpartition(".")[0] not in together]


@pytest.mark.parametrize(
    ("overrides", "name", "beta"),
    [
        ({}, "diffusion_dpo", 5000.0),
        ({"loss.name": "hinge"}, "hinge", 5000.0),
        ({"loss.name": "mapo"}, "mapo", 0.1),
        ({"loss.name": "dspo"}, "dspo", 0.001),
        ({"loss.name": "agfsync_norm"}, "agfsync_norm", 1.0),
        ({"loss.name": "kto"}, "kto", 10000.0),
        ({"loss.beta": "70", "loss.name": "kto"}, "kto", 70.0),  # whichever comes first
        ({"loss.name": "kto", "loss.kto.beta": "70"}, "kto", 70.0),
    ],
)
def test_a_beta_belongs_to_its_loss(overrides, name, beta):
    config = configs.load("configs/sdxl.py", overrides)
    loss = program.step_spec(config).loss.formula
    assert config.loss.name == name and loss.func.__module__ == f"agfsync_jax.losses.{name}"
    defaults = {p.name: p.default for p in inspect.signature(loss.func).parameters.values()}
    assert (defaults | loss.keywords)["beta"] == beta


def test_a_loss_has_settings_of_its_own_alone():
    config = configs.load("configs/sd15.py", {"loss.name": "cdpo", "loss.label_smoothing": "0.3"})
    assert config.loss.cdpo.to_dict() == {"label_smoothing": 0.3}
    for overrides, said in (
        ({"loss.label_smoothing": "0.3"}, "is no key of the config; diffusion_dpo takes .*beta"),
        ({"loss.mapo.beta": "1"}, "config.loss.name is diffusion_dpo, and takes nothing of anoth"),
        ({"loss.name": "sft", "loss.beta": "1"}, "sft takes nothing"),
        ({"loss.name": "x", "loss.beta": "1"}, "'x' is not in agfsync_jax/losses"),
        ({"loss.beta": "much"}, "--config.loss.beta=much: expected float"),
    ):
        with pytest.raises(ValueError, match=said):
            configs.load("configs/sd15.py", overrides)


def test_pictures_that_a_model_is_judged_by_may_be_drawn_otherwise():
    config = configs.load("configs/sd15.py:lcm", {"evaluate.sample.num_inference_steps": "30"})
    judged = backbones.as_judged(config)
    assert (config.sample.sampler, config.sample.num_inference_steps) == ("lcm", 5)
    assert config.sample.lora and not config.backbone.lora and not judged.sample.lora
    assert (judged.sample.sampler, judged.sample.num_inference_steps) == ("", 30)
    assert judged.sample.guidance_scale == 4.5 and config.sample.guidance_scale == 1.0
    with pytest.raises(ValueError, match="evaluate.sample.num_candidates is no key"):
        configs.load("configs/sd15.py", {"evaluate.sample.num_candidates": "3"})


AGFSYNC = {"batch_size": 64, "num_steps": 1000, "learning_rate": 1e-6, "schedule": "cosine"}
DPO = {
    "batch_size": 2048,
    "num_steps": 2000,
    "learning_rate": 2.048e-5,  # 1e-8, scaled by what a step takes
    "schedule": "constant",
    "empty_prompts": 0.2,
    "flip": True,
}
ADAMW = {"optimizer": "adamw", "weight_decay": 0.01, "max_grad_norm": 1.0}
ADAFACTOR = {"optimizer": "adafactor", "weight_decay": 0.01, "max_grad_norm": 0.0}
LORA = {"lora_rank": 8, "learning_rate": 1e-5, "schedule": "constant", "warmup_steps": 0}
RECIPES = {
    "sd15.py": (2000.0, AGFSYNC | ADAMW),
    "sdxl.py": (5000.0, AGFSYNC | ADAMW),
    "sd14.py:dpo": (2000.0, DPO | ADAMW | {"warmup_steps": 500}),
    "sd15.py:dpo": (2000.0, DPO | ADAMW | {"warmup_steps": 500}),
    "sd21.py:dpo": (2000.0, DPO | ADAMW | {"warmup_steps": 500}),
    "sdxl.py:dpo": (5000.0, DPO | ADAFACTOR | {"warmup_steps": 200}),
    "sd14.py:lora": (5000.0, LORA | ADAMW | {"batch_size": 32, "num_steps": 10_000}),
    "sd15.py:lora": (5000.0, LORA | ADAMW | {"batch_size": 32, "num_steps": 10_000}),
    "sd21.py:lora": (5000.0, LORA | ADAMW | {"batch_size": 32, "num_steps": 10_000}),
    "sdxl.py:lora": (5000.0, LORA | ADAMW | {"batch_size": 16, "num_steps": 2000}),
}


@pytest.mark.parametrize("spec", RECIPES)
def test_recipes_are_those_that_were_published(spec):
    beta, wanted = RECIPES[spec]
    config = configs.load(f"configs/{spec}", {})
    got = {key: config.train[key] for key in wanted}
    for key, value in wanted.items():
        assert got[key] == (pytest.approx(value) if isinstance(value, float) else value), key
    assert config.loss.name == "diffusion_dpo"
    assert config.loss.get("diffusion_dpo", {}).get("beta", 2000.0) == beta
    assert config.pair.flips == config.train.flip


@pytest.mark.parametrize("spec", ["sd15.py:dpo,lora", "sdxl.py:lora,dpo", "sdxl.py:small,dpo"])
def test_two_ways_of_training_are_not_one(spec):
    with pytest.raises(ValueError, match="they are two ways of training, give one"):
        configs.load(f"configs/{spec}", {})
