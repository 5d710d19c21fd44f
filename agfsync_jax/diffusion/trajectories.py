"""The steps of a sampler, computed on the host: timesteps and coefficients.

In float64 where diffusers' schedulers are; the tables of sigmas are float32, as theirs.
"""

import functools
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from agfsync_jax.diffusion.schedules import Schedule

Span = tuple[float, float]


class Trajectory(NamedTuple):
    """The steps of a span.

    Every step has a `signal` and a `sigma`: its latents are signal x_0 + sigma noise where the
    denoiser sees them.
    """

    timesteps: np.ndarray  # [n]
    rows: dict[str, np.ndarray]  # coefficients, [n, ...]
    init_sigma: float = 1.0


def trajectory(name: str, schedule: Schedule, num_steps: int, span: Span) -> Trajectory:
    """The steps of the sampler `name`; ValueError as `samplers.check` says."""
    start, end = span
    if not 0 <= start < end <= 1:
        raise ValueError(f"A span is (start, end) with 0 <= start < end <= 1, got {tuple(span)}.")
    scheduler, make = SAMPLERS[name]
    steps = make(schedule.fields(scheduler), num_steps, span)
    if schedule.parameterization.needs_signal and (steps.rows["signal"] == 0).any():
        raise ValueError(
            f"{name} starts where rescale_betas_zero_snr has left no signal, and cannot tell x_0"
            " from the noise there: such a model predicts v_prediction or sample."
        )
    return steps


def _within(span: Span, timesteps: np.ndarray, total: int) -> slice:
    """The part of falling `timesteps` that lies in a span."""
    cuts = [int(round(total - fraction * total)) for fraction in span]
    first, last = (int(np.sum(timesteps >= cut)) for cut in cuts)
    part = slice(first if span[0] > 0 else 0, last if span[1] < 1 else len(timesteps))
    if part.start >= part.stop:
        raise ValueError(
            f"None of {len(timesteps)} steps lies in the span {tuple(span)}: take more steps."
        )
    return part


def _spaced(fields: SimpleNamespace, num_steps: int, extra: int = 0) -> np.ndarray:
    """Falling timesteps, float64 [num_steps] (arXiv:2305.08891, table 2).

    Whole numbers, except with "linspace". The last of the `extra` are left out.
    """
    total, points = fields.num_train_timesteps, num_steps + extra
    if not 1 <= num_steps <= total - extra:
        raise ValueError(
            f"num_inference_steps is {num_steps}; this schedule takes 1 to {total - extra}."
        )
    if fields.timestep_spacing == "leading":
        timesteps = np.arange(points)[::-1] * (total // points) + fields.steps_offset
    elif fields.timestep_spacing == "trailing":
        timesteps = np.round(np.arange(total, 0, -total / num_steps)) - 1
    else:
        timesteps = np.linspace(0, total - 1, points)[::-1]
    timesteps = timesteps[:num_steps].astype(np.float64)
    if not 0 <= timesteps[-1] <= timesteps[0] <= total - 1:
        raise ValueError(
            f"{num_steps} steps with steps_offset {fields.steps_offset} go from timestep"
            f" {int(timesteps[0])} to {int(timesteps[-1])}, beyond 0 to {total - 1}: take fewer"
            " steps."
        )
    return timesteps


def _integers(timesteps: np.ndarray) -> np.ndarray:
    return np.round(timesteps).astype(np.int32)


def _transfer(now: np.ndarray, after: np.ndarray) -> dict:
    """Coefficients of latents at a_t = `now`, and of what they become at `after`."""
    return {
        "signal": np.sqrt(now),
        "sigma": np.sqrt(1 - now),
        "next_signal": np.sqrt(after),
        "next_sigma": np.sqrt(1 - after),
    }


def _stride(fields: SimpleNamespace, timesteps: np.ndarray, num_steps: int) -> dict:
    """Coefficients from timesteps to those a stride lower, where a negative one is the end."""
    alphas = fields.alphas_cumprod.astype(np.float64)
    after = timesteps - fields.num_train_timesteps // num_steps
    final = 1.0 if fields.set_alpha_to_one else alphas[0]
    return _transfer(alphas[timesteps], np.where(after >= 0, alphas[np.maximum(after, 0)], final))


def _ddim(fields: SimpleNamespace, num_steps: int, span: Span) -> Trajectory:
    timesteps = _integers(_spaced(fields, num_steps))
    part = _within(span, timesteps, fields.num_train_timesteps)
    timesteps = timesteps[part]
    bound = fields.clip_sample_range if fields.clip_sample else np.inf
    rows = {"bound": np.full(len(timesteps), bound)}
    return Trajectory(timesteps, rows | _stride(fields, timesteps, num_steps))


def _pndm(fields: SimpleNamespace, num_steps: int, span: Span) -> Trajectory:
    timesteps = _integers(_spaced(fields, num_steps))
    timesteps = timesteps[_within(span, timesteps, fields.num_train_timesteps)]
    # The second timestep comes twice: first to step again from the start, with the mean of the
    # predictions at both ends (Heun's method).
    timesteps = np.insert(timesteps, 1, timesteps[1:2])
    again = np.arange(len(timesteps)) == 1
    origins = timesteps + fields.num_train_timesteps // num_steps * again
    # Weights of this prediction and of the three before it: Adams-Bashforth of rising order.
    weights = np.tile([55 / 24, -59 / 24, 37 / 24, -9 / 24], (len(timesteps), 1))
    first = [
        [1, 0, 0, 0],
        [1 / 2, 1 / 2, 0, 0],
        [3 / 2, -1 / 2, 0, 0],
        [23 / 12, -4 / 3, 5 / 12, 0],
    ]
    weights[:4] = first[: len(timesteps)]
    rows = {"again": again, "weights": weights}
    return Trajectory(timesteps, rows | _stride(fields, origins, num_steps))


def _lcm(fields: SimpleNamespace, num_steps: int, span: Span) -> Trajectory:
    total, original = fields.num_train_timesteps, fields.original_inference_steps
    if not 1 <= num_steps <= original <= total:
        raise ValueError(
            f"num_inference_steps is {num_steps}: LCM takes 1 to original_inference_steps,"
            f" {original}, of at most {total}."
        )
    distilled = np.arange(original, 0, -1) * (total // original) - 1
    chosen = np.floor(np.linspace(0, original, num_steps, endpoint=False)).astype(int)
    timesteps = distilled[chosen].astype(np.int32)
    alphas = fields.alphas_cumprod.astype(np.float64)
    after = np.append(alphas[timesteps[1:]], 1.0)  # no noise at the end
    # The consistency function's boundary condition (arXiv:2310.04378, eq. 9), sigma_data = 0.5.
    scaled = timesteps * float(fields.timestep_scaling)
    rows = _transfer(alphas[timesteps], after) | {
        "skip": 0.25 / (scaled**2 + 0.25),
        "out": scaled / np.sqrt(scaled**2 + 0.25),
        "bound": np.full(num_steps, fields.clip_sample_range if fields.clip_sample else np.inf),
        "index": np.arange(num_steps),
    }
    part = _within(span, timesteps, total)
    return Trajectory(timesteps[part], {name: row[part] for name, row in rows.items()})


def _sigmas(fields: SimpleNamespace) -> np.ndarray:
    """sigma_t / signal_t of all training timesteps, rising, to float32 as in diffusers."""
    alphas = fields.alphas_cumprod.copy()
    if fields.rescale_betas_zero_snr:
        alphas[-1] = 2.0**-24  # keeps the last sigma finite
    return np.sqrt((1 - alphas) / alphas).astype(np.float64)


def _karras(
    fields: SimpleNamespace, table: np.ndarray, ends: tuple[float, float], num_steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sigmas from one end to the other (arXiv:2206.00364, eq. 5, rho = 7), and their timesteps."""
    largest = ends[0] if fields.sigma_max is None else fields.sigma_max
    smallest = ends[1] if fields.sigma_min is None else fields.sigma_min
    sigmas = np.linspace(largest ** (1 / 7), smallest ** (1 / 7), num_steps) ** 7
    return sigmas, np.interp(np.log(sigmas), np.log(table), np.arange(len(table)))


def _end(fields: SimpleNamespace, table: np.ndarray) -> float:
    return float(table[0]) if fields.final_sigmas_type == "sigma_min" else 0.0


def _of_sigma(sigmas: np.ndarray) -> dict:
    signal = 1 / np.sqrt(sigmas**2 + 1)
    return {"signal": signal, "sigma": sigmas * signal}


def _euler(
    fields: SimpleNamespace, num_steps: int, span: Span, *, ancestral: bool = False
) -> Trajectory:
    timesteps, table = _spaced(fields, num_steps).astype(np.float32), _sigmas(fields)
    sigmas, end = np.interp(timesteps, np.arange(len(table)), table), 0.0
    if not ancestral:
        end = _end(fields, table)
        if fields.use_karras_sigmas:
            sigmas, timesteps = _karras(fields, table, (sigmas[0], sigmas[-1]), num_steps)
    # diffusers takes the start as pure noise where the trajectory begins at the last timestep.
    pure = fields.timestep_spacing in ("linspace", "trailing")
    init_sigma = sigmas.max() if pure else np.sqrt(sigmas.max() ** 2 + 1)
    after = np.append(sigmas[1:], end)
    up = np.zeros(num_steps)
    if ancestral:
        up = np.sqrt(after**2 * (sigmas**2 - after**2) / sigmas**2)
    rows = {
        # Not as a change of sigma: that would be the difference of two large latents, where the
        # first sigma is large.
        "keep": np.sqrt(after**2 - up**2) / sigmas,
        "up": up,
        "index": np.arange(num_steps),
    } | _of_sigma(sigmas)
    part = _within(span, timesteps, fields.num_train_timesteps)
    timesteps = timesteps[part].astype(np.float32)
    return Trajectory(timesteps, {name: row[part] for name, row in rows.items()}, float(init_sigma))


def _dpmsolver_multistep(fields: SimpleNamespace, num_steps: int, span: Span) -> Trajectory:
    table = _sigmas(fields)
    extra = 0 if fields.timestep_spacing == "trailing" else 1
    timesteps = _integers(_spaced(fields, num_steps, extra))
    sigmas = table[timesteps]
    if fields.use_karras_sigmas:
        sigmas, timesteps = _karras(fields, table, (table[-1], table[0]), num_steps)
        if fields.beta_schedule != "squaredcos_cap_v2":
            timesteps = np.round(timesteps)
        timesteps = timesteps.astype(np.int32)
    part = _within(span, timesteps, fields.num_train_timesteps)

    end = _end(fields, table)
    now, after = _of_sigma(sigmas), _of_sigma(np.append(sigmas[1:], end))
    with np.errstate(divide="ignore"):  # the end may be at sigma 0
        gain = -np.log(np.append(sigmas, end))  # lambda
    h = np.diff(gain)
    shrink = -after["signal"] * np.expm1(-h)
    last = np.arange(num_steps) == num_steps - 1
    lower = fields.euler_at_final or end == 0 or (fields.lower_order_final and num_steps < 15)
    second = np.full(num_steps, fields.solver_order == 2) & ~(last & lower)
    second[: part.start + 1] = False  # there is no step before it
    slope = np.zeros(num_steps)
    if fields.solver_type == "heun":
        slope[second] = (after["signal"] * (np.expm1(-h) + h))[second]
    else:
        slope[second] = (0.5 * shrink * h)[second]
    slope[second] /= np.roll(h, 1)[second]
    rows = now | {"keep": after["sigma"] / now["sigma"], "shrink": shrink, "slope": slope}
    return Trajectory(timesteps[part], {name: row[part] for name, row in rows.items()})


SAMPLERS = {
    "ddim": ("DDIMScheduler", _ddim),
    "euler": ("EulerDiscreteScheduler", _euler),
    "euler_ancestral": (
        "EulerAncestralDiscreteScheduler",
        functools.partial(_euler, ancestral=True),
    ),
    "dpmsolver_multistep": ("DPMSolverMultistepScheduler", _dpmsolver_multistep),
    "pndm": ("PNDMScheduler", _pndm),
    "lcm": ("LCMScheduler", _lcm),
}
