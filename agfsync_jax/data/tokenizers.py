"""Text to token ids, from tokenizer folders in the Hugging Face layout (no torch)."""

import gzip
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

_CLIP_MERGES = Path(__file__).parent / "clip_vocabulary" / "merges.txt.gz"
_CLIP_LENGTH = 77
_T5_TOKENS = 32_100
_START, _END = "<|startoftext|>", "<|endoftext|>"
# What CLIP makes its byte pairs of: contractions, letters, single digits, anything else but spaces.
_CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_OPEN_CLIP_START, _OPEN_CLIP_END = "<start_of_text>", "<end_of_text>"


class _OfTransformers:
    """A tokenizer of transformers."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self.vocab_size = len(tokenizer)
        self.pad_id, self.eos_id = tokenizer.pad_token_id, tokenizer.eos_token_id

    def _encode(self, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        if not len(_listed(texts)):
            return np.zeros((0, length), np.int32), np.zeros((0, length), np.int32)
        out = self._tokenizer(list(texts), padding="max_length", max_length=length, truncation=True)
        return np.array(out["input_ids"], np.int32), np.array(out["attention_mask"], np.int32)


class ClipTokenizer(_OfTransformers):
    """CLIP's byte-pair tokenizer: `ClipTokenizer(folder)(texts)` -> int32 [b, max_length].

    Texts are cut to `max_length` with begin and end kept, and padded with the folder's pad token
    (end of text for SD 1.x, "!" for SD 2.x). Ids are those of transformers' CLIPTokenizer, which
    takes a "!" of a text for padding too where that is the pad token.
    """

    def __init__(self, folder: str | Path):
        from transformers import CLIPTokenizer

        folder = _tokenizer_folder(folder, ("tokenizer.json",), ("vocab.json", "merges.txt"))
        super().__init__(CLIPTokenizer.from_pretrained(str(folder), local_files_only=True))
        self.max_length = int(self._tokenizer.model_max_length)
        if self.max_length > 1_000_000:  # transformers' way to say that nothing was set
            raise ValueError(f"{folder}/tokenizer_config.json must set model_max_length.")

    def __call__(self, texts: Sequence[str]) -> Int[np.ndarray, "b n"]:
        return self._encode(texts, self.max_length)[0]

    def count_truncated(self, texts: Sequence[str]) -> int:
        """How many of the texts have more tokens than `max_length`, begin and end included."""
        lengths = self._tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]
        return sum(len(ids) > self.max_length for ids in lengths)


class OpenClipTokenizer:
    """CLIP's tokenizer as open_clip has it: `OpenClipTokenizer(folder)(texts)` -> int32 [b, 77].

    For models trained with open_clip (HPSv2, LAION's CLIPs). Unlike transformers' it repairs the
    text first (ftfy: broken encodings, ligatures, curly quotes; HTML entities) and pads with 0.

    Args:
        folder: its vocab.json and merges.txt are the vocabulary if they are there, and its
            open_clip_config.json says the context length (77 if it does not). Without a folder, or
            with open_clip_config.json alone, it is CLIP's own vocabulary, of which a copy is here.

    Raises:
        FileNotFoundError: a folder with neither.
        ValueError: an open_clip_config.json of a model with another tokenizer.
    """

    def __init__(self, folder: str | Path | None = None):
        from tokenizers import Regex, models, pre_tokenizers

        names = ("vocab.json", "merges.txt"), ("open_clip_config.json",)
        folder = None if folder is None else _tokenizer_folder(folder, *names)
        text = {}
        if folder and (path := folder / "open_clip_config.json").is_file():
            text = json.loads(path.read_text("utf-8")).get("model_cfg", {}).get("text_cfg", {})
        keys = ("hf_tokenizer_name", "tokenizer_kwargs")
        if other := {key: text[key] for key in keys if text.get(key)}:
            raise ValueError(f"{path} asks for another tokenizer than CLIP's: {other}.")
        if folder and (folder / "vocab.json").is_file():
            vocab = json.loads((folder / "vocab.json").read_text("utf-8"))
            merges = _parse_merges((folder / "merges.txt").read_text("utf-8"))
        else:
            merges = clip_merges()
            vocab = clip_vocabulary(merges)
        self.max_length = int(text.get("context_length", _CLIP_LENGTH))
        self.vocab_size = len(vocab)
        self.pad_id = 0
        self._start_id, self.eos_id = vocab[_START], vocab[_END]
        self._special = {_OPEN_CLIP_START: self._start_id, _OPEN_CLIP_END: self.eos_id}
        words = Regex(f"(?i){'|'.join([*self._special, _CLIP_WORDS])}")
        self._words = pre_tokenizers.Split(words, "removed", invert=True)
        self._bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._pairs = models.BPE(vocab=vocab, merges=merges, end_of_word_suffix="</w>")

    def __call__(self, texts: Sequence[str]) -> Int[np.ndarray, "b n"]:
        """Ids, cut to `max_length` with begin and end kept, and padded with 0."""
        rows = np.full((len(_listed(texts)), self.max_length), self.pad_id, np.int32)
        for row, text in zip(rows, texts, strict=True):
            ids = [self._start_id, *self.encode(text)[: self.max_length - 2], self.eos_id]
            row[: len(ids)] = ids
        return rows

    def encode(self, text: str) -> list[int]:
        """The ids of one text, neither cut nor padded, without begin and end."""
        import ftfy  # only here: it takes half a second

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
        text = " ".join(text.split()).lower()
        ids = []
        for word, _ in self._words.pre_tokenize_str(text):
            if word in self._special:
                ids.append(self._special[word])
            else:
                ((letters, _),) = self._bytes.pre_tokenize_str(word)
                ids += [token.id for token in self._pairs.tokenize(letters)]
        return ids


def write_clip_tokenizer(folder: str | Path, *, pad_token: str = _END) -> Path:
    """Writes CLIP's tokenizer in transformers' layout, for checkpoints that carry none.

    Args:
        folder: is returned; its vocab.json, merges.txt, tokenizer_config.json and
            special_tokens_map.json are overwritten.
        pad_token: "<|endoftext|>" for SD 1.x and SDXL's first text encoder, "!" for SD 2.x and
            SDXL's second. ValueError for one that is not in the vocabulary.
    """
    merges = clip_merges()
    vocab = clip_vocabulary(merges)
    if pad_token not in vocab:
        raise ValueError(f"pad_token {pad_token!r} is not among CLIP's {len(vocab)} tokens.")
    special = {"bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": pad_token}
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": _CLIP_LENGTH,
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
    }
    files = {
        "vocab.json": json.dumps(vocab, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]) + "\n",
        "tokenizer_config.json": json.dumps(config | special, indent=2) + "\n",
        "special_tokens_map.json": json.dumps(special, indent=2) + "\n",
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, "utf-8")
    return folder


def write_text_tokenizer(folder: str | Path) -> None:
    """Writes a tokenizer of as many tokens as T5's, which stands in where that is not at hand."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    special = ("<pad>", "</s>", "<unk>")  # with T5's ids
    tokens = [*special, *list(clip_vocabulary(clip_merges()))[: _T5_TOKENS - len(special)]]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [pair for pair in clip_merges() if "".join(pair) in vocab]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", end_of_word_suffix="</w>")
    )
    tokenizer.normalizer = normalizers.Lowercase()
    words = pre_tokenizers.Split(Regex(_CLIP_WORDS), "removed", invert=True)
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, in_bytes])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.add_special_tokens(list(special))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = dict(zip(("pad_token", "eos_token", "unk_token"), special, strict=True))
    (folder / "tokenizer_config.json").write_text(json.dumps(names, indent=2) + "\n")


def clip_merges() -> list[tuple[str, str]]:
    """CLIP's 48,894 byte-pair merges (Radford et al. 2021), the first to be made first."""
    return _parse_merges(gzip.decompress(_CLIP_MERGES.read_bytes()).decode("utf-8"))


def clip_vocabulary(merges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """Token -> id: bytes, bytes that end a word, what the merges make, begin and end of text."""
    # Bytes that print stand for themselves, the others for the characters from 256 on.
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = [chr(code) for code in [*printed, *range(256, 512 - len(printed))]]
    words = [letter + "</w>" for letter in letters]
    tokens = [*letters, *words, *(first + second for first, second in merges), _START, _END]
    return {token: i for i, token in enumerate(tokens)}


def _parse_merges(text: str) -> list[tuple[str, str]]:
    lines = [line for line in text.split("\n") if line and not line.startswith("#version")]
    return [tuple(line.split(" ")) for line in lines]


class TextTokenizer(_OfTransformers):
    """A text model's tokenizer (T5, BERT): `TextTokenizer(folder)(texts, length)` -> ids, mask."""

    def __init__(self, folder: str | Path):
        # Not AutoTokenizer: it imports torch. tokenizer.json says all that a class would.
        from transformers import PreTrainedTokenizerFast

        folder = _tokenizer_folder(folder, ("tokenizer.json",))
        super().__init__(
            PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
        )
        if self.eos_id is None:
            self.eos_id = self._tokenizer.sep_token_id  # with which BERT ends a text
        for name, token in (("pad_token", self.pad_id), ("eos_token", self.eos_id)):
            if token is None:
                raise ValueError(f"{folder}/tokenizer_config.json must set {name}.")

    def __call__(
        self, texts: Sequence[str], length: int
    ) -> tuple[Int[np.ndarray, "b n"], Int[np.ndarray, "b n"]]:
        """Ids int32 and mask int32 (1 for text, 0 for padding), cut and padded to `length`."""
        return self._encode(texts, length)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The ids of one text, neither cut nor padded; without the end token if not `special`."""
        return self._tokenizer.encode(text, add_special_tokens=special)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens left out."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)


def _tokenizer_folder(folder: str | Path, *layouts: tuple[str, ...]) -> Path:
    """Checks that one of the layouts is there: transformers would ask the network instead."""
    folder = Path(folder)
    if not any(all((folder / name).is_file() for name in names) for names in layouts):
        wanted = " or ".join(" and ".join(names) for names in layouts)
        raise FileNotFoundError(f"No tokenizer in {folder}: expected {wanted} there.")
    return folder


def _listed(texts: Sequence[str]) -> Sequence[str]:
    if isinstance(texts, str):
        raise ValueError(f"Expected a list of texts, got the single text {texts!r}.")
    return texts
