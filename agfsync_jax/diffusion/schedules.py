"""Noise schedules of discrete-time diffusion, read from a diffusers `scheduler_config.json`.

Forward process (DDPM, arXiv:2006.11239, eq. 4): x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise, with a_t
the cumulative product of 1 - beta. Velocity (arXiv:2202.00512, appendix D): v = sqrt(a_t) noise -
sqrt(1 - a_t) x_0.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Latents = Float[Array, "b ..."]
Timesteps = Int[Array, " b"]
Formula = Callable[[Array, Array, Array, Array], Array]

# Fields of every class of scheduler, with the defaults of most.
NOISE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "steps_offset": 0,
}


class Parameterization(NamedTuple):
    """What a denoiser predicts at x = signal x_0 + sigma noise, and what that says of the two."""

    target: Formula  # (x_0, noise, signal, sigma) -> the prediction that is right
    clean: Formula  # (x, prediction, signal, sigma) -> x_0
    noise: Formula  # of the same, the noise
    needs_signal: bool = False  # x_0 cannot be told where the signal is 0


PARAMETERIZATIONS = {
    "epsilon": Parameterization(
        target=lambda clean, noise, signal, sigma: noise,
        clean=lambda x, prediction, signal, sigma: (x - sigma * prediction) / signal,
        noise=lambda x, prediction, signal, sigma: prediction,
        needs_signal=True,
    ),
    "v_prediction": Parameterization(
        target=lambda clean, noise, signal, sigma: signal * noise - sigma * clean,
        clean=lambda x, prediction, signal, sigma: signal * x - sigma * prediction,
        noise=lambda x, prediction, signal, sigma: signal * prediction + sigma * x,
    ),
    "sample": Parameterization(
        target=lambda clean, noise, signal, sigma: clean,
        clean=lambda x, prediction, signal, sigma: prediction,
        noise=lambda x, prediction, signal, sigma: (x - signal * prediction) / sigma,
    ),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """A discrete noise schedule, and the scheduler_config.json that it was read from."""

    alphas_cumprod: np.ndarray  #: float32 [num_train_timesteps], a_t
    prediction_type: str  #: what the denoiser predicts, a key of PARAMETERIZATIONS
    scheduler: str  #: the file's `_class_name`, such as "PNDMScheduler"
    config: dict[str, Any]  #: the file

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], defaults: Mapping[str, Any] = NOISE
    ) -> "Schedule":
        """The noise of a diffusers `scheduler_config.json`; its other fields are the samplers'.

        Args:
            config: the file, of any class that shares this noise.
            defaults: what the class takes for fields that the file lacks.

        Raises:
            ValueError: an unsupported kind of noise; all that is wrong is listed at once.
        """
        # As diffusers: what was a default of the class that wrote the file is not of the file.
        left_out = ("_use_default_values", *config.get("_use_default_values", ()))
        config = {name: value for name, value in config.items() if name not in left_out}
        fields = {**defaults, **config}
        betas, steps = fields["trained_betas"], fields["num_train_timesteps"]
        known = {"prediction_type": PARAMETERIZATIONS}
        if betas is None:
            known["beta_schedule"] = _BETAS
        errors = [
            f"{name}={fields[name]!r} (supported: {', '.join(table)})"
            for name, table in known.items()
            if fields[name] not in table
        ]
        if betas is not None and len(betas) != steps:
            errors.append(f"{len(betas)} trained_betas for {steps} timesteps")
        if errors:
            raise ValueError(
                "scheduler_config.json holds what this schedule does not do: " + "; ".join(errors)
            )
        scheduler = config.get("_class_name", "DDIMScheduler")
        return cls(alphas_cumprod(fields), fields["prediction_type"], scheduler, config)

    @property
    def parameterization(self) -> Parameterization:
        return PARAMETERIZATIONS[self.prediction_type]

    @property
    def num_train_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    def signal_and_noise(self, timesteps: Timesteps, ndim: int) -> tuple[Array, Array]:
        """sqrt(a_t) and sqrt(1 - a_t), each [b, 1, ...] with `ndim` dimensions."""
        alphas = jnp.asarray(self.alphas_cumprod)[timesteps]
        alphas = alphas.reshape(alphas.shape + (1,) * (ndim - 1))
        return jnp.sqrt(alphas), jnp.sqrt(1 - alphas)

    def add_noise(self, latents: Latents, noise: Latents, timesteps: Timesteps) -> Latents:
        """x_t of x_0 = `latents`."""
        signal, sigma = self.signal_and_noise(timesteps, latents.ndim)
        return signal * latents + sigma * noise

    def target(self, latents: Latents, noise: Latents, timesteps: Timesteps) -> Latents:
        """What the denoiser is trained to predict from x_t: noise, velocity or x_0."""
        signal, sigma = self.signal_and_noise(timesteps, latents.ndim)
        return self.parameterization.target(latents, noise, signal, sigma)

    def clean_scale(self, timesteps: Timesteps) -> Float[Array, " b"]:
        """How far the x_0 that a prediction tells is off where the prediction is off by 1."""
        signal, sigma = self.signal_and_noise(timesteps, 1)
        zero, one = jnp.zeros_like(sigma), jnp.ones_like(sigma)
        return jnp.abs(self.parameterization.clean(zero, one, signal, sigma))  # which is linear


def alphas_cumprod(fields: Mapping[str, Any]) -> Float[np.ndarray, " t"]:
    """a_t of the fields NOISE, and `rescale_betas_zero_snr` for classes that have it."""
    if fields["trained_betas"] is not None:
        betas = np.asarray(fields["trained_betas"], np.float32)
    else:
        make = _BETAS[fields["beta_schedule"]]
        betas = make(fields["num_train_timesteps"], fields["beta_start"], fields["beta_end"])
    if fields.get("rescale_betas_zero_snr"):
        betas = _rescale_zero_terminal_snr(betas)
    return _cumprod(1 - betas)


def _cumprod(alphas: np.ndarray) -> np.ndarray:
    return np.cumprod(alphas.astype(np.float64)).astype(np.float32)


def _linear(num: int, start: float, end: float) -> np.ndarray:
    return np.linspace(start, end, num).astype(np.float32)


def _squared_cosine(num: int, start: float, end: float) -> np.ndarray:
    """Cosine schedule (arXiv:2102.09672, eq. 17), betas at most 0.999; it has no start and end."""
    alpha = [math.cos((i / num + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(num + 1)]
    return np.asarray([min(1 - alpha[i + 1] / alpha[i], 0.999) for i in range(num)], np.float32)


_BETAS = {
    "linear": _linear,
    "scaled_linear": lambda num, start, end: _linear(num, start**0.5, end**0.5) ** 2,
    "squaredcos_cap_v2": _squared_cosine,
}


def _rescale_zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Betas whose last step holds no signal (arXiv:2305.08891, algorithm 1)."""
    root = np.sqrt(_cumprod(1 - betas))
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    alphas_cumprod = root**2
    return 1 - np.append(alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1])
