"""Whole text-to-image systems, a file each."""
