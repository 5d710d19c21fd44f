"""Weights in and out: folders, single files, LoRA, open_clip, buckets, the Hub."""
