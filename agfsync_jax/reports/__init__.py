"""A workdir, read back as plain data and shown to a person."""
