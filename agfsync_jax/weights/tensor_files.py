"""Tensors in files, read when asked for: safetensors, and torch's pickles.

A checkpoint is a dictionary from key to `Tensor`. Opening a file reads its header alone; renaming,
splitting and transposing act on `Tensor`s and move no byte; reading a part of a tensor reads the
bytes of the rows that it lies in.
"""

import contextlib
import dataclasses
import functools
import io
import json
import math
import os
import pickle
import re
import shutil
import threading
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from agfsync_jax.utils.files import is_url, size_of
from agfsync_jax.weights import pickles

SAFETENSORS = (".safetensors",)
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
SHAPES = ".shapes.json"  # the shape of each tensor, of random numbers (random_weights.py)
_NUMBERS = 1_000_003  # that are drawn, and repeat; a prime, so that no two rows are alike

# https://github.com/huggingface/safetensors#format
_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
FLOATING = ("float32", "float16", "bfloat16")  # what weights are written in

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor that lies in a file, or a view of one.

    Attributes:
      key: its name in the file, for messages.
      shape, dtype: of the view.
      fetch: reads the elements of an index, one slice with start and stop a dimension.
      row_axis: the axis along which the file's rows lie, which are read apart.
    """

    key: str
    shape: tuple[int, ...]
    dtype: np.dtype
    fetch: Callable[[Index], np.ndarray]
    row_axis: int = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def read(self, index: Sequence[slice] | None = None) -> np.ndarray:
        """The elements of `index` (steps of 1), all by default; maybe as a strided view."""
        index = index or (slice(None),) * len(self.shape)
        sized = zip(index, self.shape, strict=True)
        return self.fetch(tuple(slice(*part.indices(size)[:2]) for part, size in sized))

    def transpose(self, *axes: int) -> "Tensor":
        """The view with axis `axes[i]` in place i."""

        def fetch(index):
            inner = tuple(index[axes.index(axis)] for axis in range(len(axes)))
            return self.fetch(inner).transpose(axes)

        shape, row_axis = tuple(self.shape[axis] for axis in axes), axes.index(self.row_axis)
        return dataclasses.replace(self, shape=shape, fetch=fetch, row_axis=row_axis)

    def split(self, parts: int) -> list["Tensor"]:
        """`parts` views of equally many rows each.

        Raises:
          ValueError: the rows do not divide into so many parts.
        """
        if not self.shape or self.shape[0] % parts:
            raise ValueError(f"{self.key} {list(self.shape)} does not split into {parts} parts.")
        size = self.shape[0] // parts

        def fetch(start, index):
            rows = slice(start + index[0].start, start + index[0].stop)
            return self.fetch((rows, *index[1:]))

        shape, starts = (size, *self.shape[1:]), range(0, self.shape[0], size)
        return [
            dataclasses.replace(self, shape=shape, fetch=functools.partial(fetch, start))
            for start in starts
        ]

    def reshape(self, *shape: int) -> "Tensor":
        """The view with axes of size 1 dropped or added, nothing else; it is always read whole.

        Raises:
          ValueError: the other axes differ.
        """
        if [n for n in self.shape if n != 1] != [n for n in shape if n != 1]:
            raise ValueError(f"{self.key} {list(self.shape)} has no view of shape {list(shape)}.")

        def fetch(index):
            return self.read().reshape(shape)[index]

        return dataclasses.replace(self, shape=shape, fetch=fetch, row_axis=0)


def from_array(key: str, value: np.ndarray) -> Tensor:
    """A tensor that lies in memory."""
    return Tensor(key, tuple(value.shape), value.dtype, lambda index: value[index])


def _random(key: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers that keep activations of about unit size through a network of any width."""
    leaf = key.rpartition(".")[2]
    if len(shape) < 2 and leaf in ("weight", "bias"):
        mean, std = float(leaf == "weight"), 0.0
    else:
        of_inputs = len(shape) > 1 and not re.search("embed|shared|query_tokens", key)
        mean, std = 0.0, math.prod(shape[1:]) ** -0.5 if of_inputs else 0.02
    start = zlib.crc32(key.encode())

    def fetch(index: Index) -> np.ndarray:
        if not shape:
            return np.float16(mean)
        row, drawn = math.prod(shape[1:]), _normal(mean, std)
        values = np.empty((index[0].stop - index[0].start) * row, np.float16)
        first, done = (start + index[0].start * row) % _NUMBERS, 0
        while done < len(values):
            part = drawn[first : first + len(values) - done]
            values[done : done + len(part)] = part
            first, done = 0, done + len(part)
        return values.reshape(-1, *shape[1:])[(slice(None), *index[1:])]

    return Tensor(key, shape, np.dtype(np.float16), fetch)


@functools.lru_cache(64)
def _normal(mean: float, std: float) -> np.ndarray:
    drawn = np.random.default_rng(0).standard_normal(_NUMBERS, np.float32)
    return (mean + std * drawn).astype(np.float16)


def open_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, of a pickle of tensors (.bin, .pt, .pth, .ckpt), or of
    the shapes of random ones.

    Of pickles only what makes tensors is run (pickles.py; `weights_only=True` for old ones).

    Args:
      path: a local path, or an etils.epath.Path of gs:// and the like.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not whole, not of its kind, or an old pickle while torch is not installed.
    """
    if not path.exists():
        raise FileNotFoundError(f"No file {path}.")
    if path.suffix in SAFETENSORS:
        return _open_safetensors(path)
    if path.suffix in PICKLES:
        return _open_pickle(path)
    if path.name.endswith(SHAPES):
        shapes = json.loads(path.read_text())
        return {key: _random(key, tuple(shape)) for key, shape in shapes.items()}
    known = ", ".join(SAFETENSORS + PICKLES)
    raise ValueError(f"{path} is no file of weights: its name must end in one of {known}.")


def read_header(path: Path) -> tuple[dict[str, tuple], dict[str, str], int]:
    """(key -> (dtype, shape, begin, end), metadata, size of it all) of a safetensors file.

    Raises:
      ValueError: it is none, or not whole.
    """
    with path.open("rb") as file:
        start, size = file.read(8), size_of(path)
        length = int.from_bytes(start, "little")
        if start == b"version ":  # the first line of a pointer file
            raise ValueError(
                f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull`."
            )
        if size < 8 + length or len(start) < 8:
            raise ValueError(
                f"{path} is not a whole safetensors file ({size} bytes): copy it again."
            )
        raw = file.read(length)
    try:
        header = json.loads(raw)
        metadata = header.pop("__metadata__", None) or {}
        entries = {
            key: (entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
            for key, entry in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no safetensors file (its header: {error}): copy it again, or convert it."
        ) from error
    return entries, metadata, 8 + length


def _open_safetensors(path: Path) -> dict[str, Tensor]:
    entries, _, end = read_header(path)
    read_into, size = _reader(path), size_of(path)
    tensors, wrong = {}, []
    for key, (name, shape, begin, stop) in entries.items():
        if name not in _DTYPES:
            wrong.append(f"{key} has dtype {name}, known are {', '.join(_DTYPES)}")
            continue
        dtype = np.dtype(_DTYPES[name])
        if stop - begin != math.prod(shape) * dtype.itemsize:
            wrong.append(f"{key} {list(shape)} {name} spans {stop - begin} bytes")
        elif end + stop > size:
            wrong.append(f"{key} ends at byte {end + stop}, the file has {size}")
        fetch = functools.partial(_fetch, read_into, end + begin, shape, dtype)
        tensors[key] = Tensor(key, shape, dtype, fetch)
    if wrong:
        few = "".join(f"\n  {line}" for line in wrong[:5])
        more = f"\n  and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"{path} is not a whole safetensors file: copy it again.{few}{more}")
    return tensors


def _fetch(read_into: Callable, offset: int, shape: tuple, dtype: np.dtype, index: Index):
    """Reads the rows of `index` and cuts the rest of it out of them."""
    rows = index[0] if shape else slice(0, 1)
    out = np.empty((rows.stop - rows.start, *shape[1:]), dtype)
    if out.size:
        where = offset + rows.start * math.prod(shape[1:]) * dtype.itemsize
        read_into(where, memoryview(out.reshape(-1).view(np.uint8)))
    return out[(slice(None), *index[1:])] if shape else out.reshape(())


def _reader(path: Path) -> Callable[[int, memoryview], None]:
    """read_into(offset, buffer) of a file, for any thread.

    Nothing is mapped: pages of a mapped file would count as this process's memory.
    """
    local = threading.local()
    file = None if is_url(path) else open(path, "rb", buffering=0)

    def read_some(offset: int, buffer: memoryview) -> int:
        if file:  # reading at an offset moves no pointer, so threads share the file
            return os.preadv(file.fileno(), [buffer], offset)  # at most 2 GB a call
        if not hasattr(local, "file"):
            local.opened = contextlib.ExitStack()  # TensorFlow's files open in a `with` alone
            local.file = local.opened.enter_context(path.open("rb"))
        local.file.seek(offset)
        data = local.file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def read_into(offset: int, buffer: memoryview) -> None:
        while len(buffer):
            count = read_some(offset, buffer)
            if not count:
                raise ValueError(f"{path} ends before byte {offset}: copy it again.")
            offset, buffer = offset + count, buffer[count:]

    return read_into


def _open_pickle(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file:
        try:
            if zipfile.is_zipfile(file):
                return _of_archive(path, file)
        except ValueError as error:
            raise ValueError(f"{path} is not a whole pickle of tensors alone ({error}).") from error
    return _of_old_pickle(path)


def _of_archive(path: Path, file: Any) -> dict[str, Tensor]:
    state, offset = pickles.read_pickle(file)
    read_into = _reader(path)

    def fetch(stored: pickles.Stored, begin: int, index: Index) -> np.ndarray:
        if stored.is_contiguous:
            return _fetch(read_into, begin, stored.shape, stored.dtype, index)
        last = sum((n - 1) * s for n, s in zip(stored.shape, stored.strides, strict=True))
        flat = _fetch(read_into, begin, (last + 1,), stored.dtype, (slice(0, last + 1),))
        strides = [stride * stored.dtype.itemsize for stride in stored.strides]
        return np.lib.stride_tricks.as_strided(flat, stored.shape, strides)[index]

    return {
        key: Tensor(key, value.shape, value.dtype, functools.partial(fetch, value, offset(value)))
        for key, value in _state_of(state).items()
        if isinstance(value, pickles.Stored)
    }


def _state_of(state: Any) -> dict[str, Any]:
    """The dictionary of tensors in a pickle, which may lie under "state_dict"."""
    while isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict):
        raise ValueError(f"it holds a {type(state).__name__}, expected a dictionary")
    return state


def _of_old_pickle(path: Path) -> dict[str, Tensor]:
    """A pickle of torch < 1.6, which torch reads whole."""
    try:
        import torch
    except ImportError as error:
        raise ValueError(
            f"{path} is a pickle of a torch before 1.6, which needs torch: pip install"
            " 'agfsync_jax[torch]', or convert it once where torch is, with"
            " safetensors.torch.save_file(torch.load(path, weights_only=True), new_path)."
        ) from error
    try:
        source = io.BytesIO(path.read_bytes()) if is_url(path) else path
        state = torch.load(source, map_location="cpu", weights_only=True)
        state = _state_of(state)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is not a whole pickle of tensors alone ({reason}).") from error

    def fetch(value, index):
        if value.dtype == torch.bfloat16:  # torch gives numpy none; the bits stay
            return value[index].view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return value[index].numpy()

    return {
        key: Tensor(
            key,
            tuple(value.shape),
            np.dtype(str(value.dtype).removeprefix("torch.")),
            functools.partial(fetch, value.detach()),
        )
        for key, value in state.items()
        if isinstance(value, torch.Tensor)
    }


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes one safetensors file, reading and writing one tensor at a time.

    Every process reads every tensor, the main one writes. The file appears when it is whole.

    Raises:
      OSError: the disk has not enough room; nothing is left behind.
    """
    names = {np.dtype(value): name for name, value in _DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for key, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[key] = {
            "dtype": names[np.dtype(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    if jax.process_index():
        for tensor in tensors.values():
            tensor.read()
        return
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # the format aligns what follows
    if (free := shutil.disk_usage(path.parent).free) < end:
        raise OSError(
            f"{path} needs {end / 1e9:.1f} GB and {path.parent} has {free / 1e9:.1f} GB free."
        )
    aside = path.with_name(f"{path.name}.tmp")
    try:
        with open(aside, "wb") as file:
            file.write(len(raw).to_bytes(8, "little") + raw)
            for tensor in tensors.values():
                value = np.ascontiguousarray(tensor.read())
                file.write(memoryview(value.reshape(-1).view(np.uint8)))
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
