"""Pictures while training: the same held-out prompts and seeds every time, and their scores."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw

from agfsync_jax import backbones
from agfsync_jax.diffusion.generation import row_seed
from agfsync_jax.evaluation.prompts import held_out
from agfsync_jax.parallel import multihost
from agfsync_jax.parallel.mesh import local_mesh
from agfsync_jax.parallel.sharding import round_up
from agfsync_jax.scoring import engine

_SHOWN = 16  # images of the grid
_COLUMNS = 4
_CAPTION = 14  # pixels below an image


class Validation:
    """Draws `config.train.num_validation_prompts` prompts of `config.evaluate` and scores them.

    The scorers and the parameters of `backbone`, all but its denoiser's, stay on the devices. Each
    process draws and scores its share.

    Raises:
        FileNotFoundError, ValueError: no prompts, or no weights of a scorer.
    """

    def __init__(self, config: Any, workdir: Path, mesh: Mesh, backbone: Any):
        rows, asked = held_out(config, workdir)
        ids = list(rows)[: config.train.num_validation_prompts]
        if len(ids) < jax.process_count():
            raise ValueError(
                f"config.train.num_validation_prompts={config.train.num_validation_prompts} and"
                f" {len(rows)} held-out prompts: expected one a process, {jax.process_count()}."
            )
        own = ids[multihost.process_slice(len(ids))]
        self._prompts = [rows[i]["prompt"] for i in own]
        self._questions = [asked.get(i, []) for i in own]
        self._seeds = [row_seed(config.seed, 0, i, 0) for i in own]
        self._frozen = dict(backbone.params)
        num_images = round_up(len(ids), jax.process_count())
        self._generator = backbones.generator(
            backbones.as_judged(config),
            mesh,
            backbone,
            conditioning_noise=0.0,
            num_images=num_images,
        )
        own_mesh = local_mesh(config.score.mesh)
        self._scorers = engine.load_scorers(
            own_mesh,
            config.scorers.to_dict(),
            batch_size=engine.batch_size(config, own_mesh, max(len(own), 1)),
        )

    def __call__(
        self, trained: dict[str, Any]
    ) -> tuple[dict[str, float], UInt8[np.ndarray, "h w 3"] | None]:
        """Mean scores over all prompts, and a grid of this process's first images."""
        params = self._frozen | trained
        # Processes may have one prompt more or less, and call the generator alike.
        perturb = [False] * len(self._prompts)
        batches = list(self._generator.stream(params, self._prompts, self._seeds, perturb))
        columns, grid = {}, None
        if batches:
            images = np.concatenate([batch[2] for batch in batches])
            columns, _ = engine.score_images(self._scorers, images, self._prompts, self._questions)
            grid = draw_grid(images[:_SHOWN], self._prompts)
        return {name: _mean(values) for name, values in columns.items()}, grid


@dataclasses.dataclass(frozen=True)
class HeldOutPairs:
    """Pairs of prompts that no step learns from: whether the policy tells those apart, too.

    They are taken with the same noise at every validation.
    """

    program: Callable[..., dict[str, Any]]  #: see `held_out_program`
    batch: Callable[[int], dict[str, Any]]
    weights: Float[np.ndarray, " batches"]  #: of batches in the mean, see `PairLoader.weights`

    def __call__(self, state: Any, frozen: Any) -> dict[str, float]:
        """held_out/loss and the loss's own metrics, such as held_out/accuracy."""
        rows = jax.device_get(
            [
                self.program(state, frozen, self.batch(index), np.int32(index))
                for index in range(len(self.weights))
            ]
        )
        return {
            f"held_out/{name.removeprefix('rewards/')}": float(
                np.average([row[name] for row in rows], weights=self.weights)
            )
            for name in rows[0]
            if name == "loss" or name.startswith("rewards/")
        }


def _mean(values: np.ndarray) -> float:
    """Over all processes, without what is not finite."""
    values = values[np.isfinite(values)].astype(np.float64)
    total = np.array([values.sum(), len(values)])
    if jax.process_count() > 1:
        total = multihost_utils.process_allgather(total).sum(axis=0)
    return float(total[0] / total[1]) if total[1] else float("nan")


def draw_grid(
    images: UInt8[np.ndarray, "b h w 3"], captions: list[str]
) -> UInt8[np.ndarray, "H W 3"]:
    """Images in rows of four, each over the beginning of its caption."""
    _, height, width, _ = images.shape
    scale = max(1, 128 // width)  # small ones would be too small for their captions
    height, width = height * scale, width * scale
    rows = math.ceil(len(images) / _COLUMNS)
    sheet = Image.new("RGB", (_COLUMNS * width, rows * (height + _CAPTION)), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (image, text) in enumerate(zip(images, captions, strict=False)):
        left, top = index % _COLUMNS * width, index // _COLUMNS * (height + _CAPTION)
        picture = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(picture, (left, top))
        while text and draw.textlength(text) > width - 4:
            text = text[:-1]
        draw.text((left + 2, top + height + 1), text, fill="black")
    return np.asarray(sheet)
