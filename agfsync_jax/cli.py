"""The command line: `agfsync <verb> --config=FILE[:arg] --workdir=DIR [--config.key=value ...]`.

A verb is a file of the package with `main(config, workdir, *, round_index, repair)`; its docstring
is its help text. What a user can get wrong is checked here, before a device is touched.
"""

import argparse
import ast
import hashlib
import importlib
import logging
import os
import platform
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from agfsync_jax.utils import configs, modules

PACKAGE = Path(__file__).parent
VERBS = (
    *("run", "prompts", "questions", "sample", "score", "pair", "train", "evaluate", "report"),
    *("export", "plan", "bench"),
)
# Flags that only one verb knows, as argparse takes them.
_JSON = {"action": "store_true", "help": "the last line of the output is one JSON object"}
FLAGS = {
    "export": {
        "verify": {
            "action": "store_true",
            "help": "let diffusers draw an image from the files, and compare",
        }
    },
    "report": {
        "stage": {
            "choices": ("pair",),
            "default": "",
            "help": "a gallery of that stage's outcome, of --round, instead of the report",
        }
    },
    "bench": {
        "stage": {
            "choices": modules.names("benches"),
            "default": "load",
            "help": "what is measured",
        },
        "against": {
            "choices": ("diffusers", "reference"),
            "help": "measure this peer too, in turn with agfsync",
        },
        "json": _JSON,
    },
    "plan": {
        "topology|topologies": {
            "default": "",
            "metavar": "NAME[,NAME]",
            "help": "v5e:4x4, v5p:2x2x4, v6e:4x4, ...; without it, the devices that are here",
        },
        "verb": {
            "choices": (*modules.names("plans"), "all"),
            "default": "sample",
            "help": "whose program is compiled",
        },
        "largest": {
            "action": "store_true",
            "help": "look for the largest batch that fits: some more compilations",
        },
        "json": _JSON,
    },
}
# What says which of several processes this is, where the cluster does not.
PROCESSES = {
    "coordinator_address": {"metavar": "HOST:PORT", "help": "of process 0; of several processes"},
    "num_processes": {"type": int, "metavar": "N", "help": "of them all"},
    "process_id": {"type": int, "metavar": "N", "help": "of this one, from 0"},
}
NEED_NO_WORKDIR = ("bench", "plan")
DEFAULT_CONFIG = "configs/micro.py"
# What --help lists besides the block of the verb's own name.
ALSO_READS = {
    "run": ("seed", "rounds", "backbone", "mesh", "sharding"),
    "sample": ("backbone",),
    "score": ("scorers",),
    "train": ("loss",),
    "export": ("backbone",),
    "bench": ("scorers", "train"),
    "plan": ("backbone", "mesh", "sharding", "sample", "scorers", "score", "loss", "train"),
}
EPILOG = """\
--config.a.b=value sets any key of the config: agfsync sample --help lists those that sample reads.

environment:
  AGFSYNC_TRACEBACK=1   show where an error was raised
  AGFSYNC_CACHE=DIR     compiled programs, kept for the next run (~/.cache/agfsync_jax); empty: none
  AGFSYNC_DISTRIBUTED=1 one of several processes, which the cluster knows: TPU pod, GKE, Slurm
"""


def main(argv: list[str] | None = None) -> int:
    """Runs one verb; returns the exit status: 0, 2 after an error, 130 or 143 when stopped.

    Of several processes one that stops ends the others too: see parallel/watch.py.
    """
    argv = sys.argv[1:] if argv is None else argv
    signal.signal(signal.SIGTERM, _terminate)
    try:
        _run(argv)
    except KeyboardInterrupt as stop:
        print(
            "\nstopped; what is done is kept, and the same command goes on from there:\n"
            f"  agfsync {shlex.join(argv)}",
            file=sys.stderr,
        )
        status = 143 if stop.args == ("SIGTERM",) else 130
        _tell_others("was stopped by a signal.", status)
        return status
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("AGFSYNC_TRACEBACK") == "1":
            traceback.print_exc()
        print(f"agfsync: error: {error}", file=sys.stderr)
        _tell_others(f"stopped with an error: {error}", 2)
        return 2
    return 0


def _run(argv: list[str]) -> None:
    verb, args, overrides = parse(argv)
    config = configs.load(args.config, overrides)
    from agfsync_jax.steps import checks, settings  # these import jax

    checks.check(config, verb)
    start_jax(*(getattr(args, name) for name in PROCESSES))
    from agfsync_jax.parallel import multihost, watch
    from agfsync_jax.utils.files import to_path

    if multihost.several():
        multihost.agree(_facts(verb, args, config))
    with watch.explained():
        workdir = to_path(args.workdir) if args.workdir else None
        if workdir:
            settings.claim(workdir, config, _steps, write=multihost.is_main())
        module = importlib.import_module(f"agfsync_jax.{verb}")
        own = {name: getattr(args, name) for name in _names(FLAGS.get(verb, ()))}
        module.main(config, workdir, round_index=args.round, repair=args.repair, **own)


def _steps() -> list[Any]:
    """The steps of the loop, in order."""
    from agfsync_jax import run

    return [module.main for module in run.ROUND]


def _facts(verb: str, args: argparse.Namespace, config: Any) -> dict[str, Any]:
    """What must be the same in every process."""
    import jax
    from ml_collections import ConfigDict

    public = ConfigDict(configs.public(config.to_dict()))
    code = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        code.update(path.relative_to(PACKAGE).as_posix().encode() + path.read_bytes())
    flags = {k: v for k, v in vars(args).items() if k not in ("config", *PROCESSES)}
    return {
        "the verb": verb,
        "jax": jax.__version__,
        "the code of agfsync_jax": code.hexdigest()[:12],
        "the devices": f"{jax.local_device_count()} x {jax.devices()[0].device_kind}",
        **{f"--{key}": value for key, value in flags.items()},
        **{f"config.{key}": value for key, value in configs.flatten(public).items()},
    }


def _names(flags: Iterable[str]) -> list[str]:
    """Of flags that may have other spellings, as in "topology|topologies"."""
    return [name.partition("|")[0] for name in flags]


def _tell_others(why: str, status: int) -> None:
    """Of several processes this one ends here, and the others are told why."""
    if watch := sys.modules.get("agfsync_jax.parallel.watch"):  # else none was started
        watch.stop(why, status)


def parse(argv: list[str]) -> tuple[str, argparse.Namespace, dict[str, str]]:
    """The verb, its flags and the `--config.key=value` overrides; exits for --help.

    Raises:
        ValueError: a flag that is unknown or missing.
    """
    known = verbs()
    lines = [f"  {verb:<10} {docstring(verb).splitlines()[0]}" for verb in known]
    top = argparse.ArgumentParser(
        prog="agfsync",
        usage="agfsync VERB --config=FILE[:arg] --workdir=DIR [--config.key=value ...]",
        description="AGFSync: text-to-image diffusion models aligned with AI feedback only.\n\n"
        "verbs (agfsync VERB --help says more):\n" + "\n".join(lines),
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("verb", choices=known, metavar="VERB", help="one of the above")
    verb = top.parse_args(argv[:1] or ["--help"]).verb

    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS)
    flags.add_argument("-h", "--help", action="store_true", help="show this and exit")
    flags.add_argument("--config", metavar="FILE[:arg]", help=f"such as {DEFAULT_CONFIG}")
    flags.add_argument("--workdir", metavar="DIR", help="all that the verbs read and write")
    flags.add_argument("--repair", action="store_true", help="make damaged shards anew")
    flags.add_argument("--round", type=int, default=0, metavar="N", help="of the loop, from 0")
    for name, options in (FLAGS.get(verb, {}) | PROCESSES).items():
        flags.add_argument(*(f"--{each}" for each in name.split("|")), **options)
    args, rest = flags.parse_known_args(argv[1:])
    overrides = {}
    for item in rest:
        match = re.fullmatch(r"--config\.([\w.]+)=(.*)", item, re.DOTALL)
        if not match:
            raise ValueError(
                f"unknown argument {item!r}; agfsync {verb} takes --config=FILE, --workdir=DIR,"
                " --round=N, --repair, --config.key=value and what --help lists"
            )
        overrides[match[1]] = match[2]
    if args.help:
        print_help(verb, flags, args.config or DEFAULT_CONFIG, overrides)
        raise SystemExit(0)
    for flag, example in (("config", DEFAULT_CONFIG), ("workdir", "runs/micro")):
        if getattr(args, flag) is None and not (flag == "workdir" and verb in NEED_NO_WORKDIR):
            raise ValueError(f"agfsync {verb} needs --{flag}, such as --{flag}={example}")
    if args.round < 0:
        raise ValueError(f"--round={args.round}: rounds count from 0")
    return verb, args, overrides


def verbs() -> list[str]:
    """The verbs, `run` first, then in the order of the loop."""
    return [verb for verb in VERBS if (PACKAGE / f"{verb}.py").exists()]


def docstring(verb: str) -> str:
    """What the verb's file says of itself, read without importing it."""
    return ast.get_docstring(ast.parse((PACKAGE / f"{verb}.py").read_text())) or verb


def print_help(
    verb: str, flags: argparse.ArgumentParser, spec: str, overrides: dict[str, str]
) -> None:
    """The verb's docstring, the flags, and the keys that it reads with their meaning."""
    meaning = configs.meanings()
    blocks = (*ALSO_READS.get(verb, ()), verb)
    rows = []
    for key, value in configs.flatten(configs.load(spec, overrides)).items():
        if key.partition(".")[0] in blocks:
            row = f"  --config.{key}={value}"
            rows.append(f"{row:<48}  {meaning[key]}" if key in meaning else row)
    print(f"usage: agfsync {verb} --config=FILE[:arg] --workdir=DIR [--config.key=value ...]\n")
    print(f"{docstring(verb)}\n\n{flags.format_help().strip()}")
    if rows:
        print(f"\nkeys, with their values in {spec}:\n" + "\n".join(rows))


def start_jax(*processes: Any) -> None:
    """Joins the other processes, if any; turns on the cache of compiled programs."""
    import jax

    from agfsync_jax.parallel import multihost

    folder = os.environ.get("AGFSYNC_CACHE", str(Path.home() / ".cache" / "agfsync_jax"))
    if folder and not jax.config.jax_compilation_cache_dir:
        # A CPU's program holds this machine's instructions, and a home folder may be shared.
        place = Path(folder) / f"xla-{platform.machine()}-{platform.node()}"
        jax.config.update("jax_compilation_cache_dir", str(place))
        jax.config.update("jax_compilation_cache_max_size", 4 * 2**30)  # bytes; locks and evicts
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if os.environ.get("AGFSYNC_TRACEBACK") != "1":
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs what it raises anyway
    multihost.initialize(*processes)


def _terminate(*_) -> None:
    raise KeyboardInterrupt("SIGTERM")


if __name__ == "__main__":
    sys.exit(main())
