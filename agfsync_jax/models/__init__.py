"""Plain NNX networks: no mesh, no config file, no input or output."""
