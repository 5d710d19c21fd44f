import jax
import pytest

from agfsync_jax.parallel.mesh import create_mesh, mesh_shape


@pytest.mark.parametrize(
    "spec, shape",
    [
        (None, (8, 1, 1)),
        ({"data": -1, "fsdp": 1, "tensor": 1}, (8, 1, 1)),
        ({"data": -1, "fsdp": 2, "tensor": 2}, (2, 2, 2)),
        ({"fsdp": -1}, (1, 8, 1)),
        ({"data": 4, "tensor": 2}, (4, 1, 2)),
    ],
)
def test_shapes(spec, shape):
    mesh = create_mesh(spec)
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert mesh.devices.shape == shape


def test_some_devices():
    assert create_mesh({"data": -1}, devices=jax.devices()[:2]).devices.shape == (2, 1, 1)


@pytest.mark.parametrize(
    "spec, message",
    [
        ({"model": 2}, r"Unknown mesh axes \['model'\]; the axes are data, fsdp, tensor"),
        ({"data": 3}, "data=3, fsdp=1, tensor=1 does not fit 8 device"),
        ({"data": -1, "fsdp": 3}, "data=-1, fsdp=3, tensor=1 does not fit 8 device.*take 3"),
        ({"data": -1, "fsdp": -1}, "one axis at most may be -1"),
        ({"data": 0}, "sizes are at least 1"),
    ],
)
def test_errors(spec, message):
    with pytest.raises(ValueError, match=message):
        create_mesh(spec)


@pytest.mark.parametrize(
    ("spec", "num_devices", "batch_size", "shape"),
    [
        ({"data": 1, "fsdp": -1}, 8, 64, (1, 8, 1)),
        ({"data": 1, "fsdp": -1}, 256, 64, (1, 64, 4)),
        ({"data": -1}, 8, 12, (4, 1, 2)),
        ({"data": 2, "fsdp": -1}, 8, 6, (2, 1, 4)),
        ({"data": -1, "tensor": 2}, 8, 2, (2, 1, 4)),
        ({"data": -1}, 8, 3, (1, 1, 8)),
    ],
)
def test_devices_that_a_batch_does_not_divide_over_go_to_tensor(
    spec, num_devices, batch_size, shape
):
    assert mesh_shape(spec, num_devices, batch_size) == shape


@pytest.mark.parametrize("spec", [{"data": 8}, {"data": 4, "tensor": -1}, {"data": 4, "fsdp": -1}])
def test_a_batch_that_no_mesh_divides_is_refused(spec):
    with pytest.raises(ValueError, match="A batch of 6 cannot be split over data x fsdp = [48]"):
        mesh_shape(spec, 8, 6)
