"""Preferences that people gave, from the files of Hugging Face's datasets, row by row.

A parquet file; a folder of parquet files as repositories have them (data/train-00000-of-00012-
<hash>.parquet); or a folder that `datasets.save_to_disk` wrote. A row has a caption, two images and
a label that says which is better; the columns' names are config.pair.columns.
"""

import hashlib
import io
import json
import re
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

_ROWS = 16  # read and decoded together
_BATCHES_AHEAD = 2  # of these, decoded while the device is busy
_THREADS = 8  # decoders run outside the interpreter's lock
_TOLD = 5  # bad rows that an error names
_FLAG = "has_label"  # Pick-a-Pic's column, read where it is there


class Preference(NamedTuple):
    """One row that counts."""

    row: int  # its number in the set
    caption: str
    images: tuple[UInt8[np.ndarray, "h w 3"], UInt8[np.ndarray, "h w 3"]]  # first and second
    chosen: int  # 0 or 1, which of them


def fit_image(data: bytes, height: int, width: int) -> UInt8[np.ndarray, "h w 3"]:
    """Decodes an image, turned as its EXIF says, to RGB of this size.

    It is resized until it just covers that size, by PIL with a Lanczos kernel (antialiased) on the
    host, and its center is cut out; an image of that size stays as it is.

    Raises:
        ValueError: bytes that are no whole image.
    """
    try:
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    except UnidentifiedImageError as error:
        raise ValueError(f"{len(data)} bytes are no image that PIL knows") from error
    except Exception as error:  # what PIL's decoders raise is anything that broken bytes lead to
        raise ValueError(f"{len(data)} bytes are not a whole image: {error}") from error
    return np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS))


def find_files(path: str | Path, split: str) -> list[Path]:
    """The files of one split, in order.

    A parquet file belongs to a split by its name (train-00000-of-00012.parquet, train.parquet) or
    by a folder that it lies in (train/0000.parquet). With an empty split all of a folder's belong.

    Raises:
        FileNotFoundError: nothing there, or no such split; lists those that are there.
    """
    path = Path(path).expanduser()
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"config.pair.path={path}: no such file or folder.")
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text())["splits"]
        if split not in splits:
            raise _no_split(path, split, splits)
        path = path / split
    if (path / "state.json").is_file():
        state = json.loads((path / "state.json").read_text())
        return [path / entry["filename"] for entry in state["_data_files"]]
    splits: dict[Path, set[str]] = {}
    for file in sorted(path.rglob("*.parquet")):
        stem = re.sub(r"-\d+-of-\d+(-\w+)?$", "", file.stem)
        splits[file] = {stem, *file.relative_to(path).parts[:-1]}
    if not splits:
        raise FileNotFoundError(
            f"config.pair.path={path}: expected a parquet file, a folder of them, or a folder that"
            " `datasets.save_to_disk` wrote (state.json)."
        )
    found = [file for file in splits if not split or split in splits[file]]
    if not found:
        raise _no_split(path, split, sorted(set().union(*splits.values())))
    return found


def _no_split(path: Path, split: str, there: list[str]) -> FileNotFoundError:
    return FileNotFoundError(
        f"{path} has no split {split!r}: set config.pair.split to one of {', '.join(there)}"
        " (or, for a folder of parquet files, to nothing for all of them)."
    )


class PreferenceSet:
    """The rows of such files; every file's columns are looked at before the first row is read.

    Args:
        path, split: see `find_files`.
        columns: the names of "caption", "first", "second" and "label".
        max_rows: rows to read, 0 for all.

    Attributes:
        files, num_rows: what will be read.
        counts: what reading has dropped so far, as "unlabelled", "ties", "empty_captions" and
            "bad_images", and how many distinct captions ("prompts") there were.

    Raises:
        FileNotFoundError: see `find_files`.
        ValueError: a file that cannot be read, lacks a column or has one of another type.
    """

    def __init__(
        self, path: str | Path, split: str, columns: Mapping[str, str], *, max_rows: int = 0
    ):
        path = Path(path).expanduser()
        self.folder = path if path.is_dir() else path.parent
        self.files = find_files(path, split)
        self.counts: Counter = Counter()
        self._columns = dict(columns)
        total = sum(_look_at(file, self._columns) for file in self.files)
        self.num_rows = min(total, max_rows) if max_rows else total
        self._captions: set[bytes] = set()
        self._bad: list[str] = []

    def fingerprint(self) -> list[tuple[str, int, int]]:
        """Changes when a file does: its name, size and time of change."""
        stats = [(file, file.stat()) for file in self.files]
        return [(str(file.name), stat.st_size, stat.st_mtime_ns) for file, stat in stats]

    def read(
        self,
        height: int,
        width: int,
        *,
        max_bad: float = 1.0,
        done: Callable[[int], None] = lambda count: None,
    ) -> Iterator[Preference]:
        """Decodes the rows that count, some ahead of whoever asks for them.

        Args:
            height, width: of the images, see `fit_image`.
            max_bad: the share of all rows that may have no caption or an image that cannot be
                decoded.
            done: called with a number of rows once they are read, dropped ones too.

        Raises:
            ValueError: more bad rows than that, of which the first are named; a label that is
                neither 0, 0.5 nor 1; a damaged file.
        """
        pending: deque[tuple[list[tuple[Preference, list[Future]]], int]] = deque()
        with ThreadPoolExecutor(_THREADS) as pool:
            start = 0
            for cells in self._batches():
                batch = []
                for row, values in enumerate(zip(*cells.values(), strict=True), start):
                    each = dict(zip(cells, values, strict=True))
                    chosen = self._chosen(row, each, max_bad)
                    if chosen is not None:
                        images = [
                            pool.submit(self._image, each[side], height, width)
                            for side in ("first", "second")
                        ]
                        batch.append((Preference(row, each["caption"], (), chosen), images))
                start += len(cells["label"])
                pending.append((batch, len(cells["label"])))
                if len(pending) > _BATCHES_AHEAD:
                    yield from self._decoded(*pending.popleft(), max_bad, done)
            while pending:
                yield from self._decoded(*pending.popleft(), max_bad, done)

    def _decoded(self, batch, num_rows, max_bad, done) -> Iterator[Preference]:
        for preference, futures in batch:
            try:
                images = tuple(future.result() for future in futures)
            except ValueError as error:
                self._drop("bad_images", f"row {preference.row}: {error}", max_bad)
                continue
            yield preference._replace(images=images)
        done(num_rows)

    def _chosen(self, row: int, cells: Mapping[str, Any], max_bad: float) -> int | None:
        """Which image is preferred; None for a row that is dropped, which is counted."""
        caption, label = cells["caption"], cells["label"]
        if caption and caption.strip():
            self._captions.add(hashlib.sha256(caption.encode()).digest()[:8])
            self.counts["prompts"] = len(self._captions)
        if label is None or label != label or cells.get(_FLAG) is False:  # NaN is none either
            self.counts["unlabelled"] += 1
        elif label not in (0, 0.5, 1):
            raise ValueError(
                f"row {row} has the label {label!r}: expected 1 where the first image is"
                " preferred, 0 for the second, 0.5 for a tie (config.pair.columns.label)."
            )
        elif label == 0.5:
            self.counts["ties"] += 1
        elif not (caption and caption.strip()):
            self._drop("empty_captions", f"row {row}: no caption", max_bad)
        else:
            return 0 if label else 1
        return None

    def _drop(self, reason: str, what: str, max_bad: float) -> None:
        self.counts[reason] += 1
        self._bad.append(what)
        if len(self._bad) > max_bad * self.num_rows:
            raise ValueError(
                f"{len(self._bad)} of {self.num_rows} rows are bad, more than"
                f" config.pair.max_bad={max_bad} of them: {self.bad_rows()}"
            )

    def bad_rows(self) -> str:
        """The first rows that were dropped as bad, in one line; empty if there were none."""
        more = len(self._bad) - _TOLD
        return "; ".join(self._bad[:_TOLD]) + (f"; and {more} more" if more > 0 else "")

    def _image(self, cell: Any, height: int, width: int) -> np.ndarray:
        """Decodes bytes, or {"bytes", "path"} with a path in the set's folder."""
        data, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, "")
        if data is None and path:
            try:
                data = (self.folder / path).read_bytes()
            except OSError as error:
                raise ValueError(f"{path} cannot be read: {error.strerror}") from error
        if data is None:
            raise ValueError("there is no image")
        return fit_image(data, height, width)

    def _batches(self) -> Iterator[dict[str, list]]:
        """The cells of some rows at a time: "caption", "first", "second", "label", "has_label"."""
        left = self.num_rows
        for file in self.files:
            for batch in _record_batches(file, list(self._columns.values())):
                flag = {_FLAG: _FLAG} if _FLAG in batch.schema.names else {}
                for start in range(0, batch.num_rows, _ROWS):
                    part = batch.slice(start, min(_ROWS, left))
                    yield {
                        key: part.column(name).to_pylist()
                        for key, name in (self._columns | flag).items()
                    }
                    left -= part.num_rows
                    if not left:
                        return


def _open(file: Path) -> Any:
    """A pyarrow ParquetFile, or a reader of record batches."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if file.suffix == ".arrow":
        return pa.ipc.open_stream(pa.memory_map(str(file)))
    return pq.ParquetFile(file)


def _record_batches(file: Path, columns: list[str]) -> Iterator[Any]:
    import pyarrow as pa

    try:
        reader = _open(file)
        if file.suffix == ".arrow":
            yield from reader
            return
        names = [*columns, *([_FLAG] if _FLAG in reader.schema_arrow.names else [])]
        yield from reader.iter_batches(_ROWS, columns=names)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def _look_at(file: Path, columns: Mapping[str, str]) -> int:
    """The number of rows of a file. Raises ValueError if a column is not what it must be."""
    import pyarrow as pa
    from pyarrow import types

    try:
        reader = _open(file)
        if file.suffix == ".arrow":
            schema, num_rows = reader.schema, sum(batch.num_rows for batch in reader)
        else:
            schema, num_rows = reader.schema_arrow, reader.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error

    def is_text(kind):
        return types.is_string(kind) or types.is_large_string(kind)

    def is_image(kind):
        if types.is_struct(kind):
            fields = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
            return "bytes" in fields and is_bytes(fields["bytes"])
        return is_bytes(kind)

    def is_bytes(kind):
        return types.is_binary(kind) or types.is_large_binary(kind) or types.is_null(kind)

    def is_number(kind):
        return any(f(kind) for f in (types.is_floating, types.is_integer, types.is_boolean))

    image = is_image, "the bytes of an image, or a struct of bytes and path"
    kinds = {"caption": (is_text, "text"), "first": image, "second": image}
    kinds["label"] = is_number, "numbers"
    for key, name in columns.items():
        if name not in schema.names:
            raise ValueError(
                f"{file} has no column {name!r} (config.pair.columns.{key}); it has"
                f" {', '.join(schema.names)}."
            )
        fits, expected = kinds[key]
        if not fits(schema.field(name).type):
            raise ValueError(
                f"{file}: column {name!r} (config.pair.columns.{key}) holds"
                f" {schema.field(name).type}, expected {expected}."
            )
    return num_rows
