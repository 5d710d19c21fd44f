"""Every kernel of attention equals the plain formula: shapes, dtypes, gradients, meshes, platforms.

The TPU's kernel runs here in Pallas' interpreter. Where libtpu is installed it is also compiled for
real TPUs, which it needs none of.
"""

import functools
import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.experimental import pallas, topologies
from jax.sharding import NamedSharding, PartitionSpec

from agfsync_jax.models import attention as module
from agfsync_jax.models.attention import attention, choose, chunked, describe, plain, using
from agfsync_jax.parallel.mesh import create_mesh
from tests.twins import relative_error

TOLERANCE = {"float32": (1e-5, 1e-5), "bfloat16": (8e-3, 2e-2)}  # forward, gradient
CPU = create_mesh({"data": 1}, devices=jax.devices()[:1])


@pytest.fixture
def interpreter(monkeypatch):
    """Pallas kernels for TPUs run as plain XLA programs."""
    call = functools.partial(pallas.pallas_call, interpret=True)
    monkeypatch.setattr(pallas, "pallas_call", call)


def inputs(b, s, t, h, d, dtype="float32"):
    random = np.random.default_rng(0)
    shapes = ((b, s, h, d), (b, t, h, d), (b, t, h, d))
    return [jnp.asarray(random.standard_normal(shape, np.float32), dtype) for shape in shapes]


def both(function):
    """jit of the result and its gradients, under a loss that weighs each number differently."""

    @jax.jit
    def run(q, k, v):
        def loss(q, k, v):
            out = function(q, k, v)
            weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
            return (out.astype(jnp.float32) * weights).sum(), out

        gradients, out = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
        return out, gradients

    return run


def assert_equals_plain(function, arrays):
    """In the dtype's tolerance of the plain formula in float32."""
    out, gradients = both(function)(*arrays)
    scale = arrays[0].shape[-1] ** -0.5
    expected = both(lambda q, k, v: plain(q, k, v, scale=scale))
    wanted, wanted_gradients = expected(*(x.astype(jnp.float32) for x in arrays))
    forward, backward = TOLERANCE[arrays[0].dtype.name]
    assert out.dtype == arrays[0].dtype and out.shape == arrays[0].shape
    assert relative_error(out, wanted) <= forward
    for ours, gradient in zip(gradients, wanted_gradients, strict=True):
        assert relative_error(ours, gradient) <= backward


def devices(platform, kind, **more):
    """A mesh of one device that is not here, as far as the choice looks at it."""
    device = SimpleNamespace(platform=platform, device_kind=kind, **more)
    return SimpleNamespace(devices=np.array([device]))


TPU = devices("tpu", "TPU v5 lite")
HOPPER = devices("gpu", "NVIDIA H100 80GB HBM3", compute_capability="9.0")
TURING = devices("gpu", "Tesla T4", compute_capability="7.5")
AMD = devices("gpu", "AMD Instinct MI300X", compute_capability="gfx942")


def test_plain_equals_torch():
    q, k, v = inputs(2, 50, 77, 3, 40)
    mask = jnp.asarray(np.random.default_rng(1).random((2, 1, 50, 77)) < 0.5)
    bias = jnp.asarray(np.random.default_rng(2).standard_normal((1, 3, 50, 77), np.float32))

    def expected(mask=None, scale=None):
        tensors = [torch.from_numpy(np.array(x)).transpose(1, 2) for x in (q, k, v)]
        mask = None if mask is None else torch.from_numpy(np.array(mask))
        sdpa = torch.nn.functional.scaled_dot_product_attention
        return sdpa(*tensors, attn_mask=mask, scale=scale).transpose(1, 2)

    assert relative_error(attention(q, k, v), expected()) <= 1e-5
    assert relative_error(attention(q, k, v, scale=0.3), expected(scale=0.3)) <= 1e-5
    assert relative_error(attention(q, k, v, mask=mask), expected(mask)) <= 1e-5
    assert relative_error(attention(q, k, v, bias=bias), expected(bias)) <= 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("s, t, size", [(64, 64, 40), (64, 77, 64), (101, 101, 80), (33, 77, 160)])
def test_chunked_equals_plain(monkeypatch, s, t, size, dtype):
    monkeypatch.setattr(module, "CHUNK_SCORES", 16 * t)  # chunks of at most 16 queries
    with using("chunked", CPU):
        assert_equals_plain(attention, inputs(2, s, t, 2, size, dtype))


def test_chunked_keeps_one_chunk_of_scores():
    """Forward and gradient: all scores would be 64 MB, a chunk is 8."""
    arrays = inputs(1, 4096, 4096, 1, 8)
    run = both(lambda q, k, v: chunked(q, k, v, scale=1.0)).lower(*arrays).compile()
    assert run.memory_analysis().temp_size_in_bytes < 40e6
    run = both(lambda q, k, v: plain(q, k, v, scale=1.0)).lower(*arrays).compile()
    assert run.memory_analysis().temp_size_in_bytes > 64e6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "s, t, size", [(128, 128, 40), (128, 77, 64), (130, 128, 80), (130, 140, 160)]
)
def test_flash_equals_plain(interpreter, s, t, size, dtype):
    """Whole blocks, then padded keys, padded queries, and both."""
    arrays = inputs(1, s, t, 1, size, dtype)
    assert_equals_plain(lambda *qkv: module.flash(*qkv, scale=size**-0.5), arrays)


def test_flash_equals_plain_over_several_blocks(interpreter, monkeypatch):
    monkeypatch.setattr(module, "MAX_BLOCK", 128)
    arrays = inputs(2, 260, 300, 2, 40)
    assert_equals_plain(lambda *qkv: module.flash(*qkv, scale=40**-0.5), arrays)


def test_blocks_of_flash_fit_the_length():
    blocks = {length: module._block(length, 40) for length in (64, 77, 256, 1024, 4096, 16384)}
    assert blocks == {64: 128, 77: 128, 256: 256, 1024: 1024, 4096: 1024, 16384: 1024}
    assert [module._block(length, 64) for length in (9216, 1280)] == [1024, 640]  # whole blocks
    assert [module._block(9216, size) for size in (128, 160, 512)] == [1024, 512, 256]
    for length in range(1, 5000, 37):
        block = module._block(length, 80)
        assert block % 128 == 0 and -length % block < max(128, 0.2 * length)


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
    monkeypatch.setattr(module, "CHUNK_SCORES", 100)
    function = {"chunked": chunked, "flash": module.flash}[kernel]
    arrays = inputs(batch, 20, 24, 2, 40)
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    spec = PartitionSpec(("data", "fsdp") if batch % parts == 0 else None)
    arrays = [jax.device_put(x, NamedSharding(mesh, spec)) for x in arrays]
    scaled = functools.partial(function, scale=40**-0.5)
    assert_equals_plain(lambda *qkv: module.sharded(scaled, mesh, *qkv), arrays)


def test_chunked_on_a_mesh_needs_no_other_device():
    mesh = create_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor"))
    arrays = [jax.device_put(x, sharding) for x in inputs(4, 64, 64, 2, 40)]
    with using("chunked", mesh):
        text = both(attention).lower(*arrays).compile().as_text()
    assert "all-reduce" not in text.replace("all-reduce(f32[]", "")
    assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute"))


def shaped(s, t, d, dtype="bfloat16"):
    return [jax.ShapeDtypeStruct((2, length, 8, d), dtype) for length in (s, t)]


@pytest.mark.parametrize("mesh, best", [(CPU, "chunked"), (TPU, "flash"), (HOPPER, "cudnn")])
def test_auto_chooses_by_platform_and_shapes(mesh, best):
    assert choose("auto", mesh, *shaped(4096, 4096, 40)) == best
    assert choose("auto", mesh, *shaped(1024, 1024, 80)) == best
    assert choose("auto", mesh, *shaped(4096, 77, 40)) == "plain"  # over a text
    assert choose("auto", mesh, *shaped(256, 256, 160)) == "plain"  # a small map
    assert choose(best, mesh, *shaped(256, 77, 40)) == best  # as told


def test_what_a_kernel_cannot_take_is_chunked_or_plain():
    assert choose("auto", HOPPER, *shaped(1024, 1024, 160)) == "chunked"
    assert choose("auto", HOPPER, *shaped(4096, 4096, 40, "float32")) == "chunked"
    assert choose("cudnn", HOPPER, *shaped(256, 256, 40, "float32")) == "plain"
    assert choose("auto", TPU, *shaped(4096, 4096, 40, "float16")) == "chunked"
    assert choose("auto", TPU, *shaped(4096, 4096, 512, "float32")) == "flash"  # the autoencoder's
    assert choose("auto", TURING, *shaped(4096, 4096, 40)) == "chunked"
    assert choose("auto", AMD, *shaped(4096, 4096, 40)) == "chunked"


def test_a_mask_or_a_bias_is_plain():
    q, k, v = inputs(2, 8, 8, 2, 4)
    mask = jnp.tril(jnp.ones((1, 1, 8, 8), bool))
    expected = (
        plain(q, k, v, mask=mask, scale=0.5),
        plain(q, k, v, bias=jnp.where(mask, 1.0, -1.0), scale=0.5),
    )
    with using("chunked", CPU):
        actual = attention(q, k, v, mask=mask), attention(q, k, v, bias=jnp.where(mask, 1.0, -1.0))
        assert "scan" in str(jax.make_jaxpr(attention)(q, k, v))
        assert "scan" not in str(jax.make_jaxpr(lambda *x: attention(*x, mask=mask))(q, k, v))
    for ours, plainly in zip(actual, expected, strict=True):
        assert relative_error(ours, plainly) <= 1e-6


@pytest.mark.parametrize("mesh", [CPU, TPU, HOPPER, TURING, AMD])
@pytest.mark.parametrize("kernel", list(module.KERNELS))
def test_a_kernel_that_the_platform_cannot_run(kernel, mesh):
    runs = {"flash": mesh is TPU, "cudnn": mesh is HOPPER}.get(kernel, True)
    if runs:
        with using(kernel, mesh):
            pass
        assert describe(kernel, mesh).startswith("attention: ")
        return
    kind = mesh.devices.flat[0].device_kind
    for call in (using, describe):
        with pytest.raises(ValueError, match=f'(?i)"{kernel}" cannot run on .*{kind}.*"plain": X'):
            call(kernel, mesh)


def test_an_unknown_kernel():
    with pytest.raises(ValueError, match='"fast" is unknown.*"auto": .*"plain": .*"chunked": '):
        using("fast", CPU)


def test_the_choice_is_described():
    short = "(plain below 1024 queries or keys)"
    cpu = f"attention: chunked over queries {short}, as the devices are CPUs"
    assert describe("auto", CPU) == cpu
    assert "Pallas flash" in describe("auto", TPU) and "TPU v5 lite" in describe("auto", TPU)
    assert "cuDNN flash" in describe("auto", HOPPER) and "H100" in describe("auto", HOPPER)
    assert "chunked" in describe("auto", TURING) and "T4" in describe("auto", TURING)
    assert describe("plain", TPU) == "attention: plain, as configured"


def test_a_function_jitted_once_is_traced_anew_under_another_kernel():
    arrays = inputs(2, 8, 8, 2, 4)
    function = jax.jit(lambda q, k, v: attention(q, k, v))

    def loops():
        return "while" in function.lower(*arrays).as_text()

    assert not loops()
    with using("chunked", CPU):
        assert loops()
        with using("plain", CPU):
            assert not loops()
        assert loops()
        with pytest.raises(RuntimeError, match="inside"), using("plain", CPU):
            raise RuntimeError("inside")
        assert loops()
        seen = []
        thread = threading.Thread(target=lambda: seen.append(loops()))
        thread.start()
        thread.join()
        assert seen == [False]
    assert not loops()


def test_cudnn_lowers_for_cuda(monkeypatch):
    """To cuDNN's call, inside a map over the devices; forward and gradient."""
    stablehlo = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(stablehlo, "check_cudnn_version", lambda: 91000)  # none is installed
    mesh = create_mesh({"data": 8})
    arrays = inputs(8, 1024, 1024, 2, 40, "bfloat16")

    def run(q, k, v):
        out = module.sharded(lambda *x: module.cudnn(*x, scale=0.1), mesh, q, k, v)
        return out.astype(jnp.float32).sum()

    gradient = jax.jit(jax.grad(run)).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
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
        out, backward = jax.vjp(attention, q, k, v)
        return out, backward(cotangent)

    with using("flash", mesh):
        compiled = jax.jit(gradient).lower(q, k, k, q).compile()
    text = compiled.as_text()
    assert "tpu_custom_call" in text
    words = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute")
    assert not any(word in text for word in words)
    if min(s, t) >= 4096:  # a number of arrays of the size of q with its heads padded, no scores
        size = 64 // 16 * h * s * (-d % 128 + d) * q.dtype.itemsize
        assert compiled.memory_analysis().temp_size_in_bytes < 16 * size
