"""Where the arrays of a network lie on a mesh, and what computes its attention there."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from agfsync_jax.parallel.sharding import BATCH_AXES, batch_shards, replicated

HEAD_AXES = ("tensor",)  # those that shard attention's heads
KERNELS = {
    "auto": "by the platform and by the shapes of each call",
    "plain": "XLA, all scores at once; on any platform",
    "chunked": "XLA, the scores of one head and some queries at a time; on any platform",
    "cudnn": "cuDNN's flash attention; on NVIDIA GPUs of compute capability 8.0 and later",
    "flash": "flash attention in Pallas; on TPUs",
}
# "auto" is plain for fewer queries or keys: the scores of one head then take less than 4 MB.
LONG = 1024


@dataclasses.dataclass(frozen=True)
class Placement:
    """The hooks that a network's layers call (models/hooks.py), for the devices of a mesh.

    Raises:
        ValueError: an unknown kernel, or one that the devices of the mesh cannot run.
    """

    mesh: Mesh  #: the devices that the program is for, which need not be of this host
    kernel: str = "auto"  #: of attention, one of `KERNELS`

    def __post_init__(self):
        if self.kernel in KERNELS and self._runs(self.kernel):
            return
        choices = (f'"{name}": {text}' for name, text in KERNELS.items() if self._runs(name))
        problem = f"cannot run on {self._devices()}" if self.kernel in KERNELS else "is unknown"
        raise ValueError(
            f'Attention kernel "{self.kernel}" {problem}. Set it to one of: {"; ".join(choices)}.'
        )

    def describe(self) -> str:
        """In one line, what computes attention, and why."""
        text = {
            "plain": "plain",
            "chunked": "chunked over queries",
            "cudnn": "cuDNN flash, chunked for heads above 128 or not in 16 bits",
            "flash": "Pallas flash, chunked for float16",
        }[self._best() if self.kernel == "auto" else self.kernel]
        if self.kernel != "auto":
            return f"attention: {text}, as configured"
        below = f"(plain below {LONG} queries or keys)"
        return f"attention: {text} {below}, as the devices are {self._devices()}"

    def activations(self, x: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
        """`x` with its examples split over the mesh, where that divides them.

        A layer says so of what goes in and comes out: where the same axis splits its weights, the
        partitioner has to gather those, and may not split the features of the activations instead.
        """
        parts = batch_shards(self.mesh)
        if parts == 1 or x.shape[0] % parts:
            return x
        spec = PartitionSpec(BATCH_AXES, *(PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1))
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))

    def weights(self, kernel: Array) -> Array:
        """A layer's weights, whole on every device; so is their gradient until it is split again.

        Left to itself, the partitioner passes parts of products around instead. With tensor
        parallelism weights stay split as they are.
        """
        if self.mesh.size == 1 or self.mesh.shape["tensor"] > 1:
            return kernel
        return jax.lax.with_sharding_constraint(kernel, replicated(self.mesh))

    def attention(
        self,
        kernels: Mapping[str, Callable],
        q: Float[Array, "b s h d"],
        k: Float[Array, "b t h d"],
        v: Float[Array, "b t h d"],
        *,
        scale: float,
    ) -> Float[Array, "b s h d"]:
        """By the kernel that `choose` names, each device on its own examples and heads.

        The partitioner knows neither how to split a kernel nor that a loop over heads can be split.
        An axis that does not divide the examples, or the heads, is left out: its devices all do the
        same.
        """
        name = self.choose(q, k)
        function = functools.partial(kernels[name], scale=scale)
        if name == "plain":
            return function(q, k, v)
        b, _, h, _ = q.shape
        spec = PartitionSpec(self._dividing(BATCH_AXES, b), None, self._dividing(HEAD_AXES, h))
        # Without check_vma: a Pallas kernel does not say over which axes its results vary.
        split = jax.shard_map(
            function, mesh=self.mesh, in_specs=spec, out_specs=spec, check_vma=False
        )
        return split(q, k, v)

    def choose(self, q: Array, k: Array) -> str:
        """The kernel of one call without a mask or a bias, "auto" resolved.

        "auto" is "plain" unless queries and keys are both `LONG`, and then "cudnn", "flash" or,
        where neither runs, "chunked". A call whose dtype or head size "cudnn" or "flash" cannot
        take is "chunked" where it is long, else "plain".
        """
        kernel, size = self.kernel, q.shape[-1]
        is_long = min(q.shape[1], k.shape[1]) >= LONG
        if kernel == "auto":
            kernel = self._best() if is_long else "plain"
        takes = {
            "cudnn": q.dtype in (jnp.bfloat16, jnp.float16) and size % 8 == 0 and size <= 128,
            "flash": q.dtype in (jnp.bfloat16, jnp.float32) and size <= 512,
        }
        if not takes.get(kernel, True):
            kernel = "chunked" if is_long else "plain"
        return kernel

    def _best(self) -> str:
        """The kernel of long calls under "auto"."""
        return next(kernel for kernel in ("flash", "cudnn", "chunked") if self._runs(kernel))

    def _runs(self, kernel: str) -> bool:
        """Whether the devices can run a kernel."""
        device = self.mesh.devices.flat[0]
        if kernel == "cudnn":
            # A number for NVIDIA's GPUs, such as "9.0"; a name for AMD's, such as "gfx942".
            version = getattr(device, "compute_capability", "").split(".")[0]
            return device.platform in ("gpu", "cuda") and version.isdigit() and int(version) >= 8
        return kernel != "flash" or device.platform == "tpu"

    def _devices(self) -> str:
        """What the devices are, in words."""
        device = self.mesh.devices.flat[0]
        kind = "" if device.device_kind == device.platform else f" ({device.device_kind})"
        return f"{device.platform.upper()}s{kind}"

    def _dividing(self, axes: tuple[str, ...], size: int) -> tuple[str, ...] | None:
        """Those of the axes that split, together, so many rows into equal parts."""
        used = ()
        for axis in axes:
            parts = self.mesh.shape[axis]
            if parts > 1 and size % parts == 0:
                used, size = (*used, axis), size // parts
        return used or None
