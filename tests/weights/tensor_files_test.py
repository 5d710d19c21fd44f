"""Tensors in files: the bytes that torch and safetensors wrote, parts of them, and broken files."""

import json
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from etils import epath

from agfsync_jax.weights import tensor_files
from agfsync_jax.weights.tensor_files import Tensor, open_tensors, write_tensors

RNG = np.random.default_rng(0)
VALUES = {
    "matrix": RNG.standard_normal((6, 4)).astype(np.float32),
    "half": RNG.standard_normal((8, 3, 2, 2)).astype(np.float16),
    "brain": RNG.standard_normal((5,)).astype(ml_dtypes.bfloat16),
    "scalar": np.float32(2.5).reshape(()),
    "ids": np.arange(7),
    "empty": np.zeros((0, 4), np.float32),
}


def as_torch(value):
    if value.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(value.astype(np.float32)).bfloat16()
    return torch.from_numpy(np.array(value))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({key: as_torch(value) for key, value in VALUES.items()}, path)
    return path


def same(tensors):
    assert tensors.keys() == VALUES.keys()
    for key, value in VALUES.items():
        assert (tensors[key].shape, tensors[key].dtype) == (value.shape, value.dtype), key
        np.testing.assert_array_equal(tensors[key].read(), value, err_msg=key)


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "state_dict"])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_pickle_of_torch(tmp_path, nested, legacy):
    state = {key: as_torch(value) for key, value in VALUES.items()}
    state = {"epoch": 3, "state_dict": state} if nested else state
    torch.save(state, tmp_path / "w.pt", _use_new_zipfile_serialization=not legacy)
    same(open_tensors(tmp_path / "w.pt"))


def test_a_file_of_safetensors(file):
    same(open_tensors(file))


def test_what_is_written_is_what_safetensors_reads(file, tmp_path):
    write_tensors(tmp_path / "again.safetensors", open_tensors(file))
    read = safetensors.torch.load_file(tmp_path / "again.safetensors")
    for key, value in VALUES.items():
        assert torch.equal(read[key], as_torch(value)), key
    with safetensors.safe_open(tmp_path / "again.safetensors", "np") as opened:
        assert opened.metadata() == {"format": "pt"}  # without which transformers refuses it
    assert not list(tmp_path.glob("*.tmp"))


def test_views_read_what_they_show(file):
    tensors = open_tensors(file)
    half, matrix = VALUES["half"], VALUES["matrix"]
    view = tensors["half"].transpose(2, 3, 1, 0)
    index = (slice(0, 2), slice(1, 2), slice(None), slice(2, 7))
    np.testing.assert_array_equal(view.read(index), half.transpose(2, 3, 1, 0)[index])
    first, second, third = tensors["matrix"].split(3)
    np.testing.assert_array_equal(second.read(), matrix[2:4])
    np.testing.assert_array_equal(
        third.transpose(1, 0).read((slice(1, 3), slice(1, 2))).T, matrix[5:6, 1:3]
    )
    conv = tensors["matrix"].reshape(6, 4, 1, 1)
    np.testing.assert_array_equal(conv.read(), matrix[..., None, None])
    np.testing.assert_array_equal(
        conv.reshape(6, 4).read((slice(2, 4), slice(0, 1))), matrix[2:4, :1]
    )
    with pytest.raises(ValueError, match=r"matrix \[6, 4\] does not split into 4 parts"):
        tensors["matrix"].split(4)
    with pytest.raises(ValueError, match=r"matrix \[6, 4\] has no view of shape \[4, 6\]"):
        tensors["matrix"].reshape(4, 6)


def test_a_part_reads_the_bytes_of_its_rows_alone(file, monkeypatch):
    tensors, read = open_tensors(file), []
    preadv = tensor_files.os.preadv

    def counting(descriptor, buffers, offset):
        read.append(sum(len(buffer) for buffer in buffers))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(tensor_files.os, "preadv", counting)
    tensors["matrix"].transpose(1, 0).read((slice(None), slice(2, 5)))
    assert sum(read) == 3 * 4 * 4


def test_a_url_is_read_as_a_local_file_is(file):
    same(open_tensors(epath.Path(file)))  # etils' own path type, as gs:// has it


def test_files_that_are_not_whole(file, tmp_path):
    def broken(content, name="b.safetensors"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError) as error:
            open_tensors(tmp_path / name)
        assert str(tmp_path / name) in str(error.value)
        return str(error.value)

    whole = file.read_bytes()
    assert "copy it again" in broken(b"")
    assert "copy it again" in broken(whole[:100])
    assert "ends at byte" in broken(whole[:-1])
    assert "no safetensors file" in broken((20).to_bytes(8, "little") + b"{" * 20)
    assert "git lfs pull" in broken(b"version https://git-lfs.github.com/spec/v1\n")
    assert "copy it again" in broken(b"<html>this is a login page, and no tensor</html>")
    header = json.dumps({"a": {"dtype": "F7", "shape": [1], "data_offsets": [0, 4]}}).encode()
    assert "dtype F7" in broken(len(header).to_bytes(8, "little") + header + b"0000")
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}).encode()
    assert "a [2] F32 spans 4 bytes" in broken(len(header).to_bytes(8, "little") + header + b"0000")
    torch.save({"a": torch.ones(3)}, tmp_path / "w.pt")
    assert "not a whole pickle" in broken((tmp_path / "w.pt").read_bytes()[:-30], "half.pt")
    assert "must end in one of .safetensors" in broken(b"", "weights.npz")
    with pytest.raises(FileNotFoundError, match="No file"):
        open_tensors(tmp_path / "none.safetensors")


def test_a_file_that_shrinks_while_it_is_read(file):
    tensors = open_tensors(file)
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(ValueError, match="ends before byte"):
        for tensor in tensors.values():
            tensor.read()


class Evil:
    def __reduce__(self):
        return print, ("code that a pickle runs",)


def test_a_pickle_of_code_is_refused(tmp_path, capsys):
    torch.save({"a": torch.ones(3), "b": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="not a whole pickle of tensors alone"):
        open_tensors(tmp_path / "evil.pt")
    assert "code" not in capsys.readouterr().out


@pytest.mark.parametrize("module", ["os.system", "builtins.eval", "torch.load"])
def test_only_what_makes_tensors_is_run(tmp_path, module):
    """By name, whatever torch itself would allow."""
    torch.save({"a": torch.ones(3)}, tmp_path / "good.pt")
    module, _, name = module.rpartition(".")
    call = f"c{module}\n{name}\n(X\x05\0\0\0touchtR.".encode()
    with zipfile.ZipFile(tmp_path / "good.pt") as good:
        with zipfile.ZipFile(tmp_path / "evil.pt", "w") as evil:
            for entry in good.namelist():
                evil.writestr(entry, call if entry.endswith(".pkl") else good.read(entry))
    with pytest.raises(ValueError, match=f"tensors alone .{module}.{name} makes no tensor"):
        open_tensors(tmp_path / "evil.pt")


def test_views_and_parameters_of_a_pickle(tmp_path):
    whole = torch.arange(24.0).reshape(4, 6)
    state = {
        "turned": whole.T,
        "part": whole[1:3, 2:5],
        "step": whole[::2, ::3],
        "trained": torch.nn.Parameter(whole + 1),
        "half": whole.half(),
        "flags": whole > 3,
    }
    torch.save(state, tmp_path / "w.pt")
    tensors = open_tensors(tmp_path / "w.pt")
    for key, value in state.items():
        np.testing.assert_array_equal(tensors[key].read(), value.detach().numpy(), err_msg=key)
        part = tensors[key].read((slice(1, 2), slice(0, 2)))
        np.testing.assert_array_equal(part, value.detach().numpy()[1:2, :2], err_msg=key)


def test_a_pickle_needs_no_torch_but_an_old_one(tmp_path, monkeypatch):
    torch.save({"a": torch.ones(3)}, tmp_path / "w.bin")
    old = tmp_path / "old.bin"
    torch.save({"a": torch.ones(3)}, old, _use_new_zipfile_serialization=False)
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    np.testing.assert_array_equal(open_tensors(tmp_path / "w.bin")["a"].read(), np.ones(3))
    with pytest.raises(ValueError, match=r"agfsync_jax\[torch\].*convert"):
        open_tensors(old)


def test_a_full_disk_is_seen_before_it_is_written(tmp_path):
    huge = Tensor("a", (2**50,), np.dtype(np.float32), lambda index: 1 / 0)
    with pytest.raises(OSError, match="needs 4503599.6 GB"):
        write_tensors(tmp_path / "w.safetensors", {"a": huge})
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_of_a_file_that_failed(tmp_path):
    bad = Tensor("a", (4,), np.dtype(np.float32), lambda index: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_tensors(tmp_path / "w.safetensors", {"a": bad})
    assert not list(tmp_path.iterdir())
