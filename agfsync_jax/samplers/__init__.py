"""Samplers, a file each: from noise to latents along a trajectory of denoiser calls.

A file of this room exports one value, and `config.sample.sampler` is the file's name:

    SAMPLER = Sampler(
        scheduler="DDIMScheduler",                # the class of diffusers that it equals
        defaults=NOISE | {"clip_sample": True},   # that class's fields, with its defaults
        trajectory=trajectory,                    # (fields, num_steps, span) -> Trajectory
        step=step,                                # (model, row, latents) -> (latents,)
    )

The trajectory is computed on the host: a timestep and a row of coefficients for every call of the
denoiser. A sampler then has three parts, and one `lax.scan` walks them all, float32 around the
denoiser: `start` makes a state of latents, `step` makes the next state with one call of the
denoiser, `end` takes latents from the last. A state is a tuple of arrays like latents; for most
samplers, of latents alone.

What a value says of its class is checked against diffusers by tests that walk this room.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from agfsync_jax.diffusion.schedules import (
    PARAMETERIZATIONS,
    Parameterization,
    Schedule,
    alphas_cumprod,
)
from agfsync_jax.diffusion.trajectories import Fields, Span, Trajectory
from agfsync_jax.utils import modules

Latents = Float[Array, "b h w c"]
State = tuple[Latents, ...]
Denoise = Callable[[Array, Array], Array]
Keys = Key[Array, " b"]

# Fields that several classes have.
THRESHOLDING = {
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
}
SIGMAS = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    # Some classes do not name these two, but read them from the file all the same.
    "sigma_min": None,
    "sigma_max": None,
    "timestep_spacing": "linspace",
}
FLOW = {
    "use_flow_sigmas": False,
    "flow_shift": 1.0,
    "use_dynamic_shifting": False,
    "time_shift_type": "exponential",
}
# What fields may hold in any class; any other value is refused by name.
SUPPORTED: dict[str, tuple] = {
    "prediction_type": tuple(PARAMETERIZATIONS),
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "thresholding": (False,),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
    "use_flow_sigmas": (False, None),
    "final_sigmas_type": ("zero", "sigma_min"),
}
# Why these change no trajectory, in any class.
NO_EFFECT = {
    "dynamic_thresholding_ratio": "acts with thresholding, which is refused",
    "sample_max_value": "acts with thresholding, which is refused",
    "flow_shift": "acts with use_flow_sigmas, which is refused",
    "use_dynamic_shifting": "acts with a `mu` that no Stable Diffusion pipeline gives",
    "time_shift_type": "acts with use_dynamic_shifting",
}


class Model(NamedTuple):
    """The denoiser at one step of a trajectory."""

    denoise: Denoise
    parameterization: Parameterization
    row: dict[str, Array]
    keys: Keys | None

    def predict(self, latents: Latents) -> Latents:
        """What the denoiser says of latents = signal x_0 + sigma noise, float32."""
        timesteps = jnp.full(latents.shape[:1], self.row["timestep"])
        return self.denoise(latents, timesteps).astype(jnp.float32)

    def split(self, latents: Latents, prediction: Latents) -> tuple[Latents, Latents]:
        """x_0 and the noise of latents, by what was predicted of them."""
        given = latents, prediction, self.row["signal"], self.row["sigma"]
        return self.parameterization.clean(*given), self.parameterization.noise(*given)

    def clean(self, latents: Latents) -> Latents:
        """x_0 of latents, as the denoiser sees it."""
        return self.split(latents, self.predict(latents))[0]

    def noise(self, shape: tuple[int, ...]) -> Latents:
        """Fresh standard normal noise; by a row's key and the step's index alone."""

        def draw(key):
            return jax.random.normal(jax.random.fold_in(key, self.row["index"]), shape[1:])

        return jax.vmap(draw)(self.keys)


def memories(count: int) -> Callable[[Latents], State]:
    """A start with so many arrays of zeros beside the latents."""
    return lambda latents: (latents, *[jnp.zeros_like(latents)] * count)


@dataclasses.dataclass(frozen=True, eq=False)
class Sampler:
    """A way from noise to latents, equal to a scheduler of diffusers."""

    scheduler: str  #: that class; its `from_config` of a schedule's file, with `variant`, is equal
    #: The fields of the class and their defaults. A field is honored unless `supported` or
    #: `no_effect` has it, here or, for all samplers, above.
    defaults: Mapping[str, Any]
    #: (fields, num_steps, span) -> the calls of the denoiser in that span, which may be more than
    #: `num_steps`; ValueError for what cannot be.
    trajectory: Callable[[Fields, int, Span], Trajectory]
    step: Callable[..., State]  #: (model, row, *state) -> the next; a row's entries are scalars
    start: Callable[[Latents], State] = memories(0)
    end: Callable[[State], Latents] = lambda state: state[0]
    draws_noise: bool = False  #: rows then have an `index`, counted from the whole one's start
    #: Fields that tell this sampler from others of the same class. A file of the class means this
    #: sampler where it holds these values. Whoever names the sampler means them too, whatever
    #: supported value the file holds.
    variant: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    supported: Mapping[str, tuple] = dataclasses.field(default_factory=dict)  #: values of fields
    no_effect: Mapping[str, str] = dataclasses.field(default_factory=dict)  #: field -> why

    def __call__(
        self,
        denoise: Denoise,
        schedule: Schedule,
        latents: Latents,
        num_steps: int,
        *,
        keys: Keys | None = None,
        span: Span = (0.0, 1.0),
    ) -> Latents:
        """Walks a trajectory.

        Args:
            denoise: (latents [b, h, w, c], timesteps [b]) -> prediction, the guided denoiser.
            schedule: the noise that it was trained with, and the scheduler's file.
            latents: standard normal noise; where `span` does not start at 0, what ended there.
            num_steps: of the whole trajectory.
            keys: a PRNG key a row, for samplers that draw noise.
            span: the fractions of the trajectory between which to walk, as `denoising_start` and
                `denoising_end` of diffusers' pipelines. Multistep solvers start anew there.

        Raises:
            ValueError: no keys where they are needed; see `steps`.
        """
        if self.draws_noise and keys is None:
            raise ValueError(f"{self.scheduler} draws noise at each step: give `keys`, one a row.")
        steps = self.steps(schedule, num_steps, span)
        rows = {
            name: jnp.asarray(row, jnp.float32 if row.dtype.kind == "f" else jnp.int32)
            for name, row in ({"timestep": steps.timesteps} | steps.rows).items()
        }

        def body(state, row):
            model = Model(denoise, schedule.parameterization, row, keys)
            return self.step(model, row, *state), None

        latents = latents.astype(jnp.float32)
        if span[0] == 0:
            latents = latents * np.float32(steps.init_sigma)
        state, _ = jax.lax.scan(body, self.start(latents), rows)
        return self.end(state)

    def steps(self, schedule: Schedule, num_steps: int, span: Span = (0.0, 1.0)) -> Trajectory:
        """The calls of the denoiser; all that can be wrong is told here, before any compilation.

        Raises:
            ValueError: a field of the scheduler's file that is not supported, too many steps, a
                span without any.
        """
        if not 0 <= span[0] < span[1] <= 1:
            raise ValueError(f"A span is (start, end), 0 <= start < end <= 1, got {tuple(span)}.")
        steps = self.trajectory(self.fields(schedule), num_steps, span)
        if schedule.parameterization.needs_signal and (steps.rows["signal"] == 0).any():
            raise ValueError(
                f"The sampler of {self.scheduler} starts where rescale_betas_zero_snr has left no"
                f" signal, and {schedule.prediction_type} tells nothing of x_0 there: such a model"
                " predicts v_prediction or sample."
            )
        return steps

    def num_calls(self, schedule: Schedule, num_steps: int, span: Span = (0.0, 1.0)) -> int:
        """How often the denoiser runs; raises as `steps`."""
        return len(self.steps(schedule, num_steps, span).timesteps)

    def fields(self, schedule: Schedule) -> Fields:
        """The class's fields, as its `from_config` of the schedule's file sets them in diffusers.

        Fields that the file lacks take the class's defaults, whatever class wrote the file; those
        that the class lacks are left out, as are those without effect. `alphas_cumprod` is that of
        these fields.

        Raises:
            ValueError: unsupported values; all are listed at once.
        """
        fields = {name: schedule.config.get(name, value) for name, value in self.defaults.items()}
        supported = SUPPORTED | self.supported
        if errors := [
            f"{name}={value!r} (supported: {', '.join(map(repr, supported[name]))})"
            for name, value in fields.items()
            if value not in supported.get(name, (value,))
        ]:
            raise ValueError(
                f"scheduler_config.json, read as {self.scheduler}'s, asks for what this sampler"
                f" does not do: {'; '.join(errors)}. Choose another config.sample.sampler, or"
                " change the file."
            )
        fields |= self.variant
        used = {n: value for n, value in fields.items() if n not in NO_EFFECT | self.no_effect}
        return Fields(alphas_cumprod=alphas_cumprod(fields), **used)

    def file(self, schedule: Schedule) -> dict[str, Any]:
        """The scheduler_config.json with which diffusers draws as this sampler does.

        As diffusers' `from_config` of the schedule's file would save it: fields of other classes
        stay, so that the sampler can be exchanged again.
        """
        config = {**self.defaults, **schedule.config, **self.variant}
        return config | {"_class_name": self.scheduler}

    def is_of(self, schedule: Schedule) -> bool:
        """Whether the schedule's file means this sampler."""
        has = schedule.config.get
        return schedule.scheduler == self.scheduler and all(
            has(name, self.defaults[name]) == value for name, value in self.variant.items()
        )


def find(name: str, schedule: Schedule) -> Sampler:
    """The sampler of this name; with an empty one, the sampler that the schedule's file means.

    Raises:
        ValueError: there is none; the message lists them all.
    """
    if name:
        return modules.load("samplers", name).SAMPLER
    known = []
    for name, sampler in _all().items():
        if sampler.is_of(schedule):
            return sampler
        variant = [f"{field}={value!r}" for field, value in sampler.variant.items()]
        known.append(f"{name} ({', '.join([sampler.scheduler, *variant])})")
    raise ValueError(
        f"There is no sampler for this scheduler_config.json, of {schedule.scheduler}; there are"
        f" {', '.join(known)}: name one of them as config.sample.sampler."
    )


def read_schedule(config: Mapping[str, Any]) -> Schedule:
    """The schedule of a diffusers `scheduler_config.json`, all of whose fields are known here.

    Raises:
        ValueError: an unknown field, or an unsupported kind of noise.
    """
    every = _all().values()
    own = [each.defaults for each in every if each.scheduler == config.get("_class_name")]
    schedule = Schedule.from_config(config, *own[:1])
    known = set().union(*(each.defaults for each in every))
    if unknown := [n for n in schedule.config if n not in known and not n.startswith("_")]:
        told = ", ".join(f"{name}={schedule.config[name]!r}" for name in unknown)
        raise ValueError(f"scheduler_config.json has fields that no sampler knows: {told}.")
    return schedule


def _all() -> dict[str, Sampler]:
    return {name: modules.load("samplers", name).SAMPLER for name in modules.names("samplers")}
