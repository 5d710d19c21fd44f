"""Whether a verb has room here: memory of the devices, disk of the workdir; and what is dear."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
from ml_collections import ConfigDict

from agfsync_jax import backbones
from agfsync_jax.plans import _holdings
from agfsync_jax.plans._tables import gib
from agfsync_jax.training import inversion
from agfsync_jax.utils.files import is_url, to_path

DRAWS = ("run", "sample", "evaluate")  # verbs that draw, and those that train
TRAINS = ("run", "train")


def room(config: ConfigDict, verb: str, workdir: Path) -> list[str]:
    """What the devices' memory or the disk of this machine is too small for."""
    on_device, on_disk = trained_bytes(config, verb)
    return [*memory(config, verb, on_device), *disk(config, verb, workdir, on_disk)]


def trained_bytes(config: ConfigDict, verb: str) -> tuple[int, int]:
    """What a training keeps on a device, and in a checkpoint; zeros where there is none."""
    if verb in TRAINS:
        with contextlib.suppress(FileNotFoundError):  # sizes that nothing here tells
            return _holdings.training_bytes(config, jax.devices())
    return 0, 0


def memory(config: ConfigDict, verb: str, trained: int) -> Iterator[str]:
    """Weights that the devices cannot hold, whatever the batch.

    Args:
        trained: bytes that a training keeps on a device.
    """
    devices = jax.devices()
    limit = _holdings.memory(jax.local_devices()[0])
    wanted: list[tuple[str, int, str]] = []
    unknown = contextlib.suppress(FileNotFoundError)
    if verb in DRAWS:
        with unknown:
            held = _holdings.drawing_bytes(config, devices)
            wanted.append(("the model that draws", held, "config.sample.param_dtype=bfloat16"))
    if verb in ("run", "score", "evaluate"):
        with unknown:
            held = _holdings.scoring_bytes(config, jax.local_devices())
            wanted.append(("the scorers", held, "a smaller BLIP-2, a scorer's dtype=bfloat16"))
    helps = "config.train.lora_rank=8, config.train.optimizer=adafactor"
    wanted.append(("what is trained, with moments and gradients,", trained, helps))
    for what, held, helps in wanted:
        if limit is not None and held > limit:
            yield (
                f"{what} takes {gib(held)} of a device without any batch, and there are"
                f" {gib(limit)}: what helps is {helps}, or weights split over more devices"
                " (config.mesh.fsdp, config.score.mesh.fsdp)."
            )


def disk(config: ConfigDict, verb: str, workdir: Path, checkpoint: int) -> Iterator[str]:
    """Files that have no room where the workdir is.

    Args:
        checkpoint: bytes of one of a training.
    """
    workdir = to_path(workdir)
    if is_url(workdir):
        return
    wanted = {}
    if verb in ("run", "sample") and not config.pair.path:
        wanted["candidates"] = _holdings.drawn_bytes(config)
    if verb in TRAINS:
        saves = max(1, config.train.num_steps // config.train.save_every)
        wanted["checkpoints"] = checkpoint * min(config.train.keep + 1, saves)
        if config.train.inversion_steps:
            timesteps = inversion.wanted(config, backbones.schedule(config))
            wanted["inversion"] = _holdings.inversion_bytes(config, len(timesteps))
    folder = next(path for path in (workdir, *workdir.absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    rounds = config.rounds if verb == "run" else 1
    needed = rounds * sum(wanted.values())
    if needed > free:  # what is there already needs no more room
        made = (path for name in wanted for path in workdir.glob(f"round_*/{name}/**/*"))
        needed -= sum(path.stat().st_size for path in made if path.is_file())
    if needed > free:
        told = ", ".join(f"{name} {gib(size)} a round" for name, size in wanted.items())
        yield (
            f"--workdir={workdir} needs about {gib(needed)} of disk ({told}), and {gib(free)} are"
            " free there: take another disk, or lower config.prompts.num_prompts,"
            " config.sample.num_candidates or config.train.keep."
        )


def advice(config: ConfigDict, verb: str) -> Iterator[str]:
    """What works, and costs more than it seems to."""
    if jax.devices()[0].platform != "cpu":
        return
    dtypes = {f"config.scorers.{name}": spec for name, spec in config.scorers.items()}
    if verb in ("run", "score", "evaluate"):
        for block, spec in dtypes.items():
            if spec.get("dtype", "float32") != "float32":
                yield (
                    f"{block}.dtype={spec.dtype}: on CPUs XLA keeps a float32 copy of such weights,"
                    " so that float32 takes less memory, and is faster."
                )
    if verb in DRAWS and config.sample.param_dtype != "float32":
        yield (
            f"config.sample.param_dtype={config.sample.param_dtype}: on CPUs XLA keeps a float32"
            " copy of such weights, so that float32 takes less memory, and is faster."
        )
