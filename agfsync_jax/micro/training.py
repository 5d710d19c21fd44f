"""How the suite trains a network, and the small steps that its stages share."""

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from agfsync_jax.data.images import OPENAI_MEAN, OPENAI_STD
from agfsync_jax.micro import referee
from agfsync_jax.micro.drawing import render
from agfsync_jax.micro.grammar import Scene
from agfsync_jax.micro.scenes import sample_scenes
from agfsync_jax.training.checkpoints import Checkpoints
from agfsync_jax.utils.clock import Stage
from agfsync_jax.weights import networks as weights

PyTree = Any
Batch = dict[str, np.ndarray]
SAVE_EVERY = 250


def untrained(network: type, folder: Path, seed: int) -> tuple[nnx.GraphDef, nnx.State]:
    """A network of the sizes of the folder's config.json, with random parameters."""
    config = weights.read_json(folder / "config.json")
    return weights.init_model(network, network.config_class.from_dict(config), seed=seed)


def save(network: type, folder: Path, params: nnx.State, **settings: Any) -> None:
    """Writes a network as float16 next to its config.json, in which `settings` change."""
    config = weights.read_json(folder / "config.json") | settings
    weights.save_model(network, folder, params, config, dtype=np.float16)


def join(*parts: Mapping[str, Any]) -> nnx.State:
    """The parameters of a network whose parts are trained apart, name by name."""
    return nnx.State({name: part[name] for part in parts for name in part})


def split(params: nnx.State, *names: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The named parts of a network's parameters, and the rest."""
    named = {name: params[name] for name in names}
    return named, {name: part for name, part in params.items() if name not in names}


def fit(
    name: str,
    workdir: Path,
    params: PyTree,
    loss_fn: Callable[[PyTree, Batch, jax.Array], jax.Array],
    make_batch: Callable[[np.random.Generator], Batch],
    *,
    steps: int,
    learning_rate: float,
    ema: float,
    weight_decay: float = 0.01,
) -> PyTree:
    """Minimizes `loss_fn(params, batch, key)` with AdamW, warm-up and cosine decay.

    Batch and key are functions of the step, so a resumed run sees what an uninterrupted one would.
    Returns the parameters' moving average of decay `ema`.
    """
    rate = optax.warmup_cosine_decay_schedule(0.0, learning_rate, min(100, steps // 4), steps)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.99, weight_decay=weight_decay)
    )

    def update(state, batch, key):
        loss, grads = jax.value_and_grad(loss_fn)(state["params"], batch, key)
        updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        averaged = optax.incremental_update(params, state["ema"], 1 - ema)
        return {"params": params, "ema": averaged, "opt_state": opt_state}, loss

    update = jax.jit(update, donate_argnums=0)
    with Checkpoints(workdir / name) as checkpoints, Stage(workdir, name, unit="steps") as stage:
        averaged = jax.tree.map(jnp.copy, params)  # since the state is donated
        state = {"params": params, "ema": averaged, "opt_state": optimizer.init(params)}
        start = checkpoints.latest_step() or 0
        if start:
            state = checkpoints.restore(start, state)
            stage.skipped(start, steps, "steps")
        losses: list[jax.Array] = []
        with stage.progress(steps - start) as progress:
            for step, batch in enumerate(_ahead(make_batch, start, steps), start):
                key = jax.random.fold_in(jax.random.key(0), step)
                state, loss = update(state, batch, key)
                losses.append(loss)
                if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
                    mean = float(np.mean(jax.device_get(losses)))
                    losses.clear()
                    if not np.isfinite(mean):
                        raise FloatingPointError(f"{name}: the loss is {mean} by step {step + 1}")
                    stage.print(f"step {step + 1}: loss {mean:.4f}")
                    checkpoints.save(step + 1, state)
                progress.update()
    return state["ema"]


def _ahead(make_batch, start: int, steps: int) -> Iterator[Batch]:
    """The batches of steps start..steps, made on a thread while the device works."""

    def make(step: int) -> Batch:
        return make_batch(np.random.default_rng((0, step)))

    with ThreadPoolExecutor(1) as pool:
        futures = (pool.submit(make, step) for step in range(start, steps))
        waiting = deque(itertools.islice(futures, 2))
        while waiting:
            batch = waiting.popleft().result()
            waiting.extend(itertools.islice(futures, 1))
            yield batch


def clip_pixels(images: jax.Array) -> jax.Array:
    """uint8 images normalized as CLIP and BLIP-2 take them."""
    mean, std = jnp.asarray(OPENAI_MEAN), jnp.asarray(OPENAI_STD)
    return (images.astype(jnp.float32) / 255.0 - mean[None, None, None]) / std[None, None, None]


def in_batches(function, *arrays: np.ndarray, size: int = 64) -> np.ndarray:
    """Applies a jitted function of [size, ...] arrays to longer ones, padding the last batch."""
    outs, count = [], len(arrays[0])
    for start in range(0, count, size):
        parts = [each[start : start + size] for each in arrays]
        short = size - len(parts[0])
        parts = [np.concatenate([part, np.repeat(part[-1:], short, 0)]) for part in parts]
        outs.append(np.asarray(function(*parts)))
    return np.concatenate(outs)[:count]


def renders(
    count: int, split: str, seed: int | np.random.Generator
) -> tuple[list[Scene], np.ndarray]:
    """Scenes of a split and their pictures uint8 [count, 64, 64, 3]."""
    rng = np.random.default_rng(seed)
    scenes = sample_scenes(rng, count, split)
    return scenes, np.stack([render(scene, rng) for scene in scenes])


def judged(images: np.ndarray, scenes: list[Scene]) -> tuple[np.ndarray, np.ndarray]:
    """What the referee says of each picture: the share of its checks, and whether all are true."""
    checks = [referee.judge(image, scene) for image, scene in zip(images, scenes, strict=True)]
    return np.array(list(map(referee.mean, checks))), np.array(list(map(referee.strict, checks)))


def unit(x: jax.Array) -> jax.Array:
    """Vectors of length 1 along the last axis."""
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
