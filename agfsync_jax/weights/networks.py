"""Parameters in and out of Hugging Face folders: files of tensors <-> graph and pytree.

The key table of a model follows from the model itself. Submodules keep the names of the torch state
dict, so a parameter's path is its checkpoint key up to the leaf, and the leaf's name and rank fix
the transform:

    kernel of rank 2  <->  weight, transposed       (Linear: [in, out] <-> [out, in])
    kernel of rank 4  <->  weight, (3, 2, 0, 1)     (Conv: [h, w, in, out] <-> [out, in, h, w])
    scale, embedding  <->  weight                   (norms, embeddings)
    any other leaf    <->  its own name

A model class may add `key_aliases` ((regex, replacement) for other spellings of its keys that
checkpoints carry), `tied_keys` ((regex, key): where to look for a key that is missing) and
`ignored_keys` (regexes of keys that hold no parameter of their own).

Loading has two halves. `fit` compares a file's header with the model and reads no tensor, so that
all that is wrong is known in a moment; `Fitted.read` then streams each tensor from its file to its
sharding, of which a process reads the rows of its own devices.
"""

import dataclasses
import functools
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from tqdm import tqdm

from agfsync_jax.weights.places import resolve_path, weight_names
from agfsync_jax.weights.tensor_files import Tensor, open_tensors, write_tensors

READ_EVENT = "/agfsync_jax/read_weights"  # with its seconds, to listeners of jax.monitoring
_CONV = (3, 2, 0, 1)  # [h, w, in, out] -> [out, in, h, w]
_ALIGNMENT = 64  # bytes
_BLOCK = 128  # rows
_CHUNK = 2**20  # numbers
_THREADS = min(4, os.cpu_count() or 1)  # each holds one tensor or two in memory


def read_json(path: Path) -> dict[str, Any]:
    """Parses a JSON file; raises FileNotFoundError or ValueError if it is missing or none."""
    if not path.exists():
        raise FileNotFoundError(
            f"No {path.name} in {path.parent}: is it a folder in the Hugging Face layout?"
        )
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error


def init_model(
    cls: type, config: Any, *, seed: int = 0, dtype: Any = jnp.float32
) -> tuple[nnx.GraphDef, nnx.State]:
    """A network with random parameters, as a graph and a pytree of float32 parameters."""

    @jax.jit
    def init():
        return nnx.state(cls(config, rngs=nnx.Rngs(seed), dtype=dtype), nnx.Param)

    graph, _ = abstract_model(cls, config, dtype=dtype)
    return graph, init()


def abstract_model(
    cls: type, config: Any, *, dtype: Any = jnp.float32
) -> tuple[nnx.GraphDef, nnx.State]:
    """The same without memory: the leaves are `jax.ShapeDtypeStruct`s."""
    model = cls(config, rngs=_NoKeys(), dtype=dtype)
    graph, params, _ = nnx.split(model, nnx.Param, ...)
    return graph, params


class _NoKeys:
    """In place of `nnx.Rngs`, for which the layers of models/ give shapes alone: tracing the random
    numbers, as `nnx.eval_shape` does, takes twice as long as all else in opening a checkpoint."""

    def params(self) -> None:
        return None


def parameter_path(path: tuple) -> str:
    """A parameter's path as one string, "down_blocks.0.resnets.0.conv1.kernel"."""
    return ".".join(str(part) for part in path)


def checkpoint_key(path: tuple, ndim: int) -> tuple[str, tuple[int, ...] | None]:
    """The checkpoint key of the parameter at `path`, and the axes order that turns it into the
    checkpoint's layout."""
    *parents, leaf = path
    axes = (_CONV if ndim == 4 else (1, 0)) if leaf == "kernel" else None
    name = "weight" if leaf in ("kernel", "scale", "embedding") else leaf
    return parameter_path((*parents, name)), axes


def checkpoint_table(
    params: nnx.State,
) -> dict[str, tuple[tuple, tuple[int, ...] | None, tuple[int, ...]]]:
    """Checkpoint key -> (path, axes order, shape in the checkpoint) of every parameter."""
    table = {}
    for path, leaf in nnx.to_flat_state(params):
        key, axes = checkpoint_key(path, leaf.ndim)
        table[key] = path, axes, tuple(leaf.shape[axis] for axis in axes or range(leaf.ndim))
    return table


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A network and the tensors in files that will fill it; nothing of them is read yet.

    Attributes:
      graph, abstract: of the network.
      tensors: parameter path -> its tensor, in the parameter's own layout.
    """

    graph: nnx.GraphDef
    abstract: nnx.State
    tensors: dict[tuple, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors in their files."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def read(
        self,
        *,
        param_dtype: Any = jnp.float32,
        shardings: Callable[[nnx.State], Any] | None = None,
        label: str = "",
    ) -> nnx.State:
        """Streams every tensor to its place: on the first device, if there are no shardings.

        Args:
          param_dtype: the one the parameters are kept in.
          shardings: from the abstract parameters to a pytree of shardings.
          label: of the progress bar, which shows up after a few seconds.
        """
        began = time.monotonic()
        flat = dict(nnx.to_flat_state(self.abstract))
        alone = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        places = dict(nnx.to_flat_state(shardings(self.abstract))) if shardings else {}

        def place(item):
            path, tensor = item
            place = places.get(path, alone)
            place = getattr(place, "get_value", lambda: place)()  # a sharding in an nnx.Variable

            @functools.cache  # several devices may hold the same part
            def part(*bounds):
                return _read(tensor, [slice(*each) for each in bounds], param_dtype)

            def fetch(index):
                return part(*(s.indices(n)[:2] for s, n in zip(index, tensor.shape, strict=True)))

            return jax.make_array_from_callback(tensor.shape, place, fetch).block_until_ready()

        progress = tqdm(
            total=self.nbytes,
            unit="B",
            unit_scale=True,
            desc=label,
            delay=3,  # seconds
            mininterval=0.1 if sys.stderr.isatty() else 10,
            leave=False,
            disable=jax.process_index() > 0,
        )
        filled = {}
        with progress, ThreadPoolExecutor(_THREADS) as pool:
            items = self.tensors.items()
            for (path, tensor), value in zip(items, pool.map(place, items), strict=True):
                filled[path] = flat[path].replace(value)
                progress.update(tensor.nbytes)
        jax.monitoring.record_event_duration_secs(READ_EVENT, time.monotonic() - began)
        return nnx.from_flat_state([(path, filled[path]) for path in flat])


def _read(tensor: Tensor, index: list[slice], dtype: Any) -> np.ndarray:
    """The elements of `index` in another dtype, laid out as a device takes them.

    It is read and transposed in blocks that a cache holds, as the whole at once is several times
    slower, and begins where JAX on CPU takes it over without a copy of its own.
    """
    shape = tuple(part.stop - part.start for part in index)
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    out = raw[start : start + size].view(dtype).reshape(shape)
    if not shape:
        out[...] = tensor.read()
        return out
    axis = tensor.row_axis
    rows, blocks = index[axis], np.moveaxis(out, axis, 0)
    row_size = max(1, out.size // max(1, len(blocks)))
    step = max(_BLOCK, _CHUNK // row_size // _BLOCK * _BLOCK)
    for first in range(rows.start, rows.stop, step):
        part = slice(first, min(first + step, rows.stop))
        value = tensor.read([*index[:axis], part, *index[axis + 1 :]])
        value, to = np.moveaxis(value, axis, 0), blocks[first - rows.start :]
        for row in range(0, len(value), _BLOCK):
            block = value[row : row + _BLOCK]
            _convert(block, to[row : row + len(block)])
    return out


def _convert(value: np.ndarray, to: np.ndarray) -> None:
    """`np.copyto(to, value)`, which is four times slower at widening float16.

    With its bits in float32's places, a float16 is a number 2**112 too small; none but those that
    are not finite.
    """
    if (value.dtype, to.dtype) != (np.float16, np.float32):
        np.copyto(to, value)
        return
    half = np.empty_like(to, np.float16)  # in the order that `to` lies in
    np.copyto(half, value)
    bits = half.view(np.int16).astype(np.int32)
    bits <<= 13
    bits &= np.int32(-0x70002000)  # 0x8fffe000: not the copies of the sign
    np.multiply(bits.view(np.float32), np.float32(2.0**112), out=to)
    if (half.view(np.uint16) & 0x7FFF).max(initial=0) >= 0x7C00:
        np.copyto(to, half)


def fit(
    cls: type,
    config: Any,
    tensors: Mapping[str, Tensor],
    *,
    dtype: Any = jnp.float32,
    where: Any = "the checkpoint",
) -> Fitted:
    """Finds the tensor of every parameter of `cls` by its checkpoint key.

    Args:
      config: of `cls.config_class`.
      dtype: of the computation.
      where: the checkpoint's place, for messages.

    Raises:
      ValueError: keys that are unused or used twice, parameters without a tensor, shapes that
        differ: all of them listed.
    """
    graph, abstract = abstract_model(cls, config, dtype=dtype)
    table = checkpoint_table(abstract)
    ignored = getattr(cls, "ignored_keys", ())
    fitted, problems, known = {}, [], set()
    for stored, key in _canonical_keys(cls, tensors).items():
        tensor = tensors[stored]
        if key not in table:
            if not any(re.fullmatch(pattern, key) for pattern in ignored):
                problems.append(f"not in model  {stored} {list(tensor.shape)}")
            continue
        path, axes, expected = table[key]
        if key in known:
            problems.append(f"twice         {stored}, as another spelling of {key}")
        elif tensor.shape != expected:
            shapes = f"{list(tensor.shape)}, expected {list(expected)}"
            problems.append(f"wrong shape   {stored}: {shapes}")
        elif not jnp.issubdtype(tensor.dtype, jnp.floating):
            problems.append(f"wrong dtype   {stored}: {tensor.dtype}, expected a floating one")
        else:
            fitted[path] = tensor.transpose(*np.argsort(axes).tolist()) if axes else tensor
        known.add(key)
    problems += [f"not in file   {key}" for key in table if key not in known]
    if problems:
        lines = "\n  ".join([f"({len(problems)} problems):", *problems])
        raise ValueError(f"{where} does not fit {cls.__name__} {lines}")
    return Fitted(graph, abstract, fitted)


def _canonical_keys(cls: type, stored: Iterable[str]) -> dict[str, str]:
    """Stored key -> key of the model, by the class's aliases and tied keys."""
    keys = {key: key for key in stored}
    for pattern, replacement in getattr(cls, "key_aliases", ()):
        keys = {key: re.sub(pattern, replacement, name) for key, name in keys.items()}
    for pattern, name in getattr(cls, "tied_keys", ()):
        if name not in keys.values():
            other = next((key for key in keys if re.fullmatch(pattern, keys[key])), None)
            keys |= {other: name} if other else {}
    return keys


def load_model(
    cls: type,
    folder: str | Path,
    *,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    shardings: Callable[[nnx.State], Any] | None = None,
    variant: str = "",
) -> tuple[nnx.GraphDef, nnx.State]:
    """The graph and the parameters of one Hugging Face folder: `fit`, then `Fitted.read`.

    Raises:
      FileNotFoundError: no config.json, or no weights of this variant.
      ValueError: as `fit`, or a config that asks for what `cls` does not do.
    """
    folder = resolve_path(folder, variant=variant)
    config = cls.config_class.from_dict(read_json(folder / "config.json"))
    fitted = fit(cls, config, find_tensors(folder, variant), dtype=dtype, where=folder)
    params = fitted.read(param_dtype=param_dtype, shardings=shardings, label=str(folder))
    return fitted.graph, params


def find_tensors(folder: Path, variant: str = "") -> dict[str, Tensor]:
    """The tensors of a network's folder: safetensors where there are, else pickles.

    One file or several with an index; `variant` is the part before the ending in
    "model.fp16.safetensors".

    Raises:
      FileNotFoundError: none of this variant; lists those that are there.
      ValueError: a file that is not whole, an index that names files that are not there.
    """
    for name in weight_names(variant):
        if (folder / name).exists():
            return (_indexed if ".index." in name else open_tensors)(folder / name)
    suffixes = (".safetensors", ".bin", ".msgpack", ".ckpt")
    files = folder.iterdir() if folder.is_dir() else ()
    there = sorted(file.name for file in files if file.suffix in suffixes)
    kind, infix = (f" of the variant {variant!r}", f".{variant}") if variant else ("", "")
    raise FileNotFoundError(
        f"No weights{kind} in {folder}: expected diffusion_pytorch_model{infix}.safetensors or "
        f"model{infix}.safetensors (or .bin, or their .index.json); there is "
        f"{', '.join(there) or 'no file of weights'}."
        + (" Set the variant that these names carry." if there and not variant else "")
    )


def _indexed(index: Path) -> dict[str, Tensor]:
    """The tensors of the files that an index names; each holds the keys it is said to hold."""
    listed = read_json(index).get("weight_map", {})
    tensors, problems = {}, []
    for name in sorted(set(listed.values())):
        try:
            inside = open_tensors(index.parent / name)
            expected = {key for key, file in listed.items() if file == name}
            problems += [f"{name} lacks {key}" for key in sorted(expected - inside.keys())]
            tensors |= inside
        except (FileNotFoundError, ValueError) as error:
            problems.append(str(error))
    if problems:
        raise ValueError(f"{index} and its files do not agree:\n  " + "\n  ".join(problems))
    return tensors


def save_model(
    cls: type,
    folder: str | Path,
    params: nnx.State,
    config: dict,
    *,
    dtype: Any = np.float32,
    max_shard_size: int = 10 * 10**9,
) -> None:
    """Writes config.json and safetensors that torch loads; the inverse of `load_model`.

    Every process calls it, the main one writes.

    Args:
      config: the dictionary that goes into config.json.
      dtype: the one the tensors are stored in.
      max_shard_size: bytes a file, as in diffusers; above it there are several and an index.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stem = "diffusion_pytorch_model" if "_diffusers_version" in config else "model"
    tensors = stored_tensors(params, dtype)
    split = huggingface_hub.split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern=f"{stem}{{suffix}}.safetensors",
        max_shard_size=max_shard_size,
    )
    for name, keys in split.filename_to_tensors.items():
        write_tensors(folder / name, {key: tensors[key] for key in keys})
    if jax.process_index():
        return
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True)
        (folder / f"{stem}.safetensors.index.json").write_text(text + "\n")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def stored_tensors(params: nnx.State, dtype: Any) -> dict[str, Tensor]:
    """Parameters by checkpoint key, in the checkpoint's layout; each leaves its device when read.

    Several processes must read them all, in the same order: a parameter that is spread over them
    is gathered.
    """

    def fetch(value, index):
        if not value.is_fully_addressable:
            value = multihost_utils.process_allgather(value, tiled=True)
        return np.asarray(value)[index].astype(dtype, copy=False)

    tensors = {}
    for path, leaf in nnx.to_flat_state(params):
        key, axes = checkpoint_key(path, leaf.ndim)
        of_leaf = functools.partial(fetch, leaf[...])
        tensor = Tensor(key, tuple(leaf.shape), np.dtype(dtype), of_leaf)
        tensors[key] = tensor.transpose(*axes) if axes else tensor
    return tensors
