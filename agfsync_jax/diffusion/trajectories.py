"""What the steps of samplers are made of: timesteps, sigmas and coefficients, on the host.

In float64 where diffusers' schedulers are; the tables of sigmas are float32, as theirs.
"""

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

Span = tuple[float, float]


class Trajectory(NamedTuple):
    """The n calls of the denoiser, in order.

    Among the rows are `signal` and `sigma`: the denoiser sees signal x_0 + sigma noise.
    """

    timesteps: np.ndarray  # [n]
    rows: dict[str, np.ndarray]  # coefficients, [n, ...]
    init_sigma: float = 1.0  # the standard deviation of what a whole trajectory begins with

    def cut(self, part: slice) -> "Trajectory":
        rows = {name: row[part] for name, row in self.rows.items()}
        return Trajectory(self.timesteps[part], rows, self.init_sigma)


class Fields(SimpleNamespace):
    """The fields of a scheduler's file and `alphas_cumprod`, which is made of them (see
    `Sampler.fields` in samplers/), and what follows from them."""

    def within(self, span: Span, timesteps: np.ndarray) -> slice:
        """The part of falling `timesteps` that lies in a span; ValueError if none does."""
        total = self.num_train_timesteps
        cuts = [int(round(total - fraction * total)) for fraction in span]
        first, last = (int(np.sum(timesteps >= cut)) for cut in cuts)
        part = slice(first if span[0] > 0 else 0, last if span[1] < 1 else len(timesteps))
        if part.start >= part.stop:
            raise ValueError(
                f"None of {len(timesteps)} steps lies in the span {tuple(span)}: take more steps."
            )
        return part

    def spaced(self, num_steps: int, extra: int = 0) -> np.ndarray:
        """Falling timesteps, float64 [num_steps] (arXiv:2305.08891, table 2).

        Whole numbers, except with "linspace". The last of the `extra` are left out.

        Raises:
            ValueError: more or fewer steps than there are timesteps.
        """
        total, points = self.num_train_timesteps, num_steps + extra
        if not 1 <= num_steps <= total - extra:
            raise ValueError(
                f"num_inference_steps is {num_steps}; this schedule takes 1 to {total - extra}."
            )
        if self.timestep_spacing == "leading":
            timesteps = np.arange(points)[::-1] * (total // points) + self.steps_offset
        elif self.timestep_spacing == "trailing":
            timesteps = np.round(np.arange(total, 0, -total / num_steps)) - 1
        else:
            timesteps = np.linspace(0, total - 1, points)[::-1]
        timesteps = timesteps[:num_steps].astype(np.float64)
        if not 0 <= timesteps[-1] <= timesteps[0] <= total - 1:
            raise ValueError(
                f"{num_steps} steps with steps_offset {self.steps_offset} go from timestep"
                f" {int(timesteps[0])} to {int(timesteps[-1])}, beyond 0 to {total - 1}: take fewer"
                " steps."
            )
        return timesteps

    @property
    def clip_bound(self) -> float:
        """What x_0 is clipped to on both sides."""
        return self.clip_sample_range if self.clip_sample else np.inf

    def stride(self, timesteps: np.ndarray, num_steps: int) -> dict[str, np.ndarray]:
        """`transfer` from timesteps to those a stride lower, where a negative one is the end."""
        alphas = self.alphas_cumprod.astype(np.float64)
        after = timesteps - self.num_train_timesteps // num_steps
        end = 1.0 if self.set_alpha_to_one else alphas[0]
        return transfer(alphas[timesteps], np.where(after >= 0, alphas[np.maximum(after, 0)], end))

    @property
    def sigma_table(self) -> np.ndarray:
        """sigma_t / signal_t of all training timesteps, rising, to float32 as in diffusers."""
        alphas = self.alphas_cumprod.copy()
        alphas[alphas == 0] = 2.0**-24  # keeps the last sigma finite
        return np.sqrt((1 - alphas) / alphas).astype(np.float64)

    def karras(
        self, largest: float, smallest: float, num_steps: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Falling sigmas (arXiv:2206.00364, eq. 5, rho = 7), and their timesteps.

        `largest` and `smallest` are those where the file has no sigma_max and sigma_min.
        """
        largest = largest if self.sigma_max is None else self.sigma_max
        smallest = smallest if self.sigma_min is None else self.sigma_min
        sigmas = np.linspace(largest ** (1 / 7), smallest ** (1 / 7), num_steps) ** 7
        table = self.sigma_table
        return sigmas, np.interp(np.log(sigmas), np.log(table), np.arange(len(table)))

    def interpolated(self, num_steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Falling timesteps, float32, of which not all are whole, and their sigmas, float64."""
        timesteps, table = self.spaced(num_steps).astype(np.float32), self.sigma_table
        sigmas = np.interp(timesteps, np.arange(len(table)), table)
        if getattr(self, "use_karras_sigmas", False):
            sigmas, timesteps = self.karras(sigmas[0], sigmas[-1], num_steps)
        return timesteps, sigmas

    def init_sigma(self, sigmas: np.ndarray) -> float:
        """Where latents are x_0 + sigma noise: their standard deviation at the start."""
        # diffusers takes the start as pure noise where the trajectory begins at the last timestep.
        pure = self.timestep_spacing in ("linspace", "trailing")
        return float(sigmas.max() if pure else np.sqrt(sigmas.max() ** 2 + 1))


def integers(timesteps: np.ndarray) -> np.ndarray:
    return np.round(timesteps).astype(np.int32)


def transfer(now: np.ndarray, after: np.ndarray) -> dict[str, np.ndarray]:
    """Coefficients of latents at a_t = `now`, and of what they become at `after`."""
    return {
        "signal": np.sqrt(now),
        "sigma": np.sqrt(1 - now),
        "next_signal": np.sqrt(after),
        "next_sigma": np.sqrt(1 - after),
    }


def of_sigma(sigmas: np.ndarray) -> dict[str, np.ndarray]:
    """Signal and sigma of variance-preserving latents, by the ratio of the two."""
    signal = 1 / np.sqrt(sigmas**2 + 1)
    return {"signal": signal, "sigma": sigmas * signal}
