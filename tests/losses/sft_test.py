import jax.numpy as jnp
import numpy as np

from agfsync_jax.losses import diffusion_dpo, sft


def test_the_loss_is_the_error_on_the_chosen():
    loss, metrics = sft.loss(jnp.array([1.0, 3.0]), jnp.array([9.0, 9.0]))
    np.testing.assert_allclose(loss, [1.0, 3.0])
    assert metrics == {}


def test_only_preference_losses_need_a_reference():
    assert not sft.LOSS.uses_reference and diffusion_dpo.LOSS.uses_reference
