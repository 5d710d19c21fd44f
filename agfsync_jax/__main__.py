"""python -m agfsync_jax: the same as the command `agfsync`."""

import sys

from agfsync_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
