"""The micro world's referee: classical vision judges each image against its prompt.

It shares nothing with the models that score and train, so it tells whether a higher score means
better images. Only for prompts in the grammar of micro/grammar.py (the one room besides data
that this file needs).
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8

from agfsync_jax import evaluators
from agfsync_jax.data.columns import Column
from agfsync_jax.micro import referee
from agfsync_jax.micro.grammar import parse_caption
from agfsync_jax.micro.questions import ELEMENT_TYPES

_BY_TYPE = {
    f"referee/{kind}": Column(f"the referee's checks about {kind}", "%") for kind in ELEMENT_TYPES
}


class Evaluator(evaluators.Evaluator):
    """The share of checks that are true, whether all are, and the share of each element type."""

    columns = {
        "referee": Column(
            "checks that an independent vision program, never used to train, finds true", "%"
        ),
        "referee_strict": Column("images in which the referee finds every check true", "%"),
        **_BY_TYPE,
    }

    def check(self, prompts: Sequence[str]) -> None:
        """Raises ValueError for a prompt outside the grammar."""
        for prompt in prompts:
            parse_caption(prompt)

    def __call__(
        self,
        images: UInt8[np.ndarray, "b h w 3"],
        prompts: Sequence[str],
        questions: Sequence[Sequence[dict]] = (),
    ) -> dict[str, Float[np.ndarray, " b"]]:
        """Judges a batch; the questions have no say.

        Raises:
            ValueError: a prompt outside the grammar, or images of another size than the world's.
        """
        del questions
        columns = {name: np.full(len(prompts), np.nan, np.float32) for name in self.columns}
        for row, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
            checks = referee.judge(np.asarray(image), parse_caption(prompt))
            columns["referee"][row] = referee.mean(checks)
            columns["referee_strict"][row] = referee.strict(checks)
            by_type = defaultdict(list)
            for check, true in checks.items():
                by_type[check.partition(":")[0]].append(true)
            for kind, results in by_type.items():
                columns[f"referee/{kind}"][row] = np.mean(results)
        return columns
