"""Preference losses, a file each: per-example denoising errors in, per-example loss out."""
