"""Parts of `agfsync train`: the step, and what watches it."""
