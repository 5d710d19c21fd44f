"""The rehearsal: every verb runs once with the least work, without weights if need be, and the
hours of the whole run are told."""

import json

import pytest

from agfsync_jax import cli, rehearsal
from agfsync_jax.rehearsal import Measured, amounts, shrink, table
from agfsync_jax.utils import configs
from agfsync_jax.weights import random_weights, skeletons

_TEXT = skeletons._CLIP_L | {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
_UNET = skeletons._UNET_SD1 | {
    "block_out_channels": [8],  # attention is in the middle alone: this is compiled sooner
    "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
_VAE = skeletons._VAE_SD | {
    "block_out_channels": [8],
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
_KIND = (
    skeletons._SD,
    skeletons._BARE,
    _UNET,
    _VAE,
    skeletons._PNDM,
    {"text_encoder": (_TEXT, "!")},
)
_LAYERS = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
_BLIP2 = {
    "model_type": "blip-2",
    "num_query_tokens": 4,
    "vision_config": _LAYERS | {"num_attention_heads": 2, "image_size": 224, "patch_size": 56},
    "qformer_config": _LAYERS | {"num_attention_heads": 2, "encoder_hidden_size": 16},
    "text_config": skeletons._FLAN_T5
    | {"d_model": 16, "d_ff": 16, "num_heads": 2, "d_kv": 8, "num_layers": 1}
    | {"num_decoder_layers": 1},
}


@pytest.fixture
def tiny(monkeypatch):
    """Released names of tiny sizes."""
    monkeypatch.setitem(skeletons._KINDS, "stable-diffusion-v1-5", _KIND)
    monkeypatch.setitem(skeletons.BLIP2, "blip2-flan-t5-xxl", _BLIP2)
    tower = {"layers": 1, "width": 16, "heads": 2}
    vision = {"layers": 1, "width": 16, "head_width": 8, "patch_size": 112, "image_size": 224}
    config = {"embed_dim": 768, "vision_cfg": vision, "text_cfg": tower}
    monkeypatch.setitem(random_weights._CLIPS, "clip-vit-large-patch14", config)


def test_a_released_config_without_weights(tiny, tmp_path, capsys):
    """What a user types who has neither weights nor prompts yet; sizes alone are others."""
    args = ["run", "--rehearse", "--random_weights", "--config=configs/sd15.py"]
    args += [f"--workdir={tmp_path}", "--config.sample.height=8", "--config.sample.width=8"]
    args += ["--config.sample.num_inference_steps=2", "--config.sample.device_batch_size=1"]
    args += ["--config.score.device_batch_size=1", "--config.train.batch_size=8"]
    args += ["--config.sample.num_candidates=4", "--config.rounds=2"]
    assert cli.main(args) == 0
    out, err = capsys.readouterr()
    folder = tmp_path / "rehearsal"
    assert "config.backbone.path: random numbers in a stable-diffusion-v1-5 in place of" in out
    rows = {line.split()[0]: line.split() for line in out[out.index(" did ") :].splitlines()[1:]}
    assert rows["sample"][1:3] == ["8", "images"] and rows["train"][1:3] == ["2", "steps"]
    assert rows["evaluate"][1:3] == ["16", "images"] and "together" in rows
    assert {"prompts", "questions", "score", "pair", "report", "export"} <= rows.keys()
    assert json.loads((folder / "config.json").read_text())["train"]["num_steps"] == 2
    assert (folder / "report.html").exists()
    assert (folder / "round_000/export/unet/diffusion_pytorch_model.safetensors").exists()
    assert not (tmp_path / "round_000").exists()  # nothing of the run itself
    assert cli.main([*args, "--config.backbone.kind="]) == 2
    assert "config.backbone.kind is empty" in capsys.readouterr().err


def test_random_weights_are_of_a_rehearsal(tmp_path, capsys):
    args = ["run", "--config=configs/micro.py", f"--workdir={tmp_path}", "--random_weights"]
    assert cli.main(args) == 2
    assert "agfsync run --rehearse --random_weights" in capsys.readouterr().err


def test_unknown_sizes_are_told(tmp_path):
    config = configs.load(
        "configs/sd15.py", {"scorers.vqa.path": "some/blip3", "scorers.clip.path": "some/clip9"}
    )
    with pytest.raises(ValueError, match="scorers.vqa.path=some/blip3") as told:
        rehearsal.invent(config, tmp_path)
    assert "scorers.clip.path=some/clip9" in str(told.value)


def test_the_least_work_fills_a_batch_of_every_verb():
    config = configs.load("configs/micro.py", {})
    config = config.unlock()
    config.sample.device_batch_size, config.score.device_batch_size = 2, 4  # on 8 devices
    small = shrink(config)
    assert small.prompts.num_prompts * small.sample.num_candidates == 32 == 4 * 8
    assert small.sample.prompts_per_shard == small.prompts.num_prompts
    assert small.evaluate.num_prompts * small.evaluate.num_seeds == 16 == 2 * 8
    assert (small.train.num_steps, small.train.batch_size) == (2, config.train.batch_size)
    same = ("backbone", "loss", "sample.num_inference_steps", "train.optimizer", "scorers")
    for key in same:
        whole, least = config, small
        for part in key.split("."):
            whole, least = whole[part], least[part]
        assert str(whole) == str(least), key


def test_no_pair_is_held_out_of_the_few_of_a_rehearsal():
    changes = {"train.held_out": "0.1", "train.validate_every": "50", "train.patience": "3"}
    config = configs.load("configs/micro.py", changes | {"train.best": "held_out/loss"})
    small = shrink(config)
    assert (small.train.held_out, small.train.best, small.train.patience) == (0, "", 0)
    assert small.train.validate_every == 2
    config.train.num_validation_prompts = 0
    assert shrink(config).train.validate_every == 0


def test_the_table_tells_the_whole_run():
    config = configs.load("configs/micro.py", {})  # 384 prompts, 8 candidates, 200 steps
    least = amounts(config) | {"sample": 64, "train": 2}
    rows = [
        Measured("sample", 10.0, 5.0, 2**30, None),
        Measured("train", 4.0, 30.0, 2**31, 2**32),
        Measured("report", 1.0, 2.0, None, None),
    ]
    text = table(rows, amounts(config), least, {"sample": 0.1}, rounds=2)
    by_verb = {line.split("  ")[0]: line for line in text.splitlines()}
    # 2 x (5 + 48 x 10) s, 2 x (30 + 100 x 4) s, 2 x 3 s
    assert "64 images" in by_verb["sample"] and "6.4" in by_verb["sample"]
    assert "16 min" in by_verb["sample"] and "12 min" in by_verb["sample"]
    assert "14 min" in by_verb["train"] and "4.00 GiB" in by_verb["train"]
    assert "6 s" in by_verb["report"]
    assert "31 min" in by_verb["together"]


def test_spans_that_overlap_count_once():
    assert rehearsal._union([(0, 2), (1, 3), (1.5, 1.7), (5, 6)]) == 4
    assert rehearsal._union([]) == 0
