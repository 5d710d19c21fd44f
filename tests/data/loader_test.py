import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from agfsync_jax.data.loader import PairLoader, example_ids
from agfsync_jax.parallel.mesh import create_mesh


def pairs(n):
    """Latents that say which pair they are."""
    rows = np.arange(n)
    latents = np.broadcast_to(rows.reshape(n, 1, 1, 1), (n, 2, 2, 4)).astype(np.float16)
    return {
        "pair_id": [f"p{i}" for i in rows],
        "prompt": [""] * n,
        "chosen_latents": latents,
        "rejected_latents": -latents,
        "token_ids": np.stack([rows, rows + 1], axis=1).astype(np.int32),
    }


@pytest.fixture
def mesh():
    return create_mesh({"data": -1, "fsdp": 2})


def test_batch_fields_and_sharding(mesh):
    loader = PairLoader(pairs(20), 8, seed=0, mesh=mesh)
    batch, rows = loader.batch(1), loader.rows(1)
    assert {name: (a.shape, a.dtype) for name, a in batch.items()} == {
        "chosen_latents": ((8, 2, 2, 4), np.float32),
        "rejected_latents": ((8, 2, 2, 4), np.float32),
        "token_ids": ((8, 2), np.int32),
        "example": ((8,), np.int32),
    }
    for array in batch.values():
        assert array.sharding.spec == PartitionSpec(("data", "fsdp"))
        assert {s.data.shape[0] for s in array.addressable_shards} == {1}
    np.testing.assert_array_equal(batch["chosen_latents"][:, 0, 0, 0], rows)
    np.testing.assert_array_equal(batch["rejected_latents"][:, 1, 1, 3], -rows)
    np.testing.assert_array_equal(batch["token_ids"], np.stack([rows, rows + 1], axis=1))
    np.testing.assert_array_equal(batch["example"], example_ids([f"p{i}" for i in rows]))


def test_order_is_a_function_of_seed_and_step(mesh):
    first, second = (PairLoader(pairs(20), 8, seed=3, mesh=mesh) for _ in range(2))
    steps = {step: first.rows(step) for step in range(10)}
    for step in (7, 2, 9, 0):  # a restart may begin anywhere
        np.testing.assert_array_equal(second.rows(step), steps[step])
    other = PairLoader(pairs(20), 8, seed=4, mesh=mesh)
    assert any(not np.array_equal(other.rows(step), steps[step]) for step in steps)


@pytest.mark.parametrize("n, batch_size", [(20, 8), (5, 8), (3, 16), (16, 8)])
def test_every_epoch_is_a_fresh_permutation_and_no_pair_is_skipped(mesh, n, batch_size):
    loader = PairLoader(pairs(n), batch_size, seed=0, mesh=mesh)
    num_steps = 4 * n // np.gcd(n, batch_size)
    stream = np.concatenate([loader.rows(step) for step in range(num_steps)])
    epochs = stream.reshape(-1, n)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(n), (len(epochs), 1)))
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_any_number_of_devices_gives_the_same_batch(mesh):
    one = create_mesh({"data": 1}, devices=jax.devices()[:1])
    tensor = create_mesh({"data": 2, "tensor": 4})
    loaders = [PairLoader(pairs(20), 8, seed=0, mesh=m) for m in (mesh, one, tensor)]
    for a, b, c in zip(*(loader.batch(5).values() for loader in loaders), strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)


def test_example_follows_its_pair():
    """Noise keys must not change when other pairs come or go."""
    ids = example_ids(["p0", "p1", "p2"])
    np.testing.assert_array_equal(example_ids(["p1", "x", "p0"])[[2, 0]], ids[:2])
    assert ids.dtype == np.int32 and (ids >= 0).all() and len(set(ids.tolist())) == 3


def test_errors(mesh):
    with pytest.raises(ValueError, match="batch of 12 cannot be split over 8 devices"):
        PairLoader(pairs(20), 12, seed=0, mesh=mesh)
