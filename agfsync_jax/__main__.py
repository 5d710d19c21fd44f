"""python -m agfsync_jax: the same as the command `agfsync`."""

import sys

from agfsync_jax.cli import main

sys.exit(main())
