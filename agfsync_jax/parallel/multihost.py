"""Several processes: start them together, know which one this is, wait for one another.

Everything here also holds for a single process, so that callers need no second case.
"""

import os

import jax
from jax.experimental import multihost_utils


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Joins the other processes; must run before the first use of a device.

    The three values come from the arguments or from JAX_COORDINATOR_ADDRESS ("host:port"),
    JAX_NUM_PROCESSES and JAX_PROCESS_ID. With AGFSYNC_DISTRIBUTED=1 and none of them, JAX asks
    the cluster (TPU pod, GKE, Slurm, Open MPI). With nothing set this is a single process, and
    with a group already joined there is nothing left to do.

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
        if os.environ.get("AGFSYNC_DISTRIBUTED", "0") not in ("", "0"):
            jax.distributed.initialize()
        return
    if missing:
        raise ValueError(
            f"Several processes need all of {', '.join(values)}; missing: {', '.join(missing)}. "
            "Set them all, or none for a single process."
        )
    for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        if not str(values[name]).isdecimal():
            raise ValueError(f"{name} must be a whole number, got {values[name]!r}.")
    # XLA's CPU backend has no cross-process collectives of its own.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        str(values["JAX_COORDINATOR_ADDRESS"]),
        int(values["JAX_NUM_PROCESSES"]),
        int(values["JAX_PROCESS_ID"]),
    )


def is_main() -> bool:
    """Whether this is the process that writes what is written once."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Returns once every process has called it with the same name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def process_slice(num_items: int) -> slice:
    """This process's contiguous share of `num_items` rows; shares differ by at most one row."""
    count, index = jax.process_count(), jax.process_index()
    return slice(num_items * index // count, num_items * (index + 1) // count)


def shards_of_process(num_shards: int) -> range:
    """The shards that this process makes, interleaved so that work ends evenly."""
    return range(jax.process_index(), num_shards, jax.process_count())
