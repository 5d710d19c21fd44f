"""The scripts in launch/, with a Python that only writes down what it is asked to do."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted([*(ROOT / "launch").glob("*.sh"), ROOT / ".ci" / "run"])

# Stands in for every Python: `-m venv --clear DIR` copies it to DIR/bin/python.
FAKE = """\
#!/usr/bin/env bash
echo "$*" >>"$FAKE_LOG"
case "$*" in
  "-m venv --clear "*) mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
  --version) echo "Python 3.12.0" ;;
  *"pip"*"install"*) [[ -z "${FAKE_PIP_FAILS:-}" ]] ;;
esac
"""

ALL = "-m pytest -n 2 --dist loadfile --no-loadscope-reorder"  # what test.sh runs without arguments


@pytest.fixture
def clone(tmp_path):
    """A checkout in a folder with a space, without a .venv; what the fake was asked is in log."""
    folder = tmp_path / "a clone"
    (folder / "agfsync_jax").mkdir(parents=True)
    shutil.copytree(ROOT / "launch", folder / "launch")
    shutil.copy(ROOT / "setup.py", folder)
    shutil.copy(ROOT / "agfsync_jax" / "__init__.py", folder / "agfsync_jax")
    python = tmp_path / "python"
    python.write_text(FAKE)
    python.chmod(0o755)
    return folder


def start(clone, script, *args, **env):
    log = clone.parent / "log"
    log.write_text("")
    env = os.environ | {"PYTHON": str(clone.parent / "python"), "FAKE_LOG": str(log)} | env
    command = ["bash", str(clone / "launch" / script), *args]
    done = subprocess.run(command, env=env, cwd="/", capture_output=True, text=True, timeout=60)
    return done, log.read_text().splitlines()


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_bash_can_read_it(path):
    subprocess.run(["bash", "-n", path], check=True)


def test_quickstart(clone):
    done, asked = start(clone, "quickstart.sh", "--config.train.num_steps=9", "--workdir=/tmp/x y")
    assert done.returncode == 0, done.stderr
    pip = "-m pip --quiet --disable-pip-version-check"
    assert [line for line in asked if "install" in line] == [f"{pip} install --editable={clone}"]
    assert asked[-1] == (
        f"-m agfsync_jax run --config={clone}/configs/micro.py --workdir={clone}/runs/micro"
        " --config.train.num_steps=9 --workdir=/tmp/x y"
    )
    done, asked = start(clone, "quickstart.sh")
    assert done.returncode == 0, done.stderr
    assert not [line for line in asked if "install" in line or "venv" in line]
    assert asked[-1].startswith("-m agfsync_jax run")
    (clone / "setup.py").write_text("# changed")
    _, asked = start(clone, "quickstart.sh")
    assert [line for line in asked if "install" in line] == [f"{pip} install --editable={clone}"]


def test_test(clone):
    done, asked = start(clone, "test.sh", "tests/cli_test.py", "-k", "a or b")
    assert done.returncode == 0, done.stderr
    installs = [line.rpartition("install ")[2] for line in asked if "install" in line]
    open_clip = "--no-deps open_clip_torch==3.3.0"
    assert installs == ["torch==2.13.0", f"--editable={clone}[test]", open_clip]
    assert asked[-1] == "-m pytest tests/cli_test.py -k a or b"
    _, asked = start(clone, "test.sh")
    assert asked[-1] == ALL and not [line for line in asked if "install" in line]


def test_no_python(clone):
    done, _ = start(clone, "quickstart.sh", PYTHON="/nowhere/python3.9")
    assert done.returncode == 1
    assert "needs Python 3.11, 3.12 or 3.13; /nowhere/python3.9 is" in done.stderr
    assert "PYTHON=/path/to/python3.12 bash" in done.stderr
    assert not (clone / ".venv").exists()


def test_a_failed_installation_is_tried_again(clone):
    done, asked = start(clone, "test.sh", FAKE_PIP_FAILS="1")
    assert done.returncode == 1 and "could not install torch==2.13.0" in done.stderr
    assert "-m pytest" not in asked
    done, asked = start(clone, "test.sh")
    assert done.returncode == 0 and asked[-1] == ALL
    assert len([line for line in asked if "install" in line]) == 3
