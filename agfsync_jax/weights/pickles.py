"""Pickles of tensors as torch has written them since 1.6: a zip archive, read without torch.

Like `torch.load(weights_only=True)`, only what makes tensors is called; any other name in a pickle
is refused. Storages lie in the archive as they are, so that a tensor is read when it is asked for.
"""

import collections
import math
import pickle
import struct
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

_STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
# What unpickling may raise besides its own error, as its documentation warns.
_OTHERS = (AttributeError, EOFError, IndexError, KeyError, TypeError, ValueError)
_LOCAL_HEADER = struct.Struct("<26xHH")  # of an archive's entry: lengths of its name and extra


class Stored(NamedTuple):
    """A tensor as a pickle describes it."""

    place: str  #: the name of its storage's entry
    dtype: np.dtype
    start: int  #: in the storage, in elements
    shape: tuple[int, ...]
    strides: tuple[int, ...]  #: in elements

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie one behind another."""
        expected, size = [], 1
        for length in reversed(self.shape):
            expected.append(size)
            size *= length
        pairs = zip(self.shape, self.strides, reversed(expected), strict=True)
        return not size or all(n == 1 or stride == whole for n, stride, whole in pairs)


def read_pickle(file: Any) -> tuple[Any, Callable[[Stored], int]]:
    """What is pickled in an open archive, each tensor a `Stored`; and where its bytes begin.

    Raises:
        ValueError: no whole archive of torch, or names in it that do not make tensors.
    """
    try:
        archive = zipfile.ZipFile(file)
        (pickled,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        root = pickled.removesuffix("data.pkl")
        order = f"{root}byteorder"
        if order in archive.namelist() and archive.read(order) != b"little":
            raise ValueError("its numbers are big-endian")
        made = _Unpickler(archive.open(pickled), root).load()
        places = {info.filename: info for info in archive.infolist()}
    except (pickle.UnpicklingError, zipfile.BadZipFile, *_OTHERS) as error:
        raise ValueError(str(error) or type(error).__name__) from error

    def offset(tensor: Stored) -> int:
        entry = places.get(tensor.place)
        last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True))
        needed = (tensor.start + last + 1) * tensor.dtype.itemsize if math.prod(tensor.shape) else 0
        if entry is None or entry.compress_type != zipfile.ZIP_STORED or entry.file_size < needed:
            raise ValueError(f"{tensor.place} is not there, or not whole")
        file.seek(entry.header_offset)
        name, extra = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
        begin = entry.header_offset + _LOCAL_HEADER.size + name + extra
        return begin + tensor.start * tensor.dtype.itemsize

    return made, offset


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, root: str):
        super().__init__(file, encoding="utf-8")
        self._known = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
            ("torch", "Size"): tuple,
        }
        self._known |= {("torch", name): np.dtype(kind) for name, kind in _STORAGES.items()}
        self._root = root

    def find_class(self, module: str, name: str) -> Any:
        found = self._known.get((module, name))
        if found is None:
            raise pickle.UnpicklingError(f"{module}.{name} makes no tensor")
        return found

    def persistent_load(self, saved: Any) -> tuple[str, np.dtype]:
        _, dtype, key, *_ = saved  # and a device, and the number of elements
        if not isinstance(dtype, np.dtype) or not isinstance(key, str):
            raise pickle.UnpicklingError("a storage of an unknown kind")
        return f"{self._root}data/{key}", dtype


def _tensor(storage: tuple[str, np.dtype], start: int, shape: tuple, strides: tuple, *_) -> Stored:
    return Stored(*storage, int(start), tuple(shape), tuple(strides))
