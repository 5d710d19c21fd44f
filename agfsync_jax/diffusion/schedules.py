"""Noise schedules of discrete-time diffusion, read from a diffusers `scheduler_config.json`.

Forward process (DDPM, arXiv:2006.11239, eq. 4): x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise, with a_t
the cumulative product of 1 - beta. Velocity (arXiv:2202.00512, appendix D): v = sqrt(a_t) noise -
sqrt(1 - a_t) x_0.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "trailing", "linspace")

# Fields of one diffusers scheduler or another that change the trajectory: the supported value.
_ONLY = {
    "thresholding": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_flow_sigmas": False,
    "interpolation_type": "linear",
    "timestep_type": "discrete",
    "final_sigmas_type": "zero",
    "sigma_min": None,
    "sigma_max": None,
}
# Fields of a solver (config.sample.sampler chooses it), or that act only beside a field of _ONLY.
_IGNORED = {
    *(
        "_class_name",
        "_diffusers_version",
        "skip_prk_steps",
        "sample_max_value",
        "dynamic_thresholding_ratio",
    ),
    *(
        "variance_type",
        "algorithm_type",
        "solver_order",
        "solver_type",
        "lower_order_final",
        "euler_at_final",
    ),
    *(
        "lambda_min_clipped",
        "use_lu_lambdas",
        "original_inference_steps",
        "timestep_scaling",
        "flow_shift",
    ),
    *("use_dynamic_shifting", "time_shift_type"),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """A discrete noise schedule.

    Attributes:
        alphas_cumprod: float32 [num_train_timesteps], a_t.
        final_alpha_cumprod: a at the end of a DDIM trajectory (`set_alpha_to_one`: 1, else a_0).
        timestep_spacing: None where the file is silent: each sampler has its own default then.
        clip_sample_range: bound on the predicted x_0, None for no bound.
    """

    alphas_cumprod: np.ndarray
    prediction_type: str = "epsilon"
    timestep_spacing: str | None = None
    steps_offset: int = 0
    final_alpha_cumprod: float = 1.0
    clip_sample_range: float | None = None
    zero_terminal_snr: bool = False

    @classmethod
    def from_config(cls, config: dict) -> "Schedule":
        """Builds the schedule of a diffusers `scheduler_config.json`.

        Raises ValueError, listing every unsupported field and value at once.
        """
        config = dict(config)
        class_name = config.get("_class_name", "DDIMScheduler")
        known = {
            "num_train_timesteps": 1000,
            "beta_start": 0.0001,
            "beta_end": 0.02,
            "beta_schedule": "linear",
            "trained_betas": None,
            "prediction_type": "epsilon",
            "timestep_spacing": None,
            "steps_offset": 0,
            "set_alpha_to_one": True,
            # The two classes that clip by default: latents must not be clipped by any other.
            "clip_sample": class_name in ("DDIMScheduler", "DDPMScheduler"),
            "clip_sample_range": 1.0,
            "rescale_betas_zero_snr": False,
        }
        errors = []
        for name, value in config.items():
            if name in _ONLY and value != _ONLY[name]:
                errors.append(f"{name}={value!r} (supported: {_ONLY[name]!r})")
            elif name not in known and name not in _ONLY and name not in _IGNORED:
                errors.append(f"{name}={value!r} (unknown field)")
        fields = known | {name: value for name, value in config.items() if name in known}
        if fields["prediction_type"] not in PREDICTION_TYPES:
            errors.append(
                f"prediction_type={fields['prediction_type']!r} (supported: {PREDICTION_TYPES})"
            )
        if fields["timestep_spacing"] not in (None, *SPACINGS):
            errors.append(
                f"timestep_spacing={fields['timestep_spacing']!r} (supported: {SPACINGS})"
            )
        if fields["trained_betas"] is None and fields["beta_schedule"] not in _BETAS:
            errors.append(f"beta_schedule={fields['beta_schedule']!r} (supported: {tuple(_BETAS)})")
        if errors:
            raise ValueError(
                "scheduler_config.json holds what this schedule does not do: " + "; ".join(errors)
            )

        if fields["trained_betas"] is not None:
            betas = np.asarray(fields["trained_betas"], np.float32)
        else:
            make = _BETAS[fields["beta_schedule"]]
            betas = make(fields["num_train_timesteps"], fields["beta_start"], fields["beta_end"])
        if fields["rescale_betas_zero_snr"]:
            betas = _rescale_zero_terminal_snr(betas)
        alphas_cumprod = np.cumprod((1 - betas).astype(np.float64)).astype(np.float32)
        return cls(
            alphas_cumprod=alphas_cumprod,
            prediction_type=fields["prediction_type"],
            timestep_spacing=fields["timestep_spacing"],
            steps_offset=fields["steps_offset"],
            final_alpha_cumprod=1.0 if fields["set_alpha_to_one"] else float(alphas_cumprod[0]),
            clip_sample_range=float(fields["clip_sample_range"]) if fields["clip_sample"] else None,
            zero_terminal_snr=fields["rescale_betas_zero_snr"],
        )

    @property
    def num_train_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    def timesteps(self, num_steps: int, *, spacing: str = "leading") -> np.ndarray:
        """Falling timesteps of an inference run, float64 [num_steps] (arXiv:2305.08891, table 2).

        `spacing` holds where the schedule itself names none. Whole numbers, except with "linspace".
        """
        total, spacing = self.num_train_timesteps, self.timestep_spacing or spacing
        if not 1 <= num_steps <= total:
            raise ValueError(
                f"num_inference_steps is {num_steps}; this schedule takes 1 to {total}."
            )
        if spacing == "leading":
            timesteps = np.arange(num_steps)[::-1] * (total // num_steps) + self.steps_offset
        elif spacing == "trailing":
            timesteps = np.round(np.arange(total, 0, -total / num_steps)) - 1
        else:
            timesteps = np.linspace(0, total - 1, num_steps)[::-1]
        if timesteps[0] > total - 1:
            raise ValueError(
                f"{num_steps} steps with steps_offset {self.steps_offset} start at timestep "
                f"{int(timesteps[0])}, beyond the last one, {total - 1}: take fewer steps."
            )
        return timesteps.astype(np.float64)

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
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return latents
        signal, sigma = self.signal_and_noise(timesteps, latents.ndim)
        return signal * noise - sigma * latents


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
    root = np.sqrt(np.cumprod(1.0 - betas.astype(np.float64)))
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    alphas_cumprod = root**2
    alphas = np.concatenate([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])
    return (1 - alphas).astype(np.float32)
