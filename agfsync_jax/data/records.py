"""Everything that stages leave on disk: TFRecord shards, JSONL, Parquet; pairs.py has the pairs.

One feature table per kind of record serves writer and reader. A file takes its final name only
when it is whole and on the disk, so what has a final name can be trusted and skipped. Shards are
framed and parsed here without TensorFlow (5 s and 600 MB to import), in TensorFlow's own format:
https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details
"""

import contextlib
import errno
import functools
import io
import json
import os
import re
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from agfsync_jax.utils.files import is_url, size_of, to_path

# name -> (dtype, shape). "str" is text, "png" an encoded image (a list of them where the shape is
# (None,)); a None dimension varies. A float16 array is stored as its bytes, and with several
# varying dimensions beside its shape (as TFDS does).
Features = Mapping[str, tuple[str, tuple[int | None, ...]]]
_TEXTS = {"str": str, "png": bytes}
# Which list of a tf.train.Feature holds a dtype; whole numbers lie in int64_list.
_LISTS = dict.fromkeys(("str", "png", "float16"), "bytes_list") | {"float32": "float_list"}

CANDIDATE_FEATURES: Features = {
    "prompt_id": ("str", ()),
    "candidate": ("int32", ()),
    "seed": ("int64", ()),
    "image": ("png", ()),
    "latents": ("float16", (None, None, None)),
}


# What a file lies in, or is itself -> the verb that makes it anew.
_MADE_BY = {
    "candidates": "sample",
    "scores": "score",
    "pairs": "pair",
    "evals": "evaluate",
    "prompts.jsonl": "prompts",
    "questions.jsonl": "questions",
}


class RecordError(ValueError):
    """A damaged file, with its `path` and the byte `offset` of the record (None: not known).

    Where it lies in a workdir, the message names the verb that makes it anew.
    """

    def __init__(self, path: str | Path, offset: int | None, problem: str):
        self.path, self.offset = to_path(path), offset
        where = "" if offset is None else f" at byte {offset}"
        super().__init__(f"{path} is damaged{where}: {problem}. {_how_to_mend(self.path)}")


def _how_to_mend(path: Path) -> str:
    round_dir = next((each for each in path.parents if re.fullmatch(r"round_\d+", each.name)), None)
    inside = path.relative_to(round_dir).parts if round_dir else ()
    verb = next((_MADE_BY[each] for each in inside if each in _MADE_BY), None)
    if verb is None:
        return "Give the command that made it again, with --repair, to drop it and make it anew."
    flags = f"--config=... --workdir={round_dir.parent}"
    if index := int(round_dir.name.removeprefix("round_")):
        flags += f" --round={index}"
    return f"Make it anew with `agfsync {verb} {flags} --repair`, then give this command again."


def shard_name(index: int, num_shards: int) -> str:
    """The name of a shard without its ending: "00003-of-00010"."""
    return f"{index:05d}-of-{num_shards:05d}"


# Files


def write_file(path: str | Path, chunks: Sequence[bytes]) -> None:
    """Writes a file aside, flushes it to the disk, then gives it its final name.

    In a bucket it has that from the start: a file is whole there or absent.

    Raises:
      OSError: no space left, with the path and the bytes needed; nothing half-written stays.
    """
    path = to_path(path)
    if is_url(path):
        path.write_bytes(b"".join(chunks))
        return
    aside = path.with_name(path.name + ".aside")
    with explain_no_space(path, sum(len(chunk) for chunk in chunks)):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with aside.open("wb") as file:
                file.writelines(chunks)
                file.flush()
                os.fsync(file.fileno())
            rename(aside, path)
        finally:
            aside.unlink(missing_ok=True)


@contextlib.contextmanager
def explain_no_space(path: Path, needed: int) -> Iterator[None]:
    """Turns "no space left" into an error that says where and how much."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        there = next(parent for parent in path.absolute().parents if parent.exists())
        raise OSError(
            error.errno,
            f"No space left to write {path}: {megabytes(needed)} are needed, "
            f"{megabytes(shutil.disk_usage(there).free)} are free. "
            "Make room, then give the command again",
        ) from error


def rename(aside: Path, path: Path) -> None:
    """Gives a file or folder its final name, so that it lasts through a power cut."""
    os.replace(aside, path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def megabytes(size: int) -> str:
    """Bytes as text: "1.5 MB"."""
    return f"{size / 1e6:.1f} MB"


# TFRecord


def write_shard(path: str | Path, rows: Iterable[Mapping[str, Any]], features: Features) -> int:
    """Writes rows, dicts with exactly the names of `features`, as one file of tf.train.Example.

    It is whole or not there; its folder is made. Returns the number of rows.

    Raises:
      ValueError: no rows, or a row that does not fit the table.
      OSError: no space left; see `write_file`.
    """
    records = [encode_record(row, features) for row in rows]
    if not records:
        raise ValueError(f"There are no rows for {path}: a shard holds at least one.")
    write_file(path, records)
    return len(records)


def read_shard(
    path: str | Path,
    features: Features,
    fields: Iterable[str] | None = None,
    *,
    num_rows: int | None = None,
) -> Iterator[dict[str, Any]]:
    """Reads a shard row by row.

    Args:
      path, features: as they were given to `write_shard`.
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
    from google.protobuf.message import DecodeError

    count = 0
    for offset, data in _read_frames(path):
        try:
            stored = example_class().FromString(data).features.feature
            row = {name: _decode_field(stored, name, *features[name]) for name in names}
        except DecodeError as error:
            raise RecordError(path, offset, "the record is no tf.train.Example") from error
        except ValueError as error:
            raise RecordError(path, offset, str(error)) from error
        yield row
        count += 1
    if num_rows is not None and count != num_rows:
        size = size_of(to_path(path))
        raise RecordError(path, size, f"the file has {count} rows, expected {num_rows}")


def repair_shard(path: str | Path, num_rows: int | None = None) -> bool:
    """Drops one file (.tfrecord, .parquet, .jsonl) if it is damaged; whether it was.

    `num_rows` is how many a .tfrecord must have, if known.
    """
    path = to_path(path)

    def check_shard(path: Path) -> None:
        for _ in read_shard(path, {}, num_rows=num_rows):
            pass

    readers = {".tfrecord": check_shard, ".parquet": read_table, ".jsonl": read_jsonl}
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
    return length + struct.pack("<I", _mask(length)) + data + struct.pack("<I", _mask(data))


def _read_frames(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """Yields (byte offset, payload) of every record; RecordError at the first damaged one."""
    path, offset = to_path(path), 0
    with path.open("rb") as file:
        size = size_of(path)
        if not size:
            raise RecordError(path, 0, "the file is empty")
        while offset < size:
            header, left = file.read(12), size - offset
            if len(header) < 12:
                raise RecordError(path, offset, f"{len(header)} bytes of a header of 12 are there")
            length, crc = struct.unpack("<QI", header)
            if _mask(header[:8]) != crc:
                raise RecordError(path, offset, "the checksum of the record's length is wrong")
            if (takes := 16 + length) > left:
                raise RecordError(path, offset, f"the record takes {takes} bytes, {left} are there")
            data = file.read(length)
            if _mask(data) != struct.unpack("<I", file.read(4))[0]:
                raise RecordError(path, offset, "the checksum of the record's data is wrong")
            yield offset, data
            offset += takes


@functools.cache
def example_class() -> type:
    """tf.train.Example, which TFDS ships without TensorFlow.

    While TFDS is imported, imports of all other threads fail: who starts a thread that reads or
    writes shards calls this first.
    """
    from tensorflow_datasets.proto import tf_example_pb2

    return tf_example_pb2.Example


def _key(name: str, dtype: str, shape: tuple[int | None, ...]) -> str:
    return f"{name}/value" if dtype == "float16" and shape.count(None) > 1 else name


def _values(feature: Any, dtype: str) -> Any:
    """The list of a tf.train.Feature that holds values of a dtype."""
    return getattr(feature, _LISTS.get(dtype, "int64_list")).value


def encode_record(row: Mapping[str, Any], features: Features) -> bytes:
    """A row as it lies in a shard. Raises ValueError if it does not fit the table."""
    if set(row) != set(features):
        missing, extra = sorted(set(features) - set(row)), sorted(set(row) - set(features))
        raise ValueError(f"A row does not fit its table: missing {missing}, unexpected {extra}.")
    example = example_class()()
    out = example.features.feature
    for name, (dtype, shape) in features.items():
        key = _key(name, dtype, shape)
        if dtype in _TEXTS:
            values = row[name] if shape else [row[name]]
            for each in values:
                if not isinstance(each, _TEXTS[dtype]):
                    wanted, got = _TEXTS[dtype].__name__, type(each).__name__
                    raise ValueError(f"{name} must be {wanted}, got {got}.")
            values = [each.encode() for each in values] if dtype == "str" else values
        else:
            array = np.asarray(row[name])
            _check_array(name, array, dtype, shape)
            values = [array.tobytes()] if dtype == "float16" else array.ravel().tolist()
            if key != name:
                out[f"{name}/shape"].int64_list.value.extend(array.shape)
        _values(out[key], dtype).extend(values)
    # else the order of the features is another in each process
    return _frame(example.SerializeToString(deterministic=True))


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


def _decode_field(stored: Any, name: str, dtype: str, shape: tuple[int | None, ...]) -> Any:
    key = _key(name, dtype, shape)
    if key not in stored:
        raise ValueError(f"field {name} is missing, the record has {', '.join(sorted(stored))}")
    values = _values(stored[key], dtype)
    if len(values) != 1 and (dtype == "float16" or not shape):
        raise ValueError(f"field {name} has {len(values)} values, expected 1")
    if dtype in _TEXTS:
        values = [value.decode() for value in values] if dtype == "str" else list(values)
        return values if shape else values[0]
    if dtype == "float16":
        array = np.frombuffer(values[0], np.float16)
    else:
        array = np.array(values, dtype)
    if key != name:
        shape = tuple(stored[f"{name}/shape"].int64_list.value)
    array = array.reshape([-1 if dim is None else dim for dim in shape])
    return array if shape else array.item()


# Tables


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object a line, whole or not at all."""
    write_file(path, [(json.dumps(row, ensure_ascii=False) + "\n").encode() for row in rows])


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Reads one JSON object a line; blank lines are left out. RecordError for a broken line."""
    rows, offset = [], 0
    for number, line in enumerate(to_path(path).read_bytes().splitlines(keepends=True), 1):
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
    """Reads the rows of one file; the same errors as `read_table`."""
    return read_table(path).to_pylist()


def read_table(path: str | Path, columns: Sequence[str] | None = None) -> Any:
    """Reads one file as a pyarrow.Table; all columns by default, in the file's order.

    Raises:
      FileNotFoundError: no such file.
      RecordError: a file that is cut off or corrupt.
      ValueError: a column that it lacks.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = io.BytesIO(to_path(path).read_bytes())
    try:
        file = pq.ParquetFile(data, page_checksum_verification=True)
        there = file.schema_arrow.names
        if missing := [name for name in columns or () if name not in there]:
            raise ValueError(f"{path} has no column {missing[0]!r}; it has {', '.join(there)}.")
        return file.read(columns)
    except (pa.ArrowException, OSError) as error:  # Arrow says OSError for damaged pages
        raise RecordError(path, None, f"no readable Parquet table ({error})") from error
