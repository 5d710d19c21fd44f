"""UniPC (arXiv:2302.04867, algorithms 1 and 2): a predictor, and a corrector that costs no call.

The prediction at a step's latents first corrects these, then predicts the next. Both are sums of
latents and of predictions at this step and at those before it, with coefficients of the host.
"""

import jax.numpy as jnp
import numpy as np

from agfsync_jax.diffusion.schedules import NOISE
from agfsync_jax.diffusion.trajectories import Fields, Span, Trajectory, of_sigma
from agfsync_jax.samplers import (
    FLOW,
    SIGMAS,
    THRESHOLDING,
    Sampler,
    dpmsolver_multistep,
    memories,
)

_ORDER = 3  # the highest


def trajectory(fields: Fields, num_steps: int, span: Span) -> Trajectory:
    timesteps, sigmas = dpmsolver_multistep.points(fields, num_steps, always_round=True)
    if fields.use_karras_sigmas and fields.final_sigmas_type == "sigma_min":
        sigmas[-1] = sigmas[-2]
    part = fields.within(span, timesteps)
    index = np.arange(num_steps)
    most = num_steps - index if fields.lower_order_final else num_steps
    orders = np.minimum(np.minimum(fields.solver_order, most), index - part.start + 1)
    end, last = sigmas[-1], sigmas[-2]
    if (end in (0, last) and orders[-1] > 1) or (end == 0 and not fields.predict_x0):
        raise ValueError(
            f"UniPC's last step, from sigma {last:.4g} to {end:.4g}, is possible with"
            " lower_order_final and predict_x0 alone: choose another config.sample.sampler, or set"
            " them in scheduler_config.json."
        )
    # Of (latents before the prediction, latents after the step before, predictions), and of
    # (corrected latents, predictions); the latest prediction first.
    correct, predict = np.zeros((num_steps, 3 + _ORDER)), np.zeros((num_steps, 1 + _ORDER))
    correct[:, 0] = 1.0
    with np.errstate(divide="ignore", invalid="ignore"):  # the end may be at sigma 0
        for step in index[part]:
            if step > part.start and step - 1 not in fields.disable_corrector:
                keep, weights = _weights(fields, sigmas, step - 1, orders[step - 1], correct=True)
                correct[step, : 2 + len(weights)] = [0.0, keep, *weights]
            keep, weights = _weights(fields, sigmas, step, orders[step], correct=False)
            predict[step, : 1 + len(weights)] = [keep, *weights]
    rows = of_sigma(sigmas[:-1]) | {
        "correct": correct,
        "predict": predict,
        "of_clean": np.full(num_steps, fields.predict_x0),
    }
    return Trajectory(timesteps, rows).cut(part)


def _weights(
    fields: Fields, sigmas: np.ndarray, step: int, order: int, *, correct: bool
) -> tuple[float, list[float]]:
    """Coefficients of a step from point `step` to the next: of the latents, and of predictions.

    The predictions are those at the point and at the `order - 1` before it; and, to correct, first
    that at the next.
    """
    signal, sigma = of_sigma(sigmas).values()
    if not fields.predict_x0:
        signal, sigma = sigma, signal
    gain = -np.log(sigmas[step - order + 1 : step + 2])  # lambda
    h = gain[-1] - gain[-2]
    signed = -h if fields.predict_x0 else h
    keep, scale = sigma[step + 1] / sigma[step], signal[step + 1]
    # Where the other predictions lie, in steps from the point.
    places = [(gain[-2 - i] - gain[-2]) / h for i in range(1, order)]
    places = np.array([1.0, *places] if correct else places)
    if not len(places):
        return keep, [-scale * np.expm1(signed)]
    whole = np.expm1(signed) if fields.solver_type != "bh1" else signed
    if len(places) == 1:
        shares = np.array([0.5])
    else:
        moments, rest, factorial = [], np.expm1(signed) / signed - 1, 1
        for i in range(1, len(places) + 1):
            moments.append(rest * factorial / whole)
            factorial *= i + 1
            rest = rest / signed - 1 / factorial
        shares = np.linalg.solve(np.vander(places, increasing=True).T, moments)
    others = list(-scale * whole * shares / places)
    own = -scale * np.expm1(signed) - sum(others)
    return keep, [others[0], own, *others[1:]] if correct else [own, *others]


def step(model, row, latents, start, *before):
    clean, noise = model.split(latents, model.predict(latents))
    predictions = jnp.where(row["of_clean"], clean, noise), *before
    corrected = _sum(row["correct"], latents, start, *predictions)
    after = _sum(row["predict"], corrected, *predictions[:-1])
    return after, corrected, *predictions[:-1]


def _sum(weights, *terms):
    return sum(weight * term for weight, term in zip(weights, terms, strict=True))


SAMPLER = Sampler(
    scheduler="UniPCMultistepScheduler",
    defaults=NOISE
    | SIGMAS
    | THRESHOLDING
    | FLOW
    | {
        "solver_order": 2,
        "predict_x0": True,
        "solver_type": "bh2",
        "lower_order_final": True,
        "disable_corrector": [],
        "solver_p": None,
        "final_sigmas_type": "zero",
        "rescale_betas_zero_snr": False,
        "shift_terminal": None,
    },
    trajectory=trajectory,
    step=step,
    start=memories(1 + _ORDER),
    supported={
        "solver_order": tuple(range(1, 1 + _ORDER)),
        # The last three are of DPM-Solver and DEIS; diffusers takes them as bh2.
        "solver_type": ("bh1", "bh2", "midpoint", "heun", "logrho"),
        "solver_p": (None,),
        "shift_terminal": (None,),
    },
)
