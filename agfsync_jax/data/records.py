"""Everything that stages leave on disk: TFRecord shards, preference pairs, JSONL, Parquet.

One feature table per kind of record serves writer and reader. A file takes its final name only
when it is whole and on the disk, so what has a final name can be trusted and skipped. Shards are
framed and parsed here without TensorFlow (5 s and 600 MB to import), in TensorFlow's own format:
https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details
"""

import contextlib
import errno
import glob
import io
import json
import os
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

# name -> (dtype, shape). "str" is text, "png" an encoded image; a None dimension varies. A float16
# array is stored as its bytes, and with several varying dimensions beside its shape (as TFDS does).
Features = Mapping[str, tuple[str, tuple[int | None, ...]]]

CANDIDATE_FEATURES: Features = {
    "prompt_id": ("str", ()),
    "candidate": ("int32", ()),
    "seed": ("int64", ()),
    "image": ("png", ()),
    "latents": ("float16", (None, None, None)),
}

PAIR_FEATURES: Features = {
    "pair_id": ("str", ()),
    "prompt_id": ("str", ()),
    "prompt": ("str", ()),
    "token_ids": ("int32", (None,)),
    "chosen_latents": ("float16", (None, None, None)),
    "rejected_latents": ("float16", (None, None, None)),
    "chosen_candidate": ("int32", ()),
    "rejected_candidate": ("int32", ()),
    "chosen_image": ("png", ()),
    "rejected_image": ("png", ()),
    "chosen_score": ("float32", ()),
    "rejected_score": ("float32", ()),
    "margin": ("float32", ()),
}

_PAIR_SHARD_BYTES = 64 << 20


class RecordError(ValueError):
    """A damaged file, with its `path` and the byte `offset` of the record (None: not known)."""

    def __init__(self, path: str | Path, offset: int | None, problem: str):
        self.path, self.offset = Path(path), offset
        where = "" if offset is None else f" at byte {offset}"
        super().__init__(
            f"{path} is damaged{where}: {problem}. "
            "Give the command again with --repair to drop this file and make it anew."
        )


def shard_name(index: int, num_shards: int) -> str:
    """The name of a shard without its ending: "00003-of-00010"."""
    return f"{index:05d}-of-{num_shards:05d}"


# Files


def write_file(path: str | Path, chunks: Sequence[bytes]) -> None:
    """Writes a file aside, flushes it to the disk, then gives it its final name.

    Raises:
      OSError: no space left, with the path and the bytes needed; nothing half-written stays.
    """
    path = Path(path)
    aside = path.with_name(path.name + ".aside")
    with _explain_no_space(path, sum(len(chunk) for chunk in chunks)):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with aside.open("wb") as file:
                file.writelines(chunks)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
            _sync_folder(path.parent)
        finally:
            aside.unlink(missing_ok=True)


@contextlib.contextmanager
def _explain_no_space(path: Path, needed: int) -> Iterator[None]:
    """Turns "no space left" into an error that says where and how much."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        there = next(parent for parent in path.absolute().parents if parent.exists())
        raise OSError(
            error.errno,
            f"No space left to write {path}: {_megabytes(needed)} are needed, "
            f"{_megabytes(shutil.disk_usage(there).free)} are free. "
            "Make room, then give the command again",
        ) from error


def _sync_folder(folder: Path) -> None:
    """Makes a rename in a folder last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


# TFRecord


def write_shard(path: str | Path, rows: Iterable[Mapping[str, Any]], features: Features) -> int:
    """Writes rows as one TFRecord file of tf.train.Example, whole or not at all.

    Args:
      path: the file; its folder is made.
      rows: dicts with exactly the names of `features`.
      features: `CANDIDATE_FEATURES`, `PAIR_FEATURES`, or a table like them.

    Returns:
      The number of rows.

    Raises:
      ValueError: no rows, or a row that does not fit the table.
      OSError: no space left; see `write_file`.
    """
    records = [_frame(_encode_row(row, features)) for row in rows]
    if not records:
        raise ValueError(f"There are no rows for {path}: a shard holds at least one.")
    write_file(path, records)
    return len(records)


def read_shard(
    path: str | Path,
    features: Features,
    fields: Sequence[str] | None = None,
    *,
    num_rows: int | None = None,
) -> Iterator[dict[str, Any]]:
    """Reads a shard row by row.

    Args:
      path: a file from `write_shard`.
      features: the table that it was written with.
      fields: the names to read; all by default.
      num_rows: how many rows there must be, if known (framing alone cannot tell a file that was
        cut between two rows).

    Yields:
      Dicts: str, PNG bytes, int or float for scalars, numpy arrays of the table's dtype otherwise.

    Raises:
      RecordError: a record that is cut off, corrupt, or does not fit the table, by byte offset.
      ValueError: a field that the table lacks.
      FileNotFoundError: no such file.
    """
    names = list(features) if fields is None else list(fields)
    if unknown := [name for name in names if name not in features]:
        raise ValueError(f"Unknown fields {unknown}; the table has {', '.join(features)}.")
    count = 0
    for offset, data in _read_frames(path):
        try:
            row = _decode_row(data, features, names)
        except ValueError as error:
            raise RecordError(path, offset, str(error)) from error
        yield row
        count += 1
    if num_rows is not None and count != num_rows:
        size = os.path.getsize(path)
        raise RecordError(path, size, f"the file has {count} rows, expected {num_rows}")


def repair_shard(path: str | Path) -> bool:
    """Drops one file (.tfrecord, .parquet, .jsonl) if it is damaged, so that it is made anew.

    Returns:
      Whether it was dropped.
    """
    path = Path(path)
    readers = {".tfrecord": _check_frames, ".parquet": read_parquet, ".jsonl": read_jsonl}
    if path.suffix not in readers:
        raise ValueError(f"Cannot check {path}: expected one of {', '.join(readers)}.")
    try:
        readers[path.suffix](path)
    except RecordError:
        path.unlink()
        return True
    return False


def _mask(data: bytes) -> int:
    """TFRecord's masked CRC-32C."""
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def _frame(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return b"".join(
        (length, struct.pack("<I", _mask(length)), data, struct.pack("<I", _mask(data)))
    )


def _read_frames(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """Yields (byte offset, payload) of every record; RecordError at the first damaged one."""
    offset = 0
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if not size:
            raise RecordError(path, 0, "the file is empty")
        while offset < size:
            header = file.read(12)
            if len(header) < 12:
                raise RecordError(path, offset, f"{len(header)} bytes of a header of 12 are there")
            length, crc = struct.unpack("<QI", header)
            if _mask(header[:8]) != crc:
                raise RecordError(path, offset, "the checksum of the record's length is wrong")
            if offset + 16 + length > size:
                raise RecordError(
                    path, offset, f"the record takes {16 + length} bytes, {size - offset} are there"
                )
            data = file.read(length)
            if _mask(data) != struct.unpack("<I", file.read(4))[0]:
                raise RecordError(path, offset, "the checksum of the record's data is wrong")
            yield offset, data
            offset += 16 + length


def _check_frames(path: Path) -> None:
    from google.protobuf.message import DecodeError

    for offset, data in _read_frames(path):
        try:
            _example_class().FromString(data)
        except DecodeError as error:
            raise RecordError(path, offset, "the record is no tf.train.Example") from error


def _example_class():
    # TFDS ships the message classes on their own, without TensorFlow.
    from tensorflow_datasets.proto import tf_example_pb2

    return tf_example_pb2.Example


def _encode_row(row: Mapping[str, Any], features: Features) -> bytes:
    if set(row) != set(features):
        missing, extra = sorted(set(features) - set(row)), sorted(set(row) - set(features))
        raise ValueError(f"A row does not fit its table: missing {missing}, unexpected {extra}.")
    example = _example_class()()
    out = example.features.feature
    for name, (dtype, shape) in features.items():
        value = row[name]
        if dtype in ("str", "png"):
            kind = str if dtype == "str" else bytes
            if not isinstance(value, kind):
                raise ValueError(f"{name} must be {kind.__name__}, got {type(value).__name__}.")
            out[name].bytes_list.value.append(value.encode() if dtype == "str" else value)
            continue
        array = np.asarray(value)
        _check_array(name, array, dtype, shape)
        if dtype == "float16":
            key = name
            if shape.count(None) > 1:
                out[f"{name}/shape"].int64_list.value.extend(array.shape)
                key = f"{name}/value"
            out[key].bytes_list.value.append(array.astype("<f2").tobytes())
        elif dtype == "float32":
            out[name].float_list.value.extend(array.ravel().tolist())
        else:
            out[name].int64_list.value.extend(array.ravel().tolist())
    # else the order of the features is another in each process
    return example.SerializeToString(deterministic=True)


def _check_array(name: str, array: np.ndarray, dtype: str, shape: tuple[int | None, ...]) -> None:
    if array.ndim != len(shape) or any(
        want not in (None, have) for want, have in zip(shape, array.shape, strict=True)
    ):
        raise ValueError(f"{name} must have the shape {list(shape)}, got {list(array.shape)}.")
    wanted = np.dtype(dtype)
    if wanted.kind == "i":
        info = np.iinfo(wanted)
        if array.dtype.kind not in "iu":
            raise ValueError(f"{name} must hold whole numbers, got {array.dtype}.")
        if array.size and not (info.min <= int(array.min()) and int(array.max()) <= info.max):
            raise ValueError(f"{name} must fit {dtype}, got {array.min()} to {array.max()}.")
    elif array.dtype.kind != "f" or (dtype == "float16" and array.dtype != wanted):
        raise ValueError(f"{name} must be {dtype}, got {array.dtype}.")


def _decode_row(data: bytes, features: Features, names: Sequence[str]) -> dict[str, Any]:
    from google.protobuf.message import DecodeError

    try:
        stored = _example_class().FromString(data).features.feature
    except DecodeError as error:
        raise ValueError("the record is no tf.train.Example") from error
    return {name: _decode_field(stored, name, *features[name]) for name in names}


def _decode_field(stored: Any, name: str, dtype: str, shape: tuple[int | None, ...]) -> Any:
    key = f"{name}/value" if dtype == "float16" and shape.count(None) > 1 else name
    if key not in stored:
        raise ValueError(f"field {name} is missing, the record has {', '.join(sorted(stored))}")
    feature = stored[key]
    if dtype in ("str", "png", "float16"):
        values = feature.bytes_list.value
        if len(values) != 1:
            raise ValueError(f"field {name} has {len(values)} values, expected 1 of bytes")
        if dtype != "float16":
            return values[0].decode() if dtype == "str" else values[0]
        array = np.frombuffer(values[0], "<f2").astype(np.float16, copy=False)
        if key != name:
            shape = tuple(stored[f"{name}/shape"].int64_list.value)
    else:
        values = (feature.float_list if dtype == "float32" else feature.int64_list).value
        array = np.array(values, dtype)
    if not shape:
        if array.size != 1:
            raise ValueError(f"field {name} has {array.size} values, expected 1")
        return array.item()
    return array.reshape([-1 if dim is None else dim for dim in shape])


# Preference pairs


def write_pairs(
    folder: str | Path, rows: Iterable[Mapping[str, Any]], metadata: Mapping[str, Any]
) -> int:
    """Writes preference pairs as a TFDS dataset with a dataset card, whole or not at all.

    `tfds.builder_from_directory(folder).as_dataset(split="train")` reads it.

    Args:
      folder: must not exist yet.
      rows: dicts with exactly the names of `PAIR_FEATURES`.
      metadata: what the card tells: "description" and "license" as they are, all else as a table.

    Returns:
      The number of pairs.

    Raises:
      FileExistsError: the folder is there.
      ValueError: no rows, or a row that does not fit the table.
      OSError: no space left; see `write_file`.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} is there already. Remove it to make the pairs anew.")
    aside = folder.with_name(folder.name + ".aside")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        lengths, num_bytes = _write_pair_shards(aside, rows)
        if not lengths:
            raise ValueError(f"There are no pairs to write to {folder}.")
        with _explain_no_space(folder, num_bytes):
            _write_tfds_metadata(aside, lengths, num_bytes, metadata)
        card = _dataset_card(sum(lengths), num_bytes, metadata)
        write_file(aside / "README.md", [card.encode()])
        os.replace(aside, folder)
        _sync_folder(folder.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return sum(lengths)


def _pair_shard(index: int) -> str:
    return f"pairs-train.tfrecord-{index:05d}"


def _write_pair_shards(folder: Path, rows: Iterable[Mapping[str, Any]]) -> tuple[list[int], int]:
    """Writes shards of about 64 MB; returns the rows of each and the bytes of all."""
    lengths: list[int] = []
    num_bytes = 0
    pending: list[bytes] = []

    def flush() -> None:
        write_file(folder / _pair_shard(len(lengths)), pending)
        lengths.append(len(pending))
        pending.clear()

    for row in rows:
        pending.append(_frame(_encode_row(row, PAIR_FEATURES)))
        num_bytes += len(pending[-1])
        if sum(map(len, pending)) >= _PAIR_SHARD_BYTES:
            flush()
    if pending:
        flush()
    return lengths, num_bytes


def _write_tfds_metadata(
    folder: Path, lengths: list[int], num_bytes: int, metadata: Mapping[str, Any]
) -> None:
    import tensorflow_datasets as tfds

    template = tfds.core.ShardedFileTemplate(
        data_dir=folder,
        dataset_name="pairs",
        split="train",
        filetype_suffix="tfrecord",
        template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}",
    )
    split = tfds.core.SplitInfo(
        name="train", shard_lengths=lengths, num_bytes=num_bytes, filename_template=template
    )
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features={name: _tfds_feature(*entry) for name, entry in PAIR_FEATURES.items()},
        split_infos=[split],
        filename_template=template,
        check_data=False,
        description=str(metadata.get("description", "Preference pairs of images.")),
        license=str(metadata.get("license", "other")),
    )


def _tfds_feature(dtype: str, shape: tuple[int | None, ...]) -> Any:
    import tensorflow_datasets as tfds

    if dtype == "str":
        return tfds.features.Text()
    if dtype == "png":
        return tfds.features.Image(shape=(None, None, 3), encoding_format="png")
    encoding = "bytes" if dtype == "float16" else "none"
    return tfds.features.Tensor(shape=shape, dtype=np.dtype(dtype), encoding=encoding)


def _dataset_card(num_pairs: int, num_bytes: int, metadata: Mapping[str, Any]) -> str:
    license_name = metadata.get("license", "other")
    lines = [
        "---",
        f"license: {license_name}",
        "task_categories: [text-to-image]",
        "tags: [preference, diffusion-dpo, agfsync]",
        "---",
        "# Preference pairs",
        "",
        str(metadata.get("description", "Preference pairs of images made with AI feedback only.")),
        "",
        f"{num_pairs} pairs, {_megabytes(num_bytes)}, split `train`, license: {license_name}.",
        "",
        "| | |",
        "|---|---|",
    ]
    for key, value in metadata.items():
        if key not in ("description", "license"):
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            lines.append(f"| {key} | {text} |".replace("\n", " "))
    lines += ["", "| field | dtype | shape |", "|---|---|---|"]
    for name, (dtype, shape) in PAIR_FEATURES.items():
        lines.append(f"| {name} | {dtype} | {list(shape)} |")
    lines += [
        "",
        "```python",
        "import tensorflow_datasets as tfds",
        'dataset = tfds.builder_from_directory("path/to/this/folder").as_dataset(split="train")',
        "```",
        "",
    ]
    return "\n".join(lines)


def read_pairs(folder: str | Path, fields: Sequence[str] | None = None) -> dict[str, Any]:
    """Reads all pairs into memory, without TensorFlow.

    Args:
      folder: what `write_pairs` made.
      fields: the names to read; all by default. Latents and images are what takes the memory.

    Returns:
      name -> numpy array with one row per pair; a list for texts and PNG bytes.

    Raises:
      FileNotFoundError: no pairs there.
      RecordError: a damaged or missing shard.
      ValueError: pairs whose latents or token ids differ in shape.
    """
    folder = Path(folder)
    info = folder / "dataset_info.json"
    if not info.is_file():
        raise FileNotFoundError(
            f"No pairs in {folder}: {info.name} is missing. Run `agfsync pair`."
        )
    try:
        lengths = json.loads(info.read_bytes())["splits"][0]["shardLengths"]
    except (ValueError, LookupError) as error:
        raise RecordError(info, None, f"no split with shardLengths ({error})") from error
    rows: list[dict[str, Any]] = []
    for index, length in enumerate(lengths):
        path = folder / _pair_shard(index)
        if not path.is_file():
            raise RecordError(path, None, "the file is missing")
        rows.extend(read_shard(path, PAIR_FEATURES, fields, num_rows=int(length)))
    names = PAIR_FEATURES if fields is None else fields
    return {name: _stack(name, [row[name] for row in rows]) for name in names}


def _stack(name: str, values: list[Any]) -> Any:
    dtype, _ = PAIR_FEATURES[name]
    if dtype in ("str", "png"):
        return values
    shapes = {np.shape(value) for value in values}
    if len(shapes) > 1:
        raise ValueError(f"Pairs differ in the shape of {name}: {sorted(shapes)}.")
    return np.array(values, dtype)


def repair_pairs(folder: str | Path) -> bool:
    """Drops a pairs folder if it is damaged, so that it is made anew; whether it was dropped."""
    try:
        read_pairs(folder, ["pair_id"])
    except RecordError:
        shutil.rmtree(folder)
        return True
    return False


# Tables


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object a line, whole or not at all."""
    write_file(path, [(json.dumps(row, ensure_ascii=False) + "\n").encode() for row in rows])


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Reads one JSON object a line; blank lines are left out. RecordError for a broken line."""
    rows, offset = [], 0
    for number, line in enumerate(Path(path).read_bytes().splitlines(keepends=True), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise RecordError(path, offset, f"line {number} is no JSON: {error}") from error
            if not isinstance(row, dict):
                raise RecordError(path, offset, f"line {number} is no JSON object")
            rows.append(row)
        offset += len(line)
    return rows


def write_parquet(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows as a Parquet table, whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    table = pa.Table.from_pylist([dict(row) for row in rows])
    pq.write_table(table, buffer, write_page_checksum=True)
    write_file(path, [buffer.getvalue()])


def read_parquet(path: str | Path) -> list[dict[str, Any]]:
    """Reads the rows of one file, or of all files that a glob pattern fits, in order of name.

    Raises:
      FileNotFoundError: no such file.
      RecordError: a file that is cut off or corrupt.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    paths = [str(path)] if os.path.exists(path) else sorted(glob.glob(str(path)))
    if not paths:
        raise FileNotFoundError(f"No Parquet file at {path}.")
    rows: list[dict[str, Any]] = []
    for name in paths:
        data = io.BytesIO(Path(name).read_bytes())
        try:
            rows.extend(pq.read_table(data, page_checksum_verification=True).to_pylist())
        except (pa.ArrowException, OSError) as error:  # Arrow says OSError for damaged pages
            raise RecordError(name, None, f"no readable Parquet table ({error})") from error
    return rows
