"""The noise that an image seems to be made of: DDIM inversion (InPO, arXiv:2503.18454).

Instead of random noise, a pair's images are learned with the noise that leads the reference to
them: its own sampler, taken backwards, as diffusers' DDIMInverseScheduler does. Here that is done
once, before the first step, by the model that the round begins with; the paper's released code does
it anew in each step, by the policy, adds a tenth of random noise and draws timesteps between those
of the inversion.
"""

import errno
import io
import json
import math
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float16, Int

from agfsync_jax.data.embeddings import to_half
from agfsync_jax.data.loader import PairLoader
from agfsync_jax.data.records import megabytes, write_file
from agfsync_jax.diffusion.schedules import Schedule
from agfsync_jax.parallel import multihost
from agfsync_jax.training.objective import timesteps_of
from agfsync_jax.utils.clock import Stage
from agfsync_jax.utils.files import is_url, read_json, remove_tree, write_text

_NOTE = "inversion.json"  # what the files beside it are of
_INSTEAD = "set config.train.inversion_steps=0"
_THREADS = 16  # in a bucket each read waits for the network


def grid(schedule: Schedule, num_steps: int) -> Int[np.ndarray, " k"]:
    """The timesteps of an inversion in so many steps, from the first: "leading", as diffusers'."""
    stride = schedule.num_train_timesteps // num_steps
    return np.arange(num_steps) * stride + schedule.config.get("steps_offset", 0)


def wanted(config: Any, schedule: Schedule) -> Int[np.ndarray, " n"]:
    """Which of the grid's timesteps are learned: those that `config.train.timesteps` names.

    Raises:
        ValueError: none of them; more steps than there are timesteps; a model that predicts images.
    """
    spec, num = config.train, schedule.num_train_timesteps
    if schedule.prediction_type == "sample":
        raise ValueError(
            f"config.train.inversion_steps={spec.inversion_steps}: a model that predicts images has"
            " no inversion; set it to 0."
        )
    if spec.inversion_steps > num or grid(schedule, spec.inversion_steps)[-1] >= num:
        raise ValueError(
            f"config.train.inversion_steps={spec.inversion_steps} leads beyond the model's {num}"
            " timesteps: take fewer steps, such as 10."
        )
    every = grid(schedule, spec.inversion_steps)
    possible = np.isin(every, timesteps_of(spec.timesteps, num))
    if not possible.any():
        raise ValueError(
            f"config.train.timesteps={spec.timesteps!r} has none of the timesteps of an inversion"
            f" in config.train.inversion_steps={spec.inversion_steps}: {every.tolist()}."
        )
    return every[possible]


def invert(
    denoise: Callable[[Array, Array], Array],
    schedule: Schedule,
    latents: Float[Array, "b h w c"],
    timesteps: Int[np.ndarray, " k"],
) -> Float[Array, "b k h w c"]:
    """The noise eps in x_t = sqrt(a_t) latents + sqrt(1 - a_t) eps, at each of the timesteps.

    Args:
        denoise: (x [b, h, w, c], timesteps [b]) -> prediction, given the prompt, without guidance.
        timesteps: see `grid`; from one to the next is a step of DDIM backwards, whose prediction is
            taken at the next.
    """
    alphas = np.concatenate([[1.0], schedule.alphas_cumprod[timesteps].astype(np.float64)])
    signal, sigma = np.sqrt(alphas), np.sqrt(1 - alphas)
    levels = np.stack([signal[:-1], sigma[:-1], signal[1:], sigma[1:]], axis=1).astype(np.float32)
    form = schedule.parameterization

    def step(x, row):
        time, (signal, sigma, next_signal, next_sigma) = row
        prediction = denoise(x, jnp.full(len(x), time))
        clean = form.clean(x, prediction, signal, sigma)
        x = next_signal * clean + next_sigma * form.noise(x, prediction, signal, sigma)
        return x, (x - next_signal * latents) / next_sigma

    _, noise = jax.lax.scan(step, latents, (jnp.asarray(timesteps), jnp.asarray(levels)))
    return jnp.moveaxis(noise, 0, 1)


class InvertedNoise:
    """The noise of a loader's examples (see `data.loader.Noise`) in files, read where it is wanted.

    A file is float16 [rows, n, k, h, w, c], at n timesteps.
    """

    def __init__(
        self, folder: Path, rows: int, timesteps: Int[np.ndarray, " n"], shape: tuple[int, ...]
    ):
        self.folder, self.rows, self.timesteps, self.shape = folder, rows, timesteps, shape
        self._size = 2 * math.prod(shape)  # bytes of an example's at one timestep
        self.file_size = rows * len(timesteps) * self._size  # without a header
        self._pool = ThreadPoolExecutor(_THREADS)

    def path(self, index: int) -> Path:
        return self.folder / f"{index:06d}.npy"

    def __call__(
        self, examples: Int[np.ndarray, " b"], places: Int[np.ndarray, " b"]
    ) -> Float[np.ndarray, "b k h w c"]:
        found = self._pool.map(self._read, examples.tolist(), places.tolist())
        return np.stack(list(found)).astype(np.float32)

    def _read(self, example: int, place: int) -> Float16[np.ndarray, "k h w c"]:
        index, row = divmod(example, self.rows)
        before = (row * len(self.timesteps) + place) * self._size
        with self.path(index).open("rb") as file:
            file.seek(before - self.file_size, os.SEEK_END)
            return np.frombuffer(file.read(self._size), np.float16).reshape(self.shape)


def inverted_noise(
    folder: Path,
    loader: PairLoader,
    program: Callable[[Int[np.ndarray, " b"]], Array],
    timesteps: Int[np.ndarray, " k"],
    wanted: Int[np.ndarray, " n"],
    made_by: Any,
) -> InvertedNoise:
    """The noise of a loader's examples; what is missing of it is made.

    All processes make it together, and one writes.

    Args:
        folder: of the noise, two below the round's. Another model's, or that of other pairs or
            timesteps, is made anew.
        program: examples, `loader.part_size` of them -> their images' noise [b, n, k, h, w, c] at
            the timesteps that are wanted, on every process.
        timesteps: of the inversion.
        wanted: those of them whose noise is kept.
        made_by: names the model.

    Raises:
        ValueError: noise that does not fit float16.
        OSError: a disk without room for it.
    """
    rows, parts = loader.batch_size, loader.batch_size // loader.part_size
    told = {"timesteps": timesteps.tolist(), "wanted": wanted.tolist(), "rows": rows}
    told |= {"pairs": loader.fingerprint(), "made_by": made_by}
    found = InvertedNoise(folder, rows, wanted, loader.latents_shape)
    if multihost.is_main() and read_json(folder / _NOTE) != told:
        remove_tree(folder)
        write_text(folder / _NOTE, json.dumps(told) + "\n")
    multihost.barrier("inversion")
    files = range(math.ceil(loader.num_pairs / rows))
    missing = [index for index in files if not found.path(index).exists()]
    needed = len(missing) * found.file_size
    if not is_url(folder) and (free := shutil.disk_usage(folder).free) < needed:
        raise OSError(
            errno.ENOSPC,
            f"{folder} needs {megabytes(needed)} and {megabytes(free)} are free: make room, lower"
            f" config.train.inversion_steps, or {_INSTEAD}",
        )
    multihost.barrier("inversion plan")  # every process has looked before the main one writes
    with Stage(folder.parent.parent, "inversion", unit="pairs") as stage:
        stage.skipped((len(files) - len(missing)) * rows, len(files) * rows, "pairs")
        with stage.progress(len(missing) * rows) as progress:
            for index in missing:
                examples = np.arange(index * rows, (index + 1) * rows) % loader.num_pairs
                made = []
                for part in np.split(examples, parts):
                    noise = jax.device_get(program(part))
                    made.append(to_half(noise, "inverted noise", _INSTEAD))
                    progress.update(len(part))
                if multihost.is_main():
                    data = io.BytesIO()
                    np.save(data, np.concatenate(made))
                    write_file(found.path(index), [data.getvalue()])
    multihost.barrier("inversion done")
    return found
