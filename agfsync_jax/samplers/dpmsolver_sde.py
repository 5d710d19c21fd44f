"""SDE-DPM-Solver++ (2M) (arXiv:2211.01095, appendix B): DPM-Solver++ that draws noise."""

import dataclasses
from types import SimpleNamespace

import numpy as np

from agfsync_jax.diffusion.trajectories import Span, Trajectory, of_sigma, within
from agfsync_jax.samplers import dpmsolver_multistep


def trajectory(fields: SimpleNamespace, num_steps: int, span: Span) -> Trajectory:
    timesteps, sigmas = dpmsolver_multistep.points(fields, num_steps)
    part = within(span, timesteps, fields.num_train_timesteps)
    second = dpmsolver_multistep.is_second_order(fields, sigmas, part.start)
    now, after = of_sigma(sigmas[:-1]), of_sigma(sigmas[1:])
    with np.errstate(divide="ignore", invalid="ignore"):  # the end may be at sigma 0
        h = np.maximum(np.diff(-np.log(sigmas)), 0.0)  # the last may be 0, but for rounding
        shrink = -after["signal"] * np.expm1(-2 * h)
        if fields.solver_type == "heun":
            slope = after["signal"] * (np.expm1(-2 * h) / 2 + h)
        else:
            slope = 0.5 * shrink * h
        slope /= np.roll(h, 1)
    rows = now | {
        "keep": after["sigma"] / now["sigma"] * np.exp(-h),
        "shrink": shrink,
        "slope": np.where(second, slope, 0.0),
        "fresh": after["sigma"] * np.sqrt(-np.expm1(-2 * h)),
        "index": np.arange(num_steps),
    }
    return Trajectory(timesteps, rows).cut(part)


def step(model, row, latents, before):
    latents, clean = dpmsolver_multistep.step(model, row, latents, before)
    return latents + row["fresh"] * model.noise(latents.shape), clean


SAMPLER = dataclasses.replace(
    dpmsolver_multistep.SAMPLER,
    trajectory=trajectory,
    step=step,
    draws_noise=True,
    variant={"algorithm_type": "sde-dpmsolver++"},
)
