"""What each key of an experiment may be; all are checked before any work.

A key of configs/common.py that has no rule here fails the tests. The blocks in `OPEN` have other
keys too: those of the file that the block names, which checks them itself.
"""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

OPEN = ("prompts", "questions", "evaluate", "scorers", "loss")

# Keys of config.sample that config.evaluate.sample may have, too.
JUDGED = """num_inference_steps guidance_scale guidance_rescale sampler negative_prompt refiner
    refiner_start""".split()


class Rule(NamedTuple):
    """Which values a key takes."""

    allowed: str  #: in words, after "expected"
    holds: Callable[[Any], bool]


def is_number(value: Any) -> bool:
    """Whether it is a finite one; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def whole(low: int, also: int | None = None) -> Rule:
    """Whole numbers from `low`, and the one that means something else."""
    extra = "" if also is None else f", or {also}"
    return Rule(
        f"a whole number of at least {low}{extra}",
        lambda x: isinstance(x, int) and not isinstance(x, bool) and (x >= low or x == also),
    )


def number(low: float = -math.inf, high: float = math.inf, *, above: float = -math.inf) -> Rule:
    """Finite numbers from `low` to `high`, larger than `above`."""
    if above > -math.inf:
        bounds = f" above {above:g}" + (f" and at most {high:g}" if high < math.inf else "")
    elif high < math.inf:
        bounds = f" from {low:g} to {high:g}"
    else:
        bounds = f" of at least {low:g}" if low > -math.inf else ""
    return Rule(
        f"a finite number{bounds}", lambda x: is_number(x) and low <= x <= high and x > above
    )


def one_of(*names: str) -> Rule:
    """One of some words; "" stands for none where it is among them."""
    told = " | ".join(name or "''" for name in names)
    return Rule(told, lambda x: isinstance(x, str) and x in names)


def _is_pairs(value: Any, second: tuple[type, ...]) -> bool:
    return isinstance(value, tuple | list) and all(
        isinstance(entry, tuple | list)
        and len(entry) == 2
        and isinstance(entry[0], str)
        and isinstance(entry[1], second)
        for entry in value
    )


TEXT = Rule("text", lambda x: isinstance(x, str))
NAME = Rule("text that is not empty", lambda x: isinstance(x, str) and bool(x.strip()))
FLAG = Rule("true or false", lambda x: isinstance(x, bool))
NAMES = Rule(
    "a list of names, as in \"('referee',)\"",
    lambda x: isinstance(x, tuple | list) and all(isinstance(name, str) for name in x),
)
LORAS = Rule(
    "(path, scale) of each file, as in \"(('lora.safetensors', 1.0),)\"",
    lambda x: _is_pairs(x, (int, float)) and all(is_number(scale) for _, scale in x),
)
RULES = Rule(
    "(path regex, axes) rules, as in \"(('kernel$', 'fsdp'),)\"",
    lambda x: _is_pairs(x, (str, tuple, list)),
)
TIMESTEPS = Rule(
    "FIRST:END, as in '0:200', or a list, as in '249,499,749,999'; '' for all",
    lambda x: isinstance(x, str) and bool(re.fullmatch(r"(\d+:\d+|\d+(,\d+)*)?", x)),
)
FLOATS = one_of("float32", "bfloat16", "float16")
SPLIT = whole(1, also=-1)
SHARE = number(0, 1)
DECAY = Rule("a number from 0 to below 1", lambda x: is_number(x) and 0 <= x < 1)

KEYS = {
    "seed": whole(0),
    "rounds": whole(1),
    "backbone.name": NAME,
    "backbone.path": NAME,
    "backbone.variant": TEXT,
    "backbone.kind": TEXT,
    "backbone.lora": LORAS,
    "backbone.dtype": FLOATS,
    "backbone.attention": NAME,
    "mesh.data": SPLIT,
    "mesh.fsdp": SPLIT,
    "mesh.tensor": SPLIT,
    "sharding": RULES,
    "prompts.source": NAME,
    "prompts.num_prompts": whole(1),
    "prompts.split": NAME,
    "questions.source": NAME,
    "sample.height": whole(8),
    "sample.width": whole(8),
    "sample.num_inference_steps": whole(1),
    "sample.guidance_scale": number(0),
    "sample.num_candidates": whole(1),
    "sample.guidance_rescale": SHARE,
    "sample.sampler": TEXT,
    "sample.device_batch_size": whole(1),
    "sample.conditioning_noise": number(0),
    "sample.negative_prompt": TEXT,
    "sample.prompts_per_shard": whole(1),
    "sample.lora": LORAS,
    "sample.param_dtype": FLOATS,
    "sample.refiner": TEXT,
    "sample.refiner_start": SHARE,
    "score.device_batch_size": whole(1),
    "score.mesh.data": SPLIT,
    "score.mesh.fsdp": SPLIT,
    "score.mesh.tensor": SPLIT,
    "score.max_bad": SHARE,
    "pair.weights": number(),
    "pair.normalize": one_of("none", "zscore", "rank", "minmax"),
    "pair.min_margin": number(0),
    "pair.strategy": one_of("best_worst", "all_above_margin", "top_k_bottom_k", "ranked"),
    "pair.k": whole(1),
    "pair.max_pairs": whole(0),
    "pair.min_questions": whole(0),
    "pair.shuffle_labels": FLAG,
    "pair.embeddings": FLAG,
    "pair.images": FLAG,
    "pair.flips": FLAG,
    "pair.license": TEXT,
    "pair.path": TEXT,
    "pair.split": TEXT,
    "pair.columns.caption": NAME,
    "pair.columns.first": NAME,
    "pair.columns.second": NAME,
    "pair.columns.label": NAME,
    "pair.max_rows": whole(0),
    "pair.max_bad": SHARE,
    "pair.buckets": whole(0),
    "loss.name": NAME,
    "train.batch_size": whole(1),
    "train.num_steps": whole(1),
    "train.learning_rate": number(above=0),
    "train.warmup_steps": whole(0),
    "train.schedule": one_of("constant", "cosine"),
    "train.weight_decay": number(0),
    "train.max_grad_norm": number(0),
    "train.empty_prompts": SHARE,
    "train.flip": FLAG,
    "train.timesteps": TIMESTEPS,
    "train.inversion_steps": whole(0),
    "train.noise_offset": number(0),
    "train.min_snr_gamma": number(0),
    "train.optimizer": one_of("adamw", "adafactor", "lion"),
    "train.momentum_dtype": one_of("float32", "bfloat16"),
    "train.lora_rank": whole(0),
    "train.lora_alpha": number(0),
    "train.lora_targets": one_of("attention", "transformers", "all"),
    "train.lora_dropout": DECAY,
    "train.lora_text_encoder": FLAG,
    "train.device_batch_size": whole(0),
    "train.remat": one_of("none", "dots", "full"),
    "train.embeddings": one_of("cached", "step"),
    "train.ema_decay": DECAY,
    "train.save_every": whole(1),
    "train.keep": whole(1),
    "train.validate_every": whole(0),
    "train.num_validation_prompts": whole(0),
    "train.held_out": DECAY,
    "train.best": TEXT,
    "train.patience": whole(0),
    "train.tensorboard": FLAG,
    "train.wandb": TEXT,
    "train.start": TEXT,
    "train.reference": one_of("round", "first"),
    "train.reference_decay": DECAY,
    "train.auto_beta": Rule(
        "a number from 0 to below 0.5", lambda x: is_number(x) and 0 <= x < 0.5
    ),
    "train.seed": whole(0),
    "evaluate.source": TEXT,
    "evaluate.split": NAME,
    "evaluate.num_prompts": whole(0),
    "evaluate.num_seeds": whole(1),
    "evaluate.evaluators": NAMES,
    "export.output": TEXT,
    "export.dtype": FLOATS,
    "export.lora": one_of("", "diffusers", "kohya", "peft"),
    "bench.model": NAME,
    "bench.file_dtype": FLOATS,
    "bench.repeats": whole(1),
    "bench.param_dtype": FLOATS,
    "bench.dtype": one_of("", "float32", "bfloat16", "float16"),
    "bench.height": whole(0),
    "bench.width": whole(0),
    "bench.num_inference_steps": whole(1),
    "bench.guidance_scale": number(0),
    "bench.batch_size": whole(1),
    "bench.sampler": NAME,
    "bench.unet_width": number(above=0, high=1),
    "bench.num_train_steps": whole(1),
    "bench.num_prompts": whole(1),
    "bench.num_candidates": whole(1),
    "bench.num_questions": whole(1),
    "bench.num_requests": whole(1),
    "bench.concurrency": whole(1),
    "bench.num_texts": whole(1),
    "bench.text_width": whole(1),
    "report.num_examples": whole(1),
}


def rule(key: str) -> Rule | None:
    """What a key may be; None where nothing is said here."""
    block, _, name = key.rpartition(".")
    if block == "evaluate.sample":
        return KEYS[f"sample.{name}"] if name in JUDGED else None
    return KEYS["pair.weights"] if block == "pair.weights" else KEYS.get(key)
