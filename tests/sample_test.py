"""The sample verb, with a tiny random Stable Diffusion."""

import jax
import numpy as np
import pytest

from agfsync_jax import sample
from agfsync_jax.backbones.stable_diffusion import Backbone
from agfsync_jax.data import records
from agfsync_jax.data.images import decode_png
from agfsync_jax.diffusion.generation import row_seed
from agfsync_jax.utils.checkpoints import Checkpoints
from agfsync_jax.utils.clock import read_stages
from configs import micro
from tests.twins import tiny_stable_diffusion

PROMPTS = {"p0": "red circle", "p1": "blue square", "p2": "circle", "p3": "red", "p4": "blue"}


@pytest.fixture(scope="module", autouse=True)
def compile_once(tmp_path_factory):
    """As the command line does: a program is compiled once and kept for later runs."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in names]
    for name, value in zip(names, (str(tmp_path_factory.mktemp("programs")), 0.5), strict=True):
        jax.config.update(name, value)
    yield
    for name, value in zip(names, before, strict=True):
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stable_diffusion")
    tiny_stable_diffusion(folder)
    return folder


@pytest.fixture(scope="module")
def config(folder):
    config = micro.get_config("tiny")
    config.backbone.path = str(folder)
    config.sample.update({"height": 32, "width": 32, "num_inference_steps": 2})
    config.sample.update({"num_candidates": 3, "prompts_per_shard": 2, "batch_size": 8})
    return config


def start(workdir, round_index=0):
    rows = [{"id": i, "prompt": p, "category": "", "source": ""} for i, p in PROMPTS.items()]
    records.write_jsonl(workdir / f"round_{round_index:03d}" / "prompts.jsonl", rows)


def read(workdir, round_index=0):
    paths = sorted((workdir / f"round_{round_index:03d}" / "candidates").iterdir())
    rows = [r for path in paths for r in records.read_shard(path, records.CANDIDATE_FEATURES)]
    return [path.name for path in paths], rows


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, config):
    workdir = tmp_path_factory.mktemp("workdir")
    start(workdir)
    sample.main(config, workdir)
    return workdir


def test_candidates_of_every_prompt(workdir, config):
    names, rows = read(workdir)
    assert names == [f"0000{i}-of-00003.tfrecord" for i in range(3)]
    expected = [(prompt, candidate) for prompt in PROMPTS for candidate in range(3)]
    assert [(row["prompt_id"], row["candidate"]) for row in rows] == expected
    for row in rows:
        assert row["seed"] == row_seed(config.seed, 0, row["prompt_id"], row["candidate"])
        assert decode_png(row["image"]).shape == (32, 32, 3)
        assert row["latents"].shape == (16, 16, 4) and row["latents"].dtype == np.float16
    assert read_stages(workdir / "round_000" / "stages.json")["sample"]["items"] == 15


def test_only_candidates_after_the_first_are_perturbed(workdir, config, tmp_path):
    start(tmp_path)
    clean = config.copy_and_resolve_references()
    clean.sample.conditioning_noise = 0.0
    sample.main(clean, tmp_path)
    for noisy, without in zip(read(workdir)[1], read(tmp_path)[1], strict=True):
        distance = np.abs(noisy["latents"].astype(float) - without["latents"]).max()
        assert (distance > 0.01) == (noisy["candidate"] > 0)


def test_what_is_there_is_skipped_and_what_is_not_is_drawn_alike(workdir, config, capsys):
    folder = workdir / "round_000" / "candidates"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    kept, lost = "00000-of-00003.tfrecord", "00001-of-00003.tfrecord"
    (folder / lost).unlink()
    (folder / f"{lost}.aside").write_bytes(b"half a shard of a killed run")
    changed = (folder / kept).stat().st_mtime_ns
    sample.main(config, workdir)
    assert "skipped 2 of 3 shards" in capsys.readouterr().err
    assert (folder / kept).stat().st_mtime_ns == changed
    # Other rows shared its batch this time.
    assert (folder / lost).read_bytes() == before[lost]
    assert read(workdir)[0] == sorted(before)


def test_all_there_loads_no_model(workdir, config, capsys):
    other = config.copy_and_resolve_references()
    other.backbone.path = "no/such/folder"
    sample.main(other, workdir)
    assert "skipped 3 of 3 shards" in capsys.readouterr().err


def test_repair_draws_a_damaged_shard_anew(workdir, config):
    path = workdir / "round_000" / "candidates" / "00002-of-00003.tfrecord"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(records.RecordError):
        read(workdir)
    sample.main(config, workdir, repair=True)
    assert path.read_bytes() == whole


def test_a_later_round_draws_with_the_trained_denoiser(workdir, config, folder):
    unet = Backbone.load(folder).params["unet"]
    trained = jax.tree.map(lambda x: x * 1.2, unet)
    with Checkpoints(workdir / "round_000" / "checkpoints") as checkpoints:
        checkpoints.save(4, {"params": trained}, wait=True)
    start(workdir, 1)
    sample.main(config, workdir, round_index=1)
    first, second = read(workdir)[1], read(workdir, 1)[1]
    assert [row["seed"] for row in second] == [
        row_seed(config.seed, 1, row["prompt_id"], row["candidate"]) for row in first
    ]
    (workdir / "round_001" / "candidates" / "00000-of-00003.tfrecord").unlink()
    with Checkpoints(workdir / "round_000" / "checkpoints") as checkpoints:
        checkpoints.save(5, {"params": unet}, wait=True)
    sample.main(config, workdir, round_index=1)
    assert np.abs(read(workdir, 1)[1][0]["latents"] - second[0]["latents"]).max() > 0.01


def test_what_is_missing_is_said(config, tmp_path):
    with pytest.raises(FileNotFoundError, match="run `agfsync prompts` first"):
        sample.main(config, tmp_path)
    start(tmp_path, 1)
    with pytest.raises(FileNotFoundError, match="run `agfsync train` first"):
        sample.main(config, tmp_path, round_index=1)
    start(tmp_path)
    for key, value, message in (
        ("height", 30, "30x32 pixels"),
        ("sampler", "magic", "Unknown sampler 'magic'"),
        ("num_candidates", 0, "num_candidates=0"),
    ):
        wrong = config.copy_and_resolve_references()
        wrong.sample[key] = value
        with pytest.raises(ValueError, match=message):
            sample.main(wrong, tmp_path)
