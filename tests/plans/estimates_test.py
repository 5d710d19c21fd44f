"""Time is that of the slowest; what the compiler refuses is told."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from agfsync_jax.parallel.mesh import create_mesh
from agfsync_jax.plans import Work, _chips, sample
from agfsync_jax.plans._estimates import estimate, roofline
from agfsync_jax.plans._programs import Cost
from agfsync_jax.plans._tables import table
from configs import micro


def test_what_the_compiler_refuses_is_told(monkeypatch):
    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
                "temporaries (17.00G) exceeds available HBM (15.75G)."
            )

    params = ({"unet": {"big": jax.ShapeDtypeStruct((2**28,), jnp.float32)}},)
    alone = NamedSharding(create_mesh(), PartitionSpec())
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=alone), params)
    ways = {"less": True, "more": False}
    work = Work(Lowered(), create_mesh(), params, 8, 2, 8, 8, 64, ways, ("images", 8))
    monkeypatch.setattr(sample, "work", lambda config, devices, name: work)
    row = estimate(micro.get_config(), "x", jax.devices(), "sample")
    assert row["fits"] is False and row["bytes_per_chip"] == 17 * 2**30
    text = "\n".join(row["notes"])
    assert "unet.big 1.00 GiB" in text and "16.00 GiB" in text and "would help: less." in text
    assert "| NO |" in table([row])


def test_time_is_that_of_the_slowest():
    row = {"analytic_flops_per_step": 4e12, "chips": 4}
    mesh = create_mesh(devices=jax.devices()[:4])
    chip = _chips.Chip(memory=0, memory_bandwidth=1e11, network_bandwidth=1e10)
    work = Work(None, mesh, None, 8, 10, 0, 40e12, 20, {}, ("images", 8))
    cost = Cost(int(3e12), int(1e11), Counter({"all-gather": 10**10}))
    found = roofline(row, cost, work, 1e12, chip)
    assert found["bound"] == "compute" and found["step_seconds"] == 4.0
    assert found["mfu"] == 1
    # Three batches of ten steps, and ten seconds more to decode each.
    np.testing.assert_allclose(found["hours"], 3 * (10 * 4 + 10) / 3600)
    assert found["rate"] == ("images", 8 / 50)
    found = roofline(row | {"chips": 8}, cost, work, 1e12, chip)
    np.testing.assert_allclose(found["hours"], 2 * (10 * 4 + 10) / 3600)
    assert found["rate"] == ("images", 2 * 8 / 50)
    slow = Cost(int(3e12), int(1e11), Counter({"all-gather": 10**11}))
    found = roofline(row, slow, work, 1e12, chip)
    assert (found["bound"], found["step_seconds"], found["mfu"]) == ("network", 10.0, 0.4)
