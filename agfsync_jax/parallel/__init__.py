"""Meshes, shardings by parameter path, and several processes."""
