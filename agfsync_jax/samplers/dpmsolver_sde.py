"""SDE-DPM-Solver++ (2M) (arXiv:2211.01095, appendix B): DPM-Solver++ that draws noise."""

import dataclasses

from agfsync_jax.samplers import dpmsolver_multistep


def step(model, row, latents, before):
    latents, clean = dpmsolver_multistep.step(model, row, latents, before)
    return latents + row["fresh"] * model.noise(latents.shape), clean


SAMPLER = dataclasses.replace(
    dpmsolver_multistep.SAMPLER,
    step=step,
    draws_noise=True,
    variant={"algorithm_type": "sde-dpmsolver++"},
)
