"""What a verb needs, looked up before any work: all that is wrong is told at once."""

import difflib
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from ml_collections import ConfigDict

from agfsync_jax import backbones, prompt_sources
from agfsync_jax.data.imports import PreferenceSet, bucket_sizes
from agfsync_jax.data.pairs import is_pairs
from agfsync_jax.data.preferences import check_settings
from agfsync_jax.data.scores import check_scored, scored_round
from agfsync_jax.data.shards import read_rows
from agfsync_jax.evaluation.prompts import check_apart, held_out, held_out_block, is_made
from agfsync_jax.llm.captions import load_themes
from agfsync_jax.parallel.mesh import mesh_shape
from agfsync_jax.parallel.placement import KERNELS
from agfsync_jax.plans._room import DRAWS, TRAINS, room
from agfsync_jax.scoring.columns import asks_questions, check_weights, named, scorer_class
from agfsync_jax.training import inversion
from agfsync_jax.training.objective import load_loss, timesteps_of
from agfsync_jax.training.program import check_start, check_use
from agfsync_jax.utils import configs, modules
from agfsync_jax.utils.files import Unreachable, check_reachable, to_path
from agfsync_jax.weights.places import is_local, resolve_path


def check(
    config: ConfigDict,
    verb: str,
    *,
    num_devices: int | None,
    round_index: int = 0,
    workdir: Path | None = None,
) -> None:
    """Everything that can be known of a verb before it runs.

    Args:
        num_devices: of all processes; None where the verb will run elsewhere.
        workdir: where the verb will write; with it, memory and disk of this machine are looked at.

    Raises:
        ValueError: what is wrong, all of it.
        Unreachable: nothing is known to be wrong, and a host that has weights was not reached.
    """
    problems = [*keys(config), *names(config)]
    if not problems:  # what follows reads the config as if all of its keys were what they must be
        problems += [*scorers(config, verb), *sizes(config, verb, num_devices)]
        problems += files(config, verb, downloads=False)
        problems += prompts(config, verb, round_index, workdir)
    if not problems:
        problems += files(config, verb, downloads=True)
    if not problems and verb in TRAINS and config.train.start:
        problems += _told(lambda: start(config))
    if not problems and verb in TRAINS and (config.train.timesteps or config.train.inversion_steps):
        schedule = backbones.schedule(config)
        num = schedule.num_train_timesteps
        problems += _told(lambda: timesteps_of(config.train.timesteps, num))
        if config.train.inversion_steps and not problems:
            problems += _told(lambda: inversion.wanted(config, schedule))
    if not problems and workdir:
        problems += room(config, verb, workdir)
    refuse(problems)


def refuse(problems: Iterable[str]) -> None:
    """Raises ValueError that tells all problems; does nothing without any."""
    problems = list(dict.fromkeys(problems))
    if len(problems) == 1:
        raise ValueError(problems[0])
    if problems:
        raise ValueError(f"{len(problems)} things are wrong:\n  " + "\n  ".join(problems))


def keys(config: ConfigDict) -> Iterator[str]:
    """Keys that are unknown, and values that a key does not take (configs/schema.py)."""
    schema = configs.schema()
    flat = configs.flatten(config)
    for key, value in flat.items():
        rule, block = schema.rule(key), key.partition(".")[0]
        is_open = block in schema.OPEN and not key.startswith("evaluate.sample.")
        if rule is not None and not rule.holds(value):
            yield f"config.{key}={value!r}: expected {rule.allowed}."
        if rule is None and not is_open:
            yield f"config.{key} is no key of the config{_close(key, schema.KEYS)}"
    for key in schema.KEYS.keys() - flat.keys() - {"pair.weights"}:
        yield f"config.{key} is missing: start from get_config() of configs/common.py."


def names(config: ConfigDict) -> Iterator[str]:
    """Names that are no file of their room, and arguments that the named file does not take."""
    rooms = [
        ("backbones", "backbone.name", config.backbone.name),
        ("losses", "loss.name", config.loss.name),
        *(("evaluators", "evaluate.evaluators", name) for name in config.evaluate.evaluators),
    ]
    if config.sample.sampler:
        rooms.append(("samplers", "sample.sampler", config.sample.sampler))
    if config.evaluate.sample.get("sampler"):
        rooms.append(("samplers", "evaluate.sample.sampler", config.evaluate.sample.sampler))
    for folder, key, name in rooms:
        yield from _told(lambda f=folder, n=name: modules.check(f, n), f"config.{key}: ")
    for name, settings in config.loss.items():
        if name != "name" and not isinstance(settings, ConfigDict):
            used = config.loss.name
            yield (
                f"config.loss.{name}: a setting belongs to a loss: c.loss.{used} ="
                f" ConfigDict(dict({name}=...)), or --config.loss.{name}=... on the command line."
            )
        elif name != "name":
            with_its = functools.partial(load_loss, name, settings.to_dict())
            yield from _told(with_its)
    if config.backbone.attention not in ("auto", *KERNELS):
        known = ", ".join(("auto", *KERNELS))
        yield f"config.backbone.attention={config.backbone.attention!r}: expected one of {known}."
    for block, function in (
        ("prompts", "prompts"),
        ("questions", "questions"),
        ("evaluate", "prompts"),
    ):
        named = config[block].source or config.prompts.source
        found = list(_told(lambda s=named: modules.check("prompt_sources", s)))
        yield from (f"config.{block}.source: {line}" for line in found)
        if found:
            continue
        source = modules.load("prompt_sources", named)
        spec = held_out_block(config) if block == "evaluate" else config[block].to_dict()
        del spec["source"]
        known = inspect.signature(getattr(source, function)).parameters
        given = {"seed", "round_index", "prompt_rows", "desk"} & known.keys()
        found = list(_arguments(f"config.{block}", spec, known, given))
        yield from found
        if not found and hasattr(source, "check"):
            yield from _told(lambda c=source.check, s=spec: c(**s), f"config.{block}: ")
    for block, spec in config.scorers.items():
        found = list(_told(lambda b=block, s=spec: scorer_class(b, s), f"config.scorers.{block}: "))
        yield from found
        if not found:
            known = modules.settings("scorers", spec.name)
            given = {"batch_size", "name"}
            yield from _arguments(f"config.scorers.{block}", spec.to_dict(), known, given)


def scorers(config: ConfigDict, verb: str) -> Iterator[str]:
    """Settings that a scorer cannot do, and weights of columns that none makes."""
    if verb not in ("run", "score", "pair", "evaluate"):
        return
    for block, spec in config.scorers.items():
        settings = {key: value for key, value in spec.to_dict().items() if key != "name"}
        make = scorer_class(block, spec)
        yield from _told(lambda m=make, s=settings: m.check(**s), f"config.scorers.{block}: ")
    if not config.pair.path and verb != "evaluate":
        yield from _told(lambda: check_weights(config.pair.weights, config.scorers.to_dict()))


def sizes(config: ConfigDict, verb: str, num_devices: int | None) -> Iterator[str]:
    """Meshes that the devices do not make, and batches that they do not divide."""
    spec = config.train
    if verb in ("run", "pair"):
        path, size = config.pair.path, config.sample
        imports = bool(path) and not scored_round(path, to_path(path))
        yield from _told(lambda: check_settings(config.pair, of_people=imports))
        yield from _told(lambda: bucket_sizes(size.height, size.width, config.pair.buckets))
    # plan's devices are elsewhere, and it looks itself
    if verb in (*DRAWS, *TRAINS, "export") and num_devices is not None:
        found = list(_told(lambda: mesh_shape(config.mesh, num_devices), "config.mesh: "))
        yield from found
        if not found and verb in TRAINS:
            yield from _told(
                lambda: mesh_shape(config.mesh, num_devices, spec.batch_size),
                "config.train.batch_size: ",
            )
    if verb == "run" and spec.flip and not config.pair.flips:
        if not (config.pair.path and is_pairs(config.pair.path)):
            yield (
                "config.train.flip=True wants pairs with latents of mirrored images: set"
                " config.pair.flips=True."
            )
    if verb in (*TRAINS, "plan", "export") and spec.lora_text_encoder:
        yield from _text_encoder(config)
    if verb in (*TRAINS, "plan"):
        if spec.schedule == "cosine" and spec.warmup_steps >= spec.num_steps:
            yield (
                f"config.train.warmup_steps={spec.warmup_steps} leaves nothing of the cosine"
                f" schedule: it must be below config.train.num_steps={spec.num_steps}."
            )
        loss = load_loss(config.loss.name, config.loss.get(config.loss.name, {}))
        yield from _told(lambda: check_use(loss, config))
        path, makes = config.pair.path, f"config.loss.name={config.loss.name} learns from scores"
        of_people = path and not (is_pairs(path) or scored_round(path, to_path(path)))
        if loss.uses_scores and of_people:
            yield (
                f"{makes}, and config.pair.path={path} has none: those are choices of people. Take"
                " another loss, such as diffusion_dpo."
            )
        if spec.inversion_steps and config.pair.buckets and of_people:
            yield (
                f"config.train.inversion_steps={spec.inversion_steps} wants images of one shape,"
                f" and config.pair.buckets={config.pair.buckets} makes several: set one to 0."
            )
        if loss.uses_scores and config.pair.shuffle_labels:
            yield f"{makes}, which undo config.pair.shuffle_labels: take another loss."
        if spec.best and not spec.validate_every:
            yield (
                f"config.train.best={spec.best!r} needs config.train.validate_every: only a"
                " validation says which checkpoint is the best."
            )
        if spec.held_out and not spec.validate_every:
            yield (
                f"config.train.held_out={spec.held_out} needs config.train.validate_every: only"
                " validations look at the pairs that no step learns from."
            )
        if spec.validate_every and not (spec.num_validation_prompts or spec.held_out):
            yield (
                f"config.train.validate_every={spec.validate_every} has nothing to look at: set"
                " config.train.num_validation_prompts or config.train.held_out."
            )
        if spec.lora_rank and (spec.start or spec.reference == "first"):
            yield (
                f"config.train.lora_rank={spec.lora_rank} with config.train.start or"
                " config.train.reference='first': adapters belong to the model that they start"
                " from, which is the reference then. Leave both as they are, or lora_rank=0."
            )
        for key in ("flip", "noise_offset") if spec.inversion_steps else ():
            if spec[key]:
                yield (
                    f"config.train.inversion_steps={spec.inversion_steps} gives each image noise of"
                    f" its own, and config.train.{key}={spec[key]} wants other noise: set one of"
                    " them to 0 or False."
                )
        if spec.lora_dropout and not spec.lora_rank:
            yield (
                f"config.train.lora_dropout={spec.lora_dropout} is for adapters, and"
                " config.train.lora_rank is 0: set it, or no dropout."
            )
        if spec.patience and not spec.best:
            yield (
                f"config.train.patience={spec.patience} needs config.train.best: the metric that no"
                " longer gets better."
            )
        if spec.best and spec.best not in (known := validated(config)):
            has = ", ".join(known) or "none"
            yield (
                f"config.train.best={spec.best!r} is no metric of a validation, which has"
                f" {has}{_close(spec.best, known)}"
            )


def _text_encoder(config: ConfigDict) -> Iterator[str]:
    """What does not go with adapters of the text encoders."""
    spec, key = config.train, "config.train.lora_text_encoder"
    if not spec.lora_rank:
        yield f"{key} is for adapters, and config.train.lora_rank is 0: set it, such as 8."
    if spec.embeddings != "step":
        yield f"{key} changes embeddings in every step: set config.train.embeddings='step'."
    if config.backbone.dtype == "float16":
        yield (
            f"{key} with config.backbone.dtype=float16: its gradients would be too small for"
            " float16. Take bfloat16 or float32."
        )
    if config.export.lora == "peft":
        yield (
            f"{key} with config.export.lora='peft': a folder of PEFT has one network's adapters."
            " Take diffusers or kohya."
        )


def validated(config: ConfigDict) -> list[str]:
    """The metrics of a validation: the columns of the scorers, and those of held-out pairs."""
    found: list[str] = []
    if config.train.num_validation_prompts:
        for block, spec in config.scorers.items():
            found += named(block, scorer_class(block, spec).columns)
    if config.train.held_out:
        loss = load_loss(config.loss.name, config.loss.get(config.loss.name, {}))
        found += ["held_out/loss", *["held_out/accuracy"] * loss.uses_reference]
    return found


def files(config: ConfigDict, verb: str, *, downloads: bool) -> Iterator[str]:
    """Weights and other files that are not there, or in no form that is read.

    Args:
        downloads: look at those that are elsewhere, which are downloaded, instead of those here.
    """
    wanted: list[tuple[str, str, str]] = []
    if verb in (*DRAWS, *TRAINS, "pair", "export"):
        wanted.append(("backbone.path", config.backbone.path, config.backbone.variant))
        wanted += [("backbone.lora", path, "") for path, _ in config.backbone.lora]
    if verb in TRAINS and config.train.start:
        wanted.append(("train.start", config.train.start, ""))
    if verb in ("run", "sample"):
        wanted += [("sample.lora", path, "") for path, _ in config.sample.lora]
    if verb in DRAWS and config.sample.refiner:
        wanted.append(("sample.refiner", config.sample.refiner, config.backbone.variant))
    if verb in ("run", "evaluate") and (refiner := config.evaluate.sample.get("refiner")):
        wanted.append(("evaluate.sample.refiner", refiner, config.backbone.variant))
    if verb in ("run", "score", "evaluate"):
        for block, spec in config.scorers.items():
            for key in ("path", "head", "closest"):
                if spec.get(key):
                    wanted.append((f"scorers.{block}.{key}", spec[key], ""))
    for key, path, variant in wanted:
        if is_local(path) != downloads:
            yield from _told(
                lambda p=path, v=variant: resolve_path(p, variant=v), f"config.{key}: "
            )
    pairs = config.pair.path
    if verb in ("run", "pair") and pairs and not downloads:

        def look() -> None:
            check_reachable(to_path(pairs))
            if scored := scored_round(pairs, to_path(pairs)):
                check_scored(scored, config.pair.weights)
            elif not is_pairs(pairs):
                PreferenceSet(config.pair)

        yield from _told(look)


def start(config: ConfigDict) -> None:
    """Raises ValueError for a `config.train.start` that the backbone cannot hold."""
    cls = backbones.backbone_class(config)
    other = cls.inspect(cls.open(config.train.start, variant="", kind=""))
    shapes = (found[cls.denoiser_name].abstract for found in (backbones.inspect(config), other))
    check_start(config, *shapes)


def prompts(config: ConfigDict, verb: str, round_index: int, workdir: Path | None) -> Iterator[str]:
    """Prompts, questions and held-out prompts: that there are enough, and that none is both. What a
    language model writes is looked at where it is there."""
    seed, asks = config.seed, asks_questions(config.scorers)
    makes_pairs = not config.pair.path  # else the pairs are others', and nothing is drawn for them
    rounds = range(round_index, config.rounds if verb == "run" else round_index + 1)
    drawn: list[str] = []
    at_once = not prompt_sources.takes_long(config.prompts.to_dict(), "prompts")
    asks = asks and not prompt_sources.takes_long(config.questions.to_dict(), "questions")
    if at_once and ((verb == "run" and makes_pairs) or verb == "prompts"):
        for index in rounds:
            rows: list[dict] = []

            def draw(index: int = index, rows: list = rows) -> None:
                spec = config.prompts.to_dict()
                rows += prompt_sources.draw_prompts(spec, seed=seed, round_index=index)

            def ask(rows: list = rows) -> None:
                prompt_sources.ask_questions(config.questions.to_dict(), rows, seed=seed)

            found = list(_told(draw, "config.prompts: "))
            yield from found
            if not found and asks and verb == "run":
                yield from _told(ask, "config.questions: ")
            drawn += [row["prompt"] for row in rows]
            if found:
                break
    example = load_themes().categories[0].examples[0]  # of what a language model writes
    if not at_once and asks and makes_pairs and verb == "run":
        written = workdir and (workdir / f"round_{round_index:03d}" / "prompts.jsonl").exists()
        row = {"id": "example", "prompt": example, "category": "", "source": ""}
        spec = config.questions.to_dict()
        if not written:
            yield from _told(
                lambda: prompt_sources.ask_questions(spec, [row], seed=seed),
                f"config.questions.source={spec['source']} and prompts of a language model: ",
            )
    if verb in ("run", "evaluate"):
        if pairs := config.pair.path:
            check_reachable(to_path(pairs))
            if scored := scored_round(pairs, to_path(pairs)):
                drawn += [row["prompt"] for row in read_rows(scored / "prompts.jsonl", "prompts")]
        held: list[dict] = []
        if not is_made(config, workdir):
            if prompt_sources.takes_long(held_out_block(config), "prompts"):
                yield from evaluators(config, [example])
            if verb == "run" and not config.pair.path:
                return  # it will be
            workdir = workdir or Path("WORKDIR")
        told = _told(
            lambda: held.extend(held_out(config, workdir)[0].values()), "config.evaluate: "
        )
        yield from told
        prompts = [row["prompt"] for row in held]
        yield from _told(lambda: check_apart(prompts, drawn), "config.evaluate: ")
        yield from evaluators(config, prompts)


def evaluators(config: ConfigDict, prompts: Sequence[str]) -> Iterator[str]:
    """Evaluators that cannot judge pictures of the prompts."""
    for name in config.evaluate.evaluators:
        judge = modules.load("evaluators", name).Evaluator()
        told = _told(functools.partial(judge.check, prompts))
        yield from (f"config.evaluate.evaluators has {name!r}: {line}" for line in told)


def _arguments(
    block: str, spec: Mapping[str, Any], known: Mapping[str, inspect.Parameter], given: set[str]
) -> Iterator[str]:
    """What a function that a block names does not take, or misses."""
    for name, value in spec.items():
        if name in given:
            continue
        if name not in known:
            yield f"{block}.{name} is not known there{_close(name, known)}"
        elif not _is_a(value, known[name].annotation):
            kind = getattr(known[name].annotation, "__name__", known[name].annotation)
            yield f"{block}.{name}={value!r}: expected {kind}."
    for name, parameter in known.items():
        missing = parameter.default is parameter.empty and name not in spec
        if missing and name not in given:
            yield f"{block}.{name} is missing."


def _is_a(value: Any, annotation: Any) -> bool:
    """Whether a value is what a simple annotation says; true where that is not simple."""
    kinds = get_args(annotation) or (annotation,)
    if not all(kind in (str, int, float, bool, type(None)) for kind in kinds):
        return True
    if isinstance(value, bool):
        return bool in kinds
    if float in kinds and isinstance(value, int):
        return True
    return isinstance(value, kinds) and not (isinstance(value, float) and not math.isfinite(value))


def _close(name: str, known: Any) -> str:
    found = difflib.get_close_matches(name, list(known), n=2)
    return f": did you mean {' or '.join(found)}?" if found else "."


def _told(act: Callable[[], Any], prefix: str = "") -> Iterator[str]:
    """What `act` has to say against it."""
    try:
        act()
    except Unreachable:
        raise
    except (ValueError, OSError) as error:
        yield f"{prefix}{error}"
