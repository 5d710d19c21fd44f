"""Plain NNX networks: arrays in, arrays out. Where they run is others' business (hooks.py)."""
