"""Sizes of models that are not here."""

import jax
import jax.numpy as jnp
import pytest

from agfsync_jax.parallel.mesh import create_mesh
from agfsync_jax.plans import param_bytes, sample, score
from configs import sd15, sdxl


@pytest.mark.parametrize("experiment, millions", [(sd15, 859.5), (sdxl, 2567.5)])
def test_sizes_of_a_model_that_is_not_here(experiment, millions):
    """The UNets' published numbers of parameters; nothing is downloaded."""
    config = experiment.get_config()
    mesh = create_mesh()
    backbone = sample.abstract_backbone(config, mesh, config.backbone.path, config.backbone.kind)
    leaves = jax.tree.leaves(backbone.params["unet"])
    assert round(sum(x.size for x in leaves) / 1e6, 1) == millions
    assert {x.dtype for x in leaves} == {jnp.dtype("bfloat16")}
    plain = backbone.plain()  # after the folder that says the sizes is gone
    assert plain.params is backbone.params and plain.tokenize([""]).shape[1] in (77, 2 * 77)
    with pytest.raises(FileNotFoundError, match="config.backbone.kind: one of stable-diffusion-v1"):
        sample.abstract_backbone(config, mesh, config.backbone.path, "")
    config.backbone.name = "stable_diffusion_xl" if experiment is sd15 else "stable_diffusion"
    with pytest.raises(ValueError, match="config.backbone.name=stable_diffusion.* reads"):
        sample.abstract_backbone(config, mesh, config.backbone.path, config.backbone.kind)


@pytest.mark.parametrize("name, millions", [("xl", 3942), ("xxl", 12230)])
def test_sizes_of_a_blip2_that_is_not_here(name, millions):
    """The published numbers of parameters; without the query's text embeddings."""
    config = sd15.get_config()
    config.scorers.vqa.path = f"Salesforce/blip2-flan-t5-{name}"
    config.score.mesh.fsdp = 4
    devices = jax.devices()[:4]
    _, params, _ = score.abstract_blip2(
        config.scorers.vqa.to_dict(), create_mesh(config.score.mesh, devices=devices)
    )
    leaves = jax.tree.leaves(params)
    assert round(sum(x.size for x in leaves) / 1e6) == millions
    assert {x.dtype for x in leaves} == {jnp.dtype("bfloat16")}
    all_bytes = sum(x.size * 2 for x in leaves)
    assert param_bytes(params) < 0.3 * all_bytes  # a quarter, and what is whole everywhere
