"""Several processes: start them together, know which one this is, wait for and watch one another.

Everything here also holds for a single process, so that callers need no second case. Processes talk
through the key-value store of JAX's coordination service, which lives in process 0.
"""

import contextlib
import functools
import itertools
import json
import os
import re
import socket
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from agfsync_jax.parallel import watch

START_SECONDS = 300  # for all processes to start
BARRIER_SECONDS = 6 * 3600  # more than any process works while another one waits
_STORE = "agfsync/start"
_barriers, _stops = itertools.count(), itertools.count()


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Joins the other processes, unless that is done; must run before the first use of a device.

    The three values come from the arguments or from JAX_COORDINATOR_ADDRESS ("host:port"),
    JAX_NUM_PROCESSES and JAX_PROCESS_ID. With AGFSYNC_DISTRIBUTED=1 and none of them, JAX asks
    the cluster (TPU pod, GKE, Slurm, Open MPI). With nothing set this is a single process.

    Raises:
      ValueError: only some of the three values are given, or one is not a number.
    """
    if jax.distributed.is_initialized():
        return
    values = {
        "JAX_COORDINATOR_ADDRESS": coordinator_address,
        "JAX_NUM_PROCESSES": num_processes,
        "JAX_PROCESS_ID": process_id,
    }
    values = {k: os.environ.get(k) or None if v is None else v for k, v in values.items()}
    missing = [name for name, value in values.items() if value is None]
    if len(missing) == len(values):
        if os.environ.get("AGFSYNC_DISTRIBUTED", "0") in ("", "0"):
            return
        values = {}
    elif missing:
        raise ValueError(
            f"Several processes need all of {', '.join(values)}; missing: {', '.join(missing)}. "
            "Set them all, or none for a single process."
        )
    for name in values.keys() - {"JAX_COORDINATOR_ADDRESS"}:
        if not str(values[name]).isdecimal():
            raise ValueError(f"{name} must be a whole number, got {values[name]!r}.")
        values[name] = int(values[name])
    if values:
        # XLA's CPU backend has no cross-process collectives of its own.
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        # Two programs in flight would talk through the same sockets, and mix up what they say.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    # It would take SIGTERM from whoever saves the work.
    jax.config.update("jax_enable_preemption_service", False)
    address, count, index = values.values() or (None, None, None)
    which = f"process {index} of {count} joins {address}" if values else "joins the cluster's group"
    print(f"agfsync: {which}", file=sys.stderr, flush=True)
    watch.leave_last_words(
        f"not all processes came together within {START_SECONDS} s. Those that did not are the"
        " `timed out task names` above: look at their logs. Where no name stands, process 0 was not"
        " reached."
    )
    with _registration_limit(START_SECONDS):
        limit = START_SECONDS + 30  # the service speaks first
        jax.distributed.initialize(address, count, index, initialization_timeout=limit)


@contextlib.contextmanager
def _registration_limit(seconds: int) -> Iterator[None]:
    """Inside, JAX's coordination service waits so long for all, and names those who did not come.

    Its own limit is longer than that of the processes, who know no names; JAX does not hand it on.
    """
    from jax._src.lib import _jax

    create = _jax.get_distributed_runtime_service
    limited = functools.partial(create, cluster_register_timeout=seconds)
    _jax.get_distributed_runtime_service = limited
    try:
        yield
    finally:
        _jax.get_distributed_runtime_service = create


def agree(facts: Mapping[str, Any]) -> None:
    """Compares what must be the same in several processes, then watches over them (watch.py).

    Raises:
      ValueError: in every process, where facts differ; names the processes and the facts.
      TimeoutError: a process did not come.
    """
    store, me = _client(), jax.process_index()
    mine = {"host": socket.gethostname()} | dict(facts)
    store.key_value_set(f"{_STORE}/{me}", json.dumps(mine, default=str))
    barrier("start", START_SECONDS)
    found = store.key_value_dir_get(f"{_STORE}/")
    found = {int(key.rpartition("/")[2]): json.loads(value) for key, value in found}
    told = [found[index] for index in sorted(found)]
    names = [f"process {i} of {len(told)} ({each['host']})" for i, each in enumerate(told)]
    if differences := _differences(told, names):
        raise ValueError(
            "\n".join(["the processes were not started alike:", *differences])
            + "\nStart the same command, with the same code, on all of them."
        )
    watch.start(store, names)


def _differences(told: Sequence[Mapping[str, Any]], names: list[str]) -> list[str]:
    """A line for every process and fact unlike what most processes say."""
    lines = []
    for fact in sorted(set().union(*told) - {"host"}):
        said = [json.dumps(each.get(fact)) for each in told]
        usual = Counter(said).most_common(1)[0][0]  # of equally many the one of process 0
        for name, value in zip(names, said, strict=True):
            if value != usual:
                lines.append(f"  {name}: {fact} is {value}, elsewhere {usual}")
    return lines


def several() -> bool:
    """Whether this is one of several processes."""
    return jax.process_count() > 1


def is_main() -> bool:
    """Whether this is the process that writes what is written once."""
    return jax.process_index() == 0


def barrier(name: str, seconds: float = BARRIER_SECONDS) -> None:
    """Returns once every process has called it with the same name.

    Raises:
      TimeoutError: some did not in time; names them.
    """
    if not several():
        return
    try:
        _client().wait_at_barrier(f"agfsync {name} {next(_barriers)}", int(seconds * 1000))
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        late = re.search(r"timed out task names:\n((?:.+\n)+)", str(error))
        late = re.findall(r"(\d+)$", late[1], re.MULTILINE) if late else ["?"]
        raise TimeoutError(
            f"process {', '.join(late)} of {jax.process_count()} did not come to {name!r} within"
            f" {seconds:.0f} s: look at its log, then start the same command on all of them."
        ) from error


class StopTogether:
    """Tells every process to stop after the same step, once any of them wants to.

        stop = StopTogether()
        for step in ...:
            ...  # dispatches a step, and has read what the step before gave, on all devices
            if stop(step, wanted):
                break

    No process is more than a step ahead of another: a step's result takes all of them.
    """

    def __init__(self):
        self._key, self._told = f"agfsync/stop/{next(_stops)}/step", False

    def __call__(self, step: int, wanted: bool) -> bool:
        if not several():
            return wanted
        store = _client()
        if wanted and not self._told:
            self._told = True
            try:
                store.key_value_set(self._key, str(step + 2))
            except jax.errors.JaxRuntimeError as error:
                if "ALREADY_EXISTS" not in str(error):
                    raise
        found = store.key_value_dir_get(self._key.rpartition("/")[0] + "/")
        return bool(found) and step >= int(found[0][1])


def process_slice(num_items: int) -> slice:
    """This process's contiguous share of `num_items` rows; shares differ by at most one row."""
    count, index = jax.process_count(), jax.process_index()
    return slice(num_items * index // count, num_items * (index + 1) // count)


def shards_of_process(num_shards: int) -> range:
    """The shards that this process makes, interleaved so that work ends evenly."""
    return range(jax.process_index(), num_shards, jax.process_count())


def _client() -> Any:
    from jax._src import distributed  # JAX has no public name for it

    return distributed.global_state.client
