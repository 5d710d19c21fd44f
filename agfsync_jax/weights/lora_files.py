"""LoRA files in and out: the layouts of diffusers (new and old), PEFT and kohya.

Inside, a network's adapters are {module: {"A": [in, r], "B": [r, out]}}, A [h, w, in, r] of a
convolution, and `A @ B` is what is added to the module's kernel at scale 1: alpha / rank of a file
(alpha / sqrt(rank) of a rank-stabilized one) is multiplied into B. In files, the factors are

    layout          module                                     factors
    diffusers       unet.mid_block.attentions.0.proj_in        .lora_A.weight, .lora_B.weight
    diffusers, old  the same                                   .lora.down.weight, .lora.up.weight
                    unet...attn1.processor.to_q                _lora.down.weight
                    text_encoder....mlp.fc1                    .lora_linear_layer.down.weight
    PEFT            base_model.model.mid_block...              .lora_A.weight
    kohya           lora_unet_mid_block_attentions_0_proj_in   .lora_down.weight, .alpha

with A [r, in] or [r, in, h, w] and B [out, r] or [out, r, 1, 1]. A module is looked up among all
spellings of the modules that the network has; nothing is guessed from its name in the file.
"""

import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from agfsync_jax.weights.networks import parameter_path, read_json
from agfsync_jax.weights.places import resolve_path
from agfsync_jax.weights.single_files import ldm_unet_name
from agfsync_jax.weights.tensor_files import (
    Tensor,
    from_array,
    open_tensors,
    read_header,
    write_tensors,
)

Adapters = dict[str, dict[str, np.ndarray]]  # as in models/lora.py
Settings = Mapping[str, Mapping[str, Any]]

NETWORKS = ("unet", "text_encoder", "text_encoder_2")
LAYOUTS = ("diffusers", "kohya", "peft")
_DIFFUSERS_FILE, _PEFT_FILE = "pytorch_lora_weights.safetensors", "adapter_model.safetensors"
_PEFT_SETTINGS = "adapter_config.json"
_PREFIXES = {
    "unet.": "unet",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "base_model.model.": "",  # PEFT does not say which network
}
_KEY = re.compile(
    r"(.+?)(?:\.(alpha)|(?:\.lora|\.lora_linear_layer|_lora)[._](A|B|down|up)\.weight)"
)
_FACTORS = {"A": "down", "B": "up"}
# What adapters of other kinds have in their keys.
_OTHER_KINDS = {
    r"\.lora_mid\.": "LoCon with a third factor (lora_mid)",
    r"\.hada_": "LoHa",
    r"\.lokr_": "LoKr",
    r"\.b?oft_": "OFT",
    r"\.(dora_scale|lora_magnitude_vector)": "DoRA",
    r"\.lora_embedding_[AB]": "LoRA of an embedding",
    r"\.lora_[AB]\.bias$": "LoRA with a bias",
    r"\.diff(_b)?$": "whole differences of weights",
}
_WIDTHS = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL"}  # of the text that a UNet reads
_FEW = 10  # problems shown of a file that is for another model altogether


class _Part(NamedTuple):
    """A tensor of a file and what its key says."""

    network: str  # "" where the key does not say
    module: str  # as the file spells it
    factor: str  # down, up or alpha
    tensor: Tensor


def load_lora(path: str | Path, networks: Mapping[str, nnx.State]) -> dict[str, Adapters]:
    """The adapters in a file, or in a folder that diffusers or PEFT wrote.

    Args:
      path: as `resolve_path` takes it.
      networks: as `read_lora`.

    Raises:
      FileNotFoundError: there is no such file, or no single one in the folder.
      ValueError: as `read_lora`, or a file that is not whole.
    """
    path = resolve_path(path)
    if path.is_dir():
        files = [path / name for name in (_DIFFUSERS_FILE, _PEFT_FILE) if (path / name).exists()]
        files = files or [*path.glob("*.safetensors")] or [*path.glob("*.bin")]
        if len(files) != 1:
            raise FileNotFoundError(
                f"{path} holds {len(files) or 'no'} files of LoRA, expected one, such as "
                f"{_DIFFUSERS_FILE}: give the path of the file."
            )
        path = files[0]
    tensors, settings = open_tensors(path), {}
    if (path.parent / _PEFT_SETTINGS).exists():
        settings[""] = read_json(path.parent / _PEFT_SETTINGS)
    if path.suffix == ".safetensors":
        saved = read_header(path)[1].get("lora_adapter_metadata", "{}")
        for name, value in json.loads(saved).items():  # "unet.lora_alpha"
            network, _, field = name.rpartition(".")
            settings.setdefault(network, {})[field] = value
    try:
        return read_lora(tensors, networks, settings)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_lora(
    tensors: Mapping[str, Tensor],
    networks: Mapping[str, nnx.State],
    settings: Settings | None = None,
) -> dict[str, Adapters]:
    """The adapters of each network that a file has some of, in float32 on the host.

    Args:
      tensors: by key, in any of the layouts; ranks may differ.
      networks: "unet", "text_encoder", "text_encoder_2" -> its parameters; abstract ones will do,
        and others are left alone. Keys that name no network are of the one that has their modules.
      settings: network -> the fields of PEFT's LoraConfig that its adapters were made with; "" for
        keys that name none. An alpha among the tensors goes before them; without either, alpha is
        the rank.

    Raises:
      ValueError: modules or networks that are not there, shapes that do not fit, one factor without
        the other, adapters of another kind: all listed.
    """
    kernels = {name: _kernels(networks[name]) for name in NETWORKS if name in networks}
    tables = {name: _spellings(modules) for name, modules in kernels.items()}
    parts, problems = _parse(tensors)
    settings = dict(settings or {})
    bare = [part.module for part in parts if not part.network]
    if bare:
        hits = {name: sum(module in table for module in bare) for name, table in tables.items()}
        owner, *others = (name for name in hits if hits[name] == max(hits.values()))
        if others and hits[owner]:
            names = ", ".join([owner, *others])
            problems.append(
                f"its keys do not say of which of {names} they are: give that one alone"
            )
        parts = [part._replace(network=part.network or owner) for part in parts]
        settings.setdefault(owner, settings.get("", {}))
    for name in {part.network for part in parts} & settings.keys():
        fields = settings[name]
        if fields.get("use_dora") or fields.get("peft_type", "LORA") != "LORA":
            kind = "DoRA" if fields.get("use_dora") else fields["peft_type"]
            problems.append(f"{name} has adapters of the kind {kind}; only LoRA is read")

    found, unknown = {}, 0
    first = [name for name in kernels.get("unet", ()) if name.startswith("down_blocks.0.resnets.")]
    layers = len({name.split(".")[3] for name in first})
    for part in parts:
        table = tables.get(part.network, {})
        # kohya's files of SDXL have the module names of the original code
        name = table.get(part.module) or table.get(ldm_unet_name(part.module, layers))
        if name is None:
            what = f"has no module {part.module}"
            if part.network not in tables:
                what = f"is not among the networks to adapt ({', '.join(tables)})"
            problems.append(f"{part.tensor.key}: {part.network} {what}")
            unknown += 1
            continue
        pair = found.setdefault((part.network, name), {})
        if part.factor in pair:
            problems.append(f"{part.tensor.key}: the same as {pair[part.factor].tensor.key}")
        pair[part.factor] = part
    for (network, name), pair in found.items():
        problems += _misfits(f"{network} {name}", pair, kernels[network][name])
    if not (parts or problems):
        problems.append("no tensor is in it")
    if problems:
        other = _other_model(tensors, kernels.get("unet", {}), unknown > len(tensors) / 2)
        few = problems[:_FEW] if other else problems
        more = [f"and {len(problems) - len(few)} more"] if len(few) < len(problems) else []
        lines = "\n  ".join(few + more)
        raise ValueError(f"no LoRA for this model.{other} {len(problems)} problems:\n  {lines}")

    adapters = {}
    for (network, name), pair in found.items():
        factors = _read(pair, kernels[network][name], settings.get(network, {}))
        adapters.setdefault(network, {})[name] = factors
    return adapters


def _parse(tensors: Mapping[str, Tensor]) -> tuple[list[_Part], list[str]]:
    """What the keys say, and a line on each that cannot be read."""
    parts, problems = [], []
    for key, tensor in tensors.items():
        other = next((kind for mark, kind in _OTHER_KINDS.items() if re.search(mark, key)), None)
        match = _KEY.fullmatch(key)
        if other or not match:
            problems.append(f"{key} {list(tensor.shape)}: {other or 'no known layout of LoRA'}")
            continue
        prefix = next((prefix for prefix in _PREFIXES if key.startswith(prefix)), "")
        module = match[1].removeprefix(prefix).replace(".processor.", ".")
        factor = match[2] or _FACTORS.get(match[3], match[3])
        parts.append(_Part(_PREFIXES.get(prefix, ""), module, factor, tensor))
    return parts, problems


def _kernels(params: nnx.State) -> dict[str, tuple[int, ...]]:
    """Module -> the shape of its kernel, a matrix or that of a convolution."""
    return {
        parameter_path(module): tuple(leaf.shape)
        for (*module, name), leaf in nnx.to_flat_state(params)
        if name == "kernel" and len(leaf.shape) in (2, 4)
    }


def _spellings(modules: Iterable[str]) -> dict[str, str]:
    """Every name that a file may have for a module -> the module."""
    table = {}
    for module in modules:
        names = {module, module.removeprefix("text_model.")}  # transformers 5 drops the prefix
        # diffusers' old names: to_out_lora for to_out.0, and to_q_lora for a text encoder's q_proj
        names |= {name.removesuffix(".0") for name in names if name.endswith(".to_out.0")}
        names |= {re.sub(r"(self_attn\.)(q|k|v|out)_proj$", r"\1to_\2", name) for name in names}
        for name in names | {name.replace(".", "_") for name in names}:
            if table.setdefault(name, module) != module:
                raise ValueError(f"{name!r} is a name of {module} and of {table[name]}.")
    return table


def _padded(shape: Sequence[int]) -> tuple[int, ...]:
    """A matrix's shape as that of a 1x1 convolution, which files have for one another."""
    return (*shape, *[1] * (4 - len(shape)))


def _misfits(where: str, pair: Mapping[str, _Part], kernel: tuple[int, ...]) -> list[str]:
    """A line on each factor of a module that is missing or does not fit its kernel."""
    missing = [factor for factor in ("down", "up") if factor not in pair]
    if missing:
        keys = ", ".join(part.tensor.key for part in pair.values())
        return [f"{keys}: {where} has no {' and no '.join(missing)}"]
    *size, inputs, outputs = kernel
    rank = _padded(pair["down"].tensor.shape)[0]
    expected = {"down": [rank, inputs, *size], "up": [outputs, rank, *[1] * len(size)]}
    return [
        f"{pair[factor].tensor.key}: {list(pair[factor].tensor.shape)}, expected {shape}"
        for factor, shape in expected.items()
        if _padded(pair[factor].tensor.shape) != _padded(shape)
    ]


def _read(
    pair: Mapping[str, _Part], kernel: tuple[int, ...], settings: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """A module's factors in our layout, with alpha / rank multiplied into B."""
    *size, inputs, outputs = kernel
    down, up = (np.asarray(pair[name].tensor.read(), np.float32) for name in ("down", "up"))
    rank = down.shape[0]
    down = down.reshape(rank, inputs, *size)
    if "alpha" in pair:
        scale = float(pair["alpha"].tensor.read().reshape(())) / rank
    else:
        alphas = (settings.get("alpha_pattern") or {}).items()
        matches = (  # as in peft.utils.other.get_pattern_key
            alpha
            for pattern, alpha in alphas
            if re.match(rf"(.*\.)?({pattern})$", pair["down"].module)
        )
        alpha = next(matches, settings.get("lora_alpha", rank))
        scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    return {
        "A": np.ascontiguousarray(down.transpose(*range(2, down.ndim), 1, 0)),
        "B": np.ascontiguousarray(up.reshape(outputs, rank).T * np.float32(scale)),
    }


def _other_model(
    tensors: Mapping[str, Tensor], unet: Mapping[str, tuple[int, ...]], mostly_unknown: bool
) -> str:
    """A sentence if the file is for another model, by the width of the text that its UNet reads."""
    theirs = [
        tensor.shape[1]
        for key, tensor in tensors.items()
        if re.search(r"attn2.*to_k.*(lora_A|down)\.weight$", key) and len(tensor.shape) > 1
    ]
    ours = [shape[0] for name, shape in unet.items() if name.endswith("attn2.to_k")]
    if theirs and ours and theirs[0] != ours[0]:
        their, our = (f"{n} ({_WIDTHS[n]})" if n in _WIDTHS else n for n in (theirs[0], ours[0]))
        return f" It is for another one: it reads a text of width {their}, this model {our}."
    return " It seems to be for another one: most of its modules are not here." * mostly_unknown


def write_lora(
    path: str | Path,
    adapters: Mapping[str, Adapters],
    *,
    layout: str = "diffusers",
    dtype: Any = np.float32,
) -> Path:
    """Writes adapters as one file that `pipeline.load_lora_weights` or `PeftModel` loads.

    In each layout, alpha is the rank. kohya's layout has one alpha a network, the most frequent
    rank, and modules of another rank have rank / alpha in their up: diffusers does not read alphas
    of attention that differ.

    Args:
      path: a .safetensors file, or a folder, in which the file has the name that loaders look for.
        With layout="peft" a folder, which is given an adapter_config.json too.
      adapters: "unet", "text_encoder", "text_encoder_2" -> its adapters.
      layout: one of `LAYOUTS`.
      dtype: of the tensors.

    Returns:
      The path of the file.

    Raises:
      ValueError: another layout, no adapters, networks that the layout has no name for.
    """
    if layout not in LAYOUTS or not any(adapters.values()) or set(adapters) - set(NETWORKS):
        raise ValueError(
            f"LoRA files are written in the layouts {', '.join(LAYOUTS)}, of the networks "
            f"{', '.join(NETWORKS)}, not layout={layout!r} of {', '.join(adapters) or 'none'}."
        )
    path = Path(path)
    if layout == "peft":
        if len(adapters) > 1 or path.suffix == ".safetensors":
            raise ValueError(
                "PEFT's layout is a folder of one network's adapters, not "
                f"{path} of {', '.join(adapters)}: write each to a folder of its own."
            )
        path = path / _PEFT_FILE
    elif path.suffix != ".safetensors":
        path = path / _DIFFUSERS_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    number = "1" if "text_encoder_2" in adapters else ""  # kohya's scripts count from 1
    kohya = {"unet": "unet", "text_encoder": f"te{number}", "text_encoder_2": "te2"}
    tensors = {}
    for network, modules in adapters.items():
        ranks = {name: factors["B"].shape[0] for name, factors in modules.items()}
        alpha = statistics.mode(ranks.values())
        for module, factors in sorted(modules.items()):
            a, b = (np.asarray(factors[name], np.float32) for name in "AB")
            down = a.transpose(-1, -2, *range(a.ndim - 2)).astype(dtype)
            up = b.T.reshape(*b.T.shape, *[1] * (a.ndim - 2))
            if layout == "kohya":
                name = f"lora_{kohya[network]}_{module.replace('.', '_')}"
                up = up * np.float32(len(b) / alpha)
                tensors[f"{name}.lora_down.weight"] = down
                tensors[f"{name}.lora_up.weight"] = up.astype(dtype)
                tensors[f"{name}.alpha"] = np.array(alpha, np.float32)
            else:
                name = f"{network if layout == 'diffusers' else 'base_model.model'}.{module}"
                tensors[f"{name}.lora_A.weight"] = down
                tensors[f"{name}.lora_B.weight"] = up.astype(dtype)
    write_tensors(path, {key: from_array(key, value) for key, value in tensors.items()})
    if layout == "peft":
        other = {name: rank for name, rank in sorted(ranks.items()) if rank != alpha}
        config = {
            **{"peft_type": "LORA", "r": alpha, "lora_alpha": alpha},
            **{"rank_pattern": other, "alpha_pattern": other},
            **{"target_modules": sorted(ranks), "inference_mode": True},
        }
        (path.parent / _PEFT_SETTINGS).write_text(json.dumps(config, indent=2) + "\n")
    return path
