"""Every test runs on 8 fake CPU devices and fails on implicit rank promotion."""

import functools
import gc
import os
import signal
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's would take the cores from other tests
# The compiler takes most of the tests' time: half of it goes into code that runs once.
for _flag in (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",  # the former emitters compile in half the time
):
    if _flag.split("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}".strip()

import jax  # noqa: E402  (the flags above must be set before)
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
# A shell's background jobs inherit an interrupt that is ignored, and so would all they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish(session):
    gc.freeze()  # what is imported stays, and is a million objects to look through otherwise


# Minutes each: begun last, one of them would leave the other process waiting.
_LONGEST = (
    "pod_test",
    "plan_test",
    "step_test",
    "unet_test",
    "bench_test",
    "train_test",
    "export_test",
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not item.path.stem.startswith(_LONGEST))


@pytest.fixture(scope="session", autouse=True)
def compile_once(tmp_path_factory):
    """As on the command line, a program is compiled once, for all tests and what they start.

    It is kept for the next run, too; AGFSYNC_CACHE="" compiles everything anew.
    """
    programs = os.environ.get("AGFSYNC_CACHE", str(Path.home() / ".cache/agfsync_jax/tests"))
    programs = programs or str(tmp_path_factory.mktemp("programs"))
    os.environ["AGFSYNC_CACHE"] = programs
    for name, value in (
        ("jax_compilation_cache_dir", programs),
        ("jax_compilation_cache_max_size", 4 * 2**30),
        ("jax_persistent_cache_min_compile_time_secs", 0.2),
    ):
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)  # for programs that are not the command line's


@pytest.fixture
def interpreter(monkeypatch):
    """Pallas kernels for TPUs run as plain XLA programs."""
    from jax.experimental import pallas

    call = functools.partial(pallas.pallas_call, interpret=True)
    monkeypatch.setattr(pallas, "pallas_call", call)
