"""What the pages say can be typed, the files that they name exist, and their figures are ours.

Every `bash` block of README.md, CONTRIBUTING.md, tests/README.md and docs/ is read command by
command: files that it writes (`cat > FILE <<'EOF'`) are written, and of all else flags, keys and
names are looked up. What takes seconds is run; the rest of what is small (configs/micro.py:tiny) is
run by `-m slow`.
"""

import contextlib
import importlib.util
import io
import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from agfsync_jax import checks, cli
from agfsync_jax.micro import suite
from agfsync_jax.utils import configs

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "tests/README.md")),
    *sorted(path for path in (ROOT / "docs").rglob("*.md")),
]
EXTRAS = re.findall(r'^        "(\w+)": ', (ROOT / "setup.py").read_text(), re.MULTILINE)
CHEAP = ("prompts", "questions")  # run wherever a page has them
# What users have besides, and what is not ours to test.
OTHERS = {"git", "source", "xpk"}
SCRIPTS = {"tpu_pod.sh", "xpk.sh", "gpu_host.sh", "slurm.sbatch"}  # which know --dry-run


class Command(NamedTuple):
    words: list[str]
    text: str  # of the file that it writes


def page_id(path):
    return str(path.relative_to(ROOT))


every_page = pytest.mark.parametrize("page", PAGES, ids=page_id)


def commands(page):
    """Those of the page's bash blocks, in order."""
    for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        lines = iter(block.replace("\\\n", " ").splitlines())
        for line in lines:
            text = ""
            if line.endswith(" <<'EOF'"):
                line = line.removesuffix(" <<'EOF'")
                for inside in lines:
                    if inside == "EOF":
                        break
                    text += inside + "\n"
            if words := shlex.split(line, comments=True):
                yield Command(words, text)


def arguments(words):
    """What `agfsync` gets, if these words start it; the environment may stand before it."""
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    if words[0] == "agfsync":
        return words[1:]
    return words[3:] if words[:3] == ["python", "-m", "agfsync_jax"] else None


def look_up(argv):
    """Verb, flags, keys and names of a command; nothing is run."""
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            verb, args, overrides = cli.parse(argv)
    except SystemExit as stop:  # --help
        assert stop.code == 0 and "usage: agfsync" in out.getvalue()
        return
    if verb == "compare":
        return
    config = configs.load(args.config, overrides)
    checks.check(config, "report", num_devices=1)  # whose files are none
    assert verb in cli.VERBS


def check(command, folder):
    """What can be said of a command without running it, but for files, which are written."""
    words, text = command
    argv = arguments(words)
    if argv is not None:
        look_up(argv)
    elif words[:2] == ["cat", ">"]:
        path = folder / words[2]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        if path.suffix == ".py":
            runpy.run_path(path)  # its imports are there
    elif words[0] == "bash":
        script = ROOT / words[1]
        assert script.is_file(), words[1]
        if script.name in SCRIPTS:
            if not {"stop", "delete"} & set(words):
                look_up(["run", *(word for word in words if re.match("--(config|workdir)", word))])
            dry = [*words, "--dry-run"]
            done = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        elif script.name == "quickstart.sh":
            look_up(["run", "--config=configs/micro.py", "--workdir=runs/micro", *words[2:]])
        elif script.name == "test.sh":
            for word in words[2:]:
                assert not word.startswith("tests/") or (ROOT / word).exists(), word
        elif script.name == "venv.sh":
            assert set(words[2:]) <= set(EXTRAS)
    elif words[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(words[2]), words[2]
    elif words[:2] == ["pip", "install"]:
        assert words[2] == "-e"
        extras = re.fullmatch(r"\.(?:\[([\w,]+)\])?", words[3])[1] or ""
        assert set(filter(None, extras.split(","))) <= set(EXTRAS)
    else:
        tool = words[0].removeprefix(".venv/bin/")
        assert tool in OTHERS | {"sphinx-build", "ruff", "rm"}, f"{words}: teach this test"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where a reader types the commands; configs are found beside the package."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AGFSYNC_CACHE", "")
    before = signal.getsignal(signal.SIGTERM)
    yield tmp_path
    signal.signal(signal.SIGTERM, before)


@every_page
def test_every_command_can_be_typed(page, folder):
    for command in commands(page):
        check(command, folder)
        argv = arguments(command.words)
        made = [path.name for path in folder.iterdir()]
        if argv and "source=llm" in str(argv) and "--requests" not in argv:
            continue  # there is no server
        if argv and argv[0] in CHEAP and any(name in str(argv) for name in (*made, "micro.py:")):
            assert cli.main(argv) == 0, command.words


@pytest.mark.slow
@every_page
def test_what_is_small_runs(page, folder):
    env = os.environ | {"PYTHONPATH": str(ROOT), "AGFSYNC_CACHE": str(folder / "programs")}
    env.pop("XLA_FLAGS", None)  # one device, as a reader has
    for command in commands(page):
        check(command, folder)
        argv = arguments(command.words)
        if argv and any(":tiny" in word for word in argv):
            start = [sys.executable, "-m", "agfsync_jax", *argv]
            done = subprocess.run(start, env=env, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "words",
    [
        "agfsync smaple --config=configs/micro.py --workdir=w",
        "agfsync sample --config=configs/micro.py --workdir=w --hieght=3",
        "agfsync sample --config=configs/micro.py --workdir=w --config.sample.hieght=3",
        "agfsync sample --config=configs/nano.py --workdir=w",
        "agfsync train --config=configs/micro.py --workdir=w --config.loss.name=best",
        "bash launch/moon.sh",
        "bash launch/xpk.sh --name=a --config=configs/sdxl.py --workdir=gs://b/c",
        "bash launch/quickstart.sh --config.sample.hieght=3",
        "bash launch/test.sh tests/nowhere_test.py",
        "python -m agfsync_jax.nowhere",
        "pip install -e .[all]",
        "unknown tool",
    ],
)
def test_what_cannot_be_typed_is_seen(words, folder):
    with pytest.raises((ValueError, OSError, AssertionError, SystemExit)):
        check(Command(words.split(), ""), folder)


def links(page):
    """(target, anchor) of what a page links to in the repository."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        yield (page.parent / path).resolve() if path else page, anchor


def anchors(page):
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", text).lower().replace(" ", "-") for text in headings}


@every_page
def test_every_link_leads_somewhere(page):
    for path, anchor in links(page):
        if path.parent.name != "api":  # made by Sphinx, which knows whether it is there
            assert path.exists(), f"{page.name} links to {path}"
        assert not anchor or anchor in anchors(path), f"{page.name}: no #{anchor} in {path.name}"


@every_page
def test_every_file_that_is_named_exists(page):
    text = page.read_text()
    written = set(re.findall(r"^cat > (\S+) <<'EOF'$", text, re.MULTILINE))
    for name in re.findall(
        r"(?<![\w/])(?:agfsync_jax|configs|launch|tests|docs)/[\w./*-]*\w", text
    ):
        made = written | {"docs/api"}  # by Sphinx
        assert name in made or list(ROOT.glob(name)), f"{page.name} names {name}"


@every_page
def test_every_key_that_is_named_exists(page):
    known = set()
    for name in ("micro.py", "sd15.py:lcm", "sdxl.py"):
        for key in configs.flatten(configs.load(f"configs/{name}", {})):
            parts = key.split(".")
            known |= {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
    for key in re.findall(r"`(?:c|config)\.([a-z_]+(?:\.[a-z_]+)*)", page.read_text()):
        assert key in known | {"json"}, f"{page.name}: config.{key}"


def test_the_pages_tell_every_verb():
    named = set()
    for page in PAGES:
        named |= set(re.findall(r"`agfsync ([a-z]+)\b", page.read_text()))
    assert named == set(cli.VERBS)


def test_the_suites_command_runs(tmp_path, monkeypatch):
    page = (ROOT / "docs/micro_suite.md").read_text()
    command = re.search(r"python -m agfsync_jax\.micro\.suite (.+)", page)[1].split()
    assert [flag.split("=")[0] for flag in command] == ["--workdir", "--output"]
    ran = []
    stages = {
        name: lambda workdir, output, name=name: ran.append(name) or {} for name in suite.STAGES
    }
    monkeypatch.setattr(suite, "STAGES", stages)
    suite.main([f"--workdir={tmp_path}", f"--output={tmp_path}"])
    assert ran == list(stages)
    suite.main([f"--workdir={tmp_path}", f"--output={tmp_path}"])
    assert ran == list(stages)  # all of it was done before


@pytest.mark.parametrize(
    "model, key, wording",
    [
        ("aesthetic", "retrieval_of_100", "right caption among 100: {:.0%}"),
        ("vae", "referee_strict", "referee-strict on reconstructions: {:.1%}"),
        ("unet", "referee_strict", "referee-strict {:.1%}"),
        ("aesthetic", "clean_above_degraded", "clean above spoiled in {:.1%} of pairs"),
        ("blip2_generated", "all", "right answers {:.1%}"),
        ("blip2_generated", "correlation_probability", "correlation of {:.2f}"),
    ],
)
def test_the_suites_figures_are_those_that_ship(model, key, wording):
    figures = json.loads((ROOT / "agfsync_jax/micro/weights/figures.json").read_text())
    text = " ".join((ROOT / "docs/micro_suite.md").read_text().split())
    assert wording.format(figures[model][key]) in text
