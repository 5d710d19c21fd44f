"""An experiment's config: found and overridden."""

import ast
import contextlib
import difflib
import functools
import importlib.util
import inspect
import json
import re
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from agfsync_jax.utils import modules

BESIDE_PACKAGE = Path(__file__).parents[2]  # the repository, or where the package is installed
_SOURCES = ("prompts", "questions", "evaluate")  # blocks that name a prompt source
_FIRST = ("loss.name", *(f"{block}.source" for block in _SOURCES))
SECRET = r".*(api_key|password|secret|token)"


@functools.cache
def schema() -> ModuleType:
    """configs/schema.py: what each key may be."""
    source = importlib.util.spec_from_file_location(
        "agfsync_config_schema", BESIDE_PACKAGE / "configs" / "schema.py"
    )
    module = importlib.util.module_from_spec(source)
    source.loader.exec_module(module)
    return module


def load(spec: str, overrides: dict[str, str]) -> ConfigDict:
    """Runs get_config() or get_config(arg) of the file in "FILE[:arg]" and sets the overrides.

    FILE is looked for from here, then beside the package, where `configs` is installed.

    Raises:
        FileNotFoundError: no such file; lists those that ship.
        ValueError: no such key (close ones are listed), or a value of another type.
    """
    module, path, argument = _execute(spec)
    if not hasattr(module, "get_config"):
        raise ValueError(f"--config={spec}: {path} has no get_config()")
    arguments = () if argument is None else (argument,)
    try:
        inspect.signature(module.get_config).bind(*arguments)
    except TypeError:
        raise ValueError(
            f"--config={spec}: get_config of {path} "
            + ("takes no argument" if arguments else "wants an argument, as in FILE.py:arg")
        ) from None
    with _told_with_its_line(spec, path):
        config = module.get_config(*arguments)
    if not isinstance(config, ConfigDict):
        raise ValueError(f"--config={spec}: get_config of {path} returns no ConfigDict")
    override(config, overrides)
    return config.lock()


def sweep(spec: str) -> list[dict[str, str]]:
    """What sweep() of the file in "FILE[:arg]" yields: the overrides of each run, as texts. It may
    take the argument, as get_config does.

    Raises:
        FileNotFoundError: no such file; lists those that ship.
        ValueError: no sweep() there, or it yields nothing, or something else than overrides.
    """
    module, path, arg = _execute(spec)
    example = '`def sweep(): yield {"train.seed": 0}; yield {"train.seed": 1}`'
    found = getattr(module, "sweep", None)
    takes = len(inspect.signature(found).parameters) if callable(found) else 2
    if takes > 1:
        raise ValueError(f"--config={spec}: {path} has no sweep(), which says the runs: {example}")
    with _told_with_its_line(spec, path):
        yielded = found(arg) if takes else found()
        runs = list(yielded) if isinstance(yielded, Iterable) else []
    if not runs:
        raise ValueError(f"--config={spec}: sweep() of {path} yields no run; as in {example}")
    for run in runs:
        if not (isinstance(run, dict) and all(isinstance(key, str) for key in run)):
            raise ValueError(
                f"--config={spec}: sweep() of {path} yields {run!r}, expected the overrides of a"
                f" run: {example}"
            )
    return [{key: str(value) for key, value in run.items()} for run in runs]


def _execute(spec: str) -> tuple[ModuleType, Path, str | None]:
    """The module of the file in "FILE[:arg]", where it lies, and the argument."""
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
    with _told_with_its_line(spec, path):
        source.loader.exec_module(module)
    return module, path, match[2]


def override(config: ConfigDict, overrides: dict[str, str]) -> None:
    """Sets keys from texts; ValueError as in `load`."""
    for key in sorted(overrides, key=lambda key: key not in _FIRST):  # whose settings follow
        _override(config, key, overrides[key])


@contextlib.contextmanager
def _told_with_its_line(spec: str, path: Path) -> Iterator[None]:
    """An exception in a config becomes an error that shows the line of the config's file."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - a config is a program of the user's
        if isinstance(error, ValueError) and str(error).startswith("config argument "):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if frame.filename == str(path)]
        if isinstance(error, SyntaxError):
            place, line = f"{error.filename}:{error.lineno}", (error.text or "").strip()
        elif own:
            place, line = f"{path}:{own[-1].lineno}", own[-1].line
        else:
            raise
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"--config={spec}: {place}: {line}: {what}") from error


def flatten(config: ConfigDict | dict, prefix: str = "") -> dict[str, Any]:
    """{"sample.height": 64, ...}; an empty block has no keys."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict | dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def defaults() -> dict[str, Any]:
    """The flat keys of configs/common.py, as config.json would have them."""
    common = BESIDE_PACKAGE / "configs" / "common.py"
    return flatten(json.loads(load(str(common), {}).to_json()))


def meanings() -> dict[str, str]:
    """What configs/common.py says of each key, and of a block, in the comment behind it."""
    text = (BESIDE_PACKAGE / "configs" / "common.py").read_text()
    return dict(re.findall(r"^    c\.([\w.]+) = .*?  # (.+)$", text, re.MULTILINE))


def public(block: dict[str, Any]) -> dict[str, Any]:
    """The block without secrets."""
    return {
        key: public(value) if isinstance(value, dict) else value
        for key, value in block.items()
        if not re.fullmatch(SECRET, key)
    }


def _override(config: ConfigDict, key: str, text: str) -> None:
    flat = flatten(config)
    block, _, name = key.rpartition(".")
    if key in flat and not key.startswith("loss."):
        config.update_from_flattened_dict({key: _parse(key, text, flat[key])})
        if block in _SOURCES and name == "source" and text in modules.names("prompt_sources"):
            known = modules.settings("prompt_sources", text)
            with config.unlocked():  # what is there of another source goes
                for other in config[block].keys() - known.keys() - {"source"}:
                    if f"{block}.{other}" not in schema().KEYS and other != "sample":
                        del config[block][other]
        return
    if block.partition(".")[0] == "loss":
        _override_loss(config, key, text)
        return
    if re.fullmatch(r"scorers\.\w+", block) and f"{block}.name" in flat:
        known = modules.settings("scorers", flat[f"{block}.name"])
        if name in known:
            default = known[name].default
            if default is None or default is inspect.Parameter.empty:
                default = 0 if "int" in str(known[name].annotation) else ""
            config.scorers[block.removeprefix("scorers.")][name] = _parse(key, text, default)
            return
    if block in _SOURCES:
        known = modules.settings("prompt_sources", config[block].source or config.prompts.source)
        if name in known:
            with config.unlocked():
                config[block][name] = _parse(key, text, known[name].default)
            return
    if block == "evaluate.sample" and name in schema().JUDGED:
        config.evaluate.sample[name] = _parse(key, text, config.sample[name])
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


def _override_loss(config: ConfigDict, key: str, text: str) -> None:
    """Sets "loss.name"; or a setting of the loss that is named, as "loss.beta" or with its name."""
    _, *block, name = key.split(".")
    if not block and name == "name":
        config.loss.name = text
        return
    used = config.loss.name
    known = modules.settings("losses", used)
    if block not in ([], [used]):
        raise ValueError(
            f"--config.{key}: config.loss.name is {used}, and takes nothing of another loss;"
            f" set one of: {', '.join(f'config.loss.{used}.{each}' for each in known)}"
        )
    if name not in known:
        takes = ", ".join(f"config.loss.{each}" for each in known) or "nothing"
        raise ValueError(f"--config.{key} is no key of the config; {used} takes {takes}")
    with config.unlocked():
        if used not in config.loss:
            config.loss[used] = ConfigDict()
        config.loss[used][name] = _parse(key, text, known[name].default)


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
    rule = schema().rule(key)
    wanted = rule.allowed if rule else f"{type(old).__name__}, as in {old!r}"
    raise ValueError(f"--config.{key}={text}: expected {wanted}")
