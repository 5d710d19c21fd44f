"""Pure functions of arrays: noise schedules, samplers, guidance, denoising errors, generation."""
