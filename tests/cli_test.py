"""The command line, in this process where that will do, and as users start it where it must."""

import importlib
import os
import signal
import subprocess
import sys
import time
import types

import pytest

from agfsync_jax import cli
from agfsync_jax.utils.files import Unreachable

CONFIG = "--config=configs/micro.py:tiny"


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    monkeypatch.setenv("AGFSYNC_CACHE", "")
    monkeypatch.delenv("AGFSYNC_TRACEBACK", raising=False)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def verb(monkeypatch):
    """Puts a function in the place of `agfsync prompts`; returns the calls that it got."""
    calls = []
    importlib.import_module("agfsync_jax.run")  # its steps are the real ones

    def install(act=lambda: None):
        def main(config, workdir, *, round_index, repair, requests):
            calls.append((config, workdir, round_index, repair))
            act()

        monkeypatch.setitem(sys.modules, "agfsync_jax.prompts", types.SimpleNamespace(main=main))
        return calls

    return install


def fails(error):
    def act():
        raise error

    return act


def agfsync(*args, **kwargs):
    command = [sys.executable, "-m", "agfsync_jax", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **kwargs)


@pytest.mark.parametrize("args", [["--help"], []])
def test_help_lists_the_verbs(args):
    done = agfsync(*args)
    assert done.returncode == 0
    for name in cli.VERBS:
        assert f"\n  {name} " in done.stdout
    assert "closed loop" in done.stdout and "AGFSYNC_TRACEBACK" in done.stdout


def test_help_imports_no_jax():
    code = "import sys; from agfsync_jax import cli; sys.argv = ['agfsync', 'sample', '--help']\n"
    code += "try: cli.main()\nfinally: print('jax' in sys.modules, 'tensorflow' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.rstrip().endswith("False False")


@pytest.mark.parametrize("name", cli.VERBS)
def test_help_of_a_verb(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert cli.docstring(name) in out
    if name == "compare":
        assert "WORKDIR" in out and "--against" in out and "--config" not in out
        return
    block = {"run": "backbone", "plan": "sample", "sweep": "train"}.get(name, name)
    assert "--workdir DIR" in out and f"--config.{block}." in out


def test_help_shows_the_values_of_a_config(capsys):
    with pytest.raises(SystemExit):
        cli.main(["sample", "--help", CONFIG, "--config.sample.height=96"])
    out = capsys.readouterr().out
    assert "--config.sample.height=96" in out and "--config.sample.num_candidates=3" in out
    assert "a prompt" in out  # what the key means


def test_a_verb_gets_what_was_given(tmp_path, verb):
    calls = verb()
    workdir = tmp_path / "work"
    args = ["prompts", CONFIG, f"--workdir={workdir}", "--round=1", "--repair"]
    assert cli.main([*args, "--config.prompts.num_prompts=5"]) == 0
    ((config, given, round_index, repair),) = calls
    assert (given, round_index, repair) == (workdir, 1, True)
    assert config.prompts.num_prompts == 5 and config.is_locked
    assert (workdir / "config.json").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["prompts"], "needs --config, such as --config=configs/micro.py"),
        (["prompts", CONFIG], "needs --workdir"),
        (["prompts", CONFIG, "--workdir=w", "--hieght=3"], "unknown argument '--hieght=3'"),
        (["prompts", CONFIG, "--workdir=w", "--config.sample.hieght=3"], "close: sample.height"),
        (["prompts", CONFIG, "--workdir=w", "--config.loss.name=x"], "not in agfsync_jax/losses"),
        (["prompts", "--config=nowhere.py", "--workdir=w"], "no file nowhere.py; shipped"),
        (["prompts", CONFIG, "--workdir=w", "--round=-1"], "rounds count from 0"),
        (["prompts", CONFIG, "--workdir="], "--workdir= is empty: name a folder"),
        (["prompts", CONFIG, "--workdir=w", "--rounds=3"], "did you mean --config.rounds=3?"),
        (["prompts", CONFIG, "--workdir=w", "--batch_size=3"], "--config.train.batch_size=3"),
        (["prompts", CONFIG, "--workdir=w", "--config.sample.batch_size=8"], "sample.device_batc"),
        (["run", CONFIG, "--workdir=w", "--random_weights"], "run --rehearse --random_weights"),
        (["prompts", CONFIG, "--workdir=w", "--config.seed"], "write --config.seed=VALUE"),
        (["prompts", CONFIG, "--workdir=w", "--config.backbone.lora=x.safetensors"], "(('lora.sa"),
        (["prompts", CONFIG, "--workdir=w", "--config.train.keep=two"], "whole number of at least"),
        (["prompts", CONFIG, "--workdir=w", "--config.scorers.vqa.dtpe=a"], "scorers.vqa.dtpe"),
        (["prompts", CONFIG, "--workdir=w", "--config.train.learning_rate=nan"], "finite number"),
        (["run", CONFIG, "--workdir=w", "--config.train.timesteps=0:2000"], "some of 0 to 999"),
        (["run", CONFIG, "--workdir=w", "--config.evaluate.sample.sampler=x"], "'x' is not in"),
        (["run", CONFIG, "--workdir=w", "--step=worst"], "expected last, best or the number"),
        (["sample", CONFIG, "--workdir=w", "--step=best"], "and --round=0 has none"),
        (["run", CONFIG, "--workdir=w", "--config.train.patience=2"], "needs config.train.best"),
    ],
)
def test_mistakes_get_one_line_before_any_work(args, message, tmp_path, monkeypatch, verb, capsys):
    calls = verb()
    monkeypatch.chdir(tmp_path)
    assert cli.main(args) == 2
    err = capsys.readouterr().err
    assert err.startswith("agfsync: error: ") and err.count("\n") == 1 and message in err
    assert not calls and not list(tmp_path.iterdir())


def test_an_unknown_verb_lists_the_known(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["sampel"])
    assert stop.value.code == 2
    assert "'run', 'prompts'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [ValueError("bad"), FileNotFoundError("bad"), OSError(28, "bad"), FloatingPointError("bad")],
)
def test_expected_errors_have_no_traceback(error, tmp_path, verb, capsys, monkeypatch):
    verb(fails(error))
    args = ["prompts", CONFIG, f"--workdir={tmp_path}"]
    assert cli.main(args) == 2
    err = capsys.readouterr().err
    assert err.startswith("agfsync: error: ") and "bad" in err and "Traceback" not in err
    monkeypatch.setenv("AGFSYNC_TRACEBACK", "1")
    assert cli.main(args) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and "agfsync: error: " in err


@pytest.mark.parametrize(
    "error", [Unreachable("the Hub"), TimeoutError("process 1"), ConnectionResetError("reset")]
)
def test_what_may_pass_by_itself_has_a_status_of_its_own(error, tmp_path, verb, capsys):
    """So that a launcher starts it again."""
    verb(fails(error))
    assert cli.main(["prompts", CONFIG, f"--workdir={tmp_path}"]) == 75
    assert capsys.readouterr().err.startswith("agfsync: error: ")


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out.startswith("agfsync_jax 0.")


@pytest.mark.parametrize("rest", [["--config.seed", "3"], ["--config.seed=3"]])
def test_a_key_and_its_value_in_one_word_or_two(rest, tmp_path, verb):
    calls = verb()
    assert cli.main(["prompts", CONFIG, f"--workdir={tmp_path}", *rest]) == 0
    assert calls[0][0].seed == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config():\n    return 1 / 0", "mine.py:2: return 1 / 0: ZeroDivisionError"),
        ("import nothing_there", "mine.py:1: import nothing_there: ModuleNotFoundError"),
        ("def get_config(:", "mine.py:1: def get_config(:: SyntaxError"),
        (
            "from configs import common\ndef get_config():\n    return common.lora(3)",
            "mine.py:3: return common.lora(3): TypeError",
        ),
    ],
)
def test_an_exception_in_a_config_shows_its_line(text, message, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(text)
    assert cli.main(["prompts", f"--config={tmp_path / 'mine.py'}", "--workdir=w"]) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err and err.count("\n") == 1


def test_a_defect_keeps_its_traceback(tmp_path, verb):
    verb(fails(KeyError("bug")))
    with pytest.raises(KeyError):
        cli.main(["prompts", CONFIG, f"--workdir={tmp_path}"])


def test_another_config_in_the_workdir(tmp_path, verb, capsys):
    verb()
    args = ["prompts", CONFIG, f"--workdir={tmp_path}"]
    assert cli.main(args) == 0
    (tmp_path / "round_000").mkdir()
    (tmp_path / "round_000" / "prompts.jsonl").touch()
    assert cli.main(args) == 0
    assert cli.main([*args, "--config.seed=1"]) == 2
    assert "seed: 0 there, 1 now" in capsys.readouterr().err


def test_ctrl_c_says_how_to_go_on(tmp_path, verb, capsys):
    verb(fails(KeyboardInterrupt()))
    workdir = tmp_path / "a folder"
    assert cli.main(["prompts", CONFIG, f"--workdir={workdir}"]) == 130
    err = capsys.readouterr().err
    assert f"agfsync prompts {CONFIG} '--workdir={workdir}'" in err and "Traceback" not in err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_stop_cleanly(number, code, tmp_path):
    script = (
        "import signal, sys, time, types\n"
        "from agfsync_jax import cli\n"
        # What a shell starts in the background ignores Ctrl-C, and so would this.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def main(*args, **kwargs):\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(600)\n"
        "sys.modules['agfsync_jax.prompts'] = types.SimpleNamespace(main=main)\n"
        f"sys.exit(cli.main(['prompts', {CONFIG!r}, '--workdir={tmp_path}']))\n"
    )
    command = [sys.executable, "-c", script]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=os.environ, **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        _, err = process.communicate(timeout=120)
    assert process.returncode == code
    assert "the same command goes on" in err and "Traceback" not in err


LONG = """
import contextlib, signal, sys, types
import jax
from agfsync_jax import cli
from agfsync_jax.utils.signals import hold_signals
signal.signal(signal.SIGINT, signal.default_int_handler)
turns = lambda count, turn: lambda x: jax.lax.fori_loop(0, count, lambda _, x: turn(x), x)
forever = jax.jit(turns(2**30, turns(2**30, jax.numpy.sin)))
holding = sys.argv.pop() == "held"
def main(*args, **kwargs):
    hold = hold_signals(signal.SIGTERM) if holding else contextlib.nullcontext()
    with hold:
        print("ready", flush=True)
        forever(1.0).block_until_ready()
sys.modules["agfsync_jax.prompts"] = types.SimpleNamespace(main=main)
sys.exit(cli.main())
"""


@pytest.mark.parametrize(
    ("number", "code", "kind"),
    [
        (signal.SIGINT, 130, "free"),
        (signal.SIGTERM, 143, "free"),
        (signal.SIGTERM, 143, "held"),
    ],
)
def test_a_device_that_is_busy_for_long_holds_nothing_up(number, code, kind, tmp_path):
    """Python's own handlers would wait for it."""
    command = [sys.executable, "-c", LONG, "prompts", CONFIG, f"--workdir={tmp_path}", kind]
    env = os.environ | {"AGFSYNC_STOP_SECONDS": "4"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=env, **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        time.sleep(2)
        began = time.monotonic()
        process.send_signal(number)
        try:
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
        assert time.monotonic() - began < 12
    assert process.returncode == code
    assert ("the step under way is saved if it ends within 4 s" in err) == (kind == "held")
    assert "the same command goes on" in err and "Traceback" not in err


def test_prompts_and_questions_run_alone(tmp_path, capsys):
    for name, file in (("prompts", "prompts.jsonl"), ("questions", "questions.jsonl")):
        args = [name, CONFIG, f"--workdir={tmp_path}", "--config.prompts.num_prompts=4"]
        assert cli.main(args) == 0
        assert (tmp_path / "round_000" / file).read_text()
        capsys.readouterr()
        assert cli.main(args) == 0
        assert "skipped 1 of 1" in capsys.readouterr().err


def test_help_lists_what_a_source_takes(capsys):
    with pytest.raises(SystemExit):
        cli.main(
            ["questions", "--help", "--config=configs/sd15.py", "--config.questions.source=llm"]
        )
    said = capsys.readouterr().out
    assert "--config.questions.style=yes_no" in said and "--config.questions.path" not in said
