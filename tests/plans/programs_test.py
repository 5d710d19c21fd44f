"""What is read from compiled programs, against programs whose every byte is known."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from agfsync_jax.parallel.mesh import create_mesh
from agfsync_jax.plans._programs import Program, _meetings
from agfsync_jax.utils import flops


def program(function, *shapes, mesh=None, specs=None):
    """A function's compiled program, taken apart; arguments are float32 of these shapes."""
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    if mesh:
        split = jax.shard_map(
            function, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False
        )
        places = [NamedSharding(mesh, spec) for spec in specs]
        function = jax.jit(split, in_shardings=places, out_shardings=places[0])
    return Program(jax.jit(function).lower(*args).compile().as_text())


def test_collectives_inside_and_outside_of_a_loop():
    mesh, split = create_mesh(), PartitionSpec("data")

    def function(x):  # [2, 16] a device
        def step(x, _):
            whole = jax.lax.all_gather(x, "data", tiled=True)  # 16 * 16 * 4 = 1024 bytes
            x = x + jnp.sin(whole)[:2]
            turned = jax.lax.ppermute(x, "data", [(i, (i + 1) % 8) for i in range(8)])  # 128
            return jnp.cos(turned) * x, None

        x = jax.lax.scan(step, x, None, length=5)[0]
        return x + jax.lax.psum(jnp.sin(x[:1]), "data")  # 64, once

    found = program(function, (16, 16), mesh=mesh, specs=(split,))
    assert [loop.collectives for loop in found.loops] == [
        {"all-gather": 1024, "collective-permute": 128}
    ]
    assert found.cost.collectives == {
        "all-gather": 5 * 1024,
        "collective-permute": 5 * 128,
        "all-reduce": 64,
    }


@pytest.mark.parametrize(
    "groups, axes",
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", "fsdp"),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", "data"),
        ("replica_groups=[2,4]<=[8]", "fsdp"),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", "data"),
        ("replica_groups={}", "data, fsdp"),
        ("source_target_pairs={{0,1},{1,0},{4,5},{5,4}}", "fsdp"),
        ("replica_groups=[8,1]<=[8]", None),
        ("replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}", None),
    ],
)
def test_the_axes_that_a_collective_crosses(groups, axes):
    text = f"""
ENTRY %main (x: f32[4]) -> f32[4] {{
  %x = f32[4]{{0}} parameter(0)
  ROOT %r = f32[4]{{0}} all-gather(%x), channel_id=1, {groups}, use_global_device_ids=true
}}
"""
    found = Program(text, {"data": 2, "fsdp": 4, "tensor": 1}).cost.collectives
    assert found == ({f"all-gather over {axes}": 16} if axes else {})
    assert Program(text).cost.collectives == ({"all-gather": 16} if axes else {})


def test_a_sharded_weight_is_gathered_in_the_loop_and_a_whole_one_is_not():
    mesh = create_mesh()

    def loop(x, w):
        return jax.lax.scan(lambda x, t: (jnp.tanh(x @ w + t), None), x, jnp.arange(3.0))[0]

    def collectives(spec):
        places = [NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, spec)]
        jitted = jax.jit(loop, in_shardings=places, out_shardings=places[0])
        args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((512, 64), (64, 64))]
        found = Program(jitted.lower(*args).compile().as_text())
        return found.loops[0].collectives + found.cost.collectives

    assert not collectives(PartitionSpec())
    assert collectives(PartitionSpec("data")).total() >= 64 * 64 * 4


@pytest.mark.parametrize(
    "function, shapes",
    [
        (lambda a, b: a @ b, [(24, 32), (32, 40)]),
        (functools.partial(jnp.einsum, "bshd,bthd->bhst"), [(2, 8, 3, 16), (2, 10, 3, 16)]),
        (lambda x, w: jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=7)[0],
         [(24, 32), (32, 32)]),
        (lambda x, k: jax.lax.conv_general_dilated(
            x, k, (2, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")),
         [(2, 9, 8, 4), (3, 3, 4, 6)]),
        (lambda x, k: jax.lax.conv_general_dilated(
            x, k, (1, 1), "VALID", rhs_dilation=(2, 1), feature_group_count=2,
            dimension_numbers=("NHWC", "HWIO", "NHWC")),
         [(2, 9, 8, 4), (3, 3, 2, 6)]),
    ],
    ids=["matmul", "einsum", "scan", "strided", "grouped"],
)  # fmt: skip
def test_flops_are_those_of_the_formulas(function, shapes):
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    found = program(function, *shapes).cost
    assert found.flops == flops.count(function, *args) > 0
    assert not found.uncounted


def test_a_loop_reads_and_writes_slices():
    """Of what a scan goes over and stacks, a pass takes its own part."""

    def function(x, weights):
        def layer(x, weight):
            x = jnp.sin(x * weight)
            return x, jnp.cos(x)

        return jax.lax.scan(layer, x, weights)

    size, layers = 4 * 512 * 512, 16
    found = program(function, (512, 512), (layers, 512, 512))
    (loop,) = found.loops
    # x and a weight are read, x and a row of the stack written; copies are the compiler's own.
    assert 4 * size <= loop.bytes_accessed <= 12 * size


@pytest.mark.parametrize("pad, stride, dilation", [(1, 1, 1), (0, 2, 3), (3, 2, 1), (7, 7, 8)])
def test_products_with_padding_are_left_out(pad, stride, dilation):
    """A convolution of ones by ones counts its products."""
    size, kernel = 8, 3
    ones = jax.lax.conv_general_dilated(
        jnp.ones((1, size, 1)),
        jnp.ones((kernel, 1, 1)),
        (stride,),
        [(pad, pad)],
        lhs_dilation=(dilation,),
        dimension_numbers=("NHC", "HIO", "NHC"),
    )
    meetings = _meetings(size, kernel, ones.shape[1], stride, pad, dilation, 1)
    assert meetings == int(ones.sum()) > 0


TPU = """\
HloModule jit_f, is_scheduled=true

%fused (p.1: bf16[4,8,16], p.2: bf16[4,16,32]) -> bf16[4,8,32] {
  %p.1 = bf16[4,8,16]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p.2 = bf16[4,16,32]{2,1,0:T(8,128)(2,1)} parameter(1)
  ROOT %c = bf16[4,8,32]{2,1,0:T(8,128)(2,1)} convolution(%p.1, %p.2), \
window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0io->0bf
}

%body (t: (s32[], bf16[4,8,16], bf16[4,16,32])) -> (s32[], bf16[4,8,16], bf16[4,16,32]) {
  %t = (s32[]{:T(128)}, bf16[4,8,16]{2,1,0:T(8,128)(2,1)}, /*index=2*/bf16[4,16,32]{2,1,0}) \
parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%t), index=0
  %x = bf16[4,8,16]{2,1,0:T(8,128)(2,1)} get-tuple-element(%t), index=1
  %w = bf16[4,16,32]{2,1,0:T(8,128)(2,1)} get-tuple-element(%t), index=2
  %s = (bf16[4,16,32]{2,1,0:T(8,128)(2,1)S(1)}, bf16[4,16,32]{2,1,0:T(8,128)(2,1)}, \
u32[]{:S(2)}) copy-start(%w)
  %d = bf16[4,16,32]{2,1,0:T(8,128)(2,1)S(1)} copy-done(%s)
  %y = bf16[4,8,32]{2,1,0:T(8,128)(2,1)} fusion(%x, %d), kind=kOutput, calls=%fused
  %k = f32[8,128]{1,0:T(8,128)S(1)} custom-call(%y), custom_call_target="tpu_custom_call", \
backend_config={"custom_call_config":{"body":"x","cost_estimate":{"flops":"1000",\
"transcendentals":"7","bytes_accessed":"5"}}}
  %l = f32[8,128]{1,0:T(8,128)S(1)} custom-call(%k), custom_call_target="tpu_custom_call", \
backend_config={"custom_call_config":{"body":"x"}}
  %gs = (bf16[8,16]{1,0}, bf16[64,16]{1,0}) all-gather-start(%y), replica_groups=[1,8]<=[8], \
dimensions={0}, backend_config={"a":{"b":[]}}
  %g = bf16[64,16]{1,0} all-gather-done(%gs)
  %rs = (f32[4]{0}, bf16[2]{0}) all-reduce-start(%l, %g), to_apply=%sum
  %r = (f32[4]{0}, bf16[2]{0}) all-reduce-done(%rs)
  ROOT %o = (s32[]{:T(128)}, bf16[4,8,16]{2,1,0:T(8,128)(2,1)}, bf16[4,16,32]{2,1,0}) \
tuple(%i, %x, %w)
}

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%condition (t.1: (s32[], bf16[4,8,16], bf16[4,16,32])) -> pred[] {
  %t.1 = (s32[]{:T(128)}, bf16[4,8,16]{2,1,0}, bf16[4,16,32]{2,1,0}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%t.1), index=0
  %n = s32[]{:T(128)} constant(20)
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %n), direction=LT
}

ENTRY %main (t.2: (s32[], bf16[4,8,16], bf16[4,16,32])) -> (s32[], bf16[4,8,16], bf16[4,16,32]) {
  %t.2 = (s32[]{:T(128)}, bf16[4,8,16]{2,1,0}, bf16[4,16,32]{2,1,0}) parameter(0)
  ROOT %loop = (s32[]{:T(128)}, bf16[4,8,16]{2,1,0}, bf16[4,16,32]{2,1,0}) while(%t.2), \
condition=%condition, body=%body
}
"""


def test_what_a_tpu_program_says():
    """Written as libtpu writes: products as convolutions, copies to the chip, kernels, -start."""
    found = Program(TPU)
    (step,) = found.loops
    assert step.flops == 2 * 4 * 8 * 16 * 32 + 1000  # a batch of four products, and the kernel
    assert step.collectives == {"all-gather": 64 * 16 * 2, "all-reduce": 4 * 4 + 2 * 2}
    assert step.uncounted == {"tpu_custom_call": 1}  # the kernel without an estimate
    assert found.cost.flops == 20 * step.flops
    assert found.cost.collectives["all-gather"] == 20 * 2048
    # w once to the chip; x in and y out of the fusion; y into the kernel; what the collectives
    # read and write; the counter and its bound, compared.
    w, x, y = 4 * 16 * 32 * 2, 4 * 8 * 16 * 2, 4 * 8 * 32 * 2
    gather = y + 64 * 16 * 2
    reduce = 64 * 16 * 2 + 4 * 4 + 2 * 2
    assert step.bytes_accessed == w + (x + y) + y + gather + reduce + (4 + 4 + 1)


def test_no_program():
    with pytest.raises(ValueError, match="no ENTRY"):
        Program("HloModule nothing")
