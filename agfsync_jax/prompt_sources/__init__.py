"""Where prompts and questions come from, a source a file.

A source is a module with two functions:

    prompts(num_prompts, *, split, seed, round_index, **spec) -> rows {id, prompt, category, source}
    questions(prompt_rows, *, seed, **spec) -> rows in TIFA's fields, each under its prompt's id

`spec` is what else stands in the config's block. Rows depend on the arguments alone; each round
gets other prompts, and two splits never share one.
"""


def prompt_id(split: str, round_index: int, index: int) -> str:
    """A stable name: "r000-00012" in training, "test-r000-00012" in another split."""
    prefix = "" if split == "train" else f"{split}-"
    return f"{prefix}r{round_index:03d}-{index:05d}"
