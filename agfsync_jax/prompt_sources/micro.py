"""The embedded default: captions and questions of the micro world."""

import numpy as np

from agfsync_jax.micro.grammar import parse_caption
from agfsync_jax.micro.questions import fixed_questions
from agfsync_jax.micro.scenes import sample_scenes
from agfsync_jax.prompt_sources import prompt_id


def prompts(num_prompts: int, *, split: str, seed: int, round_index: int) -> list[dict]:
    """`num_prompts` different captions of a split of the world; the category is the scene's kind.

    No shipped network has seen the captions of "heldout", whose halves are "validation" and "test".

    Raises:
        ValueError: the world has no such split, or fewer captions in it.
    """
    if not num_prompts:
        raise ValueError("num_prompts=0: the micro world has no end of prompts, say how many.")
    rng = np.random.default_rng([seed, round_index])
    scenes = sample_scenes(rng, num_prompts, split=split, unique=True)
    return [
        {
            "id": prompt_id(split, round_index, index),
            "prompt": scene.caption(),
            "category": scene.kind,
            "source": "micro",
        }
        for index, scene in enumerate(scenes)
    ]


def questions(prompt_rows: list[dict], *, seed: int) -> list[dict]:
    """The fixed question set of each caption.

    Raises:
        ValueError: a prompt that is no caption of the world.
    """
    del seed  # a caption has one set of questions
    return [
        {"id": row["id"], "caption": row["prompt"], **question}
        for row in prompt_rows
        for question in fixed_questions(parse_caption(row["prompt"]))
    ]
