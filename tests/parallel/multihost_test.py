import pytest

from agfsync_jax.parallel import multihost
from tests.processes import run_processes

PROCESS = """
import json, sys
from agfsync_jax.parallel import multihost
multihost.initialize()
multihost.initialize()
import jax, numpy as np
from agfsync_jax.data.loader import PairLoader
from agfsync_jax.parallel.mesh import create_mesh

n = 6
latents = np.broadcast_to(np.arange(n).reshape(n, 1, 1, 1), (n, 1, 1, 4)).astype(np.float16)
pairs = {"pair_id": [str(i) for i in range(n)], "token_ids": np.zeros((n, 2), np.int32),
         "chosen_latents": latents, "rejected_latents": latents}
loader = PairLoader(pairs, 4, seed=0, mesh=create_mesh({"data": 2, "fsdp": 2}))
batch = loader.batch(1)["chosen_latents"]
local = [int(x) for s in batch.addressable_shards for x in np.asarray(s.data)[:, 0, 0, 0]]
multihost.barrier("batch is there")
total = jax.jit(lambda x: x.sum())(batch)
share = multihost.process_slice(5)
print(json.dumps({
    "main": multihost.is_main(), "devices": jax.device_count(), "shape": batch.shape,
    "local": local, "rows": loader.rows(1).tolist(), "total": float(total),
    "shards": list(multihost.shards_of_process(5)), "slice": [share.start, share.stop]}))
"""


def test_two_processes_share_one_batch():
    outs = run_processes(PROCESS)
    first, second = outs
    assert [out["main"] for out in outs] == [True, False]
    assert [out["devices"] for out in outs] == [4, 4]
    assert first["rows"] == second["rows"] == first["local"] + second["local"]
    assert first["total"] == second["total"] == 4 * sum(first["rows"])
    assert first["shape"] == [4, 1, 1, 4]
    assert (first["shards"], second["shards"]) == ([0, 2, 4], [1, 3])
    assert (first["slice"], second["slice"]) == ([0, 2], [2, 5])


def test_one_process_needs_nothing(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    multihost.initialize()
    multihost.barrier("alone")
    assert multihost.is_main()
    assert multihost.process_slice(7) == slice(0, 7)
    assert list(multihost.shards_of_process(3)) == [0, 1, 2]


def test_half_a_group_is_an_error(monkeypatch):
    for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1234")
    with pytest.raises(ValueError, match="missing: JAX_NUM_PROCESSES, JAX_PROCESS_ID"):
        multihost.initialize()
    with pytest.raises(ValueError, match="JAX_PROCESS_ID must be a whole number, got 'x'"):
        multihost.initialize("127.0.0.1:1234", 2, "x")
