"""Floating-point operations: how many a program does, and how many a device can do a second."""

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

# Dense bfloat16 products with float32 sums, TFLOP/s of one JAX device; the first match counts.
# TPUs: cloud.google.com/tpu/docs, "System architecture", a page a generation (a JAX device is a
# core, half a chip, in v2, v3 and TPU7x). GPUs: NVIDIA's data sheets without sparsity.
_PEAKS = (
    (r"TPU v2", 22.5),
    (r"TPU v3", 61.5),
    (r"TPU v4$", 275),
    (r"TPU v5 ?(lite|e)", 197),
    (r"TPU v5p?$", 459),
    (r"TPU v6", 918),
    (r"TPU7x", 1153.5),
    (r"\bB200\b", 2250),
    (r"\bG?H200\b", 989),
    (r"\bH100 NVL", 835),
    (r"\bH100 PCIe", 756),
    (r"\bH100\b", 989),
    (r"\bA100\b", 312),
    (r"\bA10G\b", 70),
    (r"\bL40S\b", 362),
    (r"\bL4\b", 121),
)


def peak(device_kind: str) -> float | None:
    """FLOP/s in bfloat16 of a device of `jax.Device.device_kind`; None where it is not known."""
    return next((tera * 1e12 for kind, tera in _PEAKS if re.search(kind, device_kind)), None)


def count(function: Callable, *args: Any) -> int:
    """The FLOP of `function(*args)`: its convolutions and matrix products alone.

    A multiply-add is two. Nothing is computed: the function is traced, and the arguments may be
    `jax.ShapeDtypeStruct`s. Products with padding are counted, those with the zeros between a
    dilated input's elements (a strided convolution's gradient) are not. Of a condition's branches
    the dearest counts. A program that is split over devices counts for all of
    them, what they do alike as often as they do it.

    Raises:
        ValueError: a while loop that has products: how often it runs is not known.
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _count(jaxpr: Jaxpr) -> int:
    return sum(_count_equation(equation) for equation in jaxpr.eqns)


def _count_equation(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    shapes = [getattr(var.aval, "shape", ()) for var in equation.invars]
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        depth = math.prod(shapes[0][axis] for axis in contracted)
        return 2 * depth * math.prod(equation.outvars[0].aval.shape)
    if name == "conv_general_dilated":
        kernel, features = shapes[1], params["dimension_numbers"].rhs_spec[0]
        depth = math.prod(kernel) // kernel[features]
        outputs = math.prod(equation.outvars[0].aval.shape)
        return 2 * depth * outputs // math.prod(params["lhs_dilation"])
    inner = [_count(jaxpr) for jaxpr in _inner(params)]
    if name == "cond":
        return max(inner)
    if name == "while" and any(inner):
        raise ValueError("flops.count: a while loop has products, and may run any number of times")
    return sum(inner) * (_TIMES[name](params) if name in _TIMES else 1)


def _devices(params: dict[str, Any]) -> int:
    """Those that run a shard_map's program; JAX's releases name its axes differently."""
    axes = next(value for name, value in params.items() if name.endswith("manual_axes"))
    return math.prod(params["mesh"].shape[axis] for axis in axes)


# A primitive -> how often it runs its program.
_TIMES = {
    "scan": lambda params: params["length"],
    "shard_map": _devices,
    "pallas_call": lambda params: math.prod(params["grid_mapping"].grid),
}


def _inner(params: dict[str, Any]) -> Iterator[Jaxpr]:
    """The programs that an equation calls."""
    kinds = (Jaxpr, ClosedJaxpr)
    for leaf in jax.tree.leaves(params, is_leaf=lambda value: isinstance(value, kinds)):
        if isinstance(leaf, kinds):
            yield leaf.jaxpr if isinstance(leaf, ClosedJaxpr) else leaf
