"""Samplers: one function each, from noise to latents along a trajectory of denoiser calls.

    sampler(denoise, schedule, latents, num_steps, *, keys=None, span=(0.0, 1.0)) -> latents

- `denoise(latents [b, h, w, c], timesteps [b]) -> prediction [b, h, w, c]` is the guided denoiser.
- `latents` [b, h, w, c]: standard normal noise where `span` starts at 0 (the sampler scales it);
  else what a call with a span that ends there has returned.
- `keys` [b]: a PRNG key a row, for samplers that draw noise at each step. The noise of step i of a
  row depends on (its key, i) alone, i counted from the start of the whole trajectory.
- `span`: the fractions of the trajectory between which to walk, as `denoising_start` and
  `denoising_end` of diffusers' Stable Diffusion XL pipelines. Multistep solvers start anew there.

Each sampler equals the diffusers scheduler that its docstring names, made by that class's
`from_config` of the schedule's file. Coefficients are computed on the host, everything is float32
around the denoiser, and a trajectory is one `lax.scan` that holds the denoiser once. All that can
be wrong with a schedule or a number of steps, `check` tells before anything is compiled.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from agfsync_jax.diffusion.schedules import Schedule
from agfsync_jax.diffusion.trajectories import SAMPLERS, Span, Trajectory, trajectory

Denoise = Callable[[Array, Array], Array]
Sampler = Callable[..., Array]
Latents = Float[Array, "b h w c"]
Keys = Key[Array, " b"]


def find(name: str) -> Sampler:
    """The sampler called `name`; ValueError that lists them all if there is none."""
    if name not in _SAMPLERS:
        raise ValueError(f"Unknown sampler {name!r}; there are: {', '.join(sorted(_SAMPLERS))}.")
    return _SAMPLERS[name]


def of_scheduler(class_name: str) -> str:
    """The sampler that does what diffusers' scheduler class does: "PNDMScheduler" -> "pndm"."""
    names = {scheduler: name for name, (scheduler, _) in SAMPLERS.items()}
    if class_name not in names:
        raise ValueError(
            f"There is no sampler for {class_name}, only for {', '.join(sorted(names))}: name one"
            f" of {', '.join(sorted(SAMPLERS))} as config.sample.sampler."
        )
    return names[class_name]


def check(name: str, schedule: Schedule, num_steps: int, span: Span = (0.0, 1.0)) -> int:
    """How often `denoise` runs in a trajectory; raises what the sampler itself would.

    Raises:
        ValueError: an unknown sampler, a field of the scheduler's file that it does not support,
            too many steps, a span without any.
    """
    find(name)
    return len(trajectory(name, schedule, num_steps, span).timesteps)


def _walk(
    denoise: Denoise,
    steps: Trajectory,
    latents: Latents,
    span: Span,
    step: Callable[..., tuple[Array, ...]],
    num_memories: int = 0,
) -> Latents:
    """The latents after `step(predict, row, latents, *memories)` at each row of a trajectory.

    A step returns latents and memories, arrays like latents that start as zeros.
    """

    def body(carry, row):
        timesteps = jnp.full(latents.shape[:1], row["timestep"])
        return step(lambda x: denoise(x, timesteps).astype(jnp.float32), row, *carry), None

    rows = {"timestep": steps.timesteps} | steps.rows
    rows = {
        name: jnp.asarray(row, jnp.float32 if row.dtype.kind == "f" else jnp.int32)
        for name, row in rows.items()
    }
    latents = latents.astype(jnp.float32)
    if span[0] == 0:
        latents = latents * np.float32(steps.init_sigma)
    return jax.lax.scan(body, (latents, *[jnp.zeros_like(latents)] * num_memories), rows)[0][0]


def _clean_and_noise(
    schedule: Schedule, latents: Latents, prediction: Latents, row: dict[str, Array]
) -> tuple[Latents, Latents]:
    """x_0 and the noise of latents = signal x_0 + sigma noise, by what the denoiser predicts."""
    given = latents, prediction, row["signal"], row["sigma"]
    return schedule.parameterization.clean(*given), schedule.parameterization.noise(*given)


def _transferred(clean: Latents, noise: Latents, row: dict[str, Array]) -> Latents:
    return row["next_signal"] * clean + row["next_sigma"] * noise


def _drawn(keys: Keys, row: dict[str, Array], shape: tuple[int, ...]) -> Latents:
    """Standard normal noise of a step, [b, h, w, c]."""

    def draw(key):
        return jax.random.normal(jax.random.fold_in(key, row["index"]), shape[1:])

    return jax.vmap(draw)(keys)


def _need_keys(name: str, keys: Keys | None) -> None:
    if keys is None:
        raise ValueError(f"{name} draws noise at each step: give `keys`, a PRNG key a row.")


def ddim(
    denoise: Denoise,
    schedule: Schedule,
    latents: Latents,
    num_steps: int,
    *,
    keys: Keys | None = None,
    span: Span = (0.0, 1.0),
) -> Latents:
    """DDIM with eta = 0 (arXiv:2010.02502, eq. 12): diffusers' DDIMScheduler."""
    steps = trajectory("ddim", schedule, num_steps, span)

    def step(predict, row, latents):
        clean, noise = _clean_and_noise(schedule, latents, predict(latents), row)
        return (_transferred(jnp.clip(clean, -row["bound"], row["bound"]), noise, row),)

    return _walk(denoise, steps, latents, span, step)


def euler(
    denoise: Denoise,
    schedule: Schedule,
    latents: Latents,
    num_steps: int,
    *,
    keys: Keys | None = None,
    span: Span = (0.0, 1.0),
) -> Latents:
    """Euler's method in sigma: diffusers' EulerDiscreteScheduler.

    arXiv:2206.00364, algorithm 2, without churn.
    """
    steps = trajectory("euler", schedule, num_steps, span)

    def step(predict, row, latents):
        scaled = row["signal"] * latents
        clean, _ = _clean_and_noise(schedule, scaled, predict(scaled), row)
        return (clean + row["keep"] * (latents - clean),)

    return _walk(denoise, steps, latents, span, step)


def euler_ancestral(
    denoise: Denoise,
    schedule: Schedule,
    latents: Latents,
    num_steps: int,
    *,
    keys: Keys | None = None,
    span: Span = (0.0, 1.0),
) -> Latents:
    """Euler's method to below the next sigma, and noise up to it.

    diffusers' EulerAncestralDiscreteScheduler: DDPM's step (arXiv:2006.11239, eq. 7) in sigma.
    """
    _need_keys("euler_ancestral", keys)
    steps = trajectory("euler_ancestral", schedule, num_steps, span)

    def step(predict, row, latents):
        scaled = row["signal"] * latents
        clean, _ = _clean_and_noise(schedule, scaled, predict(scaled), row)
        fresh = row["up"] * _drawn(keys, row, latents.shape)
        return (clean + row["keep"] * (latents - clean) + fresh,)

    return _walk(denoise, steps, latents, span, step)


def dpmsolver_multistep(
    denoise: Denoise,
    schedule: Schedule,
    latents: Latents,
    num_steps: int,
    *,
    keys: Keys | None = None,
    span: Span = (0.0, 1.0),
) -> Latents:
    """DPM-Solver++ (2M) (arXiv:2211.01095, algorithm 2): diffusers' DPMSolverMultistepScheduler."""
    steps = trajectory("dpmsolver_multistep", schedule, num_steps, span)

    def step(predict, row, latents, before):
        clean, _ = _clean_and_noise(schedule, latents, predict(latents), row)
        change = row["shrink"] * clean + row["slope"] * (clean - before)
        return row["keep"] * latents + change, clean

    return _walk(denoise, steps, latents, span, step, num_memories=1)


def pndm(
    denoise: Denoise,
    schedule: Schedule,
    latents: Latents,
    num_steps: int,
    *,
    keys: Keys | None = None,
    span: Span = (0.0, 1.0),
) -> Latents:
    """Pseudo linear multistep (arXiv:2202.09778, eqs. 9 and 12), `num_steps + 1` evaluations.

    diffusers' PNDMScheduler with skip_prk_steps, which Stable Diffusion 1 and 2 draw with. Where a
    span starts late, it repeats that span's second timestep as it does the trajectory's; diffusers
    would take a repetition for granted that its pipelines do not make.
    """
    steps = trajectory("pndm", schedule, num_steps, span)

    def step(predict, row, latents, start, *before):
        again = row["again"]
        prediction = predict(latents)
        terms = zip(row["weights"], (prediction, *before), strict=True)
        mean = sum(weight * term for weight, term in terms)
        origin = jnp.where(again, start, latents)
        after = _transferred(*_clean_and_noise(schedule, origin, mean, row), row)
        recent = [
            jnp.where(again, old, new)
            for old, new in zip(before, (prediction, *before[:-1]), strict=True)
        ]
        return after, origin, *recent

    return _walk(denoise, steps, latents, span, step, num_memories=4)


def lcm(
    denoise: Denoise,
    schedule: Schedule,
    latents: Latents,
    num_steps: int,
    *,
    keys: Keys | None = None,
    span: Span = (0.0, 1.0),
) -> Latents:
    """Latent consistency sampling (arXiv:2310.04378, algorithm 3): diffusers' LCMScheduler."""
    _need_keys("lcm", keys)
    steps = trajectory("lcm", schedule, num_steps, span)

    def step(predict, row, latents):
        clean, _ = _clean_and_noise(schedule, latents, predict(latents), row)
        clean = jnp.clip(clean, -row["bound"], row["bound"])
        denoised = row["out"] * clean + row["skip"] * latents
        return (_transferred(denoised, _drawn(keys, row, latents.shape), row),)

    return _walk(denoise, steps, latents, span, step)


_SAMPLERS = {
    function.__name__: function
    for function in (ddim, euler, euler_ancestral, dpmsolver_multistep, pndm, lcm)
}
