"""An experiment's config: found, overridden, checked before any work, and bound to a workdir."""

import ast
import difflib
import importlib.util
import inspect
import json
import re
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from agfsync_jax.utils import files

BESIDE_PACKAGE = Path(__file__).parents[2]  # the repository, or where the package is installed
# What each verb leaves in a round, in the order of the loop.
OUTPUTS = {
    "prompts": "prompts.jsonl",
    "questions": "questions.jsonl",
    "sample": "candidates",
    "score": "scores",
    "pair": "pairs",
    "train": "checkpoints",
    "evaluate": "evals",
}
# The first verb that reads a block, where that is not the verb it is named after.
FIRST_READ = {"seed": "prompts", "backbone": "sample", "scorers": "score", "loss": "train"}
# What changes no file that is already there, and may always differ.
FREE = (
    r"(report|export|bench)\..*|rounds|mesh\..*|sharding|(sample|score)\.batch_size"
    r"|score\.mesh\..*|(score|pair)\.max_bad|train\.(remat|keep|tensorboard|wandb)"
)
SECRET = r".*(api_key|password|secret|token)"


def load(spec: str, overrides: dict[str, str]) -> ConfigDict:
    """Runs get_config() or get_config(arg) of the file in "FILE[:arg]" and sets the overrides.

    FILE is looked for from here, then beside the package, where `configs` is installed.

    Raises:
        FileNotFoundError: no such file; lists those that ship.
        ValueError: no such key (close ones are listed), or a value of another type.
    """
    match = re.fullmatch(r"(.+\.py)(?::(.*))?", spec)
    if not match:
        raise ValueError(f"--config={spec}: expected FILE.py or FILE.py:arg")
    places = [Path(match[1]), BESIDE_PACKAGE / match[1]]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        shipped = sorted((BESIDE_PACKAGE / "configs").glob("[!_]*.py"))
        known = ", ".join(f"configs/{file.name}" for file in shipped if file.stem != "common")
        raise FileNotFoundError(f"--config={spec}: no file {match[1]}; shipped: {known}")
    source = importlib.util.spec_from_file_location(f"agfsync_config_{path.stem}", path)
    module = importlib.util.module_from_spec(source)
    source.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError(f"--config={spec}: {path} has no get_config()")
    arguments = () if match[2] is None else (match[2],)
    try:
        inspect.signature(module.get_config).bind(*arguments)
    except TypeError:
        raise ValueError(
            f"--config={spec}: get_config of {path} "
            + ("takes no argument" if arguments else "wants an argument, as in FILE.py:arg")
        ) from None
    config = module.get_config(*arguments)
    if not isinstance(config, ConfigDict):
        raise ValueError(f"--config={spec}: get_config of {path} returns no ConfigDict")
    for key, text in overrides.items():
        _override(config, key, text)
    return config.lock()


def claim(workdir: Path, config: ConfigDict, write: bool = True) -> None:
    """Compares the config with the one that made the workdir, then writes it to config.json.

    A key may change as long as nothing that was made with it is there.

    Raises:
        ValueError: keys differ; lists them, and what would have to go.
        NotADirectoryError: `workdir` is a file.
        OSError: the URL `workdir` cannot be reached.
    """
    workdir = files.to_path(workdir)
    files.check_reachable(workdir)
    if workdir.exists() and not workdir.is_dir():
        raise NotADirectoryError(f"--workdir={workdir} is a file; expected a folder")
    path = workdir / "config.json"
    text = json.dumps(public(config.to_dict()), indent=2)
    now = flatten(ConfigDict(json.loads(text)))  # tuples are lists in JSON
    before = flatten(ConfigDict(json.loads(path.read_text()))) if path.exists() else now
    differ, stale = [], set()
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) == now.get(key) or re.fullmatch(FREE, key):
            continue
        made = _made_with(workdir, key)
        if made:
            stale |= made
            was, new = json.dumps(before.get(key)), json.dumps(now.get(key))
            differ.append(f"  {key}: {was} there, {new} now")
    if differ:
        remove = ", ".join(name for name in OUTPUTS.values() if name in stale)
        raise ValueError(
            f"{workdir} was made by another config:\n"
            + "\n".join(differ)
            + f"\nTake another --workdir, set these keys back, or remove from its rounds: {remove}"
        )
    if write:
        files.write_text(path, text + "\n")


def flatten(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """{"sample.height": 64, ...}; an empty block has no keys."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def public(block: dict[str, Any]) -> dict[str, Any]:
    """The block without secrets."""
    return {
        key: public(value) if isinstance(value, dict) else value
        for key, value in block.items()
        if not re.fullmatch(SECRET, key)
    }


def _made_with(workdir: Path, key: str) -> set[str]:
    """The outputs in the workdir of the verbs that read `key`, or work from what it made."""
    block = key.partition(".")[0]
    verbs = list(OUTPUTS)
    # Pairs are made anew, from the same scores, whenever their settings change.
    first = "train" if block == "pair" else FIRST_READ.get(block, block)
    later = verbs[verbs.index(first) :] if first in verbs else verbs
    return {OUTPUTS[verb] for verb in later if any(workdir.glob(f"round_*/{OUTPUTS[verb]}"))}


def _override(config: ConfigDict, key: str, text: str) -> None:
    flat = flatten(config)
    if key in flat:
        config.update_from_flattened_dict({key: _parse(key, text, flat[key])})
        return
    inside = [name for name in flat if name.startswith(f"{key}.")]
    if inside:
        raise ValueError(f"--config.{key} is a block; set one of: {', '.join(inside)}")
    leaves = {name.rpartition(".")[2] for name in flat}
    alike = difflib.get_close_matches(key.rpartition(".")[2], leaves, n=3)
    close = difflib.get_close_matches(key, flat, n=3)
    close += [name for name in flat if name.rpartition(".")[2] in alike and name not in close]
    hint = f"close: {', '.join(close)}" if close else f"the blocks are: {', '.join(config)}"
    raise ValueError(f"--config.{key} is no key of the config; {hint}")


def _parse(key: str, text: str, old: Any) -> Any:
    """`text` as a value of the type of `old`."""
    if isinstance(old, str):
        return text
    try:
        if isinstance(old, bool):
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if isinstance(old, int | float):
            return type(old)(text)
        value = ast.literal_eval(text)
    except (ValueError, KeyError, SyntaxError):
        value = None
    if isinstance(old, tuple | list) and isinstance(value, tuple | list):
        return type(old)(value)
    raise ValueError(f"--config.{key}={text}: expected {type(old).__name__}, as in {old!r}")
