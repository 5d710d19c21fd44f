"""VQAScore (Lin et al. 2024): how likely is "Yes" when asked whether the image shows the prompt?

One question an image, made from the prompt itself; no questions need be written. As published the
model is CLIP-FlanT5 and the score exp(-mean cross entropy) of the answer's tokens, the end token
among them; here it is BLIP-2's, of the same kind.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, UInt8

from agfsync_jax import scorers
from agfsync_jax.data.columns import Column
from agfsync_jax.scorers._blip2 import Blip2, Question
from agfsync_jax.scorers._shared import shared

PROMPT = 'Does this figure show "{prompt}"? Please answer yes or no.'


class Scorer(scorers.Scorer):
    """Column vqascore, float32 [b] in 0..1.

    Args:
        mesh, batch_size, model: see scorers/vqa.py, with which the model is shared where all of
            them are the same.
        prompt: the question, with the field {prompt}.
        answer: whose probability counts.

    Raises:
        FileNotFoundError, ValueError: no such BLIP-2; a prompt without its field, no answer.
    """

    columns = {"vqascore": Column("how sure the VQA model is that the image shows the prompt")}
    _rest_goes_to = Blip2

    @classmethod
    def check(cls, *, prompt: str = PROMPT, answer: str = "Yes", **_: Any) -> None:
        if "{prompt}" not in prompt or not answer:
            raise ValueError(
                f"prompt {prompt!r}, answer {answer!r}: expected a question with {{prompt}} in it"
                " and an answer"
            )

    def __init__(
        self,
        mesh: Mesh,
        *,
        batch_size: int = 64,
        prompt: str = PROMPT,
        answer: str = "Yes",
        **model: Any,
    ):
        self.check(prompt=prompt, answer=answer)
        self._prompt, self._answer = prompt, answer
        self._model = shared(Blip2, mesh, batch_size=batch_size, **model)

    def __call__(
        self, images: UInt8[np.ndarray, "b h w 3"], prompts: Sequence[str], questions: Any
    ) -> dict[str, Float[np.ndarray, " b"]]:
        # not str.format: prompts may hold braces
        texts = [self._prompt.replace("{prompt}", prompt) for prompt in prompts]
        asked = [Question(image, text, (self._answer,)) for image, text in enumerate(texts)]
        totals = self._model.choice_log_probs(images, asked, end=True)
        num_tokens = len(self._model.encode(self._answer, special=True))
        return {"vqascore": np.exp(np.concatenate(totals) / num_tokens).astype(np.float32)}
