"""Whole text-to-image systems, a file each; and here the one that `config.backbone` names."""

from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from agfsync_jax.utils import modules
from agfsync_jax.utils.weights import Fitted


def backbone_class(config: Any) -> type:
    """The class that `config.backbone.name` names."""
    return modules.load("backbones", config.backbone.name).Backbone


def load(config: Any, mesh: Mesh) -> Any:
    """The backbone of `config.backbone`, its parameters on `mesh` as `config.sharding` says.

    Raises:
        FileNotFoundError, ValueError: see the backbone's own `load`.
    """
    spec = config.backbone.to_dict()
    del spec["name"]
    path = spec.pop("path")
    return backbone_class(config).load(path, mesh=mesh, rules=config.sharding, **spec)


def inspect(config: Any) -> tuple[Any, dict[str, Fitted]]:
    """Its files and the shapes of its networks; no tensor is read."""
    spec = config.backbone
    return backbone_class(config).inspect(spec.path, variant=spec.variant, kind=spec.kind)


def tokenizer(config: Any) -> Callable:
    """Its tokenizer alone: texts -> int32 [b, n]."""
    spec = config.backbone
    return backbone_class(config).tokenizer(spec.path, variant=spec.variant, kind=spec.kind)
