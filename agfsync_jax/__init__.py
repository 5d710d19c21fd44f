"""AGFSync in JAX: aligning text-to-image diffusion models with AI feedback only."""

__version__ = "0.1.0"
