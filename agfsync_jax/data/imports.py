"""Preferences that people gave, from the files of Hugging Face's datasets, row by row.

A parquet file; a folder of parquet files as repositories have them (data/train-00000-of-00012-
<hash>.parquet); or a folder that `datasets.save_to_disk` wrote. A row has a caption, two images and
a label that says which is better; the columns' names are config.pair.columns.
"""

import contextlib
import functools
import io
import itertools
import json
import math
import re
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from agfsync_jax.utils.files import is_url, to_path

_ROWS = 16  # read together
_ROWS_AHEAD = 32  # decoded while the device is busy
_THREADS = 8  # decoders run outside the interpreter's lock
_TOLD = 5  # bad rows that an error names
_FLAG = "has_label"  # Pick-a-Pic's column, read where it is there
# What a column holds: pyarrow's checks of its type, and what they are called.
_BYTES = "is_binary is_large_binary is_null", "the bytes of an image, or a struct of bytes and path"
_KINDS = {
    "caption": ("is_string is_large_string", "text"),
    "first": _BYTES,
    "second": _BYTES,
    "label": ("is_floating is_integer is_boolean", "numbers"),
}


class Preference(NamedTuple):
    """One row that counts."""

    row: int  # its number in the set
    caption: str
    images: tuple[UInt8[np.ndarray, "h w 3"], UInt8[np.ndarray, "h w 3"]]  # first and second
    chosen: int  # 0 or 1, which of them


def bucket_sizes(height: int, width: int, multiple: int) -> list[tuple[int, int]]:
    """The sizes (height, width) of images that keep their shapes; with `multiple` 0, this one.

    As kohya's scripts have them: sides are multiples of `multiple`, and an image has at most this
    one's area; there are the largest square and, of each width, the largest height, and the same
    turned. One side is at most twice the other: the ends of longer images are cut off. Of sizes of
    one shape there is the largest.

    Raises:
        ValueError: there is none.
    """
    if not multiple:
        return [(height, width)]
    area = height * width
    square = math.isqrt(area) // multiple * multiple
    if not square:
        raise ValueError(
            f"config.pair.buckets={multiple}: images of config.sample.height={height} and"
            f" config.sample.width={width} have no room for sides of {multiple}: take fewer."
        )
    found = [(square, square)]
    for wide in range(multiple, int((2 * area) ** 0.5) + 1, multiple):
        high = min(area // wide, 2 * wide) // multiple * multiple
        if wide <= 2 * high:
            found += [(high, wide), (wide, high)]
    return sorted({h / w: (h, w) for h, w in found}.values())  # the largest comes last


def nearest_size(
    sizes: Sequence[tuple[int, int]], images: Sequence[Image.Image]
) -> tuple[int, int]:
    """The size for all of these images: of the shape nearest to their mean, so that as little is
    cut off of one as of another; of two alike, the larger."""
    shape = np.mean([np.log(image.height / image.width) for image in images])
    return min(sizes, key=lambda s: (round(abs(np.log(s[0] / s[1]) - shape), 6), -s[0] * s[1]))


def decode_image(data: bytes) -> Image.Image:
    """An image, turned as its EXIF says, in RGB; ValueError for bytes that are no whole image."""
    try:
        return ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    except UnidentifiedImageError as error:
        raise ValueError(f"{len(data)} bytes are no image that PIL knows") from error
    except Exception as error:  # what PIL's decoders raise is anything that broken bytes lead to
        raise ValueError(f"{len(data)} bytes are not a whole image: {error}") from error


def fit_images(
    images: Sequence[Image.Image], sizes: Sequence[tuple[int, int]]
) -> tuple[UInt8[np.ndarray, "h w 3"], ...]:
    """Images of one size among `sizes` (height, width), the nearest.

    Each is resized until it just covers that size, by PIL with a Lanczos kernel (antialiased) on
    the host, and its center is cut out; an image of that size stays as it is.
    """
    height, width = nearest_size(sizes, images)
    size, kernel = (width, height), Image.Resampling.LANCZOS
    return tuple(np.asarray(ImageOps.fit(image, size, kernel)) for image in images)


def find_files(path: str | Path, split: str) -> list[Path]:
    """The files of one split, in order.

    A parquet file belongs to a split by its name (train-00000-of-00012.parquet, train.parquet) or
    by a folder that it lies in (train/0000.parquet). With an empty split all of a folder's belong.

    Raises:
        FileNotFoundError: nothing there, or no such split; lists those that are there.
    """
    if is_url(to_path(path)):
        raise FileNotFoundError(
            f"config.pair.path={path} is a URL where neither pairs lie nor a round's prompts.jsonl"
            " and candidates, and people's pairs are read from this machine: copy them here first."
        )
    path = Path(path).expanduser()
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"config.pair.path={path}: no such file or folder.")

    def no_split(there):
        return FileNotFoundError(
            f"{path} has no split {split!r}: set config.pair.split to one of {', '.join(there)}"
            " (or, for a folder of parquet files, to nothing for all of them)."
        )

    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text())["splits"]
        if split not in splits:
            raise no_split(splits)
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
            f"config.pair.path={path}: expected a parquet file, a folder of them, a folder that"
            " `datasets.save_to_disk` wrote (state.json), or of another workdir pairs/ or a round"
            " folder with candidates and scores."
        )
    found = [file for file in splits if not split or split in splits[file]]
    if not found:
        raise no_split(sorted(set().union(*splits.values())))
    return found


class PreferenceSet:
    """The rows of such files; every file's columns are looked at before the first row is read.

    Args:
        settings: `config.pair`: its path, split, columns, max_rows (0: all), and max_bad, the share
            of all rows that may have no caption or an image that cannot be decoded.

    Attributes:
        files, num_rows: what will be read.
        counts: what reading has dropped so far, as "unlabelled", "ties", "empty_captions" and
            "bad_images", and how many distinct captions ("prompts") there were.
        sizes: how many of the rows so far have images of a size (height, width).

    Raises:
        FileNotFoundError: see `find_files`.
        ValueError: a file that cannot be read, lacks a column or has one of another type.
    """

    def __init__(self, settings):
        path = Path(settings.path).expanduser()
        self.folder = path if path.is_dir() else path.parent
        self.files = find_files(path, settings.split)
        self.counts: Counter = Counter()
        self.sizes: Counter = Counter()
        self._columns, self._max_bad = settings.columns.to_dict(), settings.max_bad
        total = sum(_look_at(file, self._columns) for file in self.files)
        self.num_rows = min(total, settings.max_rows or total)
        self._captions: set[str] = set()
        self._bad: list[str] = []

    def fingerprint(self) -> list[tuple[str, int, int]]:
        """Changes when a file does: its name, size and time of change."""
        stats = [(file.name, file.stat()) for file in self.files]
        return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]

    def read(
        self,
        sizes: Sequence[tuple[int, int]],
        done: Callable[[int], None] = lambda count: None,
    ) -> Iterator[Preference]:
        """Decodes the rows that count, some ahead of whoever asks for them.

        Args:
            sizes: (height, width) that images may have, see `fit_images`.
            done: called with a number of rows once they are read, dropped ones too.

        Raises:
            ValueError: more bad rows than may be, of which the first are named; a label that is
                neither 0, 0.5 nor 1; a damaged file.
        """
        pending: deque = deque()
        with ThreadPoolExecutor(_THREADS) as pool:
            for row, cells in enumerate(itertools.islice(self._rows(), self.num_rows)):
                chosen = self._chosen(row, cells)
                images = None
                if chosen is not None:
                    images = pool.submit(self._images, (cells["first"], cells["second"]), sizes)
                pending.append((row, cells["caption"], images, chosen))
                if len(pending) > _ROWS_AHEAD:
                    yield from self._decoded(*pending.popleft())
                    done(1)
            for each in pending:
                yield from self._decoded(*each)
                done(1)

    def _decoded(self, row, caption, images, chosen) -> Iterator[Preference]:
        if images is None:
            return
        try:
            images = images.result()
        except ValueError as error:
            self._drop("bad_images", f"row {row}: {error}")
        else:
            self.sizes[images[0].shape[:2]] += 1
            yield Preference(row, caption, images, chosen)

    def _chosen(self, row: int, cells: Mapping[str, Any]) -> int | None:
        """Which image is preferred; None for a row that is dropped, which is counted."""
        caption, label = (cells["caption"] or "").strip(), cells["label"]
        if caption:
            self._captions.add(cells["caption"])
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
        elif not caption:
            self._drop("empty_captions", f"row {row}: no caption")
        else:
            return 0 if label else 1
        return None

    def _drop(self, reason: str, what: str) -> None:
        self.counts[reason] += 1
        self._bad.append(what)
        if len(self._bad) > self._max_bad * self.num_rows:
            raise ValueError(
                f"{len(self._bad)} of {self.num_rows} rows are bad, more than"
                f" config.pair.max_bad={self._max_bad} of them: {self.bad_rows()}"
            )

    def bad_rows(self) -> str:
        """The first rows that were dropped as bad, in one line; empty if there were none."""
        more = len(self._bad) - _TOLD
        return "; ".join(self._bad[:_TOLD]) + (f"; and {more} more" if more > 0 else "")

    def _images(self, cells: Sequence[Any], sizes: Sequence[tuple[int, int]]) -> Any:
        return fit_images([self._image(cell) for cell in cells], sizes)

    def _image(self, cell: Any) -> Image.Image:
        """Decodes bytes, or {"bytes", "path"} with a path in the set's folder."""
        data, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, "")
        if data is None and path:
            try:
                data = (self.folder / path).read_bytes()
            except OSError as error:
                raise ValueError(f"{path} cannot be read: {error.strerror}") from error
        if data is None:
            raise ValueError("there is no image")
        return decode_image(data)

    def _rows(self) -> Iterator[dict[str, Any]]:
        """The cells "caption", "first", "second", "label" and "has_label" of all rows."""
        for file in self.files:
            with _told(file):
                schema, _, batches = _open(file)
                names = self._columns | ({_FLAG: _FLAG} if _FLAG in schema.names else {})
                for batch in batches(list(names.values())):
                    for row in batch.to_pylist():
                        yield {key: row[name] for key, name in names.items()}


@contextlib.contextmanager
def _told(file: Path) -> Iterator[None]:
    """Says which file cannot be read."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def _open(file: Path) -> tuple[Any, int, Callable[[list[str]], Iterator[Any]]]:
    """A file's schema, its number of rows, and what gives columns of it, some rows at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if file.suffix == ".arrow":
        table = pa.ipc.open_stream(pa.memory_map(str(file))).read_all()  # it stays on the disk
        return table.schema, table.num_rows, lambda names: table.select(names).to_batches(_ROWS)
    reader = pq.ParquetFile(file)
    read = functools.partial(reader.iter_batches, _ROWS)
    return reader.schema_arrow, reader.metadata.num_rows, lambda names: read(columns=names)


def _look_at(file: Path, columns: Mapping[str, str]) -> int:
    """The number of rows of a file. Raises ValueError if a column is not what it must be."""
    from pyarrow import types

    with _told(file):
        schema, num_rows, _ = _open(file)
    for key, name in columns.items():
        if name not in schema.names:
            raise ValueError(
                f"{file} has no column {name!r} (config.pair.columns.{key}); it has"
                f" {', '.join(schema.names)}."
            )
        kind, (checks, expected) = schema.field(name).type, _KINDS[key]
        if _KINDS[key] is _BYTES and types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            kind = kind.field("bytes").type
        if not any(getattr(types, check)(kind) for check in checks.split()):
            raise ValueError(
                f"{file}: column {name!r} (config.pair.columns.{key}) holds"
                f" {schema.field(name).type}, expected {expected}."
            )
    return num_rows
