"""The command line: `agfsync <verb> --config=FILE[:arg] --workdir=DIR [--config.key=value ...]`.

A verb is a file of the package with `main(config, workdir, *, round_index, repair)`; its docstring
is its help text. What a user can get wrong is checked here, before a device is touched.
"""

import argparse
import ast
import contextlib
import errno
import hashlib
import importlib
import importlib.metadata
import inspect
import logging
import os
import platform
import re
import shlex
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from agfsync_jax.utils import configs, modules, signals

PACKAGE = Path(__file__).parent
VERBS = """run prompts questions sample score pair train evaluate report export
    sweep compare plan bench""".split()
READING = ("report", "export", "plan", "bench")  # beside a run, too
DEFAULT_CONFIG = "configs/micro.py"
AGAIN = 75  # the status of what may pass by itself: EX_TEMPFAIL of sysexits.h


def _flag(text: str, **options: Any) -> dict[str, Any]:
    """What argparse takes for a flag with this help; without options it is there or not."""
    return {"help": text} | (options or {"action": "store_true"})


COMMON = {
    "config": _flag(f"such as {DEFAULT_CONFIG}", metavar="FILE[:arg]"),
    "workdir": _flag("all that the verbs read and write", metavar="DIR"),
    "repair": _flag("make damaged shards anew"),
    "round": _flag("of the loop, from 0", type=int, default=0, metavar="N"),
}
_STEP = _flag(
    "of the training that is read: last, best (by config.train.best) or a number",
    default="last",
    metavar="STEP",
)
_REQUESTS = _flag("write what a language model is to be asked, and ask nothing")
_JSON = _flag("the last line of the output is one JSON object")
# Flags that only one verb knows.
FLAGS = {
    "sweep": {
        "dry-run|dry_run": _flag("print the commands that do the same, and run none"),
        "index": _flag("that run alone, from 0; or what is shared", default="", metavar="N|shared"),
        "step": _STEP,
    },
    "compare": {
        "against": _flag("the run that others are compared with", default="", metavar="WORKDIR"),
        "output": _flag("where compare.html and compare.json go", default=".", metavar="DIR"),
    },
    "run": {
        "rehearse": _flag(
            "measure a round with the least work in WORKDIR/rehearsal, and tell hours"
        ),
        "random_weights": _flag("rehearse without weights: their sizes with random numbers"),
        "step": _STEP,
    },
    "prompts": {"requests": _REQUESTS},
    "questions": {"requests": _REQUESTS},
    "sample": {"step": _STEP},
    "train": {"step": _STEP},
    "evaluate": {"step": _STEP},
    "export": {
        "verify": _flag("compare with the checkpoint, and let diffusers draw an image, too"),
        "step": _STEP,
    },
    "report": {
        "stage": _flag(
            "a gallery of that stage's outcome, of --round, instead of the report",
            choices=("pair",),
            default="",
        )
    },
    "bench": {
        "stage": _flag("what is measured", choices=modules.names("benches"), default="load"),
        "against": _flag(
            "measure this peer too, in turn with agfsync", choices=("diffusers", "reference")
        ),
        "json": _JSON,
    },
    "plan": {
        "topology|topologies": _flag(
            "v5e:4x4, v5p:2x2x4, v6e:4x4, ...; without it, the devices that are here",
            default="",
            metavar="NAME[,NAME]",
        ),
        "verb": _flag(
            "whose program is compiled", choices=(*modules.names("plans"), "all"), default="sample"
        ),
        "largest": _flag("look for the largest batch that fits: some more compilations"),
        "json": _JSON,
    },
}
# What says which of several processes this is, where the cluster does not.
PROCESSES = {
    "coordinator_address": _flag("of process 0; of several processes", metavar="HOST:PORT"),
    "num_processes": _flag("of them all", type=int, metavar="N"),
    "process_id": _flag("of this one, from 0", type=int, metavar="N"),
}
# What --help lists besides the block of the verb's own name.
ALSO_READS = {
    "run": ("seed", "rounds", "backbone", "mesh", "sharding"),
    "sample": ("backbone",),
    "score": ("scorers",),
    "train": ("loss",),
    "export": ("backbone",),
    "sweep": ("seed", "rounds", "backbone", "mesh", "sharding", "pair", "loss", "train"),
    "bench": ("scorers", "train"),
    "plan": ("backbone", "mesh", "sharding", "sample", "scorers", "score", "loss", "train"),
}
EPILOG = """\
--config.a.b=value sets any key of the config: agfsync sample --help lists those that sample reads.

environment:
  AGFSYNC_TRACEBACK=1   show where an error was raised
  AGFSYNC_CACHE=DIR     compiled programs, kept for the next run (~/.cache/agfsync_jax); empty: none
  AGFSYNC_STOP_SECONDS=20  how long SIGTERM waits for a step of training to end, and be saved
  AGFSYNC_DISTRIBUTED=1 one of several processes, which the cluster knows: TPU pod, GKE, Slurm
"""


def main(argv: list[str] | None = None) -> int:
    """Runs one verb; returns the exit status: 0, 2 after an error, 75 after one that may pass by
    itself, 130 or 143 when stopped.

    Of several processes one that stops ends the others too: see parallel/watch.py.
    """
    owns_process = argv is None
    argv = sys.argv[1:] if argv is None else argv
    signal.signal(signal.SIGTERM, _terminate)

    def stop(number: int, leave: bool = True) -> int:
        said = "\nstopped; what is done is kept, and the same command goes on from there:\n"
        status = 128 + number
        _tell(said + f"  agfsync {shlex.join(argv)}", "was stopped by a signal.", status)
        if leave:  # at once: in order the process would wait for the device
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        return status

    try:
        with signals.ended_in_time(stop):
            _run(argv)
        return 0
    except KeyboardInterrupt as error:
        is_term = error.args == ("SIGTERM",)
        return stop(signal.SIGTERM if is_term else signal.SIGINT, leave=owns_process)
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("AGFSYNC_TRACEBACK") == "1":
            traceback.print_exc()
        from agfsync_jax.utils.files import Unreachable

        passing = isinstance(error, Unreachable | TimeoutError | ConnectionError)
        status = AGAIN if passing else 2
        said, why = f"agfsync: error: {error}", f"stopped with an error: {error}"
        if str(error) == str(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))):
            said += ": make room where --workdir lies, and the same command goes on"
    _tell(said, why, status)
    return status


def _tell(said: str, why: str, status: int) -> None:
    """The user, and the other processes, with which this one ends."""
    print(said, file=sys.stderr)
    if watch := sys.modules.get("agfsync_jax.parallel.watch"):  # else there are no others
        watch.stop(why, status)


def _terminate(*_) -> None:
    raise KeyboardInterrupt("SIGTERM")


def _run(argv: list[str]) -> None:
    verb, args, overrides = parse(argv)
    if verb == "compare":  # reads what runs have left, without a config of its own or a device
        from agfsync_jax import compare

        return compare.main(None, None, **vars(args))
    config, runs = configs.load(args.config, overrides), []
    if verb == "sweep":
        runs = configs.sweep(args.config)
    start_jax(*(getattr(args, name) for name in PROCESSES))
    import jax

    from agfsync_jax import checks
    from agfsync_jax.parallel import multihost, watch
    from agfsync_jax.plans._room import advice
    from agfsync_jax.steps import settings
    from agfsync_jax.utils.files import to_path

    if multihost.several():
        multihost.agree(_facts(verb, args, config) | {"what sweep() yields": runs})
    with watch.explained(), contextlib.ExitStack() as stack:
        workdir = to_path(args.workdir) if args.workdir else None
        of_run = {"spec": args.config, "overrides": overrides, "runs": runs} if runs else {}
        # Without weights they need not be there; of a sweep each run is checked.
        if not getattr(args, "random_weights", False) and not runs:
            facts = {"num_devices": jax.device_count(), "round_index": args.round}
            checks.check(config, verb, workdir=workdir, **facts)
        for line in advice(config, verb) if multihost.is_main() else ():
            print(f"{verb}: {line}", file=sys.stderr)
        if workdir and not runs:
            writes = verb not in READING and multihost.is_main()
            stack.enter_context(settings.held(workdir) if writes else contextlib.nullcontext())
            settings.claim(workdir, config, _steps, write=multihost.is_main())
        module = importlib.import_module(f"agfsync_jax.{verb}")
        shared = {"help", *COMMON, *PROCESSES}
        own = {name: value for name, value in vars(args).items() if name not in shared} | of_run
        module.main(config, workdir, round_index=args.round, repair=args.repair, **own)


def _tell_unraisable(unraisable: Any) -> None:
    """All but what TensorStore tells of each array when the first one could not be written."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _steps() -> list[Any]:
    """Those of the loop, in order."""
    return [module.main for module in importlib.import_module("agfsync_jax.run").ROUND]


def _facts(verb: str, args: argparse.Namespace, config: Any) -> dict[str, Any]:
    """What must be the same in every process."""
    import jax

    code = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        code.update(path.relative_to(PACKAGE).as_posix().encode() + path.read_bytes())
    flags = {k: v for k, v in vars(args).items() if k not in ("config", *PROCESSES)}
    public = configs.public(config.to_dict())
    return {
        "the verb": verb,
        "jax": jax.__version__,
        "the code of agfsync_jax": code.hexdigest()[:12],
        "the devices": f"{jax.local_device_count()} x {jax.devices()[0].device_kind}",
        **{f"--{key}": value for key, value in flags.items()},
        **{f"config.{key}": value for key, value in configs.flatten(public).items()},
    }


def parse(argv: list[str]) -> tuple[str, argparse.Namespace, dict[str, str]]:
    """The verb, its flags and the `--config.key=value` overrides; exits for --help, and raises
    ValueError for a flag that is unknown or missing."""
    lines = [f"  {verb:<10} {docstring(verb).splitlines()[0]}" for verb in VERBS]
    top = argparse.ArgumentParser(
        prog="agfsync",
        usage="agfsync VERB --config=FILE[:arg] --workdir=DIR [--config.key=value ...]",
        description="AGFSync: text-to-image diffusion models aligned with AI feedback only.\n\n"
        "verbs (agfsync VERB --help says more):\n" + "\n".join(lines),
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = importlib.metadata.version("agfsync_jax")
    top.add_argument("--version", action="version", version=f"agfsync_jax {version}")
    top.add_argument("verb", choices=VERBS, metavar="VERB", help="one of the above")
    verb = top.parse_args(argv[:1] or ["--help"]).verb

    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS)
    flags.add_argument("-h", "--help", **_flag("show this and exit"))
    if verb == "compare":
        flags.add_argument("workdirs", nargs="*", metavar="WORKDIR", help="of a finished run")
    common = {} if verb == "compare" else COMMON | PROCESSES
    for name, options in (common | FLAGS.get(verb, {})).items():
        flags.add_argument(*(f"--{each}" for each in name.split("|")), **options)
    args, rest = flags.parse_known_intermixed_args(argv[1:])
    if verb == "compare":
        return verb, _compared(args, rest, flags), {}
    overrides = _overrides(verb, rest)
    if args.help:
        print_help(verb, flags, args.config or DEFAULT_CONFIG, overrides)
        raise SystemExit(0)
    if not args.config:
        raise ValueError(f"agfsync {verb} needs --config, such as --config={DEFAULT_CONFIG}")
    if args.workdir == "":
        raise ValueError("--workdir= is empty: name a folder, such as --workdir=runs/micro")
    if not args.workdir and verb not in ("bench", "plan"):
        raise ValueError(f"agfsync {verb} needs --workdir, such as --workdir=runs/micro")
    if getattr(args, "random_weights", False) and not args.rehearse:
        raise ValueError(
            "--random_weights is of a rehearsal: agfsync run --rehearse --random_weights"
        )
    step = getattr(args, "step", "last")
    if step not in ("last", "best") and not re.fullmatch("[1-9][0-9]*", step):
        raise ValueError(f"--step={step}: expected last, best or the number of a step")
    if step != "last" and verb in ("sample", "train") and args.round == 0:
        raise ValueError(f"--step={step} is of the round before, and --round=0 has none")
    if args.round < 0:
        raise ValueError(f"--round={args.round}: rounds count from 0")
    if verb == "sweep" and args.round:
        raise ValueError(f"--round={args.round}: a sweep goes through all rounds of each run")
    return verb, args, overrides


def _compared(
    args: argparse.Namespace, rest: list[str], flags: argparse.ArgumentParser
) -> argparse.Namespace:
    """The flags of `agfsync compare`, which takes workdirs alone."""
    if args.help:
        usage = "usage: agfsync compare WORKDIR WORKDIR ... [--against=WORKDIR] [--output=DIR]"
        print(f"{usage}\n\n{docstring('compare')}\n\n{flags.format_help().strip()}")
        raise SystemExit(0)
    if rest:
        raise ValueError(
            f"unknown argument {rest[0]!r}; agfsync compare takes workdirs, --against, --output"
        )
    if not args.workdirs:
        raise ValueError("agfsync compare needs workdirs: agfsync compare runs/one runs/other")
    del args.help
    return args


def _overrides(verb: str, arguments: list[str]) -> dict[str, str]:
    """{key: text} of `--config.key=value` and `--config.key value`."""
    overrides, waiting = {}, list(reversed(arguments))
    while waiting:
        item = waiting.pop()
        match = re.fullmatch(r"--config\.([\w.]+)(?:=(.*))?", item, re.DOTALL)
        if not match:
            known = configs.meanings()
            name, _, value = item.lstrip("-").partition("=")
            alike = [key for key in known if name in (key, key.rpartition(".")[2])]
            if alike:
                close = " or ".join(f"--config.{key}={value}" for key in alike)
                raise ValueError(f"unknown argument {item!r}: did you mean {close}?")
            raise ValueError(
                f"unknown argument {item!r}; agfsync {verb} takes --config=FILE, --workdir=DIR,"
                " --round=N, --repair, --config.key=value and what --help lists"
            )
        key, text = match.groups()
        if text is None:
            if not waiting or waiting[-1].startswith("--"):
                raise ValueError(f"{item} has no value: write {item}=VALUE")
            text = waiting.pop()
        overrides[key] = text
    return overrides


def docstring(verb: str) -> str:
    """What the verb's file says of itself, read without importing it."""
    return ast.get_docstring(ast.parse((PACKAGE / f"{verb}.py").read_text())) or verb


def print_help(
    verb: str, flags: argparse.ArgumentParser, spec: str, overrides: dict[str, str]
) -> None:
    """The verb's docstring, the flags, and the keys that it reads with their meaning."""
    meaning = configs.meanings()
    blocks = (*ALSO_READS.get(verb, ()), verb)
    print(f"usage: agfsync {verb} --config=FILE[:arg] --workdir=DIR [--config.key=value ...]\n")
    print(f"{docstring(verb)}\n\n{flags.format_help().strip()}")
    print(f"\nkeys, with their values in {spec}:")
    config = configs.load(spec, overrides)
    flat = {key: v for key, v in configs.flatten(config).items() if key.partition(".")[0] in blocks}
    for block in {"prompts", "questions"} & set(blocks):  # what their sources take besides
        function = getattr(modules.load("prompt_sources", config[block].source), block)
        known = inspect.signature(function).parameters
        given = {name: each.default for name, each in known.items() if name not in config[block]}
        flat |= {
            f"{block}.{name}": v for name, v in given.items() if v is not inspect.Parameter.empty
        }
    for key, value in flat.items():
        print(f"{f'  --config.{key}={value}':<48}  {meaning.get(key, '')}".rstrip())


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
        for name in ("absl", "asyncio"):  # Orbax logs what it raises anyway
            logging.getLogger(name).setLevel(logging.CRITICAL)
        sys.unraisablehook = _tell_unraisable
    multihost.initialize(*processes)


if __name__ == "__main__":
    sys.exit(main())
