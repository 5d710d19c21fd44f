"""`agfsync pair`: from scores to a TFDS dataset of pairs, again and again without scoring."""

import json

import numpy as np
import pytest

from agfsync_jax import pair
from agfsync_jax.data import images, records
from agfsync_jax.data.tokenizers import ClipTokenizer
from configs import common, micro
from tests.twins import clip_tokenizer_files

PROMPTS = {f"p{n}": f"{'red' if n % 2 else 'blue'} square" for n in range(5)}
# p3's are all equal; p4 has one that is a number
VQA = {
    "p0": [0.1, 0.9, 0.5],
    "p1": [1.0, 0.0, 0.5],
    "p2": [0.5, 0.5, 0.6],
    "p3": [0.7, 0.7, 0.7],
    "p4": [0.4, float("nan"), float("nan")],
}


@pytest.fixture
def config(tmp_path):
    clip_tokenizer_files(tmp_path / "model" / "tokenizer", ("red", "blue", "square"))
    index = {"_class_name": "StableDiffusionPipeline"}
    (tmp_path / "model" / "model_index.json").write_text(json.dumps(index))
    config = micro.get_config("tiny")
    config.backbone.path = str(tmp_path / "model")
    config.pair = common.get_config().pair
    config.pair.weights = {"vqa": 1.0}
    return config


@pytest.fixture
def workdir(tmp_path):
    folder = tmp_path / "work" / "round_000"
    rows = [
        {"id": i, "prompt": text, "category": "", "source": "test"} for i, text in PROMPTS.items()
    ]
    records.write_jsonl(folder / "prompts.jsonl", rows)
    for shard, ids in enumerate((["p0", "p1"], ["p2", "p3", "p4"])):
        name = records.shard_name(shard, 2)
        keys = [{"prompt_id": i, "candidate": c} for i in ids for c in range(3)]
        candidates = [
            key | {"seed": 0, "image": picture(**key), "latents": latents(**key).astype(np.float16)}
            for key in keys
        ]
        path = folder / "candidates" / f"{name}.tfrecord"
        records.write_shard(path, candidates, records.CANDIDATE_FEATURES)
        scores = [key | {"vqa": VQA[key["prompt_id"]][key["candidate"]]} for key in keys]
        records.write_parquet(folder / "scores" / f"{name}.parquet", scores)
        records.write_parquet(folder / "scores" / f"answers-{name}.parquet", [{"a": 1}])
    return folder.parent


def latents(prompt_id, candidate):
    return np.full((2, 3, 4), 10 * int(prompt_id[1:]) + candidate)


def picture(prompt_id, candidate):
    return images.encode_png(latents(prompt_id, candidate)[:, :, :3].astype(np.uint8))


def read(workdir):
    pairs = records.read_pairs(workdir / "round_000/pairs")
    return [dict(zip(pairs, row, strict=True)) for row in zip(*pairs.values(), strict=True)]


def counts(workdir):
    return json.loads((workdir / "round_000/pair.json").read_text())


def test_best_against_worst(config, workdir, capsys):
    pair.main(config, workdir)
    rows = read(workdir)
    assert [row["pair_id"] for row in rows] == ["p0-0-1", "p1-0-1", "p2-0-2"]
    tokenize = ClipTokenizer(f"{config.backbone.path}/tokenizer")
    for row, (chosen, rejected) in zip(rows, [(1, 0), (0, 1), (2, 0)], strict=True):
        prompt_id = row["prompt_id"]
        assert row["prompt"] == PROMPTS[prompt_id]
        np.testing.assert_array_equal(row["token_ids"], tokenize([row["prompt"]])[0])
        for side, candidate in (("chosen", chosen), ("rejected", rejected)):
            assert row[f"{side}_candidate"] == candidate
            assert row[f"{side}_image"] == picture(prompt_id, candidate)
            np.testing.assert_array_equal(row[f"{side}_latents"], latents(prompt_id, candidate))
        assert row["margin"] > 0
        np.testing.assert_allclose(
            row["margin"], row["chosen_score"] - row["rejected_score"], rtol=1e-6
        )
    found = counts(workdir)
    expected = dict(pairs=3, prompts=5, ties=1, margin=0, limit=0, nonfinite=2, too_few=1)
    assert {key: found[key] for key in expected} == expected
    assert "3 pairs from 5 prompts; dropped: 1 ties" in capsys.readouterr().err


def test_tfds_reads_the_pairs(config, workdir):
    tfds = pytest.importorskip("tensorflow_datasets")
    pair.main(config, workdir)
    dataset = tfds.builder_from_directory(workdir / "round_000/pairs").as_dataset(split="train")
    rows = list(tfds.as_numpy(dataset))
    assert sorted(row["pair_id"].decode() for row in rows) == ["p0-0-1", "p1-0-1", "p2-0-2"]
    assert rows[0]["chosen_latents"].dtype == np.float16


def test_pairing_again(config, workdir, capsys):
    pair.main(config, workdir)
    made = counts(workdir)
    capsys.readouterr()
    pair.main(config, workdir)
    assert "skipped 1 of 1" in capsys.readouterr().err and counts(workdir) == made
    config.pair.strategy = "all_above_margin"
    pair.main(config, workdir)
    assert [row["pair_id"] for row in read(workdir)] == [
        *("p0-0-1", "p0-1-2", "p0-0-2"),
        *("p1-0-1", "p1-0-2", "p1-1-2"),
        *("p2-0-2", "p2-1-2"),
    ]
    assert counts(workdir)["ties"] == 4
    config.pair.max_pairs = 1
    pair.main(config, workdir)
    assert counts(workdir)["pairs"] == 3 and counts(workdir)["limit"] == 5


def test_a_killed_run_is_made_whole(config, workdir):
    pair.main(config, workdir)
    whole = read(workdir)
    (workdir / "round_000/pair.json").unlink()
    pair.main(config, workdir)
    assert [row["pair_id"] for row in read(workdir)] == [row["pair_id"] for row in whole]
    path = next((workdir / "round_000/pairs").glob("*.tfrecord-*"))
    path.write_bytes(path.read_bytes()[:-9])
    pair.main(config, workdir, repair=True)
    assert [row["pair_id"] for row in read(workdir)] == [row["pair_id"] for row in whole]


def test_shuffled_labels_are_the_same_pairs(config, workdir):
    pair.main(config, workdir)
    straight = {row["pair_id"]: row for row in read(workdir)}
    config.pair.shuffle_labels = True
    swaps = set()
    for seed in range(6):
        config.seed = seed
        pair.main(config, workdir)
        for row in read(workdir):
            before = straight[row["pair_id"]]
            swapped = row["chosen_candidate"] == before["rejected_candidate"]
            swaps.add(swapped)
            np.testing.assert_allclose(row["margin"], before["margin"] * (-1 if swapped else 1))
            source = before["rejected_latents" if swapped else "chosen_latents"]
            np.testing.assert_array_equal(row["chosen_latents"], source)
    assert swaps == {True, False}


def test_errors(config, workdir):
    config.pair.normalize = "softmax"
    with pytest.raises(ValueError, match="normalize='softmax'"):
        pair.main(config, workdir)
    config.pair.normalize = "none"
    config.pair.weights = {"clip": 1.0}
    with pytest.raises(ValueError, match="no column 'clip'"):
        pair.main(config, workdir)
    config.pair.weights = {"vqa": 1.0}
    config.pair.min_margin = 2.0
    with pytest.raises(ValueError, match=r"no pair is left of 5 prompts \(0 pairs.* 3 below the"):
        pair.main(config, workdir)
    config.pair.min_margin = 0.0
    assert not (workdir / "round_000/pairs").exists()
    (workdir / "round_000/scores/00001-of-00002.parquet").unlink()
    with pytest.raises(FileNotFoundError, match="run `agfsync score`"):
        pair.main(config, workdir)


def test_scores_of_other_candidates(config, workdir):
    folder = workdir / "round_000"
    path = folder / "candidates/00000-of-00002.tfrecord"
    rows = list(records.read_shard(path, records.CANDIDATE_FEATURES))
    records.write_shard(path, rows[:-3], records.CANDIDATE_FEATURES)
    with pytest.raises(ValueError, match=r"lacks 2 images that have scores, such as \('p1', 0\)"):
        pair.main(config, workdir)
    assert not (folder / "pairs").exists() and not (folder / "pair.json").exists()
