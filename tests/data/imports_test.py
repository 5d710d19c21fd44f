"""Preferences that people gave, in every layout; what is dropped is counted."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from agfsync_jax.data.imports import (
    PreferenceSet,
    bucket_sizes,
    decode_image,
    find_files,
    fit_images,
    nearest_size,
)
from configs import common

COLUMNS = common.get_config().pair.columns.to_dict()
NAN = float("nan")


def fit_image(data, height, width):
    return fit_images([decode_image(data)], [(height, width)])[0]


def picture(seed, height=8, width=8):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def png(seed, *size):
    buffer = io.BytesIO()
    Image.fromarray(picture(seed, *size)).save(buffer, "PNG")
    return buffer.getvalue()


def table(labels, captions=None, as_struct=False, **changes):
    """Rows of Pick-a-Pic's columns; image 2 * n and 2 * n + 1 are those of row n."""
    images = {side: [png(2 * n + i) for n in range(len(labels))] for i, side in enumerate("01")}
    columns = {
        "uid": [str(n) for n in range(len(labels))],
        "caption": captions or [f"caption {n}" for n in range(len(labels))],
        "jpg_0": images["0"],
        "jpg_1": images["1"],
        "label_0": labels,
    }
    if as_struct:
        for name in ("jpg_0", "jpg_1"):
            columns[name] = [{"bytes": data, "path": "x.png"} for data in columns[name]]
    return pa.table(columns | changes)


def write_arrow(folder, *tables):
    """As `datasets.save_to_disk` lays it out."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{len(tables):05d}.arrow" for i in range(len(tables))]
    for name, each in zip(names, tables, strict=True):
        with pa.ipc.new_stream(folder / name, each.schema) as writer:
            writer.write_table(each, max_chunksize=3)
    state = {"_data_files": [{"filename": name} for name in names], "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def read(path, split="train", columns=COLUMNS, done=lambda count: None, **options):
    settings = common.get_config().pair
    settings.update({"path": str(path), "split": split, "columns": columns, "max_bad": 1.0})
    settings.update(options)
    source = PreferenceSet(settings)
    return list(source.read([(8, 8)], done)), source


def assert_row(preference, row, chosen):
    assert (preference.row, preference.chosen) == (row, chosen)
    assert preference.caption == f"caption {row}"
    for i, image in enumerate(preference.images):
        np.testing.assert_array_equal(image, picture(2 * row + i))


def test_what_counts_and_what_is_dropped(tmp_path):
    labels = [1.0, 0.0, 0.5, None, NAN, 1.0, 0.0, 1.0, 0.0]
    captions = [f"caption {n}" for n in range(9)]
    captions[5], captions[6], captions[8] = "", None, "caption 0"
    changes = {"has_label": [True] * 7 + [False, None]}
    rows = table(labels, captions, **changes)
    broken = rows["jpg_1"].to_pylist()
    broken[8] = broken[8][:-60]
    rows = rows.set_column(3, "jpg_1", pa.array(broken))
    pq.write_table(rows, tmp_path / "a.parquet", row_group_size=4)
    done = []
    found, source = read(tmp_path / "a.parquet", done=done.append)
    assert len(found) == 2 and sum(done) == source.num_rows == 9
    assert_row(found[0], 0, 0)
    assert_row(found[1], 1, 1)
    assert source.counts == dict(prompts=6, unlabelled=3, ties=1, empty_captions=2, bad_images=1)
    assert "row 5: no caption; row 6: no caption; row 8: " in source.bad_rows()
    with pytest.raises(ValueError, match=r"3 of 9 rows are bad.*max_bad=0.25.*row 5: no caption"):
        read(tmp_path / "a.parquet", max_bad=0.25)
    read(tmp_path / "a.parquet", max_bad=0.34)


@pytest.mark.parametrize("kind", ["binary", "struct", "path"])
def test_layouts_of_images_and_files(tmp_path, kind):
    tables = [table([1, 0, 1, 1, 0, 0], as_struct=kind == "struct"), table([0] * 20)]
    if kind == "path":
        for n in range(12):
            (tmp_path / f"{n}.png").write_bytes(png(n))
        sides = {
            f"jpg_{i}": [{"bytes": None, "path": f"{2 * n + i}.png"} for n in range(6)]
            for i in range(2)
        }
        tables[0] = table([1, 0, 1, 1, 0, 0], **sides)
    (tmp_path / "data").mkdir()
    for i in range(2):  # with a hash, as the Hub has them
        part = tables[0].slice(3 * i, 3)
        pq.write_table(part, tmp_path / f"data/train-0000{i}-of-00002-b66ac786bf6fb553.parquet")
    pq.write_table(tables[1], tmp_path / "data/validation_unique-00000-of-00001.parquet")
    write_arrow(tmp_path / "arrow/train", tables[0].slice(0, 4), tables[0].slice(4))
    write_arrow(tmp_path / "arrow/test", tables[1])
    (tmp_path / "arrow/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    if kind == "path":
        for n in range(12):  # relative to the folder that is given
            (tmp_path / f"arrow/{n}.png").write_bytes(png(n))
    for folder in (tmp_path, tmp_path / "arrow"):
        found, source = read(folder)
        assert len(source.files) == 2 and source.num_rows == 6 and not source.bad_rows()
        for row, (each, chosen) in enumerate(zip(found, [0, 1, 0, 0, 1, 1], strict=True)):
            assert_row(each, row, chosen)
        assert [each.row for each in read(folder, max_rows=5)[0]] == [0, 1, 2, 3, 4]
    if kind != "path":
        assert len(read(tmp_path / "arrow/train")[0]) == 6
        assert len(read(tmp_path / "arrow", "test")[0]) == 20


def test_files_of_a_split(tmp_path):
    names = (
        *("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
        *(
            "test.parquet",
            "default/test/0000.parquet",
            "default/test/0001.parquet",
            "other.parquet",
        ),
    )
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def found(split):
        return {str(file.relative_to(tmp_path)) for file in find_files(tmp_path, split)}

    assert found("train") == {"data/train-00000-of-00001.parquet"}
    assert found("test") == {name for name in names if "test" in name}
    assert found("") == set(names)
    with pytest.raises(FileNotFoundError, match="no split 'tra'.*one of 0000.*other, test, train"):
        find_files(tmp_path, "tra")
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or folder"):
        find_files(tmp_path / "nowhere", "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="expected a parquet file, a folder of them"):
        find_files(tmp_path / "empty", "train")
    (tmp_path / "empty/dataset_dict.json").write_text('{"splits": ["a", "b"]}')
    with pytest.raises(FileNotFoundError, match="no split 'train'.*one of a, b"):
        find_files(tmp_path / "empty", "train")


def test_other_columns(tmp_path):
    names = ["uid", "prompt", "image_a", "image_b", "is_a_better"]
    rows = table([True, False]).rename_columns(names)
    pq.write_table(rows, tmp_path / "a.parquet")
    columns = dict(zip(("caption", "first", "second", "label"), names[1:], strict=True))
    assert [each.chosen for each in read(tmp_path / "a.parquet", columns=columns)[0]] == [0, 1]
    with pytest.raises(
        ValueError, match=r"'caption' \(config.pair.columns.caption\); it has uid, prompt, image_a"
    ):
        read(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="'uid'.*columns.label. holds string, expected numbers"):
        read(tmp_path / "a.parquet", columns=columns | {"label": "uid"})
    with pytest.raises(ValueError, match="'prompt'.*columns.first. holds string, expected the byt"):
        read(tmp_path / "a.parquet", columns=columns | {"first": "prompt"})


def test_a_set_that_cannot_be_read(tmp_path):
    pq.write_table(table([1.0, 2.0]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="row 1 has the label 2.0: expected 1 where the first"):
        read(tmp_path / "a.parquet")
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(data[:-9])
    with pytest.raises(ValueError, match="a.parquet cannot be read"):
        read(tmp_path / "a.parquet")
    folder = write_arrow(tmp_path / "arrow", table([1.0, 0.0]))
    (folder / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(ValueError, match="data-00000-of-00001.arrow cannot be read"):
        read(folder)


def test_images_that_are_not_there(tmp_path):
    gone = [{"bytes": None, "path": "gone.png"}, {"bytes": None, "path": None}]
    pq.write_table(table([1.0, 0.0], jpg_0=gone), tmp_path / "a.parquet")
    found, source = read(tmp_path / "a.parquet")
    assert not found and source.counts["bad_images"] == 2
    assert source.bad_rows() == "row 0: gone.png cannot be read: No such file or directory;" + (
        " row 1: there is no image"
    )


@pytest.mark.parametrize("height, width", [(24, 48), (48, 24), (4, 8), (9, 9), (12, 12)])
def test_images_are_resized_and_cut(height, width):
    """As torchvision's Resize and CenterCrop do it, but with PIL's Lanczos kernel."""
    got = fit_image(png(1, height, width), 12, 12).astype(np.int32)
    scale = 12 / min(height, width)
    size = round(width * scale), round(height * scale)
    image = Image.fromarray(picture(1, height, width)).resize(size, Image.Resampling.LANCZOS)
    left, top = (size[0] - 12) // 2, (size[1] - 12) // 2
    expected = np.asarray(image)[top : top + 12, left : left + 12]
    # PIL rounds to gray levels between the axes, whose order is another in a high image
    assert np.abs(got - expected).mean() <= (0.5 if height > width else 0)
    assert fit_image(png(1, height, width), 6, 18).shape == (6, 18, 3)


def test_a_very_long_image_takes_no_more_memory():
    image = Image.new("RGB", (100_000, 1), (1, 2, 3))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    assert fit_image(buffer.getvalue(), 512, 512)[300, 300].tolist() == [1, 2, 3]


def test_images_are_turned_and_made_rgb():
    np.testing.assert_array_equal(fit_image(png(3, 8, 6), 8, 6), picture(3, 8, 6))
    buffer = io.BytesIO()
    image = Image.fromarray(picture(3, 8, 6))
    exif = image.getexif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    image.save(buffer, "PNG", exif=exif)
    turned = np.rot90(picture(3, 8, 6), -1)
    np.testing.assert_array_equal(fit_image(buffer.getvalue(), 6, 8), turned)
    buffer = io.BytesIO()
    image.convert("L").save(buffer, "PNG")
    gray = fit_image(buffer.getvalue(), 8, 6)
    assert gray.shape == (8, 6, 3) and (gray[..., 0] == gray[..., 2]).all()
    for data, why in ((b"", "no image"), (b"no", "no image"), (png(1)[:60], "not a whole image")):
        with pytest.raises(ValueError, match=f"^{len(data)} bytes are {why}"):
            fit_image(data, 8, 8)


@pytest.mark.parametrize(
    "height, width, multiple", [(512, 512, 64), (1024, 1024, 64), (64, 64, 16)]
)
def test_the_sizes_of_buckets(height, width, multiple):
    sizes = bucket_sizes(height, width, multiple)
    assert (height, width) in sizes and {(w, h) for h, w in sizes} == set(sizes)
    for h, w in sizes:
        assert not h % multiple and not w % multiple and h * w <= height * width
        assert 0.5 <= h / w <= 2
        short, long = sorted((h, w))
        wider = (short + multiple, long), (short, long + multiple)
        assert any(a * b > height * width or b > 2 * a for a, b in wider)
    assert len({h / w for h, w in sizes}) == len(sizes)
    assert bucket_sizes(40, 24, 0) == [(40, 24)]


def test_the_sizes_of_stable_diffusion():
    """kohya's make_bucket_resolutions(1024 * 1024, ...), as far as one side is twice the other."""
    landscape = [(704, 1408), (768, 1280), (768, 1344), (832, 1216), (896, 1152), (960, 1088)]
    portrait = [(w, h) for h, w in landscape]
    assert set(bucket_sizes(1024, 1024, 64)) == {*landscape, (1024, 1024), *portrait}
    assert len(bucket_sizes(512, 512, 64)) == 7
    assert (576, 576) in bucket_sizes(768, 512, 64)
    with pytest.raises(ValueError, match="buckets=1024: images of config.sample.height=512 and"):
        bucket_sizes(512, 512, 1024)


def test_the_nearest_size():
    def image(height, width):
        return Image.new("RGB", (width, height))

    sizes = bucket_sizes(512, 512, 64)
    assert nearest_size(sizes, [image(512, 512)]) == (512, 512)
    assert nearest_size(sizes, [image(1000, 667)]) == (640, 384)
    assert nearest_size(sizes, [image(667, 1000)]) == (384, 640)
    assert nearest_size(sizes, [image(100, 900)]) == (320, 640)  # the widest
    assert nearest_size(sizes, [image(900, 100)]) == (640, 320)
    assert nearest_size(sizes, [image(200, 100), image(100, 200)]) == (512, 512)
