"""The command line: `agfsync <verb> --config=FILE[:arg] --workdir=DIR [--config.key=value ...]`.

Everything that a user can get wrong is checked here, before JAX is imported. A verb is a file of
the package with `main(config, workdir, *, round_index, repair)`; its docstring is its help text.
"""

import argparse
import ast
import difflib
import importlib
import importlib.util
import json
import os
import platform
import re
import shlex
import signal
import sys
import textwrap
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

PACKAGE = Path(__file__).parent
VERBS = ("run", "prompts", "questions", "sample", "score", "pair", "train", "evaluate", "report")
DEFAULT_CONFIG = "configs/micro.py"
# What a verb reads besides the block of its own name.
ALSO_READS = {
    "run": ("seed", "rounds", "backbone", "mesh", "sharding"),
    "sample": ("backbone",),
    "score": ("scorers",),
    "train": ("backbone", "loss"),
}
# What may change in a workdir between two commands: it alters no file that is already there.
FREE = r"(report\..*|rounds|mesh\..*|sharding|(sample|score)\.batch_size)"
SECRET = r".*(api_key|password|secret|token)"

EPILOG = """\
--config.a.b=value sets any key of the config: agfsync sample --help lists those that sample reads.

environment:
  AGFSYNC_TRACEBACK=1   show where an error was raised
  AGFSYNC_CACHE=DIR     compiled programs, kept for the next run (~/.cache/agfsync_jax); empty: none
"""


def main(argv: list[str] | None = None) -> int:
    """Runs one verb; returns the exit status: 0, 2 after an error, 130 and 143 when stopped."""
    argv = sys.argv[1:] if argv is None else argv
    signal.signal(signal.SIGTERM, _terminate)
    try:
        verb, args, overrides = parse(argv)
        config = load_config(args.config, overrides)
        check_config(config, verb)
        workdir = Path(args.workdir)
        claim_workdir(workdir, config)
        prepare_jax()
        module = importlib.import_module(f"agfsync_jax.{verb}")
        module.main(config, workdir, round_index=args.round, repair=args.repair)
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("AGFSYNC_TRACEBACK") == "1":
            raise
        print(f"agfsync: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(
            "\nstopped; what is done is kept, and the same command goes on from there:\n"
            f"  agfsync {shlex.join(argv)}",
            file=sys.stderr,
        )
        return 143 if stop.args == ("SIGTERM",) else 130
    return 0


def parse(argv: list[str]) -> tuple[str, argparse.Namespace, dict[str, str]]:
    """Verb, flags and `--config.key=value` overrides; exits for --help and for bad usage."""
    described = [f"  {verb:<10} {summary(verb).splitlines()[0]}" for verb in verbs()]
    top = argparse.ArgumentParser(
        prog="agfsync",
        usage="agfsync VERB --config=FILE[:arg] --workdir=DIR [--config.key=value ...]",
        description="AGFSync: text-to-image diffusion models aligned with AI feedback only.\n\n"
        "verbs (agfsync VERB --help says more):\n" + "\n".join(described),
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("verb", choices=verbs(), metavar="VERB", help="one of the above")
    verb = top.parse_args(argv[:1] if argv else ["--help"]).verb

    flags = argparse.ArgumentParser(
        prog=f"agfsync {verb}", add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS
    )
    flags.add_argument("-h", "--help", action="store_true", help="show this and exit")
    flags.add_argument("--config", metavar="FILE[:arg]", help=f"such as {DEFAULT_CONFIG}")
    flags.add_argument("--workdir", metavar="DIR", help="all that the verbs read and write")
    flags.add_argument(
        "--repair",
        action="store_true",
        help="drop damaged shards and make them anew, where a record is truncated",
    )
    flags.set_defaults(round=0)
    if verb not in ("run", "report"):
        flags.add_argument("--round", type=int, default=0, metavar="N", help="of the loop, from 0")
    args, rest = flags.parse_known_args(argv[1:])
    overrides = {}
    for item in rest:
        match = re.fullmatch(r"--config\.([\w.]+)=(.*)", item, re.DOTALL)
        if not match:
            raise ValueError(
                f"unknown argument {item!r}; agfsync {verb} takes --config, --workdir, --round,"
                " --repair and --config.key=value"
            )
        overrides[match[1]] = match[2]
    if args.help:
        _print_help(verb, flags, load_config(args.config or DEFAULT_CONFIG, overrides))
        raise SystemExit(0)
    for flag, example in (("config", DEFAULT_CONFIG), ("workdir", "runs/micro")):
        if getattr(args, flag) is None:
            raise ValueError(f"agfsync {verb} needs --{flag}, such as --{flag}={example}")
    return verb, args, overrides


def verbs() -> list[str]:
    """The verbs, in the order of the loop."""
    return [verb for verb in VERBS if (PACKAGE / f"{verb}.py").exists()]


def summary(verb: str) -> str:
    """The first paragraph of a verb's docstring, read without importing it."""
    return _docstring(verb).split("\n\n")[0]


def load_config(spec: str, overrides: dict[str, str]) -> ConfigDict:
    """Runs get_config(arg) of the file in "FILE[:arg]" and sets the overrides.

    FILE is looked for from here, then beside the package, where `configs` is installed.

    Raises:
        FileNotFoundError, ValueError: no such file, no such key (close ones are listed), a value
            of another type than the one it replaces.
    """
    match = re.fullmatch(r"(.+\.py)(?::(.*))?", spec)
    if not match:
        raise ValueError(f"--config={spec}: expected FILE.py or FILE.py:arg")
    places = [Path(match[1]), PACKAGE.parent / match[1]]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        shipped = sorted((PACKAGE.parent / "configs").glob("[!_]*.py"))
        known = ", ".join(f"configs/{file.name}" for file in shipped if file.stem != "common")
        raise FileNotFoundError(f"--config={spec}: no file {match[1]}; shipped: {known}")
    source = importlib.util.spec_from_file_location(f"agfsync_config_{path.stem}", path)
    module = importlib.util.module_from_spec(source)
    source.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError(f"--config={spec}: {path} has no get_config(arg)")
    config = module.get_config(match[2])
    for key, text in overrides.items():
        _override(config, key, text)
    return config.lock()


def check_config(config: ConfigDict, verb: str) -> None:
    """Looks up every name and folder of the config that `verb` will use.

    Raises:
        ValueError: a name that is no file of its room.
        FileNotFoundError: weights that are not there.
    """
    from agfsync_jax.utils import modules
    from agfsync_jax.utils.weights import resolve_path

    modules.check("backbones", config.backbone.name)
    modules.check("losses", config.loss.name)
    for source in (config.prompts.source, config.questions.source, config.evaluate.source):
        modules.check("prompt_sources", source)
    for scorer in config.scorers.values():
        modules.check("scorers", scorer.name)
    if verb in ("run", "sample", "train", "evaluate"):
        resolve_path(config.backbone.path)
    if verb in ("run", "score", "evaluate"):
        for scorer in config.scorers.values():
            for key in ("path", "head"):
                if key in scorer:
                    resolve_path(scorer[key])


def claim_workdir(workdir: Path, config: ConfigDict) -> None:
    """Writes the config into the workdir, or compares it with the one that made the workdir.

    Raises:
        ValueError: they differ in a key that matters; the message lists all of them.
        NotADirectoryError: `workdir` is a file.
    """
    if workdir.exists() and not workdir.is_dir():
        raise NotADirectoryError(f"--workdir={workdir} is a file; expected a folder")
    path = workdir / "config.json"
    now = {key: value for key, value in _flat(config).items() if not re.fullmatch(SECRET, key)}
    now = json.loads(json.dumps(now))  # tuples are lists in JSON
    if path.exists():
        before = _flat(ConfigDict(json.loads(path.read_text())))
        differ = [
            f"{key}: {json.dumps(before.get(key))} there, {json.dumps(now.get(key))} now"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key) and not re.fullmatch(FREE, key)
        ]
        if differ:
            raise ValueError(
                f"{workdir} was made by another config. Take another --workdir, or set:\n  "
                + "\n  ".join(differ)
            )
    workdir.mkdir(parents=True, exist_ok=True)
    aside = workdir / f"config.json.{os.getpid()}"
    nested = ConfigDict()
    nested.update_from_flattened_dict(now)
    aside.write_text(json.dumps(nested.to_dict(), indent=2) + "\n")
    os.replace(aside, path)


def prepare_jax() -> None:
    """Keeps compiled programs on disk, so that the second run starts at once."""
    import jax

    default = Path.home() / ".cache" / "agfsync_jax"
    folder = os.environ.get("AGFSYNC_CACHE", str(default))
    if folder and not jax.config.jax_compilation_cache_dir:
        # A CPU program holds this machine's instructions; a home folder may be shared.
        place = Path(folder) / f"xla-{platform.machine()}-{platform.node()}"
        jax.config.update("jax_compilation_cache_dir", str(place))
        jax.config.update("jax_compilation_cache_max_size", 4 * 2**30)  # bytes; locks, evicts
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _override(config: ConfigDict, key: str, text: str) -> None:
    flat = _flat(config)
    if key not in flat:
        blocks = {name.rpartition(".")[0] for name in flat} - {""}
        if key in blocks:
            keys = ", ".join(name for name in flat if name.startswith(f"{key}."))
            raise ValueError(f"--config.{key} is a block; set one of: {keys}")
        close = difflib.get_close_matches(key, flat, n=3, cutoff=0.5)
        leaf = key.rpartition(".")[2]
        close += [name for name in flat if name.rpartition(".")[2] == leaf and name not in close]
        hint = f"close: {', '.join(close)}" if close else f"the blocks are: {', '.join(config)}"
        raise ValueError(f"--config.{key} is no key of the config; {hint}")
    config.update_from_flattened_dict({key: _parse(key, text, flat[key])})


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
    kind = type(old).__name__
    raise ValueError(f"--config.{key}={text}: expected {kind}, as in {old!r}")


def _flat(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """{"sample.height": 64, ...}; an empty block has no keys."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _docstring(verb: str) -> str:
    return ast.get_docstring(ast.parse((PACKAGE / f"{verb}.py").read_text())) or verb


def _print_help(verb: str, flags: argparse.ArgumentParser, config: ConfigDict) -> None:
    common = (PACKAGE.parent / "configs" / "common.py").read_text()
    meaning = dict(re.findall(r"^    c\.([\w.]+) = .*?  # (.+)$", common, re.MULTILINE))
    blocks = (*ALSO_READS.get(verb, ()), verb)
    rows = []
    for key, value in _flat(config).items():
        if key.partition(".")[0] in blocks:
            row = f"  --config.{key}={value}"
            rows.append(f"{row:<48}  {meaning[key]}" if key in meaning else row)
    text = [
        f"usage: agfsync {verb} --config=FILE[:arg] --workdir=DIR [--config.key=value ...]",
        _docstring(verb),
        textwrap.dedent(flags.format_help()).strip(),
    ]
    if rows:
        text.append("keys of the config, with their values in it:\n" + "\n".join(rows))
    print("\n\n".join(text))


def _terminate(*_) -> None:
    raise KeyboardInterrupt("SIGTERM")


if __name__ == "__main__":
    sys.exit(main())
