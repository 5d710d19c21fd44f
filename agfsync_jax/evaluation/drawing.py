"""The images of an evaluation: every model draws the same prompts from the same seeds."""

import functools
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from agfsync_jax import backbones
from agfsync_jax.data.candidates import Shard, draw_candidates, plan_shards
from agfsync_jax.diffusion.generation import row_seed
from agfsync_jax.utils.clock import Stage


def plan_images(config: Any, prompt_ids: Sequence[str], folder: Path) -> list[Shard]:
    """All shards of a model's images, `config.evaluate.num_seeds` a prompt."""
    return plan_shards(
        folder,
        prompt_ids,
        prompts_per_shard=config.sample.prompts_per_shard,
        num_candidates=config.evaluate.num_seeds,
        seed_of=functools.partial(row_seed, config.seed, 0),
    )


def draw_images(
    config: Any,
    mesh: Mesh,
    backbone: Any,
    params: Mapping[str, Any],
    shards: Mapping[str, Sequence[Shard]],
    undrawn: Collection[Path],
    prompts: Mapping[str, str],
    stage: Stage,
    num_images: int,
) -> None:
    """Draws unperturbed images, with the sampler's settings of `config.sample`.

    Args:
        config: that of `backbones.as_judged`.
        params: model -> its parameters of the backbone.
        shards: model -> the shards that are this process's; the processes draw together.
        undrawn: those to write.
        prompts: prompt id -> text.
        num_images: a model's, that all processes have to draw at once, at most.
    """
    generator = backbones.generator(
        config, mesh, backbone, conditioning_noise=0.0, num_images=num_images
    )
    missing = [shard for found in shards.values() for shard in found if shard.path in undrawn]
    with stage.progress(sum(len(shard.rows) for shard in missing)) as progress:
        for model, weights in params.items():
            for count in draw_candidates(
                generator, weights, shards[model], undrawn, prompts, config.evaluate.num_seeds
            ):
                progress.update(count)
