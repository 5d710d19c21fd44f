import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from agfsync_jax.data.tokenizers import ClipTokenizer, TextTokenizer

ROOT = Path(__file__).parents[2]
START, END = "<|startoftext|>", "<|endoftext|>"
TEXTS = ["a Red  circle", "", "red " * 20, "Ein grüner Kreis, 3 Stück!", "the color's\nred"]


@pytest.fixture
def clip_folder(tmp_path_factory):
    """CLIP's four files, as diffusers folders hold them: bytes, and one merged word."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    vocab = [*letters, *(c + "</w>" for c in letters), "re", "red</w>", START, END]
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 12} | special
    files = {
        "vocab.json": json.dumps({token: i for i, token in enumerate(vocab)}),
        "merges.txt": "#version: 0.2\nr e\nre d</w>\n",
        "tokenizer_config.json": json.dumps(config),
        "special_tokens_map.json": json.dumps(special),
    }
    folder = tmp_path_factory.mktemp("clip")
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def t5_folder(tmp_path_factory):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    words = ["\u2581is", "\u2581the", "\u2581red", "\u2581yes", "\u2581no", "?"]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    pieces += [(word, -3.0) for word in words] + [(c, -5.0) for c in "abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    folder = tmp_path_factory.mktemp("t5")
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "T5Tokenizer",
        "extra_ids": 0,
        "additional_special_tokens": ["<image>"],
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_clip_ids_by_hand(clip_folder):
    tokenizer = ClipTokenizer(clip_folder)
    vocab = json.loads((clip_folder / "vocab.json").read_text())
    ids = tokenizer(["a Red  cat", "", "red " * 20])
    assert ids.dtype == np.int32 and tokenizer.max_length == 12
    start, end, red = vocab[START], vocab[END], vocab["red</w>"]
    cat = [vocab["c"], vocab["a"], vocab["t</w>"]]
    assert ids.tolist() == [
        [start, vocab["a</w>"], red, *cat, *[end] * 6],
        [start, *[end] * 11],
        [start, *[red] * 10, end],
    ]
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.eos_id) == (len(vocab), end, end)
    assert tokenizer([]).shape == (0, 12)


@pytest.mark.parametrize("pad", [END, "!"])
def test_clip_equals_transformers(clip_folder, pad):
    """SD 1.x pads with the end token, SD 2.x with "!"."""
    from transformers import AutoTokenizer

    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        config = json.loads((clip_folder / name).read_text()) | {"pad_token": pad}
        (clip_folder / name).write_text(json.dumps(config))
    tokenizer = AutoTokenizer.from_pretrained(clip_folder)
    wanted = tokenizer(
        TEXTS, padding="max_length", truncation=True, max_length=tokenizer.model_max_length
    )
    ours = ClipTokenizer(clip_folder)
    np.testing.assert_array_equal(ours(TEXTS), wanted["input_ids"])
    assert ours([""])[0, -1] == ours.pad_id == tokenizer.convert_tokens_to_ids(pad)


def test_t5_equals_transformers(t5_folder):
    from transformers import AutoTokenizer

    ours, theirs = TextTokenizer(t5_folder), AutoTokenizer.from_pretrained(t5_folder)
    texts = ["is the red?", "yes", "", "is the cat red? " * 5]
    ids, mask = ours(texts, 9)
    wanted = theirs(texts, padding="max_length", truncation=True, max_length=9)
    np.testing.assert_array_equal(ids, wanted["input_ids"])
    np.testing.assert_array_equal(mask, wanted["attention_mask"])
    assert ids[0].tolist() == [4, 5, 6, 9, 1, 0, 0, 0, 0] and ids.dtype == mask.dtype == np.int32
    assert ids[3, -1] == 1 and mask[3].all()
    assert ours.encode("yes") == [7, 1] and ours.encode("yes", special=False) == [7]
    assert ours.decode(ours.encode("is the cat?")) == "is the cat?"
    assert ours.token_id("<image>") == theirs.convert_tokens_to_ids("<image>")
    assert (ours.vocab_size, ours.pad_id, ours.eos_id) == (len(theirs), 0, 1)
    with pytest.raises(ValueError, match="'<video>' is not among"):
        ours.token_id("<video>")


def test_errors(clip_folder, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(FileNotFoundError, match="expected tokenizer.json or vocab.json and merges"):
        ClipTokenizer(empty)
    with pytest.raises(FileNotFoundError, match="expected tokenizer.json"):
        TextTokenizer(empty / "none")
    with pytest.raises(ValueError, match="list of texts"):
        ClipTokenizer(clip_folder)("one text")
    config = json.loads((clip_folder / "tokenizer_config.json").read_text())
    del config["model_max_length"]
    (clip_folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="must set model_max_length"):
        ClipTokenizer(clip_folder)


def test_pad_token_must_be_set(t5_folder):
    (t5_folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    with pytest.raises(ValueError, match="must set pad_token"):
        TextTokenizer(t5_folder)


def test_no_torch(clip_folder, t5_folder):
    code = (
        "import sys\n"
        "from agfsync_jax.data.tokenizers import ClipTokenizer, TextTokenizer\n"
        f"ClipTokenizer({str(clip_folder)!r})(['red'])\n"
        f"TextTokenizer({str(t5_folder)!r})(['red'], 4)\n"
        "assert not {'torch', 'tensorflow'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
