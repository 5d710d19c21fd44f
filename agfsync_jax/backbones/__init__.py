"""Whole text-to-image systems, a file each; and here the one that `config.backbone` names."""

from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from agfsync_jax import samplers
from agfsync_jax.diffusion.generation import Generator
from agfsync_jax.utils import modules
from agfsync_jax.weights.networks import Fitted

# Keys of config.sample that are not the Generator's.
_OF_THE_VERB = ("num_candidates", "prompts_per_shard", "param_dtype")


def backbone_class(config: Any) -> type:
    """The class that `config.backbone.name` names."""
    return modules.load("backbones", config.backbone.name).Backbone


def load(config: Any, mesh: Mesh, **changes: Any) -> Any:
    """The backbone of `config.backbone`, its parameters on `mesh` as `config.sharding` says.

    Args:
        **changes: arguments of the backbone's `load` that the config does not say, or says
            otherwise.

    Raises:
        FileNotFoundError, ValueError: see the backbone's own `load`.
    """
    spec = config.backbone.to_dict() | changes
    del spec["name"]
    path = spec.pop("path")
    return backbone_class(config).load(path, mesh=mesh, rules=config.sharding, **spec)


def generator(
    config: Any, mesh: Mesh, backbone: Any, *, refiner: Any = None, **changes: Any
) -> Generator:
    """The generator of `config.sample`, with the refiner if one is named.

    Args:
        refiner: the backbone that is named, where it need not be loaded.
        **changes: arguments of the Generator that the config says otherwise.

    Raises:
        FileNotFoundError, ValueError: see the Generator, and the backbone's `load` for a refiner;
            a sampler that does not exist, or two that differ.
    """
    spec = config.sample.to_dict() | changes
    dtype = spec["param_dtype"]
    for key in _OF_THE_VERB:
        del spec[key]
    if (path := spec.pop("refiner")) and refiner is None:
        refiner = load(config, mesh, path=path, kind="", lora=(), param_dtype=dtype)
    name = spec.pop("sampler")
    drawing = [backbone] if refiner is None else [backbone, refiner]
    used = {samplers.find(name, each.schedule) for each in drawing}
    if len(used) > 1:
        raise ValueError(
            "The schedulers of base and refiner differ, and so do their latents' scales: name "
            "one sampler for both as config.sample.sampler."
        )
    return Generator(backbone, mesh, sampler=used.pop(), refiner=refiner, **spec)


def inspect(config: Any) -> tuple[Any, dict[str, Fitted]]:
    """Its files and the shapes of its networks; no tensor is read."""
    spec = config.backbone
    return backbone_class(config).inspect(spec.path, variant=spec.variant, kind=spec.kind)


def sampler(config: Any) -> samplers.Sampler:
    """The sampler of `config.sample`, or that of the checkpoint's scheduler if it names none.

    Raises:
        FileNotFoundError, ValueError: no checkpoint; no such sampler; steps that it cannot make.
    """
    spec = config.backbone
    read = backbone_class(config).read_schedule
    schedule = read(spec.path, variant=spec.variant, kind=spec.kind)
    found = samplers.find(config.sample.sampler, schedule)
    found.steps(schedule, config.sample.num_inference_steps)
    return found


def tokenizer(config: Any) -> Callable:
    """Its tokenizer alone: texts -> int32 [b, n]."""
    spec = config.backbone
    return backbone_class(config).tokenizer(spec.path, variant=spec.variant, kind=spec.kind)
