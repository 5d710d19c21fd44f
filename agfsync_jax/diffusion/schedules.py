"""Noise schedules of discrete-time diffusion, read from a diffusers `scheduler_config.json`.

Forward process (DDPM, arXiv:2006.11239, eq. 4): x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise, with a_t
the cumulative product of 1 - beta. Velocity (arXiv:2202.00512, appendix D): v = sqrt(a_t) noise -
sqrt(1 - a_t) x_0.
"""

import dataclasses
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


class Parameterization(NamedTuple):
    """What a denoiser predicts at x = signal x_0 + sigma noise, and what that says of the two.

    Attributes:
        target: (x_0, noise, signal, sigma) -> the prediction that is right.
        clean, noise: (x, prediction, signal, sigma) -> x_0, and the noise.
        needs_signal: x_0 cannot be told where the signal is 0.
    """

    target: Callable[[Array, Array, Array, Array], Array]
    clean: Callable[[Array, Array, Array, Array], Array]
    noise: Callable[[Array, Array, Array, Array], Array]
    needs_signal: bool = False


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

SPACINGS = ("leading", "trailing", "linspace")

_NOISE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "steps_offset": 0,
}
_THRESHOLDING = {
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
}
_SIGMAS = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    # DPM-Solver's class does not name these two, but reads them from the file all the same.
    "sigma_min": None,
    "sigma_max": None,
    "final_sigmas_type": "zero",
    "timestep_spacing": "linspace",
    "rescale_betas_zero_snr": False,
}
# Class of a diffusers scheduler -> its fields and their defaults.
SCHEDULERS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": _NOISE
    | _THRESHOLDING
    | {
        "clip_sample": True,
        "clip_sample_range": 1.0,
        "set_alpha_to_one": True,
        "timestep_spacing": "leading",
        "rescale_betas_zero_snr": False,
    },
    "EulerDiscreteScheduler": _NOISE
    | _SIGMAS
    | {
        "interpolation_type": "linear",
        "timestep_type": "discrete",
    },
    "EulerAncestralDiscreteScheduler": _NOISE
    | {"timestep_spacing": "linspace", "rescale_betas_zero_snr": False},
    "DPMSolverMultistepScheduler": _NOISE
    | _SIGMAS
    | _THRESHOLDING
    | {
        "solver_order": 2,
        "algorithm_type": "dpmsolver++",
        "solver_type": "midpoint",
        "lower_order_final": True,
        "euler_at_final": False,
        "use_lu_lambdas": False,
        "use_flow_sigmas": False,
        "flow_shift": 1.0,
        "lambda_min_clipped": -math.inf,
        "variance_type": None,
        "use_dynamic_shifting": False,
        "time_shift_type": "exponential",
    },
    "PNDMScheduler": _NOISE
    | {"skip_prk_steps": False, "set_alpha_to_one": False, "timestep_spacing": "leading"},
    "LCMScheduler": _NOISE
    | _THRESHOLDING
    | {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "original_inference_steps": 50,
        "clip_sample": False,
        "clip_sample_range": 1.0,
        "set_alpha_to_one": True,
        "timestep_spacing": "leading",
        "timestep_scaling": 10.0,
        "rescale_betas_zero_snr": False,
    },
}
# What these fields may hold; any other value is refused by name. Fields that stand neither here
# nor in NO_EFFECT are honored.
SUPPORTED: dict[str, tuple] = {
    "prediction_type": tuple(PARAMETERIZATIONS),
    "timestep_spacing": SPACINGS,
    "thresholding": (False,),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
    "use_lu_lambdas": (False, None),
    "use_flow_sigmas": (False, None),
    "final_sigmas_type": ("zero", "sigma_min"),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "skip_prk_steps": (True,),
    "solver_order": (1, 2),
    "algorithm_type": ("dpmsolver++",),
    # The last three are of DEIS and UniPC; diffusers takes them as the first.
    "solver_type": ("midpoint", "heun", "logrho", "bh1", "bh2"),
    "lambda_min_clipped": (-math.inf,),
    # DDPM's, which change nothing here; learned variances double the denoiser's channels.
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
}
_WITHOUT_SAMPLE = {"prediction_type": ("epsilon", "v_prediction")}
_SUPPORTED_BY = {
    "PNDMScheduler": _WITHOUT_SAMPLE,
    "EulerAncestralDiscreteScheduler": _WITHOUT_SAMPLE,
}
_OF_DISTILLATION = "LCM visits timesteps of its distillation, and ends in a prediction of x_0"
# Class, or "" for all -> field -> why it changes no trajectory.
NO_EFFECT: dict[str, dict[str, str]] = {
    "": {
        "dynamic_thresholding_ratio": "acts with thresholding, which is refused",
        "sample_max_value": "acts with thresholding, which is refused",
        "flow_shift": "acts with use_flow_sigmas, which is refused",
        "use_dynamic_shifting": "acts with a `mu` that no Stable Diffusion pipeline gives",
        "time_shift_type": "acts with use_dynamic_shifting",
    },
    "LCMScheduler": {
        "timestep_spacing": _OF_DISTILLATION,
        "steps_offset": _OF_DISTILLATION,
        "set_alpha_to_one": _OF_DISTILLATION,
    },
}
# Fields that only solvers have that are not here; other samplers have no use for them.
_OF_UNIPC = {"predict_x0", "solver_p", "disable_corrector", "shift_terminal"}


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """A discrete noise schedule, and the scheduler_config.json that it was read from.

    Attributes:
        alphas_cumprod: float32 [num_train_timesteps], a_t.
        prediction_type: what the denoiser predicts, a key of PARAMETERIZATIONS.
        scheduler: the file's `_class_name`, such as "PNDMScheduler".
        config: the file.
    """

    alphas_cumprod: np.ndarray
    prediction_type: str
    scheduler: str
    config: dict[str, Any]

    @classmethod
    def from_config(cls, config: dict) -> "Schedule":
        """Reads a diffusers `scheduler_config.json`, of any class that shares this noise.

        Raises ValueError, listing every unknown field and every unsupported kind of noise at once;
        what a sampler does not support of it, `fields` tells.
        """
        # As diffusers: what was a default of the class that wrote the file is not of the file.
        left_out = ("_use_default_values", *config.get("_use_default_values", ()))
        config = {name: value for name, value in config.items() if name not in left_out}
        scheduler = config.get("_class_name", "DDIMScheduler")
        known = _OF_UNIPC.union(*SCHEDULERS.values())
        errors = [
            f"{name}={value!r} (unknown field)"
            for name, value in config.items()
            if name not in known and not name.startswith("_")
        ]
        own = SCHEDULERS.get(scheduler, _NOISE) | {"rescale_betas_zero_snr": False} | config
        if own["prediction_type"] not in PARAMETERIZATIONS:
            errors.append(
                f"prediction_type={own['prediction_type']!r}"
                f" (supported: {tuple(PARAMETERIZATIONS)})"
            )
        if own["trained_betas"] is None and own["beta_schedule"] not in _BETAS:
            errors.append(f"beta_schedule={own['beta_schedule']!r} (supported: {tuple(_BETAS)})")
        if own["trained_betas"] is not None:
            count = len(own["trained_betas"])
            if count != own["num_train_timesteps"]:
                errors.append(f"{count} trained_betas for {own['num_train_timesteps']} timesteps")
        if errors:
            raise ValueError(
                "scheduler_config.json holds what this schedule does not do: " + "; ".join(errors)
            )
        return cls(_alphas_cumprod(own), own["prediction_type"], scheduler, config)

    @property
    def timestep_spacing(self) -> str | None:
        """None where the file is silent: each sampler has its own default then."""
        return self.config.get("timestep_spacing")

    def fields(self, scheduler: str) -> SimpleNamespace:
        """The fields of a class of SCHEDULERS, as its `from_config(config)` sets them in diffusers.

        Fields that the file lacks take the class's defaults, whatever class wrote the file; those
        that the class lacks are left out, as are those without effect. `alphas_cumprod` is that of
        these fields.

        Raises ValueError, listing every unsupported value at once.
        """
        fields = {
            name: self.config.get(name, default) for name, default in SCHEDULERS[scheduler].items()
        }
        supported = SUPPORTED | _SUPPORTED_BY.get(scheduler, {})
        errors = [
            f"{name}={value!r} (supported: {', '.join(map(repr, supported[name]))})"
            for name, value in fields.items()
            if name in supported and value not in supported[name]
        ]
        if errors:
            raise ValueError(
                f"scheduler_config.json, read as {scheduler}'s, asks for what this sampler does not"
                f" do: {'; '.join(errors)}. Choose another config.sample.sampler, or change the"
                " file."
            )
        no_effect = NO_EFFECT[""] | NO_EFFECT.get(scheduler, {})
        return SimpleNamespace(
            alphas_cumprod=_alphas_cumprod({"rescale_betas_zero_snr": False} | fields),
            **{name: value for name, value in fields.items() if name not in no_effect},
        )

    @property
    def parameterization(self) -> Parameterization:
        return PARAMETERIZATIONS[self.prediction_type]

    @property
    def num_train_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    def signal_and_noise(self, timesteps: Int[Array, " b"], ndim: int) -> tuple[Array, Array]:
        """sqrt(a_t) and sqrt(1 - a_t), each [b, 1, ...] with `ndim` dimensions."""
        alphas = jnp.asarray(self.alphas_cumprod)[timesteps]
        alphas = alphas.reshape(alphas.shape + (1,) * (ndim - 1))
        return jnp.sqrt(alphas), jnp.sqrt(1 - alphas)

    def add_noise(
        self,
        latents: Float[Array, "b ..."],
        noise: Float[Array, "b ..."],
        timesteps: Int[Array, " b"],
    ) -> Float[Array, "b ..."]:
        """x_t of x_0 = `latents`."""
        signal, sigma = self.signal_and_noise(timesteps, latents.ndim)
        return signal * latents + sigma * noise

    def target(
        self,
        latents: Float[Array, "b ..."],
        noise: Float[Array, "b ..."],
        timesteps: Int[Array, " b"],
    ) -> Float[Array, "b ..."]:
        """What the denoiser is trained to predict from x_t: noise, velocity or x_0."""
        signal, sigma = self.signal_and_noise(timesteps, latents.ndim)
        return self.parameterization.target(latents, noise, signal, sigma)


def _alphas_cumprod(fields: dict) -> np.ndarray:
    if fields["trained_betas"] is not None:
        betas = np.asarray(fields["trained_betas"], np.float32)
    else:
        make = _BETAS[fields["beta_schedule"]]
        betas = make(fields["num_train_timesteps"], fields["beta_start"], fields["beta_end"])
    if fields["rescale_betas_zero_snr"]:
        betas = _rescale_zero_terminal_snr(betas)
    return _cumprod(1 - betas)


def _cumprod(alphas: np.ndarray) -> np.ndarray:
    return np.cumprod(alphas.astype(np.float64)).astype(np.float32)


def _scaled_linear(num: int, start: float, end: float) -> np.ndarray:
    return np.linspace(start**0.5, end**0.5, num).astype(np.float32) ** 2


def _linear(num: int, start: float, end: float) -> np.ndarray:
    return np.linspace(start, end, num).astype(np.float32)


def _squared_cosine(num: int, start: float, end: float) -> np.ndarray:
    """Cosine schedule (arXiv:2102.09672, eq. 17), betas at most 0.999; it has no start and end."""
    alpha = [math.cos((i / num + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(num + 1)]
    return np.asarray([min(1 - alpha[i + 1] / alpha[i], 0.999) for i in range(num)], np.float32)


_BETAS = {"linear": _linear, "scaled_linear": _scaled_linear, "squaredcos_cap_v2": _squared_cosine}


def _rescale_zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Betas whose last step holds no signal (arXiv:2305.08891, algorithm 1)."""
    root = np.sqrt(_cumprod(1 - betas))
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    alphas_cumprod = root**2
    return 1 - np.append(alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1])
