import errno
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from agfsync_jax.training.checkpoints import Checkpoints, find_step, restore_denoiser


class Network(nnx.Module):
    def __init__(self, width, rngs):
        self.blocks = nnx.List([nnx.Linear(8, width, rngs=rngs), nnx.Linear(width, 8, rngs=rngs)])


def _state(width=16, seed=0):
    params = nnx.split(Network(width, nnx.Rngs(seed)))[1]
    return {"params": params, "optimizer": optax.adamw(1e-3).init(params), "step": jnp.int32(7)}


def _abstract(tree, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def _equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_there_and_back(tmp_path):
    state = _state()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() is None
        checkpoints.save(3, state)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 3
        _equal(checkpoints.restore(3, _abstract(state)), state)


def test_restores_into_another_sharding(tmp_path):
    def placed(shape, spec):
        devices = np.array(jax.devices()).reshape(shape)
        return NamedSharding(Mesh(devices, ("data", "fsdp")), PartitionSpec(*spec))

    values = jnp.arange(64.0).reshape(8, 8)
    state = {"params": jax.device_put(values, placed((2, 4), ("fsdp", None)))}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, wait=True)
        for sharding in (placed((1, 8), (None, "fsdp")), placed((8, 1), (None, None)), None):
            restored = checkpoints.restore(1, _abstract(state, sharding))["params"]
            np.testing.assert_array_equal(restored, values)
            if sharding is not None:
                assert restored.sharding == sharding


def test_keeps_the_newest(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3, 4):
            checkpoints.save(step, {"params": jnp.full((4,), step)})
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["3", "4"]


def test_a_donated_state_is_saved_as_it_was(tmp_path):
    step = jax.jit(lambda x: jax.tree.map(lambda y: y + 1.0, x), donate_argnums=0)
    state = {"params": jnp.zeros((512, 512))}
    with Checkpoints(tmp_path) as checkpoints:
        for number in range(3):
            checkpoints.save(number, state)
            state = step(state)
        checkpoints.wait()
        abstract = _abstract(state)
        for number in (1, 2):
            restored = checkpoints.restore(number, abstract)["params"]
            np.testing.assert_array_equal(restored, np.full((512, 512), number))


def test_a_half_written_step_does_not_count(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"params": jnp.zeros(4)})
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 1
        checkpoints.save(2, {"params": jnp.ones(4)}, wait=True)
        assert checkpoints.latest_step() == 2


def test_saving_a_step_again_changes_nothing(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"params": jnp.zeros(4)}, wait=True)
        checkpoints.save(1, {"params": jnp.ones(4)}, wait=True)
        restored = checkpoints.restore(1, {"params": jax.ShapeDtypeStruct((4,), jnp.float32)})
        np.testing.assert_array_equal(restored["params"], np.zeros(4))


def test_the_denoiser_alone(tmp_path):
    state = _state()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, _state(seed=1))
        checkpoints.save(2, state)
    _equal(restore_denoiser([(tmp_path, 2)], _abstract(state["params"])), state["params"])
    with pytest.raises(ValueError, match="ends at step 2 of config.train.num_steps=3"):
        find_step(tmp_path, "last", 3)


def test_which_step(tmp_path):
    def find(which, best="vqa", num_steps=4):
        return find_step(tmp_path, which, num_steps, best)

    with Checkpoints(tmp_path, keep=2, best="vqa") as checkpoints:
        assert checkpoints.best() is None
        for step, score in enumerate((0.5, 0.9, math.nan, 0.7), start=1):
            checkpoints.save(step, _state(), metrics={"vqa": score, "loss": -score})
        checkpoints.wait()
        assert checkpoints.steps() == [2, 3, 4] and checkpoints.best() == (2, 0.9)
    assert [find("last"), find("best"), find("3")] == [4, 2, 3]
    with pytest.raises(ValueError, match="--step=1: .* has the steps 2, 3, 4"):
        find("1")
    with pytest.raises(ValueError, match="--step=best: .* no checkpoint with a validation's metr"):
        find("best", best="")
    with Checkpoints(tmp_path, best="loss", higher_is_better=False) as checkpoints:
        assert checkpoints.best() == (2, -0.9)
    with Checkpoints(tmp_path / "lower", keep=9, best="fid", higher_is_better=False) as checkpoints:
        for step, score in enumerate((30.0, 10.0, 20.0), start=1):
            checkpoints.save(step, _state(), metrics={"fid": score})
    assert find_step(tmp_path / "lower", "best", 3, "fid", higher_is_better=False) == 2


def test_a_training_that_ended_early_is_over(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, _state(), wait=True)
        assert not checkpoints.has_ended(9)
        checkpoints.end()
        assert checkpoints.has_ended(9)
    assert find_step(tmp_path, "last", 9) == 3


def test_all_misfits_are_listed(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, _state(width=16))
    wider = _abstract(_state(width=32)["params"])
    with pytest.raises(ValueError) as error:
        restore_denoiser([(tmp_path, 1)], wider)
    for part in ("blocks.0.kernel", "(8, 16), expected (8, 32)", "blocks.1.kernel"):
        assert part in str(error.value)
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match="other: missing"):
        checkpoints.restore(1, {"other": jax.ShapeDtypeStruct((4,), jnp.float32)})


def test_no_checkpoint_says_what_to_run(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="agfsync train"):
            find_step(folder, "last", 1)
    assert not (tmp_path / "nowhere").exists()
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(FileNotFoundError, match="step 5"):
        checkpoints.restore(5, {})


TENSORSTORE = "RESOURCE_EXHAUSTED: Failed to write: No space left on device [os_error_code='28']"
FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "error",
    [
        ValueError(TENSORSTORE),
        FULL,
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        ExceptionGroup("of threads", [KeyError("a"), ExceptionGroup("more", [FULL])]),
    ],
    ids=["tensorstore", "python", "quota", "group"],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_full_disk_is_said_in_one_line(tmp_path, monkeypatch, error, wrapped):
    def fail(*_, **__):
        if wrapped:
            raise RuntimeError("a thread failed") from error
        raise error

    with Checkpoints(tmp_path) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "wait_until_finished", fail)
        with pytest.raises(OSError, match="No space left to write a checkpoint") as told:
            checkpoints.save(1, {"params": jnp.zeros(500_000)}, wait=True)
        assert told.value.errno == errno.ENOSPC
        for part in (str(tmp_path), "2.0 MB are needed", "MB are free", "are kept", "goes on"):
            assert part in str(told.value)
        assert "\n" not in str(told.value)
        monkeypatch.undo()


def test_another_error_of_a_save_stays_what_it_is(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no disk has to do with this")

    with Checkpoints(tmp_path) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "wait_until_finished", fail)
        with pytest.raises(RuntimeError, match="no disk"):
            checkpoints.wait()
        monkeypatch.undo()
