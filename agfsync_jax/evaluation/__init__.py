"""Models side by side: the same held-out prompts and seeds, drawn, judged and compared."""
