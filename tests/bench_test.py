"""The benchmarks, on a model of a few kilobytes: what they write, print and refuse."""

import json
import shutil

import pytest

from agfsync_jax import bench
from agfsync_jax.benches import Task, _models, score
from agfsync_jax.benches._results import figures, table
from configs import micro
from tests.twins import tiny_stable_diffusion, tiny_stable_diffusion_xl

SIDE = ["items_per_second", "seconds_per_step", "mfu", "peak_bytes", "compile_seconds"]


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Skeletons of tiny models among the kinds."""
    for kind, make in (("tiny", tiny_stable_diffusion), ("tiny-xl", tiny_stable_diffusion_xl)):
        make(tmp_path / "models" / kind)

    def write_skeleton(kind, folder):
        ignore = shutil.ignore_patterns("*.safetensors")
        shutil.copytree(tmp_path / "models" / kind, folder, ignore=ignore)

    monkeypatch.setattr(_models.skeletons, "KINDS", ("tiny", "tiny-xl"))
    monkeypatch.setattr(_models.skeletons, "write_skeleton", write_skeleton)
    config = micro.get_config()
    config.bench.model = "tiny"
    config.bench.repeats = 1
    config.bench.num_inference_steps = 2
    config.bench.batch_size = 2
    return config


def test_both_sides_load(config, tmp_path, capsys):
    bench.main(config, tmp_path, against="diffusers", json=True)
    found = json.loads((tmp_path / "bench" / "load-tiny.json").read_text())
    ours, theirs = found["turns"]
    assert (ours["by"], theirs["by"]) == ("agfsync", "diffusers")
    # Both hold every parameter of the files, in twice their precision.
    assert ours["held_bytes"] == theirs["held_bytes"] > 100_000
    *table, last = capsys.readouterr().out.strip().splitlines()
    assert json.loads(last) == found["result"]
    assert found["result"]["ours"]["items_per_second"] == 1 / ours["seconds"]
    assert found["result"]["ours"]["seconds_per_step"] is None
    assert found["result"]["ratio"]["median"] == theirs["seconds"] / ours["seconds"]
    assert [line.split("|")[1].strip() for line in table[2:4]] == ["agfsync", "diffusers"]
    assert not (tmp_path / "bench" / "tiny").exists()  # the weights are removed


@pytest.mark.slow
def test_both_sides_draw(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench.tempfile, "tempdir", str(tmp_path))
    config.bench.model = "tiny-xl"
    bench.main(config, None, stage="sample", against="diffusers", json=True)
    *table, last = capsys.readouterr().out.strip().splitlines()
    found = json.loads(last)
    assert list(found) == ["stage", "ours", "peer", "ratio", "device", "versions"]
    assert list(found["ours"]) == list(found["peer"]) == SIDE
    for side in (found["ours"], found["peer"]):
        assert side["mfu"] is None  # of a CPU the peak is not known
        assert side["items_per_second"] > 0 and side["seconds_per_step"] > 0
        assert side["peak_bytes"] > 0 and side["compile_seconds"] >= 0
    ratio = found["ours"]["items_per_second"] / found["peer"]["items_per_second"]
    assert found["ratio"] == dict.fromkeys(["median", "min", "max"], pytest.approx(ratio))
    assert sorted(found["versions"]) == ["diffusers", "flax", "jax", "torch"]
    assert "as fast" in table[-1]
    assert not list(tmp_path.glob("agfsync-*"))  # without a workdir nothing stays


def test_ours_alone(config, tmp_path, capsys):
    config.bench.sampler, config.bench.guidance_scale = "euler", 1.0
    bench.main(config, tmp_path, stage="sample", json=True)
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert found["peer"] is found["ratio"] is None
    assert (tmp_path / "bench" / "sample-tiny.json").exists()
    assert not (tmp_path / "bench" / "tiny").exists()


def test_utilization_is_of_the_devices_peak():
    rows = [
        {"by": by, "seconds": seconds, "step_seconds": 0.1, "peak_bytes": 5, "first_seconds": 9.0}
        for _ in range(3)
        for by, seconds in (("agfsync", 2.0), ("diffusers", 4.0))
    ]
    rows[2]["seconds"], rows[3]["seconds"] = 8.0, 4.0  # a slow turn of ours
    sides, device = ["agfsync", "diffusers"], "TPU v5 lite"
    task = Task("", "images", 8, 197e12, rows)
    result = figures(task, sides, device)
    assert result["ours"]["items_per_second"] == 4 and result["ours"]["mfu"] == 0.5
    assert result["ours"]["compile_seconds"] == 7 and result["peer"]["mfu"] == 0.25
    assert result["ratio"] == {"median": 2.0, "min": 0.5, "max": 2.0}
    shown = table(task, result, device, "diffusers")
    assert "| agfsync | 4 | 0.1 | 50.0% | 0.00 | 7.0 |" in shown
    assert "2.00 times as fast (0.50 to 2.00)" in shown


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("model", "sd9", "model=sd9: expected one of tiny, tiny-xl"),
        ("file_dtype", "int8", "file_dtype=int8: expected one of float32"),
        ("dtype", "int8", "dtype=int8: expected one of float32"),
        ("repeats", 0, "repeats=0: expected at least 1"),
        ("sampler", "magic", "'magic' is not in agfsync_jax/samplers"),
    ],
)
def test_settings_that_cannot_be(config, tmp_path, key, value, message):
    config.bench[key] = value
    with pytest.raises(ValueError, match=message):
        bench.main(config, tmp_path, stage="sample")
    assert not (tmp_path / "bench").exists()


def test_a_size_that_cannot_be(config, tmp_path):
    config.bench.height = 30
    with pytest.raises(ValueError, match="Images of 30x32 pixels cannot be drawn"):
        bench.main(config, tmp_path, stage="sample")
    assert not (tmp_path / "bench" / "tiny").exists()


def test_a_peer_that_is_not_there(config, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="--against=keras: expected diffusers"):
        bench.main(config, tmp_path, against="keras")
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs torch: pip install 'agfsync_jax\[torch\]'"):
        bench.main(config, tmp_path, against="diffusers")


def test_a_side_that_fails_says_why(config, tmp_path, monkeypatch):
    write = _models.write_tensors

    def cut_off(path, tensors):
        write(path, tensors)
        if path.parent.name == "unet":
            path.write_bytes(b"cut")

    monkeypatch.setattr(_models, "write_tensors", cut_off)
    with pytest.raises(ValueError, match="agfsync failed in `load`: .*unet"):
        bench.main(config, tmp_path)
    assert not (tmp_path / "bench" / "tiny").exists()


@pytest.mark.slow
def test_both_sides_score(tmp_path, capsys):
    """The shipped models, beside transformers with the same weights: the same answers."""
    config = micro.get_config()
    config.bench.repeats, config.bench.num_prompts, config.bench.num_candidates = 1, 2, 2
    config.bench.num_questions = 3
    bench.main(config, tmp_path, stage="score", against="reference", json=True)
    *table, last = capsys.readouterr().out.strip().splitlines()
    found = json.loads(last)
    assert list(found) == ["stage", "ours", "peer", "ratio", "tasks", "device", "versions"]
    assert list(found["tasks"]) == ["vqa", "clip, aesthetic"]
    assert found["ratio"] == found["tasks"]["vqa"]["ratio"]
    for task in found["tasks"].values():
        assert list(task["ours"]) == list(task["peer"]) == SIDE
        assert task["ratio"]["median"] > 0
    assert "12 of 12 answers are the same" in table
    apart = [float(line.split()[-2]) for line in table if "at most" in line]
    assert len(apart) == 2 and max(apart) < 1e-3
    kept = json.loads((tmp_path / "bench" / "score-scorers.json").read_text())
    assert kept["result"] == found and len(kept["turns"]["vqa"]) == 2


def test_both_sides_find_the_same_duplicates(tmp_path, capsys):
    config = micro.get_config()
    config.bench.repeats, config.bench.num_texts, config.bench.text_width = 2, 300, 24
    bench.main(config, tmp_path, stage="duplicates", against="reference", json=True)
    *table, last = capsys.readouterr().out.strip().splitlines()
    found = json.loads(last)
    assert list(found["ours"]) == list(found["peer"]) == SIDE
    assert "texts/s" in table[0] and "the kept texts are the same in 2 of 2 turns" in table
    (share,) = (int(line.split()[-6].rstrip("%")) for line in table if "were dropped" in line)
    assert 5 < share < 50
    turns = json.loads((tmp_path / "bench" / "duplicates-texts.json").read_text())["turns"]
    assert [row["by"] for row in turns] == ["agfsync", "reference"] * 2


def test_requests_are_asked_and_kept(tmp_path, capsys):
    config = micro.get_config()
    config.bench.repeats, config.bench.num_requests, config.bench.concurrency = 2, 60, 8
    bench.main(config, tmp_path, stage="ask", json=True)
    *table, last = capsys.readouterr().out.strip().splitlines()
    assert list(json.loads(last)["ours"]) == SIDE and "requests/s" in table[0]
    assert any("memory grew by" in line for line in table)


def test_other_scorers_are_not_measured(tmp_path):
    config = micro.get_config()
    config.scorers = {"hps": {"name": "hpsv2", "path": ""}}
    with pytest.raises(ValueError, match="config.scorers has hpsv2"):
        bench.main(config, tmp_path, stage="score")
    assert set(score.TASKS) == {"vqa", "clip, aesthetic"}


@pytest.mark.parametrize("model, lora_rank", [("tiny", 0), ("tiny-xl", 2)])
@pytest.mark.slow
def test_both_sides_train(config, tmp_path, capsys, model, lora_rank):
    config.bench.model, config.bench.num_train_steps = model, 2
    config.train.lora_rank, config.train.warmup_steps = lora_rank, 0
    bench.main(config, tmp_path, stage="train", against="diffusers", json=True)
    out = capsys.readouterr()
    *table, last = out.out.strip().splitlines()
    found = json.loads(last)
    assert list(found["ours"]) == list(found["peer"]) == SIDE
    assert "pairs/s" in table[0] and "as fast" in table[-1]
    turns = json.loads((tmp_path / f"bench/train-{model}.json").read_text())["turns"]
    for row in turns:  # after a few steps policy and reference are still about the same
        assert row["loss"] == pytest.approx(0.6931, abs=0.01)
        assert row["step_seconds"] == row["seconds"] / 2
    assert not (tmp_path / "bench" / model).exists()
    config.loss.name = "ipo"
    with pytest.raises(ValueError, match="measures diffusion_dpo with adamw, not ipo"):
        bench.main(config, tmp_path, stage="train")
