import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from agfsync_jax.data import images, records
from agfsync_jax.data.pairs import PAIR_FEATURES
from agfsync_jax.data.records import CANDIDATE_FEATURES, RecordError

ROOT = Path(__file__).parents[2]


def candidates(n=5):
    rng = np.random.default_rng(0)
    return [
        {
            "prompt_id": f"p{i}ö",
            "candidate": i,
            "seed": 2**32 - 1 - i,
            "image": images.encode_png(rng.integers(0, 256, (8, 8, 3), np.uint8)),
            "latents": rng.normal(size=(2, 2, 4)).astype(np.float16),
        }
        for i in range(n)
    ]


@pytest.fixture
def shard(tmp_path):
    path = tmp_path / f"{records.shard_name(0, 2)}.tfrecord"
    assert records.write_shard(path, candidates(), CANDIDATE_FEATURES) == 5
    return path


def starts(path):
    """Where each record begins."""
    return [offset for offset, _ in records._read_frames(path)]


def read(path, **kwargs):
    return list(records.read_shard(path, CANDIDATE_FEATURES, **kwargs))


def test_shard_there_and_back(shard):
    assert shard.name == "00000-of-00002.tfrecord"
    assert [p.name for p in shard.parent.iterdir()] == [shard.name]
    for row, back in zip(candidates(), read(shard, num_rows=5), strict=True):
        assert list(back) == list(CANDIDATE_FEATURES)
        assert back["latents"].dtype == np.float16
        np.testing.assert_array_equal(row["latents"], back["latents"])
        assert all(row[name] == back[name] for name in row if name != "latents")


def test_fields_picks_columns(shard):
    assert read(shard, fields=["seed", "prompt_id"])[1] == {"seed": 2**32 - 2, "prompt_id": "p1ö"}
    with pytest.raises(ValueError, match="Unknown fields.*'nope'.*prompt_id"):
        read(shard, fields=["nope"])


def test_tensorflow_reads_our_shards_and_we_read_its(shard, tmp_path):
    import tensorflow as tf

    raw = [r.numpy() for r in tf.data.TFRecordDataset(str(shard))]
    assert len(raw) == 5
    feature = tf.train.Example.FromString(raw[2]).features.feature
    assert feature["seed"].int64_list.value[0] == 2**32 - 3
    assert list(feature["latents/shape"].int64_list.value) == [2, 2, 4]
    with tf.io.TFRecordWriter(str(tmp_path / "tf.tfrecord")) as writer:
        for record in raw:
            writer.write(record)
    assert (tmp_path / "tf.tfrecord").read_bytes() == shard.read_bytes()


@pytest.mark.parametrize("cut", [1, 11, 12, 40, -1])
def test_truncated_shard_names_file_and_offset(shard, cut):
    """Cut inside the third record: in its header, in its data, in its last checksum."""
    data, offsets = shard.read_bytes(), starts(shard)
    shard.write_bytes(data[: (offsets[3] if cut < 0 else offsets[2]) + cut])
    with pytest.raises(RecordError, match=f"{shard}.*byte {offsets[2]}.*--repair") as error:
        read(shard)
    assert (error.value.path, error.value.offset) == (shard, offsets[2])
    assert isinstance(error.value, ValueError)
    assert len(read_until_error(shard)) == 2


def read_until_error(path):
    rows = []
    with pytest.raises(RecordError):
        for row in records.read_shard(path, CANDIDATE_FEATURES):
            rows.append(row)
    return rows


@pytest.mark.parametrize("where", [0, 3, 9, 12, 60, -1])
def test_any_flipped_byte_is_found(shard, where):
    data, offsets = bytearray(shard.read_bytes()), starts(shard)
    data[(offsets[2] if where < 0 else offsets[1]) + where] ^= 0x40
    shard.write_bytes(data)
    with pytest.raises(RecordError, match=f"byte {offsets[1]}.*checksum"):
        read(shard)


def test_cut_between_records_is_found_by_the_row_count(shard):
    data, offsets = shard.read_bytes(), starts(shard)
    shard.write_bytes(data[: offsets[4]])
    assert len(read(shard)) == 4
    with pytest.raises(RecordError, match="4 rows, expected 5"):
        read(shard, num_rows=5)
    shard.write_bytes(b"")
    with pytest.raises(RecordError, match="empty"):
        read(shard)


def test_record_of_another_table_is_an_error(shard, tmp_path):
    with pytest.raises(RecordError, match="byte 0.*pair_id is missing"):
        list(records.read_shard(shard, PAIR_FEATURES))
    path = tmp_path / "no_example.tfrecord"
    path.write_bytes(records._frame(b"\xff" * 20))
    with pytest.raises(RecordError, match="tf.train.Example"):
        read(path)
    assert records.repair_shard(path)


def test_repair_drops_just_the_damaged_shard(shard):
    other = shard.with_name("00001-of-00002.tfrecord")
    records.write_shard(other, candidates(), CANDIDATE_FEATURES)
    other.write_bytes(other.read_bytes()[:-3])
    assert not records.repair_shard(shard)
    assert records.repair_shard(other)
    assert shard.exists() and not other.exists()
    with pytest.raises(ValueError, match=r"\.tfrecord, \.parquet, \.jsonl"):
        records.repair_shard(shard.with_suffix(".png"))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"extra": 1}, "unexpected.*extra"),
        ({"latents": np.zeros((2, 2, 4), np.float32)}, "latents must be float16, got float32"),
        ({"latents": np.zeros((2, 4), np.float16)}, "latents must have the shape"),
        ({"candidate": 2**40}, "candidate must fit int32"),
        ({"candidate": 0.5}, "candidate must hold whole numbers"),
        ({"image": "no bytes"}, "image must be bytes, got str"),
    ],
)
def test_row_that_does_not_fit_leaves_nothing_behind(tmp_path, change, message):
    rows = candidates()
    rows[3] = rows[3] | change
    with pytest.raises(ValueError, match=message):
        records.write_shard(tmp_path / "a.tfrecord", rows, CANDIDATE_FEATURES)
    with pytest.raises(ValueError, match="no rows"):
        records.write_shard(tmp_path / "a.tfrecord", [], CANDIDATE_FEATURES)
    assert not list(tmp_path.iterdir())


def test_no_space_left(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    path = tmp_path / "deep" / "a.tfrecord"
    with pytest.raises(OSError, match=r"No space left to write .*a\.tfrecord: 0\.0 MB") as error:
        records.write_shard(path, candidates(), CANDIDATE_FEATURES)
    assert error.value.errno == errno.ENOSPC
    assert not list(path.parent.iterdir())


def test_killed_writer_leaves_no_file_of_that_name(tmp_path):
    """A process that dies between writing and renaming; the next one begins again."""
    code = (
        "import os, signal\n"
        "from agfsync_jax.data import records\n"
        "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"records.write_file({str(tmp_path / 'a.jsonl')!r}, [b'half'])\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == -9
    assert not (tmp_path / "a.jsonl").exists()
    records.write_jsonl(tmp_path / "a.jsonl", [{"id": "p0"}])
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_jsonl(tmp_path):
    rows = [{"id": "p0", "prompt": "a réd circle\nand"}, {"id": "p1", "choices": ["a", "b"]}]
    path = tmp_path / "round_000" / "prompts.jsonl"
    records.write_jsonl(path, rows)
    assert records.read_jsonl(path) == rows
    first = len(path.read_bytes().splitlines(keepends=True)[0])
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(RecordError, match=f"byte {first}: line 2 is no JSON"):
        records.read_jsonl(path)
    assert records.repair_shard(path)
    path.write_text("[1]\n")
    with pytest.raises(RecordError, match="no JSON object"):
        records.read_jsonl(path)


def test_parquet(tmp_path):
    rows = [{"prompt_id": f"p{i}", "candidate": i, "vqa": i / 3} for i in range(4)]
    records.write_parquet(tmp_path / "a.parquet", rows)
    assert records.read_parquet(tmp_path / "a.parquet") == rows
    with pytest.raises(FileNotFoundError):
        records.read_parquet(tmp_path / "none.parquet")


def test_columns_of_a_table(tmp_path):
    rows = [{"prompt_id": f"p{i}", "candidate": i, "vqa": i / 3} for i in range(4)]
    records.write_parquet(tmp_path / "a.parquet", rows)
    table = records.read_table(tmp_path / "a.parquet", ["vqa", "prompt_id"])
    assert table.column_names == ["vqa", "prompt_id"] and table.num_rows == 4
    with pytest.raises(ValueError, match="no column 'clip'; it has prompt_id, candidate, vqa"):
        records.read_table(tmp_path / "a.parquet", ["vqa", "clip"])


def test_lists_of_images_and_texts(tmp_path):
    features = {"images": ("png", (None,)), "names": ("str", (None,))}
    row = {"images": [b"a", b"bc"], "names": ["é"]}
    records.write_shard(tmp_path / "a.tfrecord", [row], features)
    assert list(records.read_shard(tmp_path / "a.tfrecord", features)) == [row]
    with pytest.raises(ValueError, match="names must be str, got bytes"):
        records.write_shard(tmp_path / "b.tfrecord", [row | {"names": [b"e"]}], features)


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_damaged_parquet(tmp_path, damage):
    path = tmp_path / "a.parquet"
    records.write_parquet(path, [{"vqa": float(i)} for i in range(100)])
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes({"cut": data[:-20], "flip": data, "empty": b""}[damage])
    with pytest.raises(RecordError, match="a.parquet is damaged: .*--repair"):
        records.read_parquet(path)
    assert records.repair_shard(path)


def test_no_tensorflow_to_write_and_read(tmp_path):
    """TensorFlow would cost seconds and 600 MB in every verb."""
    code = (
        "import sys, numpy as np\n"
        "from agfsync_jax.data import pairs, records\n"
        "row = {'prompt_id': 'p', 'candidate': 0, 'seed': 1, 'image': b'',\n"
        "       'latents': np.zeros((1, 1, 4), np.float16)}\n"
        f"path = {str(tmp_path / 'a.tfrecord')!r}\n"
        "records.write_shard(path, [row], records.CANDIDATE_FEATURES)\n"
        "list(records.read_shard(path, records.CANDIDATE_FEATURES))\n"
        "pair = {n: 'x' if d == 'str' else b'' if d == 'png' else\n"
        "        np.zeros((1,) * len(s), d) for n, (d, s) in pairs.PAIR_FEATURES.items()}\n"
        f"folder = {str(tmp_path / 'pairs')!r}\n"
        "pairs.write_pairs(folder, [pair], {})\n"
        "pairs.read_pairs(folder)\n"
        "print(sorted({'tensorflow', 'torch', 'jax'} & set(sys.modules)))\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert json.loads(out.stdout.replace("'", '"')) == []
