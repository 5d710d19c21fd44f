"""`agfsync pair`: from scores to a TFDS dataset of pairs, again and again without scoring."""

import functools
import io
import json
import shutil

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps

from agfsync_jax import backbones, checks, cli, pair, report, train
from agfsync_jax.backbones.stable_diffusion import StableDiffusion
from agfsync_jax.data import images, preferences, records
from agfsync_jax.data.pair_rows import text_fields
from agfsync_jax.data.pairs import read_features, read_pairs
from agfsync_jax.data.scores import check_scored, scored_round
from agfsync_jax.data.tokenizers import ClipTokenizer
from agfsync_jax.reports.candidates import read_gallery
from agfsync_jax.utils import configs
from agfsync_jax.utils.clock import Progress
from agfsync_jax.utils.metrics import read_metrics
from configs import common, micro
from tests.tiny_backbone import TinyBackbone
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
        scores = [key | score(**key) for key in keys]
        records.write_parquet(folder / "scores" / f"{name}.parquet", scores)
        answers = [answer(key, index) for key in keys for index in range(2 + (shard == 0))]
        records.write_parquet(folder / "scores" / f"answers-{name}.parquet", answers)
    return folder.parent


def score(prompt_id, candidate):
    """A column that counts, and two that do not."""
    vqa = VQA[prompt_id][candidate]
    return {"vqa": vqa, "vqa/color": vqa / 2, "clip": 20.0 + candidate}


def answer(key, index):
    asked = {"scorer": "vqa", "index": index, "question": "?", "element_type": "color"}
    return key | asked | {"expected": "yes", "answer": "no", "p_yes": 0.1, "correct": False}


def change_answers(workdir, change):
    """Answers of every shard, as `change` makes them."""
    for path in (workdir / "round_000/scores").glob("answers-*.parquet"):
        records.write_parquet(path, [change(row) for row in records.read_parquet(path)])


def latents(prompt_id, candidate):
    return np.full((2, 3, 4), 10 * int(prompt_id[1:]) + candidate)


def picture(prompt_id, candidate):
    return images.encode_png(latents(prompt_id, candidate)[:, :, :3].astype(np.uint8))


def read(workdir):
    pairs = read_pairs(workdir / "round_000/pairs")
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
    assert {key: found[key] for key in preferences.COUNTS} == (
        dict.fromkeys(preferences.COUNTS, 0) | expected
    )
    told = "3 pairs from 5 prompts; dropped: 1 prompts without two images that count, 2 candidates"
    assert told in capsys.readouterr().err
    for row, (chosen, rejected) in zip(rows, [(1, 0), (0, 1), (2, 0)], strict=True):
        for side, candidate in (("chosen", chosen), ("rejected", rejected)):
            for name, value in score(row["prompt_id"], candidate).items():
                assert row[f"{side}_scores/{name}"] == np.float32(value)


def test_ranked(config, workdir):
    config.pair.strategy = "ranked"
    pair.main(config, workdir)
    rows = read(workdir)
    assert [row["prompt_id"] for row in rows] == ["p0", "p1", "p2"]
    for row, order in zip(rows, [(1, 2, 0), (0, 2, 1), (2, 0, 1)], strict=True):
        assert row["candidates"].tolist() == list(order)
        values = [score(row["prompt_id"], candidate) for candidate in order]
        for name in values[0]:
            wanted = np.array([value[name] for value in values], np.float32)
            np.testing.assert_array_equal(row[f"columns/{name}"], wanted)
        wanted = preferences.normalize([value["vqa"] for value in values], "zscore")
        np.testing.assert_allclose(row["scores"], wanted, rtol=1e-6)
        np.testing.assert_allclose(row["margin"], wanted[0] - wanted[-1], rtol=1e-6)
        for candidate, image, latent in zip(order, row["images"], row["latents"], strict=True):
            assert image == picture(row["prompt_id"], candidate)
            np.testing.assert_array_equal(latent, latents(row["prompt_id"], candidate))
    assert counts(workdir)["pairs"] == 3 and counts(workdir)["ties"] == 1
    with pytest.raises(ValueError, match="holds rankings, and config.loss.name wants pairs"):
        train.main(config, workdir)


def test_top_k_bottom_k_without_images(config, workdir):
    config.pair.update(strategy="top_k_bottom_k", k=1, images=False)
    pair.main(config, workdir)
    rows = read(workdir)
    assert [row["pair_id"] for row in rows] == ["p0-0-1", "p1-0-1", "p2-0-2"]
    assert not [name for name in rows[0] if "image" in name]


def test_answers_that_are_missing(config, workdir):
    """p0's best candidate could not be asked all; p2, p3, p4 were asked two questions."""

    def silence(row, scorer="vqa"):
        silent = (row["prompt_id"], row["candidate"], row["index"]) == ("p0", 1, 2)
        return row | {"scorer": scorer} | ({"answer": None} if silent else {})

    change_answers(workdir, silence)
    pair.main(config, workdir)
    assert [row["pair_id"] for row in read(workdir)] == ["p0-0-2", "p1-0-1", "p2-0-2"]
    assert counts(workdir)["unanswered"] == 1
    config.pair.min_questions = 3
    pair.main(config, workdir)
    assert [row["pair_id"] for row in read(workdir)] == ["p0-0-2", "p1-0-1"]
    found = counts(workdir)
    assert (found["few_questions"], found["nonfinite"], found["too_few"]) == (3, 0, 0)
    # a scorer without a weight may leave out what it likes
    change_answers(workdir, functools.partial(silence, scorer="other"))
    pair.main(config, workdir)
    assert read(workdir)[0]["pair_id"] == "p0-0-1" and not counts(workdir)["unanswered"]
    for path in (workdir / "round_000/scores").glob("answers-*.parquet"):
        path.unlink()
    with pytest.raises(ValueError, match="min_questions=3: .*scores has no answers"):
        pair.main(config, workdir)
    config.pair.min_questions = 0
    pair.main(config, workdir)
    assert counts(workdir)["pairs"] == 3


def test_the_card_tells_how_they_were_made(config, workdir):
    config.pair.license = "cc-by-4.0"
    pair.main(config, workdir)
    card = (workdir / "round_000/pairs/README.md").read_text()
    for text in (
        'license: "cc-by-4.0"',
        "| `pair.strategy` | `best_worst` |",
        '| `pair.weights` | `{"vqa": 1.0}` |',
        f"| `backbone.path` | `{config.backbone.path}` |",
        f"| `sample.num_inference_steps` | `{config.sample.num_inference_steps}` |",
        "| `prompts there were` | `5` |",
        "| `candidates with a score that is not finite` | `2` |",
        "| `chosen_scores/vqa/color` | `float32` | `[]` |",
    ):
        assert text in card


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


def test_former_pairs_stay_until_the_new_ones_are_whole(config, workdir, monkeypatch):
    pair.main(config, workdir)
    whole, summary = read(workdir), workdir / "round_000/pair.json"
    before = summary.read_text()
    rows = pair.pair_rows

    def stopped(*args, **kwargs):
        yield next(iter(rows(*args, **kwargs)))
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(pair, "pair_rows", stopped)
        config.pair.normalize = "rank"
        with pytest.raises(KeyboardInterrupt):
            pair.main(config, workdir)
    assert [row["pair_id"] for row in read(workdir)] == [row["pair_id"] for row in whole]
    assert summary.read_text() == before
    pair.main(config, workdir)
    assert json.loads(summary.read_text())["settings"]["normalize"] == "rank"
    assert not list((workdir / "round_000").glob("*.aside"))


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
    config.pair.weights = {"aesthetic": 1.0}
    with pytest.raises(ValueError, match="no column 'aesthetic'.*they have vqa, vqa/color, clip"):
        pair.main(config, workdir)
    config.pair.weights = {"vqa": 1.0}
    config.pair.min_margin = 2.0
    with pytest.raises(ValueError, match=r"left of 5 prompts \(0 pairs.* 3 below the.*margin .2.0"):
        pair.main(config, workdir)
    config.pair.min_questions = 99
    with pytest.raises(ValueError, match=r"no pair is left .*lower config.pair.min_questions .99"):
        pair.main(config, workdir)
    config.pair.min_questions = 0
    config.pair.min_margin = 0.0
    assert not (workdir / "round_000/pairs").exists()
    (workdir / "round_000/scores/00001-of-00002.parquet").unlink()
    with pytest.raises(FileNotFoundError, match="run `agfsync score`"):
        pair.main(config, workdir)


def test_shards_with_other_columns(config, workdir):
    path = workdir / "round_000/scores/00001-of-00002.parquet"
    rows = [{k: v for k, v in row.items() if k != "clip"} for row in records.read_parquet(path)]
    records.write_parquet(path, rows)
    with pytest.raises(ValueError, match="00000-of-00002 has the columns vqa, vqa/color, clip, 0"):
        pair.main(config, workdir)


def test_scores_of_other_candidates(config, workdir):
    folder = workdir / "round_000"
    path = folder / "candidates/00000-of-00002.tfrecord"
    rows = list(records.read_shard(path, records.CANDIDATE_FEATURES))
    other = [row | {"prompt_id": "other"} for row in rows[-3:]]
    records.write_shard(path, rows[:-3] + other, records.CANDIDATE_FEATURES)
    with pytest.raises(ValueError, match=r"lacks 2 images that have scores, such as \('p1', 0\)"):
        pair.main(config, workdir)
    assert not (folder / "pairs").exists() and not (folder / "pair.json").exists()


# Embeddings and images, encoded by the model that ships


@pytest.fixture
def micro_config(config):
    config.backbone.path = "micro:stable-diffusion"
    return config


def test_embeddings_are_stored(micro_config, workdir):
    micro_config.pair.embeddings = True
    pair.main(micro_config, workdir)
    name = "embeddings/encoder_hidden_states"
    found = read_pairs(workdir / "round_000/pairs", ["prompt", "token_ids"], once=[name])
    backbone = StableDiffusion.load("micro:stable-diffusion")
    np.testing.assert_array_equal(found["token_ids"], backbone.tokenize(found["prompt"]))
    encode = jax.jit(backbone.encode_prompt)
    wanted = encode(backbone.params, found["token_ids"])["encoder_hidden_states"]
    assert found[name].dtype == np.float16 and wanted.dtype == np.float32
    np.testing.assert_allclose(found[name][found["prompt_row"]], wanted, rtol=1e-3, atol=1e-4)
    assert read_features(workdir / "round_000/pairs")[name] == ("float16", wanted.shape[1:])


@pytest.mark.parametrize("ranked", [False, True])
def test_latents_of_mirrored_images_are_stored(micro_config, workdir, ranked):
    """Those that the model's encoder makes of them, for each candidate its own."""

    def drawn(row):
        return row | {
            "image": images.encode_png(square(int(row["prompt_id"][1:]) * 3 + row["candidate"]))
        }

    for path in (workdir / "round_000/candidates").iterdir():
        rows = [drawn(row) for row in records.read_shard(path, records.CANDIDATE_FEATURES)]
        records.write_shard(path, rows, records.CANDIDATE_FEATURES)
    micro_config.pair.flips, micro_config.pair.images = True, False
    micro_config.pair.strategy = "ranked" if ranked else "best_worst"
    pair.main(micro_config, workdir)
    backbone = StableDiffusion.load("micro:stable-diffusion")
    every = np.stack([square(n) for n in range(15)])
    wanted = np.asarray(jax.jit(backbone.encode_image)(backbone.params, every[:, :, ::-1]))
    found = read(workdir)
    assert found
    for row in found:
        first = int(row["prompt_id"][1:]) * 3
        sides = (
            [("chosen", row["chosen_candidate"]), ("rejected", row["rejected_candidate"])]
            if not ranked
            else []
        )
        for side, candidate in sides:
            latents = row[f"{side}_latents_flipped"]
            assert latents.dtype == np.float16
            np.testing.assert_allclose(latents, wanted[first + candidate], rtol=2e-3, atol=2e-3)
        if ranked:
            for candidate, latents in zip(row["candidates"], row["latents_flipped"], strict=True):
                np.testing.assert_allclose(latents, wanted[first + candidate], rtol=2e-3, atol=2e-3)


def preference_table(count):
    rows = {name: [] for name in ("caption", "jpg_0", "jpg_1", "label_0")}
    for n in range(count):
        rows["caption"].append(f"a red square {n // 2}")
        for side in range(2):
            rows[f"jpg_{side}"].append({"bytes": images.encode_png(square(2 * n + side))})
        rows["label_0"].append([1.0, 0.0, 0.5][n % 3])
    return pa.table(rows)


def square(seed):
    return np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)


def test_an_import_is_trained_on(micro_config, tmp_path, monkeypatch, capsys):
    pq.write_table(preference_table(9), tmp_path / "human.parquet")
    config, workdir = micro_config, tmp_path / "work"
    config.pair.update(path=str(tmp_path / "human.parquet"), weights={}, flips=True)
    pair.main(config, workdir)
    rows = read(workdir)
    backbone = StableDiffusion.load("micro:stable-diffusion")
    encode = jax.jit(backbone.encode_image)
    wanted = encode(backbone.params, np.stack([square(n) for n in range(18)]))
    wanted = np.asarray(wanted, np.float16)
    mirrored = np.stack([square(n)[:, ::-1] for n in range(18)])
    mirrored = np.asarray(encode(backbone.params, mirrored), np.float16)
    assert [int(row["pair_id"].split("-")[1]) for row in rows] == [0, 1, 3, 4, 6, 7]
    for row in rows:
        number = int(row["pair_id"].split("-")[1])
        assert row["prompt"] == f"a red square {number // 2}"
        assert (row["chosen_score"], row["rejected_score"], row["margin"]) == (1, 0, 1)
        for side, i in (("chosen", number % 3), ("rejected", 1 - number % 3)):
            assert row[f"{side}_candidate"] == i
            latent = row[f"{side}_latents"]
            assert latent.dtype == np.float16
            np.testing.assert_allclose(latent, wanted[2 * number + i], rtol=2e-3, atol=2e-3)
            latent = row[f"{side}_latents_flipped"]
            np.testing.assert_allclose(latent, mirrored[2 * number + i], rtol=2e-3, atol=2e-3)
            np.testing.assert_array_equal(
                images.decode_png(row[f"{side}_image"]), square(2 * number + i)
            )
    assert len({row["prompt_id"] for row in rows}) == 4 and len(rows) == counts(workdir)["pairs"]
    found = {key: counts(workdir)[key] for key in preferences.COUNTS if counts(workdir)[key]}
    assert found == {"pairs": 6, "prompts": 5, "ties": 3}
    card = (workdir / "round_000/pairs/README.md").read_text()
    assert "| `pair.split` | `train` |" in card and "| `ties` | `3` |" in card
    assert "pair.weights" not in card
    capsys.readouterr()
    pair.main(config, workdir)
    assert "skipped 1 of 1" in capsys.readouterr().err

    monkeypatch.setattr(backbones, "backbone_class", lambda config: TinyBackbone)
    config.train.update(num_steps=2, batch_size=8, warmup_steps=0, flip=True)
    training = train.prepare(config, workdir / "round_000", [], None, 0)
    state, losses = training.state, []
    for index in range(2):
        state, metrics = training.step(state, index)
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(np.log(2), abs=1e-4)
    assert np.isfinite(losses[1]) and losses[1] != losses[0]


def of_shapes(path):
    """Choices of people, images of several shapes; the table."""
    sizes = [(60, 100), (64, 64), (61, 99), (100, 60), (64, 64)]  # height, width
    table = preference_table(15).to_pydict()
    for n in range(15):
        for side in range(2):
            shape = sizes[n % 5] if side else (sizes[n % 5][0] // 2, sizes[n % 5][1] // 2)
            pixels = np.random.default_rng(2 * n + side).integers(0, 256, (*shape, 3), np.uint8)
            table[f"jpg_{side}"][n] = {"bytes": images.encode_png(pixels)}
    pq.write_table(pa.table(table), path)
    return table


def test_images_keep_their_shapes(tmp_path, monkeypatch, capsys):
    """From files to a training: a step has images of one shape, and is compiled once for each."""
    table, workdir = of_shapes(tmp_path / "human.parquet"), tmp_path / "work"
    people = {"pair.path": str(tmp_path / "human.parquet"), "pair.buckets": "16"}
    people |= {"pair.flips": "True", "sample.device_batch_size": "2"}
    typed = [f"--config.{key}={value}" for key, value in people.items()]
    assert cli.main(["pair", "--config=configs/micro.py:tiny", f"--workdir={workdir}", *typed]) == 0
    sizes = {"48x80": 4, "64x64": 4, "80x48": 2}
    told = capsys.readouterr().err
    assert "how many pairs have them: 48x80: 4, 64x64: 4, 80x48: 2\n" in told
    assert counts(workdir)["sizes"] == sizes
    card = (workdir / "round_000/pairs/README.md").read_text()
    assert "| `pairs of 48x80 pixels` | `4` |" in card
    rows = {int(row["pair_id"].split("-")[1]): row for row in read(workdir)}
    assert len(rows) == 10
    backbone = StableDiffusion.load("micro:stable-diffusion")
    encode = jax.jit(backbone.encode_image)
    for number in (1, 10):  # of two shapes, enlarged and cut
        row, size = rows[number], (48, 80) if number == 10 else (64, 64)
        for side in ("chosen", "rejected"):
            data = table[f"jpg_{row[f'{side}_candidate']}"][number]["bytes"]
            picture = Image.open(io.BytesIO(data))
            fitted = np.asarray(ImageOps.fit(picture, size[::-1], Image.Resampling.LANCZOS))
            np.testing.assert_array_equal(images.decode_png(row[f"{side}_image"]), fitted)
            both = np.stack([fitted, fitted[:, ::-1]])
            for name, wanted in zip(("", "_flipped"), encode(backbone.params, both), strict=True):
                found = row[f"{side}_latents{name}"]
                np.testing.assert_allclose(found, wanted, rtol=5e-3, atol=5e-3)

    monkeypatch.setattr(backbones, "backbone_class", lambda config: TinyBackbone)
    monkeypatch.setattr(train.program.flops, "peak", lambda kind: 1e12)
    config = configs.load("configs/micro.py:tiny", people)
    config.train.update(num_steps=6, batch_size=16, warmup_steps=0, save_every=6, flip=True)
    config.train.update(device_batch_size=1, schedule="constant")
    config.train.update(held_out=0.3, validate_every=6, num_validation_prompts=0)
    taken, compiling, fit = [], [], train.fit
    monkeypatch.setattr(Progress, "leave_out", lambda self, seconds: compiling.append(seconds))
    monkeypatch.setattr(
        train, "fit", lambda spec, training, *a: taken.append(training) or fit(spec, training, *a)
    )
    train.main(config, workdir)
    assert "images have 3 shapes: a batch has one of them" in capsys.readouterr().err
    (training,) = taken
    shapes = [training.batch(index)["chosen_latents"].shape[1:3] for index in range(6)]
    assert len(set(shapes)) == training.compiled_step._cache_size() == len(compiling) == 3
    done = read_metrics(workdir / "round_000/checkpoints/metrics.jsonl")
    flops = [round(row["mfu"] * row["seconds"] * 8e12) for row in done]
    assert flops == [training.step_flops(index) for index in range(6)] and len(set(flops)) == 2
    assert np.isfinite(done[-1]["validation/held_out/loss"])

    report.main(config, workdir, stage="pair")
    page = (workdir / "round_000/pairs.html").read_text()
    assert "10 pairs, by height x width" in page and "<td>80x48" in page
    config.train.inversion_steps = 10
    with pytest.raises(ValueError, match="wants images of one shape, and these pairs have 3"):
        train.prepare(config, workdir / "round_000", [], None, 0)


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_pairs_of_another_workdirs_candidates(config, workdir, tmp_path, capsys):
    """Which are read where they lie; other settings make other pairs of them."""
    before, scored = files_of(workdir), workdir / "round_000"
    (workdir / "config.json").write_text('{"sample": {"height": 48}}')
    other = tmp_path / "other"
    config.pair.path = str(scored)
    pair.main(config, other)
    assert f"pairs of the candidates in {scored}" in capsys.readouterr().err
    assert before.items() <= files_of(workdir).items() and not (scored / "pairs").exists()
    card = (other / "round_000/pairs/README.md").read_text()
    assert "AI feedback" in card and "sample.height` | `48`" in card and "sample.width" not in card
    there = read(other)
    pair.main(config, other)
    assert "skipped 1 of 1 sets of pairs" in capsys.readouterr().err
    config.pair.path = ""
    pair.main(config, workdir)
    for row, same in zip(there, read(workdir), strict=True):
        assert all(np.array_equal(row[name], same[name]) for name in row)

    config.pair.update({"path": str(scored), "strategy": "ranked", "min_questions": 3})
    pair.main(config, other)
    assert [row["pair_id"] for row in read(other)] == ["p0-0-1-2", "p1-0-1-2"]
    config.pair.update({"strategy": "best_worst", "min_questions": 0, "images": False})
    pair.main(config, other)
    shown = read_gallery(other / "round_000", {}, 2, seed=0)
    assert not shown.is_import and set(shown.scores) == {"vqa", "clip"}
    sides = [each["sides"] for group in shown.examples.values() for each in group]
    assert all(side["png"] and side["answers"] for pair in sides for side in pair)
    (other / "config.json").write_text(json.dumps({"pair": {"path": str(scored)}}))
    report.main(config, other)
    page = (other / "report.html").read_text()
    assert "evaluate)" in page and "scores (agfsync score)" not in page


def test_candidates_of_another_workdir_that_are_not_scored(config, workdir, tmp_path):
    scored = workdir / "round_000"
    config.pair.path = str(scored)
    assert list(checks.files(config, "run", downloads=False)) == []
    assert scored_round(tmp_path, scored) is None and scored_round("", scored) == scored
    with pytest.raises(ValueError, match="names light, and the scores of .* are vqa, vqa/color, c"):
        check_scored(scored, {"light": 1.0, "none": 0.0})
    (scored / "scores/00001-of-00002.parquet").unlink()
    with pytest.raises(FileNotFoundError, match="lacks 1 of 2 shards.*run `agfsync score`"):
        pair.main(config, tmp_path / "other")
    (line,) = checks.files(config, "run", downloads=False)
    assert str(scored) in line and "run `agfsync score` to make them" in line
    shutil.rmtree(scored / "scores")
    (line,) = checks.files(config, "run", downloads=False)
    assert line == f"No shard in {scored}/scores: run `agfsync score` first."
    (scored / "candidates/00000-of-00002.tfrecord").unlink()
    (line,) = checks.files(config, "run", downloads=False)
    assert "run `agfsync sample` to make them" in line


def test_what_is_judged_is_no_prompt_of_the_candidates(config, workdir):
    config.pair.path = str(workdir / "round_000")
    assert list(checks.prompts(config, "run", 0, workdir)) == []
    (row,) = list(checks.held_out(config, workdir)[0].values())[:1]
    records.write_jsonl(workdir / "round_000/prompts.jsonl", [row])
    (line,) = checks.prompts(config, "run", 0, workdir)
    assert "1 of 8 held-out prompts are among those that training draws" in line


class FirstChannels:
    """The first channels of every eighth pixel, in place of an autoencoder."""

    batch_size = 4

    def start(self, pictures):
        return np.repeat(pictures[:, ::8, ::8, :1], 4, axis=3) / 255.0


def test_imports_again_and_what_is_bad(config, tmp_path, monkeypatch):
    texts = functools.partial(text_fields, tokenize=backbones.tokenizer(config), encode=None)
    monkeypatch.setattr(pair, "_load_encoders", lambda *_, **__: (texts, FirstChannels()))
    config.pair.path = str(tmp_path / "human.parquet")
    workdir = tmp_path / "work"
    rows = preference_table(9)
    broken = rows["jpg_0"].to_pylist()
    broken[1] = {"bytes": b"no image"}
    rows = rows.set_column(1, "jpg_0", pa.array(broken))
    pq.write_table(rows, config.pair.path)
    with pytest.raises(ValueError, match="1 of 9 rows are bad, more than config.pair.max_bad=0.01"):
        pair.main(config, workdir)
    assert not (workdir / "round_000/pairs").exists()
    config.pair.max_bad = 0.2
    config.pair.images = False
    pair.main(config, workdir)
    straight = {row["pair_id"]: row for row in read(workdir)}
    assert (len(straight), counts(workdir)["bad_images"]) == (5, 1)
    config.pair.shuffle_labels = True
    pair.main(config, workdir)
    swapped = [straight[row["pair_id"]]["margin"] != row["margin"] for row in read(workdir)]
    assert 0 < sum(swapped) < 5
    config.pair.update(max_rows=3, max_bad=0.5)
    pair.main(config, workdir)
    assert counts(workdir)["pairs"] == 1
    config.pair.max_rows = 0
    config.pair.columns.caption = "text"
    with pytest.raises(ValueError, match="no column 'text'.*it has caption, jpg_0, jpg_1, label_0"):
        pair.main(config, workdir)
