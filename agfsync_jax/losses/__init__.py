"""Preference losses, a file each: residuals of denoising in, a loss an example out.

A file has a formula, a pure function of arrays, and `LOSS = Loss(formula)`, which says what the
formula is given. For most that is the default, denoising errors of b pairs, each the mean over a
latent's elements:

    def loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, *, beta=2000.0):
        ...
        return values, metrics  # values [b]; each metric [b] or a scalar

    LOSS = Loss(loss)
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class Residuals(NamedTuple):
    """All that a loss may look at: residuals (prediction - target) of b examples of k images.

    An example is a pair, chosen then rejected, or a ranking, whose images are its candidates. What
    is not asked for costs nothing in a compiled step.

    Attributes:
        policy: of the model that is trained.
        reference: of the model that it is compared with; None for a loss without one.
        scores: of rankings, and of pairs for a loss that uses them; more is better.
        mask: of rankings, False where there is no candidate.
        scale: what a residual of 1 is in the clean image that the prediction tells.
    """

    policy: Float[Array, "b k ..."]
    reference: Float[Array, "b k ..."] | None = None
    scores: Float[Array, "b k"] | None = None
    mask: Bool[Array, "b k"] | None = None
    scale: Float[Array, " b"] | None = None

    @property
    def policy_errors(self) -> Float[Array, "b k"]:
        """Squared errors, as the mean over an image's elements."""
        return self._mean(jnp.square(self.policy))

    @property
    def reference_errors(self) -> Float[Array, "b k"]:
        """The same of the reference."""
        return self._mean(jnp.square(self.reference))

    @property
    def products(self) -> Float[Array, "b k"]:
        """Policy times reference, as the mean over an image's elements."""
        return self._mean(self.policy * self.reference)

    @property
    def divergence(self) -> Float[Array, " b"]:
        """How far the two predictions are apart: squared, as the mean over an example's images."""
        apart = self._mean(jnp.square(self.policy - self.reference))
        return jnp.mean(apart, axis=1) if self.mask is None else masked_mean(apart, self.mask)

    @staticmethod
    def _mean(x: Float[Array, "b k ..."]) -> Float[Array, "b k"]:
        return jnp.mean(x, axis=tuple(range(2, x.ndim)))


def pair_errors(residuals: Residuals) -> tuple[Float[Array, " b"], ...]:
    """policy_chosen, policy_rejected and, if there is one, reference_chosen, reference_rejected."""
    errors = [residuals.policy_errors]
    if residuals.reference is not None:
        errors.append(residuals.reference_errors)
    return tuple(of_model[:, image] for of_model in errors for image in (0, 1))


@dataclasses.dataclass(frozen=True)
class Loss:
    """What a file of losses/ says of its formula.

    Attributes:
        formula: (*inputs, settings by keyword) -> (loss [b], metrics, each [b] or a scalar). Its
            settings are numbers and have defaults; `config.loss.<file>` may say otherwise.
        inputs: what the formula takes by place, from the residuals.
        uses_reference: else residuals have none.
        same_noise: an example's images get the same noise (they share the timestep in any case).
        is_listwise: examples are rankings, not pairs.
        is_batchwise: an example's loss depends on the other examples of its batch, too.
        uses_scores: pairs come with the scores that made them, [b, 2], too; rankings always do.
        scales_rewards: rewards are in proportion to beta, and beta has no other part, so that
            `config.train.auto_beta` may set it.
    """

    formula: Callable[..., tuple[Float[Array, " b"], dict[str, Array]]]
    inputs: Callable[[Residuals], tuple] = pair_errors
    uses_reference: bool = True
    same_noise: bool = True
    is_listwise: bool = False
    is_batchwise: bool = False
    uses_scores: bool = False
    scales_rewards: bool = True

    def __call__(self, residuals: Residuals) -> tuple[Float[Array, " b"], dict[str, Array]]:
        """The loss of each example, and metrics."""
        return self.formula(*self.inputs(residuals))

    def configured(self, **settings: Any) -> "Loss":
        """This loss with other settings than its own.

        Raises:
            ValueError: a setting that the formula does not have, or a value that it does not take.
        """
        known, name = _settings(self.formula), self.formula.__module__.rpartition(".")[2]
        if unknown := sorted(set(settings) - set(known)):
            has = ", ".join(known) or "none"
            raise ValueError(
                f"config.loss has {', '.join(unknown)}, which {name} does not take: it has {has}."
            )
        for key, value in settings.items():
            kind = type(known[key].default)
            if isinstance(value, bool) or not isinstance(value, int | kind):
                raise ValueError(f"config.loss.{name}.{key}={value!r}: expected {kind.__name__}.")
            if not math.isfinite(value) or value < 0 or (key == "beta" and not value):
                least = "above 0" if key == "beta" else "of at least 0"
                raise ValueError(
                    f"config.loss.{name}.{key}={value!r}: expected a finite number {least}."
                )
        made = self._with(**settings)
        images = jax.ShapeDtypeStruct((2, 2, 1), jnp.float32)
        scores, mask = (jax.ShapeDtypeStruct((2, 2), dtype) for dtype in (jnp.float32, bool))
        scale = jax.ShapeDtypeStruct((2,), jnp.float32)
        residuals = Residuals(images, images if self.uses_reference else None, scores, mask, scale)
        jax.eval_shape(made, residuals)  # a formula may refuse a value, too
        return made

    @property
    def beta(self) -> float | None:
        """How strongly the policy is held to the reference; None for a loss without one."""
        found = _settings(self.formula).get("beta")
        return found and found.default

    def with_beta(self, beta: Float[Array, ""]) -> "Loss":
        """This loss with a beta that a compiled step computes."""
        return self._with(beta=beta)

    def _with(self, **settings: Any) -> "Loss":
        return dataclasses.replace(self, formula=functools.partial(self.formula, **settings))


def settings_of(module: ModuleType) -> dict[str, inspect.Parameter]:
    """What `config.loss.<file>` may set."""
    return _settings(module.LOSS.formula)


def _settings(formula: Callable) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(formula).parameters.values()
    return {each.name: each for each in parameters if each.kind is each.KEYWORD_ONLY}


def reward(
    policy: Float[Array, "..."], reference: Float[Array, "..."], beta: float
) -> Float[Array, "..."]:
    """The implicit reward of Diffusion-DPO, -beta/2 (policy error - reference error).

    T * weight(t) of arXiv:2311.12908, eq. 14, is folded into beta: hence values in the thousands,
    2000 for Stable Diffusion 1.5 and 5000 for SDXL.
    """
    return -0.5 * beta * (policy - reference)


def accuracy(margin: Float[Array, "..."]) -> Float[Array, "..."]:
    """1 where a pair is told apart, 0 where it is turned round, 1/2 for a tie: the policy at the
    start is neither right nor wrong."""
    return 0.5 * (1 + jnp.sign(margin))


def masked_mean(values: Float[Array, "b n"], mask: Bool[Array, "b n"]) -> Float[Array, " b"]:
    """Over each ranking's own candidates; 0 where there is none."""
    total = jnp.sum(jnp.where(mask, values, 0), axis=1)
    return total / jnp.maximum(jnp.sum(mask, axis=1), 1)


def group_advantages(scores: Float[Array, "b n"], mask: Bool[Array, "b n"]) -> Float[Array, "b n"]:
    """How far each score is above its group's mean, in standard deviations; 0 beyond the mask, and
    for a group without a deviation."""
    apart = jnp.where(mask, scores - masked_mean(scores, mask)[:, None], 0)
    variance = masked_mean(jnp.square(apart), mask)[:, None]
    return jnp.where(variance > 1e-12, apart * jax.lax.rsqrt(variance + 1e-12), 0)


def better_pairs(scores: Float[Array, "b n"], mask: Bool[Array, "b n"]) -> Bool[Array, "b n n"]:
    """Whether candidate i of a ranking is better than j."""
    return (scores[:, :, None] > scores[:, None, :]) & mask[:, :, None] & mask[:, None, :]


def ranking_metrics(
    rewards: Float[Array, "b n"], scores: Float[Array, "b n"], mask: Bool[Array, "b n"]
) -> dict[str, Float[Array, "..."]]:
    """`reward_metrics` of best against worst [b]; rewards/accuracy of all pairs of the batch."""
    better = better_pairs(scores, mask)
    right = jnp.sum(better * accuracy(rewards[:, :, None] - rewards[:, None, :]))
    best = jnp.argmax(jnp.where(mask, scores, -jnp.inf), axis=1, keepdims=True)
    worst = jnp.argmin(jnp.where(mask, scores, jnp.inf), axis=1, keepdims=True)
    ends = (jnp.take_along_axis(rewards, end, axis=1)[:, 0] for end in (best, worst))
    return reward_metrics(*ends) | {"rewards/accuracy": right / jnp.maximum(jnp.sum(better), 1)}


def reward_metrics(
    chosen: Float[Array, "..."], rejected: Float[Array, "..."]
) -> dict[str, Float[Array, "..."]]:
    """The metrics of every loss with a reference, in the shape of the rewards."""
    margin = chosen - rejected
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margin": margin,
        "rewards/margin_size": jnp.abs(margin),
        "rewards/accuracy": accuracy(margin),
        "rewards/weight": jax.nn.sigmoid(-margin),  # what a pair still counts in Diffusion-DPO
    }
