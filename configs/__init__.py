"""One file, one experiment: each has get_config(arg), and a docstring with its command and cost."""
