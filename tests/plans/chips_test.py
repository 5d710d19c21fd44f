"""Topologies: their names, their devices, and what the compiler says of their chips."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from agfsync_jax.parallel.mesh import create_mesh
from agfsync_jax.plans import _chips


@pytest.mark.parametrize("name", ["v5e", "v5e:4", "4x4", "v5e:4x4x"])
def test_a_name_that_is_no_topology(name):
    with pytest.raises(ValueError, match="expected KIND:SHAPE, such as v4:2x2x4, v5e:4x4"):
        _chips.devices(name)


class TestWithLibtpu:
    @pytest.fixture(autouse=True)
    def libtpu(self):
        pytest.importorskip("libtpu")

    @pytest.mark.parametrize("name, chips", [("v5e:4x4", 4), ("v5p:2x2x4", 4), ("v6e:2x2", 4)])
    def test_a_process_is_a_topology_of_its_own(self, name, chips):
        found = _chips.one_process(name, _chips.devices(name))
        assert len(found) == chips
        mesh = create_mesh(devices=found)
        split = NamedSharding(mesh, PartitionSpec("data"))
        x = jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=split)
        gathered = jax.jit(jnp.sin, out_shardings=NamedSharding(mesh, PartitionSpec()))
        assert "all-gather" in gathered.lower(x).compile().as_text()

    @pytest.mark.parametrize("name", ["v9:2x2", "v5e:3x3"])
    def test_a_topology_that_does_not_exist(self, name):
        with pytest.raises(ValueError, match=f"--topology={name}: libtpu does not know it"):
            _chips.devices(name)

    @pytest.mark.parametrize("name, chips", [("v4:2x2x1", 4), ("v6e:1x1", 1), ("v5p:2x2x1", 4)])
    def test_a_chip_is_a_device(self, name, chips):
        devices = _chips.devices(name)
        assert len(devices) == chips
        chip = _chips.chip(devices[0])
        # What the compiler says of one byte too many.
        place = NamedSharding(create_mesh(devices=devices), PartitionSpec())
        size = (chip.memory + 2**28) // 2**15
        much = jax.ShapeDtypeStruct((size, 2**13), jnp.float32, sharding=place)
        with pytest.raises(
            jax.errors.JaxRuntimeError, match=rf"exceeds.*\({chip.memory / 2**30:.2f}G\)"
        ):
            jax.jit(jnp.sum).lower(much).compile()
