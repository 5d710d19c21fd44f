"""Parameters in and out of Hugging Face folders: safetensors <-> graph and pytree.

The key table of a model follows from the model itself. Submodules keep the names of the torch state
dict, so a parameter's path is its checkpoint key up to the leaf, and the leaf's name and rank fix
the transform:

    kernel of rank 2  <->  weight, transposed       (Linear: [in, out] <-> [out, in])
    kernel of rank 4  <->  weight, (3, 2, 0, 1)     (Conv: [h, w, in, out] <-> [out, in, h, w])
    scale, embedding  <->  weight                   (norms, embeddings)
    any other leaf    <->  its own name

A model class may add `key_aliases` ((regex, replacement) for other spellings of its keys that
checkpoints carry) and `ignored_keys` (regexes of keys that hold no parameter of their own).
"""

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

_SHIPPED = Path(__file__).parent.parent / "micro" / "weights"
_FILES = ("diffusion_pytorch_model", "model", "pytorch_model")
_CONV = (3, 2, 0, 1)  # [h, w, in, out] -> [out, in, h, w]


def resolve_path(path: str | Path) -> Path:
    """A folder or file of weights: "micro:NAME" is one that ships with the package, anything else a
    local path.

    Raises:
      FileNotFoundError: nothing is there; the message says what was looked for.
    """
    text = str(path)
    found = (
        _SHIPPED / text.removeprefix("micro:")
        if text.startswith("micro:")
        else Path(text).expanduser()
    )
    if not found.exists():
        shipped = ", ".join(f"micro:{child.name}" for child in sorted(_SHIPPED.glob("*"))) or "none"
        raise FileNotFoundError(
            f"No weights at {found} (from {text!r}). Give a local folder in the Hugging Face "
            f"layout, or one of the shipped ones: {shipped}."
        )
    return found


def read_json(path: str | Path) -> dict[str, Any]:
    """Parses one JSON file.

    Raises:
      FileNotFoundError, ValueError: the file is missing or is not JSON.
    """
    path = Path(path)
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
    model = nnx.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0), dtype=dtype))
    graph, params, _ = nnx.split(model, nnx.Param, ...)
    return graph, params


def apply(graph: nnx.GraphDef, params: nnx.State) -> nnx.Module:
    """The network of `graph` with `params`; call it inside a jitted function."""
    return nnx.merge(graph, params)


def parameter_path(path: tuple) -> str:
    """A parameter's path as one string, "down_blocks.0.resnets.0.conv1.kernel"."""
    return ".".join(str(part) for part in path)


def checkpoint_key(path: tuple, ndim: int) -> tuple[str, tuple[int, ...] | None]:
    """The checkpoint key of the parameter at `path`, and the axes order that turns it into the
    checkpoint's layout."""
    *parents, leaf = path
    name, axes = leaf, None
    if leaf == "kernel":
        name, axes = "weight", _CONV if ndim == 4 else (1, 0)
    elif leaf in ("scale", "embedding"):
        name = "weight"
    return parameter_path((*parents, name)), axes


def load_model(
    cls: type,
    folder: str | Path,
    *,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    shardings: Any = None,
) -> tuple[nnx.GraphDef, nnx.State]:
    """Builds `cls` from the config.json of a Hugging Face folder and fills it from the safetensors
    beside it.

    `dtype` is the one it computes in, `param_dtype` the one its parameters are kept in. `shardings`
    is a function from the abstract parameters to a pytree of shardings; each tensor goes from the
    file straight to its own.

    Raises:
      FileNotFoundError: no config.json or no safetensors.
      ValueError: keys that are unused, parameters that are unfilled, shapes that differ: all of
      them listed.
    """
    folder = resolve_path(folder)
    config = cls.config_class.from_dict(read_json(folder / "config.json"))
    graph, abstract = abstract_model(cls, config, dtype=dtype)
    files = _weight_files(folder)
    placed = shardings(abstract) if shardings else None
    return graph, fill_params(cls, abstract, files, param_dtype=param_dtype, shardings=placed)


def save_model(
    cls: type, folder: str | Path, params: nnx.State, config: dict, *, dtype: Any = np.float32
) -> None:
    """Writes config.json and one safetensors file that torch loads; the inverse of `load_model`.

    `config` is the dictionary that goes into config.json; `dtype` is the one the tensors are stored
    in.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    name = "diffusion_pytorch_model" if "_diffusers_version" in config else "model"
    save_params(folder / f"{name}.safetensors", params, dtype=dtype)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def save_params(file: str | Path, params: nnx.State, *, dtype: Any = np.float32) -> None:
    """Writes parameters alone as one safetensors file in the checkpoint's layout."""
    tensors = {}
    for path, leaf in nnx.to_flat_state(params):
        key, axes = checkpoint_key(path, leaf.ndim)
        value = np.asarray(jax.device_get(leaf[...]))
        tensors[key] = np.array(value.transpose(axes) if axes else value, dtype, order="C")
    save_file(tensors, file, metadata={"format": "pt"})


def _weight_files(folder: Path) -> list[Path]:
    for name in _FILES:
        if (folder / f"{name}.safetensors.index.json").exists():
            index = read_json(folder / f"{name}.safetensors.index.json")
            return [folder / file for file in sorted(set(index["weight_map"].values()))]
        if (folder / f"{name}.safetensors").exists():
            return [folder / f"{name}.safetensors"]
    names = ", ".join(f"{name}.safetensors" for name in _FILES)
    raise FileNotFoundError(
        f"No weights in {folder}: expected one of {names} (or their .index.json)."
    )


def fill_params(
    cls: type,
    abstract: nnx.State,
    files: list[Path],
    *,
    param_dtype: Any = jnp.float32,
    shardings: nnx.State | None = None,
) -> nnx.State:
    """Fills abstract parameters of `cls` from safetensors files, each tensor into its sharding.

    Raises:
      ValueError: as `load_model`.
    """
    flat = dict(nnx.to_flat_state(abstract))
    table = {}
    for path, leaf in flat.items():
        key, axes = checkpoint_key(path, leaf.ndim)
        table[key] = (path, axes)
    flat_placed = dict(nnx.to_flat_state(shardings)) if shardings is not None else {}
    aliases = getattr(cls, "key_aliases", ())
    ignored = getattr(cls, "ignored_keys", ())
    filled, unused, wrong = {}, [], []
    for file in files:
        try:
            with safe_open(file, framework="np") as tensors:
                for stored in tensors.keys():  # noqa: SIM118 - not a dict
                    key = stored
                    for pattern, replacement in aliases:
                        key = re.sub(pattern, replacement, key)
                    if key not in table:
                        if not any(re.fullmatch(pattern, key) for pattern in ignored):
                            unused.append(stored)
                        continue
                    path, axes = table[key]
                    value = tensors.get_tensor(stored)
                    found = tuple(value.shape)
                    if axes and len(axes) == value.ndim:
                        value = value.transpose(np.argsort(axes))
                    if value.shape != flat[path].shape:
                        inverse = flat[path].shape
                        expected = tuple(inverse[axis] for axis in axes) if axes else tuple(inverse)
                        wrong.append(f"{stored}: {list(found)}, expected {list(expected)}")
                        continue
                    value = np.array(value, param_dtype, order="C")
                    sharding = flat_placed.get(path)
                    filled[path] = jax.device_put(
                        value, getattr(sharding, "get_value", lambda s=sharding: s)()
                    )
        except SafetensorError as error:
            raise ValueError(
                f"{file} is not a whole safetensors file ({error}): copy it again."
            ) from error
    shape_errors = {line.split(":")[0] for line in wrong}
    missing = [
        key for key, (path, _) in table.items() if path not in filled and key not in shape_errors
    ]
    problems = [
        *(f"wrong shape   {line}" for line in wrong),
        *(f"not in model  {key}" for key in unused),
        *(f"not in file   {key}" for key in missing),
    ]
    if problems:
        lines = "\n  ".join(problems)
        raise ValueError(
            f"{files[0].parent} does not fit {cls.__name__} ({len(problems)} problems):\n  {lines}"
        )
    return nnx.from_flat_state([(path, flat[path].replace(filled[path])) for path in flat])
