"""Text to token ids, from tokenizer folders in the Hugging Face layout (no torch)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int


class ClipTokenizer:
    """CLIP's byte-pair tokenizer: `ClipTokenizer(folder)(texts)` -> int32 [b, max_length].

    Texts are cut to `max_length` with begin and end kept, and padded with the folder's pad token
    (end of text for SD 1.x, "!" for SD 2.x).
    """

    def __init__(self, folder: str | Path):
        from transformers import CLIPTokenizer

        folder = _tokenizer_folder(folder, ("tokenizer.json",), ("vocab.json", "merges.txt"))
        self._tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
        self.max_length = int(self._tokenizer.model_max_length)
        if self.max_length > 1_000_000:  # transformers' way to say that nothing was set
            raise ValueError(f"{folder}/tokenizer_config.json must set model_max_length.")

    def __call__(self, texts: Sequence[str]) -> Int[np.ndarray, "b n"]:
        return _encode(self._tokenizer, texts, self.max_length)[0]

    @property
    def vocab_size(self) -> int:
        return len(self._tokenizer)

    @property
    def pad_id(self) -> int:
        return self._tokenizer.pad_token_id

    @property
    def eos_id(self) -> int:
        return self._tokenizer.eos_token_id


class TextTokenizer:
    """A text model's tokenizer (T5): `TextTokenizer(folder)(texts, length)` -> ids, mask."""

    def __init__(self, folder: str | Path):
        # Not AutoTokenizer: it imports torch. tokenizer.json says all that a class would.
        from transformers import PreTrainedTokenizerFast

        folder = _tokenizer_folder(folder, ("tokenizer.json",))
        self._tokenizer = PreTrainedTokenizerFast.from_pretrained(
            str(folder), local_files_only=True
        )
        for name in ("pad_token", "eos_token"):
            if getattr(self._tokenizer, name) is None:
                raise ValueError(f"{folder}/tokenizer_config.json must set {name}.")

    def __call__(
        self, texts: Sequence[str], length: int
    ) -> tuple[Int[np.ndarray, "b n"], Int[np.ndarray, "b n"]]:
        """Ids int32 and mask int32 (1 for text, 0 for padding), cut and padded to `length`."""
        return _encode(self._tokenizer, texts, length)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The ids of one text, neither cut nor padded; without the end token if not `special`."""
        return self._tokenizer.encode(text, add_special_tokens=special)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens left out."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def token_id(self, token: str) -> int:
        """The id of one token, such as "<image>". Raises ValueError for an unknown one."""
        vocab = self._tokenizer.get_vocab()
        if token not in vocab:
            raise ValueError(f"{token!r} is not among the tokenizer's {len(vocab)} tokens.")
        return vocab[token]

    @property
    def vocab_size(self) -> int:
        return len(self._tokenizer)

    @property
    def pad_id(self) -> int:
        return self._tokenizer.pad_token_id

    @property
    def eos_id(self) -> int:
        return self._tokenizer.eos_token_id


def _tokenizer_folder(folder: str | Path, *layouts: tuple[str, ...]) -> Path:
    """Checks that one of the layouts is there: transformers would ask the network instead."""
    folder = Path(folder)
    if not any(all((folder / name).is_file() for name in names) for names in layouts):
        wanted = " or ".join(" and ".join(names) for names in layouts)
        raise FileNotFoundError(f"No tokenizer in {folder}: expected {wanted} there.")
    return folder


def _encode(tokenizer, texts: Sequence[str], length: int):
    if isinstance(texts, str):
        raise ValueError(f"Expected a list of texts, got the single text {texts!r}.")
    if not len(texts):
        return np.zeros((0, length), np.int32), np.zeros((0, length), np.int32)
    out = tokenizer(list(texts), padding="max_length", max_length=length, truncation=True)
    return np.array(out["input_ids"], np.int32), np.array(out["attention_mask"], np.int32)
