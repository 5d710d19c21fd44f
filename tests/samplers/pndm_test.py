import numpy as np
import torch

from agfsync_jax.diffusion.schedules import Schedule
from agfsync_jax.samplers import pndm
from tests.schedulers import NOISE, SD, cut, run_diffusers, run_ours, scheduler_of


def test_it_repeats_a_timestep_after_a_hand_over():
    base, refiner = (scheduler_of("pndm", SD) for _ in range(2))
    early, late, _ = cut(base, 20, 0.8)
    late = torch.cat([late[:2], late[1:]])  # what step() counts on where it begins
    middle = run_diffusers(base, NOISE, 20, timesteps=early)
    end = run_diffusers(refiner, middle, 20, timesteps=late)
    ours = run_ours("pndm", SD, NOISE, 20, span=(0.0, 0.8))
    assert np.abs(ours - middle).max() <= 1e-4
    assert np.abs(run_ours("pndm", SD, ours, 20, span=(0.8, 1.0)) - end).max() <= 1e-4
    schedule = Schedule.from_config(SD)
    assert pndm.SAMPLER.num_calls(schedule, 20, (0.0, 0.8)) == len(early) == 17
    assert pndm.SAMPLER.num_calls(schedule, 20, (0.8, 1.0)) == len(late) == 5
