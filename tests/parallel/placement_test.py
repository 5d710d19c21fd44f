"""What a mesh makes of a network: which kernel attends, how it is split, where arrays lie.

Where libtpu is installed, flash attention is also compiled for real TPUs, which it needs none of.
"""

import inspect
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from agfsync_jax.models import attention, hooks
from agfsync_jax.models.layers import Linear
from agfsync_jax.parallel.mesh import create_mesh
from agfsync_jax.parallel.placement import KERNELS, Placement
from tests.qkv import assert_equals_plain, both, inputs

CPU = create_mesh({"data": 1}, devices=jax.devices()[:1])


def devices(platform, kind, **more):
    """A mesh of one device that is not here, as far as the choice looks at it."""
    device = SimpleNamespace(platform=platform, device_kind=kind, **more)
    return SimpleNamespace(devices=np.array([device]))


TPU = devices("tpu", "TPU v5 lite")
HOPPER = devices("gpu", "NVIDIA H100 80GB HBM3", compute_capability="9.0")
TURING = devices("gpu", "Tesla T4", compute_capability="7.5")
AMD = devices("gpu", "AMD Instinct MI300X", compute_capability="gfx942")


def test_it_has_the_hooks_of_networks_and_names_their_kernels():
    for name in ("activations", "weights", "attention"):
        ours, theirs = (getattr(cls, name) for cls in (Placement, hooks.Hooks))
        ours, theirs = (inspect.signature(each).parameters for each in (ours, theirs))
        assert list(ours) == list(theirs), name
    assert set(KERNELS) == {"auto", *attention.KERNELS}


@pytest.mark.parametrize(
    "shape, batch",
    [
        ({"data": 8}, 8),
        ({"data": 8}, 3),
        *(({"fsdp": 2, "tensor": -1, "data": 2}, b) for b in (4, 2)),
    ],
    ids=str,
)
@pytest.mark.parametrize("kernel", ["chunked", "flash"])
def test_on_a_mesh(interpreter, monkeypatch, kernel, batch, shape):
    """Inside jit, examples sharded where they divide; heads too."""
    mesh = create_mesh(shape)
    monkeypatch.setattr(attention, "CHUNK_SCORES", 100)
    # Where it cannot run, as the interpreter makes it run here.
    monkeypatch.setattr(Placement, "_runs", lambda self, kernel: True)
    arrays = inputs(batch, 20, 24, 2, 40)
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    spec = PartitionSpec(("data", "fsdp") if batch % parts == 0 else None)
    arrays = [jax.device_put(x, NamedSharding(mesh, spec)) for x in arrays]
    with hooks.using(Placement(mesh, kernel)):
        assert_equals_plain(attention.attention, arrays)


def test_chunked_on_a_mesh_needs_no_other_device():
    mesh = create_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor"))
    arrays = [jax.device_put(x, sharding) for x in inputs(4, 64, 64, 2, 40)]
    with hooks.using(Placement(mesh, "chunked")):
        text = both(attention.attention).lower(*arrays).compile().as_text()
    assert "all-reduce" not in text.replace("all-reduce(f32[]", "")
    assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute"))


def shaped(s, t, d, dtype="bfloat16"):
    return [jax.ShapeDtypeStruct((2, length, 8, d), dtype) for length in (s, t)]


@pytest.mark.parametrize("mesh, best", [(CPU, "chunked"), (TPU, "flash"), (HOPPER, "cudnn")])
def test_auto_chooses_by_platform_and_shapes(mesh, best):
    choose = Placement(mesh).choose
    assert choose(*shaped(4096, 4096, 40)) == best
    assert choose(*shaped(1024, 1024, 80)) == best
    assert choose(*shaped(4096, 77, 40)) == "plain"  # over a text
    assert choose(*shaped(256, 256, 160)) == "plain"  # a small map
    assert Placement(mesh, best).choose(*shaped(256, 77, 40)) == best  # as told


def test_what_a_kernel_cannot_take_is_chunked_or_plain():
    assert Placement(HOPPER).choose(*shaped(1024, 1024, 160)) == "chunked"
    assert Placement(HOPPER).choose(*shaped(4096, 4096, 40, "float32")) == "chunked"
    assert Placement(HOPPER, "cudnn").choose(*shaped(256, 256, 40, "float32")) == "plain"
    assert Placement(TPU).choose(*shaped(4096, 4096, 40, "float16")) == "chunked"
    autoencoder = shaped(4096, 4096, 512, "float32")
    assert Placement(TPU).choose(*autoencoder) == "flash"
    assert Placement(TURING).choose(*shaped(4096, 4096, 40)) == "chunked"
    assert Placement(AMD).choose(*shaped(4096, 4096, 40)) == "chunked"


@pytest.mark.parametrize("mesh", [CPU, TPU, HOPPER, TURING, AMD])
@pytest.mark.parametrize("kernel", list(KERNELS))
def test_a_kernel_that_the_platform_cannot_run(kernel, mesh):
    runs = {"flash": mesh is TPU, "cudnn": mesh is HOPPER}.get(kernel, True)
    if runs:
        assert Placement(mesh, kernel).describe().startswith("attention: ")
        return
    kind = mesh.devices.flat[0].device_kind
    with pytest.raises(ValueError, match=f'(?i)"{kernel}" cannot run on .*{kind}.*"plain": X'):
        Placement(mesh, kernel)


def test_an_unknown_kernel():
    with pytest.raises(ValueError, match='"fast" is unknown.*"auto": .*"plain": .*"chunked": '):
        Placement(CPU, "fast")


def test_the_choice_is_described():
    short = "(plain below 1024 queries or keys)"
    cpu = f"attention: chunked over queries {short}, as the devices are CPUs"
    assert Placement(CPU).describe() == cpu
    for mesh, *words in (
        (TPU, "Pallas flash", "TPU v5 lite"),
        (HOPPER, "cuDNN flash", "H100"),
        (TURING, "chunked", "T4"),
    ):
        assert all(word in Placement(mesh).describe() for word in words)
    assert Placement(TPU, "plain").describe() == "attention: plain, as configured"


@pytest.mark.parametrize(
    "shape, batch, constraints",
    [
        ({"data": 8}, 8, ["x", "kernel", "out"]),
        ({"data": 2, "fsdp": 4}, 16, ["x", "kernel", "out"]),
        ({"data": 8}, 12, ["kernel"]),  # examples that do not divide
        ({"data": 4, "tensor": 2}, 8, ["x", "out"]),  # weights stay split
        ({"tensor": 8}, 8, []),
    ],
    ids=str,
)
def test_layers_split_their_examples_and_gather_their_weights(shape, batch, constraints):
    mesh, layer = create_mesh(shape), Linear(4, 6, rngs=nnx.Rngs(0))
    with hooks.using(Placement(mesh)):
        equations = jax.make_jaxpr(layer)(jnp.zeros((batch, 4))).eqns
    found = [
        (equation.outvars[0].aval.shape, equation.params["sharding"].spec[:1])
        for equation in equations
        if equation.primitive.name == "sharding_constraint"
    ]
    rows = PartitionSpec(("data", "fsdp"))
    kinds = {"x": ((batch, 4), rows), "kernel": ((4, 6), ()), "out": ((batch, 6), rows)}
    assert [(shape, tuple(spec)) for shape, spec in found] == [
        (shape, tuple(spec)) for shape, spec in (kinds[name] for name in constraints)
    ]


def test_cudnn_lowers_for_cuda(monkeypatch):
    """To cuDNN's call, inside a map over the devices; forward and gradient."""
    stablehlo = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(stablehlo, "check_cudnn_version", lambda: 91000)  # none is installed
    mesh = create_mesh({"data": 8})
    arrays = inputs(8, 1024, 1024, 2, 40, "bfloat16")
    monkeypatch.setattr(Placement, "_runs", lambda self, kernel: True)

    def run(q, k, v):
        return attention.attention(q, k, v).astype(jnp.float32).sum()

    with hooks.using(Placement(mesh, "cudnn")):
        traced = jax.jit(jax.grad(run)).trace(*arrays)
    gradient = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmax(" in gradient and "__cudnn$fmhaSoftmaxBackward(" in gradient
    assert "1x1024x2x40" in gradient and "1024x1024x" not in gradient.replace("1x1024x1024", "")


MAPS = [  # queries, keys, heads, head size, dtype
    (4096, 4096, 8, 40, "bfloat16"),  # Stable Diffusion 1.5 at 512 px
    (1024, 1024, 8, 80, "bfloat16"),
    (256, 256, 8, 160, "bfloat16"),
    (4096, 4096, 10, 64, "bfloat16"),  # Stable Diffusion XL at 1024 px
    (1024, 1024, 20, 64, "bfloat16"),
    (2560, 2560, 8, 80, "float32"),  # neither a square nor a power of two
    (4096, 4096, 8, 160, "float32"),
    (1000, 1077, 8, 40, "bfloat16"),  # padded
    (16384, 16384, 1, 512, "float32"),  # the autoencoder at 1024 px
]


@pytest.mark.parametrize("sizes", MAPS, ids=str)
@pytest.mark.parametrize("name", ["v5e:4x4", "v5p:2x2x4", "v6e:4x4"])
def test_flash_compiles_for_tpus(monkeypatch, name, sizes):
    """Forward and backward, four examples a chip: no scores in memory, nothing sent."""
    pytest.importorskip("libtpu")
    for variable, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }.items():
        monkeypatch.setenv(variable, value)
    topology = topologies.get_topology_desc(platform="tpu", topology_name=name)
    mesh = create_mesh({"data": 4, "fsdp": 4}, devices=topology.devices)
    sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    s, t, h, d, dtype = sizes
    q, k = (jax.ShapeDtypeStruct((64, n, h, d), dtype, sharding=sharding) for n in (s, t))

    def gradient(q, k, v, cotangent):
        out, backward = jax.vjp(attention.attention, q, k, v)
        return out, backward(cotangent)

    with hooks.using(Placement(mesh, "flash")):
        compiled = jax.jit(gradient).lower(q, k, k, q).compile()
    text = compiled.as_text()
    assert "tpu_custom_call" in text
    words = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute")
    assert not any(word in text for word in words)
    if min(s, t) >= 4096:  # a number of arrays of the size of q with its heads padded, no scores
        size = 64 // 16 * h * s * (-d % 128 + d) * q.dtype.itemsize
        assert compiled.memory_analysis().temp_size_in_bytes < 16 * size
