"""What a compiled program does on a chip, read from its text.

`Compiled.as_text()` is taken apart loop by loop, as `cost_analysis()` sees a program whole.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping

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
        names = [field.name for field in dataclasses.fields(self)]
        return Cost(*(getattr(self, name) + getattr(other, name) for name in names))

    def __mul__(self, times: int) -> "Cost":
        counters = (
            Counter({key: n * times for key, n in counter.items()})
            for counter in (self.collectives, self.uncounted)
        )
        return Cost(self.flops * times, self.bytes_accessed * times, *counters)


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
            self._cost(_named(line.attributes, "body"))
            + self._cost(_named(line.attributes, "condition"))
            for lines in self._computations.values()
            for line in lines.values()
            if line.opcode == "while"
        ]

    def _cost_of(self, computation: str, inside: bool = False) -> Cost:
        """Of a computation; of one that is fused, `inside`, the memory is its caller's."""
        lines = self._computations[computation]
        total = Cost()
        for line in lines.values():
            total += self._line_cost(line, lines, inside)
        return total

    def _line_cost(self, line: "_Line", lines: dict[str, "_Line"], inside: bool) -> Cost:
        own = Cost(
            flops=_flops(line, lines),
            bytes_accessed=0 if inside else self._bytes_accessed(line, lines),
            collectives=_collective(line, self._axes),
            uncounted=_uncounted(line),
        )
        called = _called(line.attributes)
        if line.opcode == "while":
            each = (self._cost(name, inside) for name in called)
            return own + sum(each, Cost()) * self._trips(line)
        if line.opcode == "conditional":
            branches = [self._cost(name, inside) for name in called]
            return own + max(branches, key=lambda cost: cost.flops, default=Cost())
        fused = line.opcode not in ("call", "async-start")
        return own + sum((self._cost(name, inside or fused) for name in called), Cost())

    def _bytes_accessed(self, line: "_Line", lines: dict[str, "_Line"]) -> int:
        """Of a fusion that reads or writes but a slice of an array, as loops do: of the slice."""
        total = _bytes_accessed(line, lines)
        if line.opcode != "fusion":
            return total
        fused = self._computations[_named(line.attributes, "calls")]
        readers: dict[str, list[_Line]] = {}
        for each in fused.values():
            for name in each.names:
                readers.setdefault(name, []).append(each)
        for name, parameter in fused.items():
            uses = readers.get(name, [])
            if parameter.opcode != "parameter" or not uses:
                continue
            whole = sum(_sizes(parameter.shape))
            outside = lines.get(line.names[int(parameter.operands)])
            if outside is None or not sum(_sizes(outside.shape, memory_only=True)):
                continue  # it is not in memory, and was not counted
            if all(use.opcode == "dynamic-slice" for use in uses):
                total -= whole - sum(sum(_sizes(use.shape)) for use in uses)
            elif all(
                use.opcode == "dynamic-update-slice" and use.names[0] == name for use in uses
            ):  # in place: neither read nor written but for the update
                updates = sum(sum(_sizes(fused[use.names[1]].shape)) for use in uses)
                total -= 2 * (whole - updates)
        return max(total, 0)

    def _trips(self, line: "_Line") -> int:
        """How often a loop runs; 1 where it is not told."""
        if match := re.search(r'"known_trip_count":\{"n":"(\d+)"', line.attributes):
            return int(match[1])
        condition = self._computations[_named(line.attributes, "condition")].values()
        bounds = [each.operands for each in condition if each.opcode == "constant"]
        return int(bounds[0]) if len(bounds) == 1 and bounds[0].isdecimal() else 1


@dataclasses.dataclass(frozen=True)
class _Line:
    """`%name = shape opcode(operands), attributes`."""

    shape: str
    opcode: str
    operands: str
    attributes: str

    @property
    def names(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.operands)


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
    names = re.findall(rf"\b(?:{keys})=%?([\w.\-]+)", attributes)
    for group in re.findall(rf"\b(?:{lists})=\{{([^}}]*)\}}", attributes):
        names += re.findall(r"%?([\w.\-]+)", group)
    return names


def _arrays(shape: str) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    """(dtype, dimensions, whether it lies in the device's memory) of every array of a shape."""
    for dtype, dims, layout in re.findall(r"([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?", shape):
        sizes = tuple(int(size.lstrip("<=")) for size in dims.split(",") if size)
        yield dtype, sizes, not re.search(r"S\([1-9]", layout)


def _sizes(shape: str, memory_only: bool = False) -> list[int]:
    """Bytes of every array of a shape."""
    sizes = []
    for dtype, dims, in_memory in _arrays(shape):
        bits = re.search(r"\d+", dtype)
        bits = 8 if dtype == "pred" else int(bits[0]) if bits else 0
        sizes.append(math.prod(dims) * bits // 8 if in_memory or not memory_only else 0)
    return sizes


def _results(line: _Line, memory_only: bool = False) -> list[int]:
    """Bytes of every array that an instruction makes."""
    sizes = _sizes(line.shape, memory_only)
    if not line.opcode.endswith("-start") or line.opcode == "all-reduce-start":
        return sizes
    if line.opcode == "copy-start":  # (to, from, context)
        return sizes[:1]
    count = len(line.names)  # (from, to, context), as many of each of the first two
    return sizes[count : 2 * count]


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
    return Counter({kind: sum(_results(line))})


def _groups(attributes: str) -> list[list[int]]:
    """The devices that talk to one another, by their places in the mesh; [] where all do."""
    lists = re.search(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}", attributes)
    if lists:
        found = re.findall(r"\{([\d,]*)\}", lists[1])
        return [[int(number) for number in group.split(",") if number] for group in found]
    # [groups,size]<=[dimensions]T(order): all numbers, transposed and cut into groups
    pattern = r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?"
    if match := re.search(pattern, attributes):
        dimensions = [int(number) for number in match[3].split(",")]
        numbers = np.arange(math.prod(dimensions)).reshape(dimensions)
        if match[4]:
            numbers = numbers.transpose([int(number) for number in match[4].split(",")])
        return numbers.reshape(int(match[1]), int(match[2])).tolist()
    return []


_FREE = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"),
    *("call", "async-start", "after-all", "partition-id", "replica-id", "iota", "domain"),
    *("optimization-barrier", "add-dependency"),
)


def _bytes_accessed(line: _Line, lines: dict[str, _Line]) -> int:
    if line.opcode in _FREE or line.opcode.endswith(("-done", "-update")):
        return 0
    written = sum(_results(line, memory_only=True))
    operands = [_sizes(lines[name].shape, memory_only=True) for name in line.names if name in lines]
    operands = [sum(sizes) for sizes in operands]
    if line.opcode in ("copy-start", "slice-start", "slice", "dynamic-slice", "gather"):
        return written + (sum(_results(line)) if any(operands) else 0)  # no more than it gives
    if line.opcode == "dynamic-update-slice":
        return 2 * operands[1]
    return written + sum(operands)


def _uncounted(line: _Line) -> Counter:
    """Calls of kernels that do not say what they do."""
    if line.opcode != "custom-call":
        return Counter()
    target = re.search(r'custom_call_target="([^"]*)"', line.attributes)[1]
    kernel = re.search(
        r"tpu_custom_call|triton|mosaic|cublas|cudnn|onednn|matmul|conv|gemm", target
    )
    return Counter({target: 1} if kernel and not _estimate(line) else {})


def _estimate(line: _Line) -> int:
    """The FLOP that a Pallas kernel says it does; 0 where it does not say."""
    match = re.search(r'"cost_estimate":\{[^}]*"flops":"?(\d+)', line.attributes)
    return int(match[1]) if match else 0


def _flops(line: _Line, lines: dict[str, _Line]) -> int:
    if line.opcode == "custom-call":
        return _estimate(line)
    if line.opcode not in ("dot", "convolution"):
        return 0
    (_, result, _), *_ = _arrays(line.shape)
    left, right = (next(_arrays(lines[name].shape))[1] for name in line.names[:2])
    if line.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line.attributes)[1]
        return 2 * math.prod(result) * math.prod(left[int(d)] for d in contracted.split(",") if d)
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
    last = (size - 1) * dilation
    places = (
        output * stride + element * kernel_dilation - pad
        for output, element in itertools.product(range(outputs), range(kernel))
    )
    return sum(0 <= place <= last and place % dilation == 0 for place in places)
