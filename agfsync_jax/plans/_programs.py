"""What a compiled program does on a chip, read from its text.

`Compiled.as_text()` is taken apart loop by loop, as `cost_analysis()` sees a program whole.
"""

import dataclasses
import functools
import math
import operator
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

_COLLECTIVES = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a device does.

    Attributes:
        flops: of matrix products and convolutions; a multiply-add is two.
        bytes_accessed: of its memory, between fusions: each reads its operands and writes its
            result, once. What stays on the chip (memory space 1 of a TPU) is not counted.
        collectives: kind, or kind and axes such as "all-gather over fsdp" -> bytes of the results.
        uncounted: kernel -> how often: calls whose FLOP the program does not tell.
    """

    flops: int = 0
    bytes_accessed: int = 0
    collectives: Counter = dataclasses.field(default_factory=Counter)
    uncounted: Counter = dataclasses.field(default_factory=Counter)

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*map(operator.add, vars(self).values(), vars(other).values()))

    def __mul__(self, times: int) -> "Cost":
        def scaled(counter):
            return Counter({key: n * times for key, n in counter.items()})

        numbers = self.flops * times, self.bytes_accessed * times
        return Cost(*numbers, scaled(self.collectives), scaled(self.uncounted))


class Program:
    """The text of a compiled program, `Compiled.as_text()`, taken apart.

    Args:
        text: of the program.
        axes: the axes of its mesh and their sizes, in order; by them collectives are told apart.

    Attributes:
        cost: of the whole program. A loop whose length the text does not tell counts once.
        loops: the cost of one pass of every loop, inner ones included.
    """

    def __init__(self, text: str, axes: Mapping[str, int] | None = None):
        self._axes = axes or {}
        self._computations, entry = _parse(text)
        self._cost = functools.cache(self._cost_of)
        self.cost = self._cost(entry)
        self.loops = [
            sum(map(self._cost, _called(line.attributes)), Cost())
            for lines in self._computations.values()
            for line in lines.values()
            if line.opcode == "while"
        ]

    def _cost_of(self, computation: str, inside: bool = False) -> Cost:
        """Of a computation; of one that is fused, `inside`, the memory is its caller's."""
        lines = self._computations[computation]
        return sum((self._line_cost(line, lines, inside) for line in lines.values()), Cost())

    def _line_cost(self, line: "_Line", lines: dict[str, "_Line"], inside: bool) -> Cost:
        fused = line.opcode not in ("while", "conditional", "call", "async-start")
        called = [self._cost(name, inside or fused) for name in _called(line.attributes)]
        if line.opcode == "conditional":
            called = [max(called, key=lambda cost: cost.flops, default=Cost())]
        own = Cost(
            flops=_flops(line, lines),
            bytes_accessed=0 if inside else self._bytes_accessed(line, lines),
            collectives=_collective(line, self._axes),
        )
        if line.opcode == "custom-call":
            own += _kernel(line)
        return own + sum(called, Cost()) * (self._trips(line) if line.opcode == "while" else 1)

    def _bytes_accessed(self, line: "_Line", lines: dict[str, "_Line"]) -> int:
        """Of a fusion that reads or writes but a slice of an array, as loops do: of the slice."""
        total = _bytes_accessed(line, lines)
        if line.opcode != "fusion":
            return total
        fused = self._computations[_named(line.attributes, "calls")]
        readers = defaultdict(list)
        for each in fused.values():
            for name in each.names:
                readers[name].append(each)
        for name, parameter in fused.items():
            uses = readers[name]
            if parameter.opcode != "parameter" or not uses:
                continue
            whole = _size(parameter.arrays)
            outside = lines.get(line.names[int(parameter.operands)])
            if outside is None or not _size(outside.arrays, memory_only=True):
                continue  # it is not in memory, and was not counted
            if all(use.opcode == "dynamic-slice" for use in uses):
                total -= whole - sum(_size(use.arrays) for use in uses)
            elif all(
                use.opcode == "dynamic-update-slice" and use.names[0] == name for use in uses
            ):  # in place: neither read nor written but for the update
                updates = sum(_size(fused[use.names[1]].arrays) for use in uses)
                total -= 2 * (whole - updates)
        return max(total, 0)

    def _trips(self, line: "_Line") -> int:
        """How often a loop runs; 1 where it is not told."""
        if match := re.search(r'"known_trip_count":\{"n":"(\d+)"', line.attributes):
            return int(match[1])
        condition = self._computations[_named(line.attributes, "condition")].values()
        bounds = [each.operands for each in condition if each.opcode == "constant"]
        return int(bounds[0]) if len(bounds) == 1 and bounds[0].isdecimal() else 1


def _integers(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)))


class _Array(NamedTuple):
    dtype: str
    dims: tuple[int, ...]
    in_memory: bool  # of the device; else on the chip

    @property
    def size(self) -> int:
        """Bytes."""
        bits = 8 if self.dtype == "pred" else sum(_integers(self.dtype)[:1])
        return math.prod(self.dims) * bits // 8


def _size(arrays: Sequence[_Array], memory_only: bool = False) -> int:
    return sum(array.size for array in arrays if array.in_memory or not memory_only)


@dataclasses.dataclass(frozen=True)
class _Line:
    """`%name = shape opcode(operands), attributes`."""

    shape: str
    opcode: str
    operands: str
    attributes: str

    @functools.cached_property
    def names(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.operands)

    @functools.cached_property
    def arrays(self) -> list[_Array]:
        found = re.findall(r"([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?", self.shape)
        return [_Array(a, _integers(dims), not re.search(r"S\([1-9]", at)) for a, dims, at in found]


def _parse(text: str) -> tuple[dict[str, dict[str, _Line]], str]:
    """Computation -> instruction -> its line; and the computation that the program starts with."""
    computations, entry, lines = {}, "", {}
    for row in text.splitlines():
        if match := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", row):
            lines = computations[match[2]] = {}
            entry = match[2] if match[1] else entry
        elif match := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.+)", row):
            shape, rest = _split(match[2])
            opcode, _, rest = rest.strip().partition("(")
            operands, attributes = _split(f"({rest}")
            lines[match[1]] = _Line(shape, opcode, operands[1:-1], attributes)
    if not entry:
        raise ValueError("This is no text of a compiled program: it has no ENTRY.")
    return computations, entry


def _split(text: str) -> tuple[str, str]:
    """The text up to the parenthesis that closes its first one, or to a space; and the rest."""
    depth = 0
    for position, letter in enumerate(text):
        depth += (letter in "({[") - (letter in ")}]")
        if not depth and (letter == " " or letter == ")" and text[0] == "("):
            end = position + (letter == ")")
            return text[:end], text[end:]
    return text, ""


def _named(attributes: str, key: str) -> str:
    """The computation that an attribute names."""
    return re.search(rf"\b{key}=%?([\w.\-]+)", attributes)[1]


def _called(attributes: str) -> list[str]:
    """The computations that an instruction runs."""
    keys = r"calls|to_apply|body|condition|true_computation|false_computation"
    lists = r"branch_computations|called_computations"
    pattern = rf"\b(?:(?:{keys})=(%?[\w.\-]+)|(?:{lists})=\{{([^}}]*)\}})"
    found = ["".join(groups) for groups in re.findall(pattern, attributes)]
    return [name for text in found for name in re.findall(r"[\w.\-]+", text)]


def _results(line: _Line) -> list[_Array]:
    """What an instruction makes."""
    arrays, count = line.arrays, len(line.names)
    if line.opcode == "copy-start":  # (to, from, context)
        return arrays[:1]
    if line.opcode.endswith("-start") and line.opcode != "all-reduce-start":
        return arrays[count : 2 * count]  # (from, to, context), as many of each of the first two
    return arrays


def _collective(line: _Line, axes: Mapping[str, int]) -> Counter:
    """{kind over axes: bytes of the result}; those that run aside count where they start."""
    kind = line.opcode.removesuffix("-start")
    if kind not in _COLLECTIVES:
        return Counter()
    groups = _groups(line.attributes)
    if groups and max(map(len, groups)) == 1:
        return Counter()  # each device by itself: nothing is sent
    if axes:
        shape = tuple(axes.values())
        groups = groups or [range(math.prod(shape))]
        crossed = {
            axis
            for group in groups
            for axis, places in zip(axes, np.unravel_index(list(group), shape), strict=True)
            if len(set(places.tolist())) > 1
        }
        kind += f" over {', '.join(axis for axis in axes if axis in crossed)}"
    return Counter({kind: _size(_results(line))})


def _groups(attributes: str) -> list[Sequence[int]]:
    """The devices that talk to one another, by their places in the mesh; [] where all do."""
    lists = re.search(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}", attributes)
    if lists:
        return [_integers(group) for group in re.findall(r"\{([\d,]*)\}", lists[1])]
    # [groups,size]<=[dimensions]T(order): all numbers, transposed and cut into groups
    pattern = r"replica_groups=\[(\d+,\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?"
    if match := re.search(pattern, attributes):
        dimensions = _integers(match[2])
        numbers = np.arange(math.prod(dimensions)).reshape(dimensions)
        numbers = numbers.transpose(_integers(match[3])) if match[3] else numbers
        return numbers.reshape(_integers(match[1])).tolist()
    return []


_FREE = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"),
    *("call", "async-start", "after-all", "partition-id", "replica-id", "iota", "domain"),
    *("optimization-barrier", "add-dependency"),
)


def _bytes_accessed(line: _Line, lines: dict[str, _Line]) -> int:
    if line.opcode in _FREE or line.opcode.endswith(("-done", "-update")):
        return 0
    written = _size(_results(line), memory_only=True)
    read = [_size(lines[name].arrays, memory_only=True) for name in line.names if name in lines]
    if line.opcode in ("copy-start", "slice-start", "slice", "dynamic-slice", "gather"):
        return written + (_size(_results(line)) if any(read) else 0)  # no more than it gives
    return 2 * read[1] if line.opcode == "dynamic-update-slice" else written + sum(read)


def _kernel(line: _Line) -> Cost:
    """The FLOP that a kernel, such as Pallas', says it does; else that it does not say."""
    match = re.search(r'"cost_estimate":\{[^}]*"flops":"?(\d+)', line.attributes)
    target = re.search(r'custom_call_target="([^"]*)"', line.attributes)[1]
    kernels = r"tpu_custom_call|triton|mosaic|cublas|cudnn|onednn|matmul|conv|gemm"
    if flops := int(match[1]) if match else 0:
        return Cost(flops)
    return Cost(uncounted=Counter({target: 1} if re.search(kernels, target) else {}))


def _flops(line: _Line, lines: dict[str, _Line]) -> int:
    if line.opcode not in ("dot", "convolution"):
        return 0
    result = line.arrays[0].dims
    left, right = (lines[name].arrays[0].dims for name in line.names[:2])
    if line.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line.attributes)[1]
        return 2 * math.prod(result) * math.prod(left[d] for d in _integers(contracted))
    lhs, rhs, out = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", line.attributes).groups()
    window = re.search(r"window=\{([^}]*)\}", line.attributes)
    window = dict(item.split("=") for item in window[1].split()) if window else {}
    # Every pair of an output's and a kernel's element that meets an input's, features aside.
    pairs = result[out.index("b")] * result[out.index("f")] * right[rhs.index("i")]
    for position, label in enumerate(sorted(set(out) - set("bf"))):
        field = {key: value.split("x")[position] for key, value in window.items()}
        pairs *= _meetings(
            left[lhs.index(label)],
            right[rhs.index(label)],
            result[out.index(label)],
            int(field.get("stride", 1)),
            int(field.get("pad", "0_0").split("_")[0]),
            int(field.get("lhs_dilate", 1)),
            int(field.get("rhs_dilate", 1)),
        )
    return 2 * pairs


@functools.cache
def _meetings(
    size: int, kernel: int, outputs: int, stride: int, pad: int, dilation: int, kernel_dilation: int
) -> int:
    """How many elements of a convolution's kernel meet an element of the input, over all outputs.

    Along one dimension. TPUs write a batch of matrix products as a convolution, of which most
    elements meet padding.
    """
    places = np.add.outer(np.arange(outputs) * stride, np.arange(kernel) * kernel_dilation) - pad
    inside = (places >= 0) & (places <= (size - 1) * dilation)
    return int((inside & (places % dilation == 0)).sum())
