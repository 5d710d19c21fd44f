"""Plan: what is read from compiled programs, against programs whose every byte is known."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from agfsync_jax import cli, plan
from agfsync_jax.parallel import sharding, topologies
from agfsync_jax.parallel.mesh import create_mesh
from agfsync_jax.plans import Work, sample, score
from agfsync_jax.plans import train as train_plan
from agfsync_jax.training import program as step_program
from agfsync_jax.utils import flops, modules
from configs import micro, sd15, sdxl
from tests.twins import tiny_stable_diffusion

ROOT = Path(__file__).parents[1]
KEYS = {
    *("topology", "verb", "chips", "batch_per_chip", "largest_batch_per_chip", "fits"),
    *("param_bytes", "optimizer_bytes", "bytes_per_chip", "hbm_bytes"),
    *("flops_per_step", "analytic_flops_per_step", "collective_bytes", "collective_bytes_by_axes"),
    *("step_seconds", "bound", "mfu", "hours"),
}


def program(function, *shapes, mesh=None, specs=None):
    """A function's compiled program, taken apart; arguments are float32 of these shapes."""
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    if mesh:
        split = jax.shard_map(
            function, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False
        )
        places = [NamedSharding(mesh, spec) for spec in specs]
        function = jax.jit(split, in_shardings=places, out_shardings=places[0])
    return topologies.Program(jax.jit(function).lower(*args).compile().as_text())


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
    found = topologies.Program(text, {"data": 2, "fsdp": 4, "tensor": 1}).cost.collectives
    assert found == ({f"all-gather over {axes}": 16} if axes else {})
    assert topologies.Program(text).cost.collectives == ({"all-gather": 16} if axes else {})


def test_a_sharded_weight_is_gathered_in_the_loop_and_a_whole_one_is_not():
    mesh = create_mesh()

    def loop(x, w):
        return jax.lax.scan(lambda x, t: (jnp.tanh(x @ w + t), None), x, jnp.arange(3.0))[0]

    def collectives(spec):
        places = [NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, spec)]
        jitted = jax.jit(loop, in_shardings=places, out_shardings=places[0])
        args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((512, 64), (64, 64))]
        found = topologies.Program(jitted.lower(*args).compile().as_text())
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
    meetings = topologies._meetings(size, kernel, ones.shape[1], stride, pad, dilation, 1)
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
    found = topologies.Program(TPU)
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
        topologies.Program("HloModule nothing")


@pytest.fixture
def config(tmp_path):
    """A tiny Stable Diffusion without weights."""
    tiny_stable_diffusion(tmp_path / "tiny")
    for path in (tmp_path / "tiny").rglob("*.safetensors"):
        path.unlink()
    config = micro.get_config()
    config.backbone.path = str(tmp_path / "tiny")
    config.sample.height = config.sample.width = 16
    config.sample.num_inference_steps = 3
    config.sample.batch_size = 16
    return config


def last_row(capsys):
    (row,) = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["rows"]
    return row


def test_the_devices_that_are_here(config, capsys):
    plan.main(config, None, json=True)
    row = last_row(capsys)
    assert set(row) == KEYS
    assert (row["topology"], row["verb"]) == ("8 x cpu here", "sample")
    assert row["batch_per_chip"] == 2
    assert row["collective_bytes"] == row["collective_bytes_by_axes"] == {}
    assert (row["chips"], row["optimizer_bytes"], row["largest_batch_per_chip"]) == (8, 0, None)
    # Products with padding are not done; nothing else is missing, and nothing is done twice.
    assert 0.8 < row["flops_per_step"] / row["analytic_flops_per_step"] <= 1
    # A host's processor has no published numbers.
    assert [row[key] for key in ("fits", "hbm_bytes", "step_seconds", "mfu")] == [None] * 4


def test_split_parameters_take_less_and_examples_stay(config, monkeypatch, capsys):
    """And a chip that is too small is told, with what takes its memory."""
    mesh = create_mesh()
    whole = sample.abstract_backbone(config, mesh, config.backbone.path, "")
    config.mesh = {"data": 2, "fsdp": 4, "tensor": 1}
    config.sharding = ((r"(ff|proj|attn\d)\..*kernel", (None, "fsdp")),)
    split = sample.abstract_backbone(config, create_mesh(config.mesh), config.backbone.path, "")
    assert plan.param_bytes(split.params) < plan.param_bytes(whole.params)
    all_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(whole.params))
    assert plan.param_bytes(whole.params) == all_bytes

    monkeypatch.setattr(plan, "_memory", lambda device, chip: 2**19)
    plan.main(config, None, json=True)
    out = capsys.readouterr().out
    row = json.loads(out.strip().splitlines()[-1])["rows"][0]
    # Activations stay where their examples are; weights are gathered, by the CPU before the loop.
    assert row["collective_bytes"].keys() <= {"all-gather"}
    assert row["fits"] is False and row["bytes_per_chip"] > 2**19
    assert "| NO |" in out
    assert "does not fit: needs " in out and "unet.up_blocks " in out
    assert "would help: a smaller --config.sample.batch_size" in out
    assert "--config.sample.param_dtype=bfloat16" in out


def test_what_the_compiler_refuses_is_told(config, monkeypatch):
    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
                "temporaries (17.00G) exceeds available HBM (15.75G)."
            )

    params = ({"unet": {"big": jax.ShapeDtypeStruct((2**28,), jnp.float32)}},)
    alone = NamedSharding(create_mesh(), PartitionSpec())
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=alone), params)
    work = Work(Lowered(), create_mesh(), params, 8, 2, 8, 8, 64, ["less"])
    monkeypatch.setattr(sample, "work", lambda config, devices, name: work)
    row = plan.plan(config, "x", jax.devices(), "sample")
    assert row["fits"] is False and row["bytes_per_chip"] == 17 * 2**30
    text = "\n".join(row["notes"])
    assert "unet.big 1.00 GiB" in text and "16.00 GiB" in text and "would help: less" in text
    assert "| NO |" in plan.table([row])


@pytest.mark.parametrize("known, largest", [(1, 21), (8, 21), (40, 21)])
def test_the_largest_batch_is_found_in_few_compilations(known, largest):
    tried = []

    def peak(size):  # bytes; like a compiler's, which has an odd share for itself
        return 300 + 32 * size + size % 3

    def compiled(size):
        tried.append(size)
        return peak(size) if size < 100 else None  # where it says nothing

    found = plan.largest_batch(compiled, {known: peak(known)}, 1000)
    assert largest - largest // 8 <= found <= largest and peak(found) <= 1000
    assert len(tried) == len(set(tried)) <= 4
    assert plan.largest_batch(compiled, {1: peak(1)}, 301) == 0
    assert plan.largest_batch(compiled, {4: peak(4)}, 1000, unit=4) == 20


def test_the_largest_batch_is_found_where_the_compiler_saves():
    """As it was seen to do near the end; a size later it has no way."""
    tried = []

    def peak(size):
        tried.append(size)
        return min(700 + 50 * size, 1500 + size) if size < 28 else None

    assert 25 <= plan.largest_batch(peak, {4: 900}, 1575) <= 27
    assert len(tried) == len(set(tried)) <= 9


def test_time_is_that_of_the_slowest():
    row, mesh = {"analytic_flops_per_step": 4e12}, create_mesh(devices=jax.devices()[:4])
    chip = topologies.Chip(memory=0, memory_bandwidth=1e11, network_bandwidth=1e10)
    work = Work(None, mesh, None, 8, 10, 0, 40e12, 20, [], rate=("images", 8))
    cost = topologies.Cost(int(3e12), int(1e11), topologies.Counter({"all-gather": 10**10}))
    found = plan.estimate(row, cost, work, 1e12, chip)
    assert found["bound"] == "compute" and found["step_seconds"] == 4.0
    assert found["mfu"] == 1
    # Three batches of ten steps, and ten seconds more to decode each.
    np.testing.assert_allclose(found["hours"], 3 * (10 * 4 + 10) / 3600)
    assert found["rate"] == ("images", 8 / 50)
    found = plan.estimate(row, cost, work._replace(copies=2), 1e12, chip)
    np.testing.assert_allclose(found["hours"], 2 * (10 * 4 + 10) / 3600)
    assert found["rate"] == ("images", 2 * 8 / 50)
    slow = topologies.Cost(int(3e12), int(1e11), topologies.Counter({"all-gather": 10**11}))
    found = plan.estimate(row, slow, work, 1e12, chip)
    assert (found["bound"], found["step_seconds"], found["mfu"]) == ("network", 10.0, 0.4)


@pytest.mark.parametrize("experiment, millions", [(sd15, 859.5), (sdxl, 2567.5)])
def test_sizes_of_a_model_that_is_not_here(experiment, millions):
    """The UNets' published numbers of parameters; nothing is downloaded."""
    config = experiment.get_config()
    mesh = create_mesh()
    backbone = sample.abstract_backbone(config, mesh, config.backbone.path, config.backbone.kind)
    leaves = jax.tree.leaves(backbone.params["unet"])
    assert round(sum(x.size for x in leaves) / 1e6, 1) == millions
    assert {x.dtype for x in leaves} == {jnp.dtype("bfloat16")}
    plain = backbone.plain()  # after the folder that says the sizes is gone
    assert plain.params is backbone.params and plain.tokenize([""]).shape[1] in (77, 2 * 77)
    with pytest.raises(FileNotFoundError, match="config.backbone.kind: one of stable-diffusion-v1"):
        sample.abstract_backbone(config, mesh, config.backbone.path, "")
    config.backbone.name = "stable_diffusion_xl" if experiment is sd15 else "stable_diffusion"
    with pytest.raises(ValueError, match="config.backbone.name=stable_diffusion.* reads"):
        sample.abstract_backbone(config, mesh, config.backbone.path, config.backbone.kind)


@pytest.mark.parametrize("name", ["v5e", "v5e:4", "4x4", "v5e:4x4x"])
def test_a_name_that_is_no_topology(name):
    with pytest.raises(ValueError, match="expected KIND:SHAPE, such as v4:2x2x4, v5e:4x4"):
        topologies.devices(name)


def test_without_libtpu_one_error_says_what_to_install():
    code = (
        "import sys; sys.modules['libtpu'] = None; from agfsync_jax import cli\n"
        "sys.exit(cli.main(['plan', '--config=configs/micro.py', '--topology=v5e:2x2']))"
    )
    env = {key: value for key, value in os.environ.items() if key != "TPU_LIBRARY_PATH"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("agfsync: error: Compiling for a TPU needs libtpu")
    assert "pip install jax[tpu]" in line


def test_the_command_line_knows_every_verb():
    assert cli.FLAGS["plan"]["verb"]["choices"] == (*modules.names("plans"), "all")


def test_scoring(tmp_path, capsys):
    """The shipped BLIP-2 on the devices of one process."""
    config = micro.get_config()
    config.score.batch_size = 16
    plan.main(config, None, json=True, verb="score")
    out = capsys.readouterr().out
    row = json.loads(out.strip().splitlines()[-1])["rows"][0]
    assert (row["verb"], row["batch_per_chip"]) == ("score", 2)
    assert 0.9 < row["flops_per_step"] / row["analytic_flops_per_step"] <= 1
    assert "a step is a batch of 32 questions" in out
    config.scorers.vqa.path = "some/blip3"
    with pytest.raises(FileNotFoundError, match="knows the sizes of blip2-flan-t5-xl, blip2-flan"):
        plan.main(config, None, verb="score")
    del config.scorers.vqa
    with pytest.raises(ValueError, match="no scorer named vqa"):
        plan.main(config, None, verb="score")


def test_training(config, capsys, monkeypatch):
    monkeypatch.setattr(flops, "peak", lambda kind: {"cpu": 1e12}[kind])
    chip = topologies.Chip(memory=2**30, memory_bandwidth=1e11, network_bandwidth=1e10)
    monkeypatch.setattr(topologies, "chip", lambda device: chip)
    monkeypatch.setattr(sharding, "_SMALL", 0)  # so that this model's weights are split, too
    config.backbone.dtype = "bfloat16"
    config.train.batch_size, config.train.accumulate = 16, 2
    config.mesh = {"data": 1, "fsdp": 8, "tensor": 1}
    config.sharding = ((r"kernel$", "fsdp"),)
    plan.main(config, None, json=True, verb="train")
    out = capsys.readouterr().out
    row = json.loads(out.strip().splitlines()[-1])["rows"][0]
    assert (row["verb"], row["batch_per_chip"]) == ("train", 2)
    # Gradients have products that the formula counts as twice a forward pass.
    assert 0.6 < row["flops_per_step"] / row["analytic_flops_per_step"] < 1.4
    by_axes = row["collective_bytes_by_axes"]
    assert {name.partition(" over ")[2] for name in by_axes} == {"fsdp"}
    assert sum(row["collective_bytes"].values()) == sum(by_axes.values()) > 0
    assert row["step_seconds"] > 0 and row["hours"] > 0 and row["bound"] and row["fits"]
    # Weights are gathered and gradients summed; activations stay where their examples are.
    assert row["collective_bytes"].keys() <= {"all-gather", "all-reduce", "reduce-scatter"}
    row["hbm_bytes"] = 2**19
    work = train_plan.work(config, jax.devices(), "here")
    (text, _) = plan.too_large(row, work)
    assert "params.up_blocks " in text and "opt_state.mu " in text and "opt_state.nu " in text
    # Two moments, split as the parameters are.
    assert 2 <= row["optimizer_bytes"] / row["param_bytes"] < 2.01
    assert "8 passes of an image each by formula" in out and "| optimizer |" in out
    config.train.lora_rank = 2
    assert step_program.passes(step_program.settings_of(config, None, 0)) == 6
    config.loss.name = "sft"
    assert step_program.passes(step_program.settings_of(config, None, 0)) == 4


@pytest.mark.parametrize("name, millions", [("xl", 3942), ("xxl", 12230)])
def test_sizes_of_a_blip2_that_is_not_here(name, millions):
    """The published numbers of parameters; without the query's text embeddings."""
    config = sd15.get_config()
    config.scorers.vqa.path = f"Salesforce/blip2-flan-t5-{name}"
    config.score.mesh.fsdp = 4
    devices = jax.devices()[:4]
    _, params, _ = score.abstract_blip2(
        config.scorers.vqa.to_dict(), create_mesh(config.score.mesh, devices=devices)
    )
    leaves = jax.tree.leaves(params)
    assert round(sum(x.size for x in leaves) / 1e6) == millions
    assert {x.dtype for x in leaves} == {jnp.dtype("bfloat16")}
    all_bytes = sum(x.size * 2 for x in leaves)
    assert plan.param_bytes(params) < 0.3 * all_bytes  # a quarter, and what is whole everywhere


class TestWithLibtpu:
    @pytest.fixture(autouse=True)
    def libtpu(self):
        pytest.importorskip("libtpu")

    def test_a_tiny_model_for_a_tpu(self, config, capsys):
        config.backbone.dtype = "bfloat16"
        config.sample.batch_size = 8
        plan.main(config, None, json=True, topology="v5e:2x2")
        row = last_row(capsys)
        assert set(row) == KEYS
        assert (row["topology"], row["batch_per_chip"], row["fits"]) == ("v5e:2x2", 2, True)
        assert row["hbm_bytes"] == 15.75 * 2**30
        assert row["collective_bytes"] == {}
        assert 0.8 < row["flops_per_step"] / row["analytic_flops_per_step"] <= 1
        assert row["step_seconds"] > 0 and 0 < row["mfu"] <= 1
        assert row["bound"] in ("compute", "memory")

    @pytest.mark.parametrize("name, chips", [("v5e:4x4", 4), ("v5p:2x2x4", 4), ("v6e:2x2", 4)])
    def test_a_process_is_a_topology_of_its_own(self, name, chips):
        found = topologies.one_process(name, topologies.devices(name))
        assert len(found) == chips
        mesh = create_mesh(devices=found)
        split = NamedSharding(mesh, PartitionSpec("data"))
        x = jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=split)
        gathered = jax.jit(jnp.sin, out_shardings=NamedSharding(mesh, PartitionSpec()))
        assert "all-gather" in gathered.lower(x).compile().as_text()

    def test_scoring_for_a_tpu(self, capsys):
        config = micro.get_config()
        config.score.mesh.fsdp = 4
        config.scorers.vqa.sharding = ((r"fc1\.kernel", (None, "fsdp")),)
        plan.main(config, None, json=True, topology="v5e:4x4", verb="score")
        out = capsys.readouterr().out
        row = json.loads(out.strip().splitlines()[-1])["rows"][0]
        assert row["fits"] is True and row["batch_per_chip"] == 16 and row["step_seconds"] > 0
        assert "| v5e:4x4 | 16 | 16 |" in out and " questions |" in out

    @pytest.mark.parametrize("name", ["v9:2x2", "v5e:3x3"])
    def test_a_topology_that_does_not_exist(self, name):
        with pytest.raises(ValueError, match=f"--topology={name}: libtpu does not know it"):
            topologies.devices(name)

    @pytest.mark.parametrize("name, chips", [("v4:2x2x1", 4), ("v6e:1x1", 1), ("v5p:2x2x1", 4)])
    def test_a_chip_is_a_device(self, name, chips):
        devices = topologies.devices(name)
        assert len(devices) == chips
        chip = topologies.chip(devices[0])
        # What the compiler says of one byte too many.
        place = NamedSharding(create_mesh(devices=devices), PartitionSpec())
        size = (chip.memory + 2**28) // 2**15
        much = jax.ShapeDtypeStruct((size, 2**13), jnp.float32, sharding=place)
        with pytest.raises(
            jax.errors.JaxRuntimeError, match=rf"exceeds.*\({chip.memory / 2**30:.2f}G\)"
        ):
            jax.jit(jnp.sum).lower(much).compile()
