"""Several processes that start unlike, come late, are killed or are told to stop."""

import json
import signal
import subprocess
import sys
import time

import pytest

from agfsync_jax.parallel import watch
from tests.processes import ROOT, grouped

HEAD = """
import json, sys, time
from agfsync_jax.parallel import multihost, watch
watch.BEAT_SECONDS, watch.LOST_SECONDS = 0.2, 3.0
multihost.START_SECONDS = {seconds}
multihost.initialize()
import jax
me = jax.process_index()
"""


def start(program, count=2, seconds=300):
    """The processes, which print to files of their own; `seconds` for all to start."""
    program = HEAD.format(seconds=seconds) + program
    return [
        subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for env in grouped(count)
    ]


def ends(processes):
    """(status, stdout, stderr) of each."""
    try:
        told = [process.communicate(timeout=60) for process in processes]
        return [(p.returncode, *each) for p, each in zip(processes, told, strict=True)]
    finally:
        for process in processes:
            process.kill()


def test_processes_that_were_started_unlike_say_how():
    found = ends(
        start(
            """
from agfsync_jax import cli
def run(argv):
    multihost.agree({"verb": "train", "config.seed": me == 2, "--workdir": "w"})
cli._run = run
sys.exit(cli.main([]))
""",
            count=3,
        )
    )
    for status, _, error in found:
        assert status == 2
        assert "were not started alike:\n  process 2 of 3 (" in error
        assert "): config.seed is true, elsewhere false" in error
        assert "workdir" not in error


def test_a_barrier_says_who_is_missing():
    found = ends(
        start("""
if me == 0:
    try:
        multihost.barrier("sample", seconds=1)
    except TimeoutError as error:
        print(error)
else:
    time.sleep(2)
watch._leave(0)
""")
    )
    assert "process 1 of 2 did not come to 'sample' within 1 s" in found[0][1]


def test_the_start_says_who_is_missing():
    processes = start("", count=4, seconds=15)
    for late in processes[1], processes[3]:
        late.kill()
    for status, _, error in ends([processes[0], processes[2]]):
        assert status != 0
        names = error.partition("Some timed out task names:\n")[2]
        assert sorted(names.splitlines()[:2]) == ["1", "3"]
        last = error.splitlines()[-1]
        assert last.startswith("agfsync: error: not all processes came together within 15 s")


WAIT = """
multihost.agree({})
print("watching", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_is_killed_the_other_says_so_and_ends(victim):
    processes = start(WAIT)
    for process in processes:
        while "watching" not in process.stdout.readline():
            assert process.poll() is None
    time.sleep(1)
    before = time.monotonic()
    processes[victim].kill()
    found = ends(processes)
    assert time.monotonic() - before < 20
    status, _, error = found[1 - victim]
    assert "What is done is kept: the same command on all processes goes on" in error
    if victim:
        assert status == watch.GONE
        assert "process 1 of 2 (" in error and "is gone: nothing was heard of it for 3 s" in error
    else:  # JAX aborts where its coordinator is gone
        assert status == -signal.SIGABRT
        assert "was killed, or stopped because process 0 of 2 (" in error
    assert f"process {victim} of 2 (" in found[victim][2] and "was killed" in found[victim][2]


def test_an_error_of_one_process_is_told_by_the_other():
    found = ends(
        start("""
multihost.agree({})
if me == 1:
    watch.stop("stopped with an error: no such file", 2)
time.sleep(60)
""")
    )
    assert [status for status, _, _ in found] == [watch.GONE, 2]
    assert "process 1 of 2 (" in found[0][2]
    assert "stopped with an error: no such file" in found[0][2]
    assert "was killed" not in found[1][2]


def test_a_failed_computation_waits_for_the_verdict():
    """What fails because another process is gone is told as that, without a traceback."""
    found = ends(
        start("""
multihost.agree({})
if me == 1:
    import os
    time.sleep(0.5)
    os.kill(os.getpid(), 9)
time.sleep(1)
with watch.explained():
    raise jax.errors.JaxRuntimeError("Gloo: connection closed by peer")
""")
    )
    assert found[0][0] == watch.GONE
    assert "process 1 of 2 (" in found[0][2] and "is gone" in found[0][2]
    assert "Traceback" not in found[0][2]


def test_all_stop_after_the_same_step():
    found = ends(
        start("""
import numpy as np
from jax.experimental import multihost_utils
stop = multihost.StopTogether()
done = []
for step in range(1, 30):
    multihost_utils.process_allgather(np.array(step))
    done.append(step)
    if stop(step, me == 1 and step >= 5):
        break
print(json.dumps(done[-1]))
""")
    )
    assert [json.loads(out.splitlines()[-1]) for _, out, _ in found] == [7, 7]


def test_one_process_stops_when_it_wants():
    from agfsync_jax.parallel import multihost

    stop = multihost.StopTogether()
    assert not stop(1, False) and stop(2, True)
    assert not multihost.several()
    watch.stop("nobody listens", 2)
    with pytest.raises(KeyError), watch.explained():
        raise KeyError("a defect")
