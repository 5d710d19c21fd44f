import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from agfsync_jax.data.loader import PairLoader, example_ids
from agfsync_jax.parallel.mesh import create_mesh

SIDES = ("chosen_latents", "rejected_latents")


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


def test_a_share_of_examples_has_the_empty_prompt(mesh):
    empty = np.array([77, 78], np.int32)
    loader = PairLoader(pairs(20), 8, seed=5, mesh=mesh, empty=empty, empty_prompts=0.25)
    again = PairLoader(pairs(20), 8, seed=5, mesh=mesh, empty=empty, empty_prompts=0.25)
    dropped = []
    for step in range(100):
        rows, batch = loader.rows(step), loader.batch(step)
        without = np.array(batch["token_ids"])[:, 0] == 77
        wanted = np.where(without[:, None], empty, np.stack([rows, rows + 1], axis=1))
        np.testing.assert_array_equal(batch["token_ids"], wanted)
        np.testing.assert_array_equal(again.prompt_rows(step), loader.prompt_rows(step))
        np.testing.assert_array_equal(batch["chosen_latents"][:, 0, 0, 0], rows)
        dropped.append(without)
    dropped = np.array(dropped)
    assert abs(dropped.mean() - 0.25) < 0.05
    assert dropped.any(axis=0).all() and not dropped.all(axis=0).any()  # whatever the place


def test_half_of_the_images_are_mirrored_each_by_itself(mesh):
    rows = pairs(20)
    for name in ("chosen_latents", "rejected_latents"):
        rows[f"{name}_flipped"] = rows[name] + np.float16(0.5)
    plain = PairLoader(rows, 8, seed=5, mesh=mesh)
    flips = PairLoader(rows, 8, seed=5, mesh=mesh, flip=True)
    sides = []
    for step in range(60):
        before, batch = plain.batch(step), flips.batch(step)
        moved = [np.array(batch[name] - before[name])[:, 0, 0, 0] for name in SIDES]
        assert set(np.unique(moved)) <= {0.0, 0.5}
        sides.append(np.array(moved) == 0.5)
    sides = np.stack(sides)
    assert abs(sides.mean() - 0.5) < 0.06
    assert abs((sides[:, 0] == sides[:, 1]).mean() - 0.5) < 0.1


def test_candidates_of_a_ranking_are_mirrored_each_by_itself(mesh):
    latents = np.zeros((20, 3, 2, 2, 4), np.float16)
    rows = {"pair_id": [str(i) for i in range(20)], "token_ids": np.zeros((20, 2), np.int32)}
    rows |= {"latents": latents, "latents_flipped": latents + 1}
    batch = PairLoader(rows, 16, seed=0, mesh=mesh, flip=True).batch(0)
    flipped = np.array(batch["latents"])[..., 0, 0, 0]
    assert flipped.shape == (16, 3) and 0.2 < flipped.mean() < 0.8
    assert 0 < flipped.sum(axis=1).min() or flipped.std(axis=1).max() > 0
    assert len(np.unique(flipped, axis=0)) > 3


def of_shapes(counts):
    """Pairs of so many of each shape, one after another in turn."""
    made = pairs(sum(counts))
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    for name in SIDES:
        latents = np.empty(len(order), object)
        latents[:] = [
            np.full((2, 2 + s, 4), v[0, 0, 0]) for s, v in zip(order, made[name], strict=True)
        ]
        made[name], made[f"{name}_flipped"] = latents, latents + 0.5
    return made, order


@pytest.mark.parametrize("counts", [(16, 24, 8), (3, 29), (1, 2)])
def test_a_batch_has_one_shape_and_every_pair_its_turn(mesh, counts):
    made, shape_of = of_shapes(counts)
    loader = PairLoader(made, 8, seed=1, mesh=mesh)
    assert loader.shapes == [(2, 2 + i, 4) for i in range(len(counts))]
    assert loader.fewest == min(counts)
    every = [loader.rows(step) for step in range(sum(counts))]  # eight epochs
    for rows in every:
        assert len(set(shape_of[rows])) == 1
    seen = np.bincount(np.concatenate(every), minlength=sum(counts))
    assert set(seen) == {8}
    fresh = PairLoader(made, 8, seed=1, mesh=mesh)
    for step in (len(every) - 1, 0, 2):  # a restart may begin anywhere
        np.testing.assert_array_equal(fresh.rows(step), every[step])
    if counts == (16, 24, 8):  # in an epoch each pair once, and the shapes in no order
        assert sorted(np.concatenate(every[:6])) == list(range(48))
        turns = [[shape_of[rows[0]] for rows in every[6 * e : 6 * e + 6]] for e in range(8)]
        assert all(sorted(turn) == [0, 0, 1, 1, 1, 2] for turn in turns)
        assert len(set(map(tuple, turns))) > 3


def test_batches_of_a_shape_are_its_latents(mesh):
    made, shape_of = of_shapes((16, 24))
    loader = PairLoader(made, 8, seed=1, mesh=mesh, flip=True)
    found = set()
    for step in range(5):
        rows, batch = loader.rows(step), loader.batch(step)
        shape = (8, 2, 2 + shape_of[rows[0]], 4)
        for sign, name in zip((1, -1), SIDES, strict=True):
            assert batch[name].shape == shape and batch[name].dtype == np.float32
            values = np.asarray(batch[name])[:, 0, 0, 0] - sign * rows
            assert set(values) <= {0, 0.5}
            found |= set(values)
    assert found == {0, 0.5}


def test_shapes_have_their_share_from_the_first_epoch(mesh):
    """In the mean over seeds: also those of fewer pairs than a batch."""
    made, shape_of = of_shapes((3, 12, 25))
    turns = np.zeros(3)
    for seed in range(200):
        loader = PairLoader(made, 8, seed=seed, mesh=mesh)
        for step in range(5):
            turns[shape_of[loader.rows(step)[0]]] += 1
            assert loader.shape(step) == (2, 2 + shape_of[loader.rows(step)[0]], 4)
    np.testing.assert_allclose(turns / 200, np.array([3, 12, 25]) / 8, atol=0.12)


@pytest.mark.parametrize("counts", [(3, 12, 25), (1, 30), (20,)])
def test_a_weighted_mean_counts_every_pair_alike(mesh, counts):
    made, shape_of = of_shapes(counts) if len(counts) > 1 else (pairs(20), np.zeros(20, int))
    for seed in range(8):
        loader = PairLoader(made, 8, seed=seed, mesh=mesh, whole=True)
        weights = loader.weights(4)
        rows = [loader.rows(step) for step in range(len(weights))]
        assert len(weights) == sum(-(-4 * count // 8) for count in counts)
        assert np.bincount(np.concatenate(rows), minlength=len(shape_of)).min() >= 4
        of_batches = [2.0 ** shape_of[each[0]] for each in rows]
        found = np.average(of_batches, weights=weights)
        assert found == pytest.approx(np.mean(2.0**shape_of), rel=1e-12)
