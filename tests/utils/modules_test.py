import pytest

from agfsync_jax.utils import modules


def test_loads_by_name():
    assert modules.load("utils", "clock").__name__ == "agfsync_jax.utils.clock"


def test_names_lists_the_files_of_a_room():
    assert {"clock", "metrics", "modules"} <= set(modules.names("utils"))


def test_an_unknown_name_lists_the_room():
    with pytest.raises(ValueError, match=r"'clok' is not in .*utils.*metrics.*mean 'clock'"):
        modules.load("utils", "clok")
