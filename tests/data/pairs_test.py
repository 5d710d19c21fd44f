"""Pairs on disk: what is written is what TFDS reads, and what is read without TensorFlow."""

import errno
import html
import json
import os
import re

import numpy as np
import pytest

from agfsync_jax.data import images
from agfsync_jax.data import pairs as pairs_file
from agfsync_jax.data.pairs import (
    PAIR_FEATURES,
    pair_features,
    read_pairs,
    repair_pairs,
    write_pairs,
)
from agfsync_jax.data.records import RecordError

COLUMNS = ("vqa", "vqa/color", "vqa/color/a b")  # a column may be called as the start of another
EMBEDDINGS = {"encoder_hidden_states": (3, 4), "aesthetic_score": ()}
EVERYTHING = pair_features(columns=COLUMNS, embeddings=EMBEDDINGS)
RANKED = pair_features(ranked=True, columns=COLUMNS, embeddings=EMBEDDINGS)


def pairs(n=5, side=2):
    rng = np.random.default_rng(1)
    png = [images.encode_png(rng.integers(0, 256, (8, 8, 3), np.uint8)) for _ in range(2 * n)]
    return [
        {
            "pair_id": f"p{i}/0",
            "prompt_id": f"p{i // 2}",
            "prompt": "a réd circle",
            "token_ids": np.arange(i, i + 7, dtype=np.int32),
            "chosen_latents": rng.normal(size=(side, side, 4)).astype(np.float16),
            "rejected_latents": rng.normal(size=(side, side, 4)).astype(np.float16),
            "chosen_candidate": i,
            "rejected_candidate": i + 1,
            "chosen_image": png[2 * i],
            "rejected_image": png[2 * i + 1],
            "chosen_score": 0.1 * i,
            "rejected_score": -0.5,
            "margin": 0.1 * i + 0.5,
        }
        for i in range(n)
    ]


def embeddings(row):
    """What the prompt of a row is encoded to."""
    rng = np.random.default_rng(int(row["prompt_id"][1:]))
    return {
        f"embeddings/{name}": rng.normal(size=shape).astype(np.float16)
        for name, shape in EMBEDDINGS.items()
    }


def pairs_with_everything():
    rng = np.random.default_rng(2)
    for row in pairs():
        scores = {
            f"{side}_scores/{name}": np.float32(rng.normal())
            for side in ("chosen", "rejected")
            for name in COLUMNS
        }
        yield row | scores | embeddings(row)


def rankings():
    rng = np.random.default_rng(3)
    for i, row in enumerate(pairs()):
        n = 2 + i % 3
        pixels = rng.integers(0, 256, (n, 8, 8, 3), np.uint8)
        ids = {name: row[name] for name in ("pair_id", "prompt_id", "prompt", "token_ids")}
        yield {
            **ids,
            "candidates": np.arange(n, dtype=np.int32)[::-1],
            "latents": rng.normal(size=(n, 2, 3, 4)).astype(np.float16),
            "images": images.encode_pngs(pixels),
            "scores": rng.normal(size=n).astype(np.float32),
            "margin": 0.5,
            **{f"columns/{name}": rng.normal(size=n).astype(np.float32) for name in COLUMNS},
            **embeddings(row),
        }


KINDS = {
    "pairs": (pairs, PAIR_FEATURES),
    "no images": (
        lambda: [{k: v for k, v in row.items() if "image" not in k} for row in pairs()],
        pair_features(images=False),
    ),
    "everything": (lambda: list(pairs_with_everything()), EVERYTHING),
    "rankings": (lambda: list(rankings()), RANKED),
}


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(pairs_file, "_SHARD_BYTES", 1000)
    make, features = KINDS[kind]
    folder = tmp_path / "round_000" / "pairs"
    assert write_pairs(folder, iter(make()), {"license": "apache-2.0"}, features) == 5
    assert len(list(folder.glob("*.tfrecord-*"))) > 1
    assert [p.name for p in folder.parent.iterdir()] == ["pairs"]
    back = read_pairs(folder)
    assert list(back) == list(features)
    for name, (dtype, _) in features.items():
        wanted = [row[name] for row in make()]
        if dtype in ("str", "png"):
            assert back[name] == wanted
            continue
        for got, want in zip(back[name], wanted, strict=True):
            assert got.dtype == dtype
            np.testing.assert_array_equal(got, np.asarray(want, dtype))
    assert list(read_pairs(folder, ["margin"])) == ["margin"]
    with pytest.raises(FileExistsError):
        write_pairs(folder, make(), {}, features)


@pytest.mark.parametrize("kind", KINDS)
def test_tfds_reads_what_we_read(tmp_path, monkeypatch, kind):
    import tensorflow_datasets as tfds

    monkeypatch.setattr(pairs_file, "_SHARD_BYTES", 1000)
    make, features = KINDS[kind]
    folder = tmp_path / "pairs"
    write_pairs(folder, make(), {"description": "How.", "license": "mit"}, features)
    builder = tfds.builder_from_directory(folder)
    assert builder.name == "pairs"
    assert builder.info.description.strip() == "How."
    assert builder.info.splits["train"].num_examples == 5
    examples = list(tfds.as_numpy(builder.as_dataset(split="train")))
    examples.sort(key=lambda example: example["pair_id"])
    back = read_pairs(folder)
    for name, (dtype, _) in features.items():
        outer, _, inner = name.partition("/")
        for example, ours in zip(examples, back[name], strict=True):
            theirs = example[outer][inner] if inner else example[outer]
            if dtype == "str":
                assert theirs.decode() == ours
            elif dtype == "png":
                ours = (
                    images.decode_pngs(ours) if isinstance(ours, list) else images.decode_png(ours)
                )
                np.testing.assert_array_equal(theirs, ours)
            else:
                assert theirs.dtype == dtype
                np.testing.assert_array_equal(theirs, ours)
    assert set(examples[0]) == {name.partition("/")[0] for name in features}


def test_what_belongs_to_the_prompt_is_read_once(tmp_path):
    write_pairs(tmp_path / "pairs", pairs_with_everything(), {}, EVERYTHING)
    names = [f"embeddings/{name}" for name in EMBEDDINGS]
    found = read_pairs(tmp_path / "pairs", ["pair_id"], once=names)
    assert set(found) == {"pair_id", "prompt_row", *names}
    np.testing.assert_array_equal(found["prompt_row"], [0, 0, 1, 1, 2])
    for name in names:
        assert len(found[name]) == 3 and found[name].dtype == np.float16
        for row, value in zip(pairs(), found[name][found["prompt_row"]], strict=True):
            np.testing.assert_array_equal(value, embeddings(row)[name])
    assert list(read_pairs(tmp_path / "pairs", ["pair_id"])) == ["pair_id"]


@pytest.mark.parametrize(
    "kind, name, message",
    [
        ("no images", "chosen_image", "which config.pair.images=True stores"),
        ("pairs", "embeddings/encoder_hidden_states", "which config.pair.embeddings=True stores"),
        ("pairs", "latents", "which config.pair.strategy='ranked' stores"),
        ("rankings", "chosen_latents", "which every config.pair.strategy but 'ranked' stores"),
        ("everything", "chosen_scores/clip", "which a column of that name in scores/ stores"),
        ("pairs", "nope", "no field 'nope'; it has pair_id, prompt_id"),
    ],
)
def test_a_field_that_is_not_stored_names_its_setting(tmp_path, kind, name, message):
    make, features = KINDS[kind]
    write_pairs(tmp_path / "pairs", make(), {}, features)
    with pytest.raises(ValueError, match=message):
        read_pairs(tmp_path / "pairs", ["pair_id", name])


def test_pairs_without_a_table_of_fields(tmp_path):
    """As they were written before they had one."""
    write_pairs(tmp_path / "pairs", pairs(), {})
    (tmp_path / "pairs/fields.json").unlink()
    assert list(read_pairs(tmp_path / "pairs")) == list(PAIR_FEATURES)
    (tmp_path / "pairs/fields.json").write_text("[1]")
    with pytest.raises(RecordError, match="fields.json is damaged"):
        read_pairs(tmp_path / "pairs")
    assert repair_pairs(tmp_path / "pairs")


def test_dataset_card(tmp_path):
    metadata = {
        "description": "Made by a test.",
        "license": "apache-2.0",
        "pair.weights": {"vqa": 1.0, "clip": 0.5},
        "counts": {"ties": 7},
    }

    def rows():
        yield from pairs()
        metadata["counts"] = {"ties": 8}  # known by then

    write_pairs(tmp_path / "pairs", rows(), metadata)
    card = (tmp_path / "pairs" / "README.md").read_text()
    assert card.startswith('---\nlicense: "apache-2.0"\n')
    for text in (
        *("Made by a test.", "5 pairs", "| `ties` | `8` |"),
        '| `pair.weights` | `{"vqa": 1.0, "clip": 0.5}` |',
        "| `chosen_latents` | `float16` | `[null, null, null]` |",
    ):
        assert text in card


EVIL = 'x: "y\n---\n|a | b\\| `c` ``d`` <img src=x> [e](http://f)\n| g'


def test_text_from_outside_stays_text_in_the_card(tmp_path):
    yaml, markdown_it = pytest.importorskip("yaml"), pytest.importorskip("markdown_it")
    metadata = {"license": EVIL, "pair.path": EVIL, "counts": {EVIL: 1}}
    features = pair_features(columns=[EVIL])
    row = pairs(1)[0] | {f"{side}_scores/{EVIL}": 0.0 for side in ("chosen", "rejected")}
    write_pairs(tmp_path / "pairs", [row], metadata, features)
    card = (tmp_path / "pairs" / "README.md").read_text()
    front, body = card.removeprefix("---\n").split("\n---\n", 1)
    assert yaml.safe_load(front)["license"] == EVIL
    page = markdown_it.MarkdownIt("commonmark").enable("table").render(body)
    assert "<img" not in page and "<a" not in page
    cells = [
        [html.unescape(re.sub("<.*?>", "", cell)) for cell in re.findall("<td>.*?</td>", line)]
        for line in re.findall("<tr>.*?</tr>", page, re.DOTALL)
    ]
    text = " ".join(EVIL.split()).replace("\\|", "\\ |")
    assert ["pair.path", text] in cells and [text, "1"] in cells
    assert [f"chosen_scores/{text}", "float32", "[]"] in cells


def test_damaged_pairs_are_found_and_dropped_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(pairs_file, "_SHARD_BYTES", 1000)
    folder = tmp_path / "pairs"
    with pytest.raises(FileNotFoundError, match="agfsync pair"):
        read_pairs(folder)
    for damage in (lambda p: p.write_bytes(p.read_bytes()[:-2]), lambda p: p.unlink()):
        write_pairs(folder, pairs(), {})
        assert not repair_pairs(folder)
        damage(sorted(folder.glob("*.tfrecord-*"))[1])
        with pytest.raises(RecordError, match="pairs-train.tfrecord-00001.*--repair"):
            read_pairs(folder)
        assert repair_pairs(folder)
        assert not folder.exists()


def test_pairs_of_several_shapes_and_no_pairs(tmp_path):
    write_pairs(tmp_path / "pairs", pairs(1) + pairs(1, side=4), {})
    found = read_pairs(tmp_path / "pairs", ["chosen_latents"])["chosen_latents"]
    assert found.dtype == object and found[0].shape != found[1].shape
    different = pairs(2)
    different[1]["token_ids"] = different[1]["token_ids"][:-1]
    write_pairs(tmp_path / "pairs", different, {}, replace=True)
    with pytest.raises(ValueError, match="differ in the shape of token_ids"):
        read_pairs(tmp_path / "pairs")
    with pytest.raises(ValueError, match="no pairs"):
        write_pairs(tmp_path / "none", [], {})
    assert [p.name for p in tmp_path.iterdir()] == ["pairs"]


def test_no_space_left(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_pairs(tmp_path / "pairs", pairs(), {})
    assert not list(tmp_path.iterdir())


def test_the_table_of_fields_lies_beside(tmp_path):
    write_pairs(tmp_path / "pairs", rankings(), {}, RANKED)
    table = json.loads((tmp_path / "pairs/fields.json").read_text())
    assert table["columns/vqa/color"] == ["float32", [None]]
    assert pairs_file.read_features(tmp_path / "pairs") == RANKED
