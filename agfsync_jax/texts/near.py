"""Near duplicates among texts that come in waves: no embedding is made twice."""

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Int

from agfsync_jax.parallel.mesh import create_mesh
from agfsync_jax.texts.duplicates import near_duplicates
from agfsync_jax.texts.sentences import SentenceEncoder
from agfsync_jax.utils.clock import Stage


class NearTexts:
    """Compares texts by a sentence encoder, on this process's devices.

    Args:
        path: of the encoder; empty: no text is near another one.
        similarity: the cosine from which two are near.

    """

    def __init__(self, path: str, similarity: float):
        self.path, self.similarity = path, similarity
        self._encoder: SentenceEncoder | None = None
        self._known: dict[str, np.ndarray] = {}

    def load(self) -> None:
        """Loads the encoder, which the first call does else; raises as `SentenceEncoder` does."""
        if self.path and self._encoder is None:
            mesh = create_mesh({"data": -1}, devices=jax.local_devices())
            self._encoder = SentenceEncoder(self.path, mesh=mesh)

    def __call__(self, texts: Sequence[str], known: int, stage: Stage) -> Int[np.ndarray, " n"]:
        """Of each text -1, or the place of the earlier one that is kept and nearest to it; the
        first `known` are kept whatever they are."""
        if not self.path or len(texts) < 2:
            return np.full(len(texts), -1)
        self.load()
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        with stage.progress(len(new), "embeds", unit="texts") as progress:
            rows: list[np.ndarray] = []
            for part in self._encoder.stream(new):
                rows.extend(part)
                progress.update(len(part))
        self._known.update(zip(new, rows, strict=True))
        embeddings = np.stack([self._known[text] for text in texts])
        with stage.progress(len(texts), "compares", unit="texts") as progress:
            return near_duplicates(
                embeddings, self.similarity, known=known, on_progress=progress.update
            )
