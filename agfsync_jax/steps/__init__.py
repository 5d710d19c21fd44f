"""How a verb runs: what it needs, what it leaves in a workdir, when it is skipped."""
