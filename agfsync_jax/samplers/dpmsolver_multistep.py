"""DPM-Solver++ (2M) (arXiv:2211.01095, algorithm 2)."""

import math

import numpy as np

from agfsync_jax.diffusion.schedules import NOISE
from agfsync_jax.diffusion.trajectories import Fields, Span, Trajectory, integers, of_sigma
from agfsync_jax.samplers import FLOW, SIGMAS, THRESHOLDING, Sampler, memories


def points(
    fields: Fields, num_steps: int, always_round: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Timesteps [n], and their sigmas with the end's [n + 1].

    Of Karras' timesteps, those of a squared cosine are cut to whole numbers, or rounded as others.
    """
    table = fields.sigma_table
    timesteps = integers(fields.spaced(num_steps, int(fields.timestep_spacing != "trailing")))
    sigmas = table[timesteps]
    if fields.use_karras_sigmas:
        sigmas, timesteps = fields.karras(table[-1], table[0], num_steps)
        if always_round or fields.beta_schedule != "squaredcos_cap_v2":
            timesteps = np.round(timesteps)
        timesteps = timesteps.astype(np.int32)
    end = table[0] if fields.final_sigmas_type == "sigma_min" else 0.0
    return timesteps, np.append(sigmas, end)


def trajectory(fields: Fields, num_steps: int, span: Span) -> Trajectory:
    timesteps, sigmas = points(fields, num_steps)
    part = fields.within(span, timesteps)
    # Which steps use the prediction before theirs; the first of a span has none.
    second = np.full(num_steps, fields.solver_order == 2)
    few = fields.lower_order_final and num_steps < 15
    second[-1] &= not (fields.euler_at_final or sigmas[-1] == 0 or few)
    second[: part.start + 1] = False
    now, after = of_sigma(sigmas[:-1]), of_sigma(sigmas[1:])
    keep = after["sigma"] / now["sigma"]
    rate, drawn = 1, {}
    with np.errstate(divide="ignore", invalid="ignore"):  # the end may be at sigma 0
        h = np.diff(-np.log(sigmas))
        if fields.algorithm_type == "sde-dpmsolver++":
            h = np.maximum(h, 0.0)  # the last may be 0, but for rounding
            rate, keep = 2, keep * np.exp(-h)
            fresh = after["sigma"] * np.sqrt(-np.expm1(-2 * h))
            drawn = {"fresh": fresh, "index": np.arange(num_steps)}
        shrink = -after["signal"] * np.expm1(-rate * h)
        if fields.solver_type == "heun":
            slope = after["signal"] * (np.expm1(-rate * h) / rate + h)
        else:
            slope = 0.5 * shrink * h
        slope /= np.roll(h, 1)
    rows = now | {"keep": keep, "shrink": shrink, "slope": np.where(second, slope, 0.0)}
    return Trajectory(timesteps, rows | drawn).cut(part)


def step(model, row, latents, before):
    clean = model.clean(latents)
    change = row["shrink"] * clean + row["slope"] * (clean - before)
    return row["keep"] * latents + change, clean


SAMPLER = Sampler(
    scheduler="DPMSolverMultistepScheduler",
    defaults=NOISE
    | SIGMAS
    | THRESHOLDING
    | FLOW
    | {
        "solver_order": 2,
        "algorithm_type": "dpmsolver++",
        "solver_type": "midpoint",
        "lower_order_final": True,
        "euler_at_final": False,
        "final_sigmas_type": "zero",
        "use_lu_lambdas": False,
        "lambda_min_clipped": -math.inf,
        "variance_type": None,
        "rescale_betas_zero_snr": False,
    },
    trajectory=trajectory,
    step=step,
    start=memories(1),
    variant={"algorithm_type": "dpmsolver++"},
    supported={
        "solver_order": (1, 2),
        "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
        # The last three are of DEIS and UniPC; diffusers takes them as the first.
        "solver_type": ("midpoint", "heun", "logrho", "bh1", "bh2"),
        "use_lu_lambdas": (False, None),
        "lambda_min_clipped": (-math.inf,),
        # DDPM's, which change nothing here; learned variances double the denoiser's channels.
        "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
    },
)
