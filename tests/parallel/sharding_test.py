import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from agfsync_jax.parallel.mesh import create_mesh
from agfsync_jax.parallel.sharding import (
    batch_sharding,
    batch_shards,
    filled,
    infer_shardings,
    path_string,
    replicated,
    round_up,
)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.conv1 = nnx.Conv(4, 8, (3, 3), rngs=rngs)
        self.norm = nnx.GroupNorm(8, num_groups=2, rngs=rngs)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.down_blocks = nnx.List([Block(rngs), Block(rngs)])
        self.proj_out = nnx.Linear(8, 16, rngs=rngs)


@pytest.fixture
def mesh():
    return create_mesh({"data": 2, "fsdp": 2, "tensor": 2})


@pytest.fixture
def params():
    return nnx.split(nnx.eval_shape(lambda: Net(nnx.Rngs(0))))[1]


def specs(tree):
    return {path_string(p): s.spec for p, s in jax.tree_util.tree_flatten_with_path(tree)[0]}


RULES = [
    (r"down_blocks\.1\..*bias$", (None,)),
    (r"conv1\.kernel$", [None, None, "fsdp", "tensor"]),
    (r"proj_out\.kernel$", (("data", "fsdp"), "tensor")),
    (r"bias$", ("fsdp",)),
]


def test_first_rule_wins_and_the_rest_is_replicated(mesh, params):
    assert specs(infer_shardings(params, mesh, RULES)) == {
        "down_blocks.0.conv1.kernel": P(None, None, "fsdp", "tensor"),
        "down_blocks.0.conv1.bias": P("fsdp"),
        "down_blocks.0.norm.scale": P(),
        "down_blocks.0.norm.bias": P("fsdp"),
        "down_blocks.1.conv1.kernel": P(None, None, "fsdp", "tensor"),
        "down_blocks.1.conv1.bias": P(None),
        "down_blocks.1.norm.scale": P(),
        "down_blocks.1.norm.bias": P(None),
        "proj_out.kernel": P(("data", "fsdp"), "tensor"),
        "proj_out.bias": P("fsdp"),
    }
    assert set(specs(infer_shardings(params, mesh)).values()) == {P()}


def test_optimizer_state_follows_its_parameters(mesh, params):
    state = jax.eval_shape(optax.adamw(1e-3).init, params)
    found = specs(infer_shardings(state, mesh, RULES))
    for path, spec in specs(infer_shardings(params, mesh, RULES)).items():
        assert found[f"0.mu.{path}"] == found[f"0.nu.{path}"] == spec
    assert found["0.count"] == P()


def test_shardings_serve_jit(mesh, params):
    shardings = infer_shardings(params, mesh, RULES)
    init = jax.jit(lambda: nnx.split(Net(nnx.Rngs(0)))[1], out_shardings=shardings)
    made = init()
    assert made["proj_out"]["kernel"].sharding.spec == P(("data", "fsdp"), "tensor")
    shapes = {s.data.shape for s in made["proj_out"]["kernel"].addressable_shards}
    assert shapes == {(2, 8)}
    double = jax.jit(
        lambda p: jax.tree.map(lambda x: 2 * x, p), in_shardings=(shardings,), donate_argnums=0
    )
    assert double(made)["proj_out"]["kernel"].shape == (8, 16)


def test_plain_dicts_have_paths_too(mesh):
    tree = {"value": jnp.zeros((4, 2)), "a": [{"kernel": jnp.zeros((2, 6))}]}
    found = infer_shardings(
        tree, mesh, [(r"^a\.0\.kernel$", (None, "tensor")), ("value", ("data",))]
    )
    assert specs(found) == {"value": P("data"), "a.0.kernel": P(None, "tensor")}


@pytest.mark.parametrize(
    "rule, message",
    [
        (("proj_out.bias", (("data", "fsdp", "tensor"),)), None),
        (("conv1.kernel", ("tensor",)), "dimension 0 of size 3 is not divisible by .*tensor.*, 2"),
        (("bias", ("data", "fsdp")), "2 entries, the array 1 dimensions"),
        (("kernel", ("model",)), "unknown mesh axes .*model.*data, fsdp, tensor"),
        (("kernel", (None, None, "fsdp", ("data", "fsdp"))), "named twice"),
    ],
)
def test_rules_that_do_not_fit_are_all_listed(mesh, params, rule, message):
    if message is None:
        infer_shardings(params, mesh, [rule])
        return
    with pytest.raises(ValueError, match=message) as error:
        infer_shardings(params, mesh, [rule])
    for block in (0, 1):
        assert f"down_blocks.{block}.conv1" in str(error.value)


def test_batch_sharding(mesh):
    assert batch_shards(mesh) == 4
    batch = jax.device_put(np.zeros((8, 3)), batch_sharding(mesh))
    assert {s.data.shape for s in batch.addressable_shards} == {(2, 3)}
    whole = jax.device_put(np.zeros((8, 3)), replicated(mesh))
    assert {s.data.shape for s in whole.addressable_shards} == {(8, 3)}


def test_batches_are_filled_up():
    assert [round_up(number, 4) for number in (1, 4, 5)] == [4, 4, 8]
    rows = np.arange(6, dtype=np.int32).reshape(3, 2)
    np.testing.assert_array_equal(filled(rows, 5), rows[[0, 1, 2, 0, 0]])
    np.testing.assert_array_equal(filled(rows, 3), rows)
    nothing = filled(rows[:0], 2)
    assert nothing.dtype == np.int32 and nothing.tolist() == [[0, 0], [0, 0]]
