"""The embedded default suite: a small drawn world and models trained on it."""
