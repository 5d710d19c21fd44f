"""Several processes on one machine, as a pod's: two fake devices each."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def grouped(count=2):
    """The environments of `count` processes that find each other."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2"),
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(count),
    }
    return [env | {"JAX_PROCESS_ID": str(index)} for index in range(count)]


def run_processes(program, *arguments, count=2):
    """Runs a program in each of `count` processes that find each other; the JSON that each prints
    last. The program calls `multihost.initialize()` before it touches a device.
    """
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, *map(str, arguments)],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            text=True,
        )
        for env in grouped(count)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0].splitlines() for process in processes]
        # the network library of JAX on CPU prints at any time, also as the process ends
        told = [[line for line in lines if not line.startswith("[Gloo]")] for lines in outputs]
        return [json.loads(lines[-1]) for lines in told]
    finally:
        for process in processes:
            process.kill()
