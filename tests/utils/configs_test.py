import pytest

from agfsync_jax.utils import configs

MICRO = "configs/micro.py"


def test_finds_the_shipped_config_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert configs.load(MICRO, {}).sample.height == 64
    assert configs.load(f"{MICRO}:tiny", {}).sample.num_candidates == 3


def test_a_file_here_goes_first(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / MICRO).write_text(
        "from configs import common\n"
        "def get_config(arg=None):\n"
        "    c = common.get_config()\n"
        "    c.seed = 7\n"
        "    return c\n"
    )
    monkeypatch.chdir(tmp_path)
    assert configs.load(MICRO, {}).seed == 7


@pytest.mark.parametrize(
    ("signature", "returned", "arg", "message"),
    [
        ("", "common.get_config()", "", ""),
        ("", "common.get_config()", ":tiny", "get_config of .*own.py takes no argument"),
        ("arg", "common.get_config()", "", "wants an argument, as in FILE.py:arg"),
        ("arg", "None", ":tiny", "returns no ConfigDict"),
    ],
)
def test_a_config_of_ones_own(signature, returned, arg, message, tmp_path):
    path = tmp_path / "own.py"
    path.write_text(
        f"from configs import common\ndef get_config({signature}):\n    return {returned}\n"
    )
    if message:
        with pytest.raises(ValueError, match=message):
            configs.load(f"{path}{arg}", {})
    else:
        assert configs.load(f"{path}{arg}", {}).rounds == 1


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("configs/nano.py", FileNotFoundError, "no file configs/nano.py; shipped: .*micro.py"),
        ("micro", ValueError, "expected FILE.py"),
        (f"{MICRO}:tinny", ValueError, "'tinny' is unknown; known: tiny"),
        (f"{MICRO}:tiny=yes", ValueError, "expected true or false"),
    ],
)
def test_what_is_no_config(spec, error, message):
    with pytest.raises(error, match=message):
        configs.load(spec, {})


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("sample.height", "128", 128),
        ("train.learning_rate", "1e-3", 1e-3),
        ("loss.beta", "500", 500.0),
        ("pair.shuffle_labels", "true", True),
        ("pair.normalize", "rank", "rank"),
        ("backbone.path", "", ""),
        ("sharding", "(('.*kernel', ('fsdp', None)),)", ((".*kernel", ("fsdp", None)),)),
        ("evaluate.evaluators", "()", ()),
    ],
)
def test_overrides_keep_the_type(key, text, value):
    found = configs.flatten(configs.load(MICRO, {key: text}))[key]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("sample.hieght", "1", "no key of the config; close: sample.height"),
        ("num_steps", "1", "close: train.num_steps"),
        ("xyzzy", "1", "the blocks are: .*sample"),
        ("sample", "1", "is a block; set one of: .*sample.height"),
        ("sample.height", "64.5", "sample.height=64.5: expected a whole number of at least 8"),
        ("train.learning_rate", "fast", "expected a finite number above 0"),
        ("pair.shuffle_labels", "maybe", "expected true or false"),
        ("sharding", "5", r"expected .path regex, axes. rules"),
    ],
)
def test_bad_overrides(key, text, message):
    with pytest.raises(ValueError, match=message):
        configs.load(MICRO, {key: text})


def test_every_key_has_a_meaning():
    """Which --help and the table of keys show."""
    told = configs.meanings()
    keys = configs.flatten(configs.load("configs/common.py", {}))
    together = ("mesh", "score.mesh", "pair.columns")  # blocks that are told in one comment
    assert not [key for key in keys if key not in told and key.rpartition(".")[0] not in together]
