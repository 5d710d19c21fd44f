"""Images through the scorers of a config: what they say of themselves, and what they make."""
