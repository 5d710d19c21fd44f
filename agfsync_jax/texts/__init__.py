"""Texts by their meaning: sentence embeddings, the nearest choice, near duplicates."""
