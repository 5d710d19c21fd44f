import csv
import gzip
import hashlib
import importlib.util
import json
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from agfsync_jax.data.tokenizers import (
    ClipTokenizer,
    OpenClipTokenizer,
    TextTokenizer,
    clip_merges,
    write_clip_tokenizer,
)

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
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


# open_clip_torch 3.3.0's own SimpleTokenizer: ids without begin and end.
OPEN_CLIP_IDS = {
    "a photo of a cat": [320, 1125, 539, 320, 2368],
    "": [],
    " \n\t ": [],
    "&amp;amp; &lt;b&gt; &quot;hi&quot;": [261, 283, 321, 285, 257, 1883, 257],
    "schÃ¶n, a cafÃ©": [844, 7255, 333, 267, 320, 15304],
    "“curly” it’s": [257, 20795, 257, 585, 568],
    "😀👩\u200d👩\u200d👧": [12832, 26304, 26304, 964, 356],
    "一只红色的猫": [
        *[19759, 222, 34517, 103, 163, 118, 95, 164, 231, 110, 163, 248, 226, 163, 234, 360]
    ],
    "IT'S ﬁne ½ ²": [585, 568, 3797, 33613, 41175],
    "!<end_of_text>a<END_OF_TEXT>": [0, 283, 806, 318, 539, 318, 4160, 285, 320, 49407],
    "e\u0301\u200b\x00\ufeff": [4166, 9844],
    "word " * 100: [2653] * 100,
}
# sha256 of its int32 ids, padded to 77, of all prompts of a file.
OPEN_CLIP_DIGESTS = {
    "PartiPrompts": "76aab80995d5d7c117c5a67eca6f39fad16e53dcfb9eef4b4634052968abd363",
    "TIFA": "f743e804ed57371c3d7be7513ef0a87c2c124c45e81007d0145b55bafa2ae337",
}
MERGES_DIGEST = "d308b7377a8ceaa9707a21614fe8c831b9196e197b7aeb69833359362907af02"


@pytest.fixture(scope="module", params=list(OPEN_CLIP_DIGESTS))
def prompts(request):
    """(name, the file's prompts); both have curly quotes, exclamation marks and a too long one."""
    file = {"PartiPrompts": "PartiPrompts.tsv", "TIFA": "tifa_v1.0_text_inputs.json"}[request.param]
    if not (DATA / file).is_file():
        pytest.skip(f"the prompts {DATA / file} are not here")
    with open(DATA / file, encoding="utf-8", newline="") as lines:
        if file.endswith(".json"):
            return request.param, [row["caption"] for row in json.load(lines)]
        rows = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        return request.param, [row["Prompt"] for row in rows]


@pytest.fixture(scope="module")
def simple_tokenizer():
    """open_clip's tokenizer, which is OpenAI's code; its file alone loads without torchvision."""
    package = importlib.util.find_spec("open_clip")
    if package is None:
        pytest.skip("open_clip is not installed")
    path = Path(package.submodule_search_locations[0]) / "tokenizer.py"
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer(str(path.parent / "bpe_simple_vocab_16e6.txt.gz"))


def padded(ids, pad_id):
    """The ids with another padding than open_clip's 0 behind the first end of text."""
    behind = np.cumsum(ids == 49407, 1) - (ids == 49407) > 0
    return np.where(behind, pad_id, ids)


def test_vocabulary_is_clips():
    data = (ROOT / "agfsync_jax/data/clip_vocabulary/merges.txt.gz").read_bytes()
    assert data[4:8] == bytes(4), "gzip's time must be 0"
    assert hashlib.sha256(gzip.decompress(data)).hexdigest() == MERGES_DIGEST
    merges = clip_merges()
    assert len(merges) == 48894 and merges[0] == ("i", "n") and merges[-1] == ("jeky", "ll</w>")


def test_vocabulary_is_open_clips(simple_tokenizer):
    assert clip_merges() == list(simple_tokenizer.bpe_ranks)


@pytest.mark.parametrize("text", OPEN_CLIP_IDS, ids=ascii)
def test_open_clip_ids(text):
    tokenizer = OpenClipTokenizer()
    wanted = OPEN_CLIP_IDS[text]
    assert tokenizer.encode(text) == wanted
    (row,) = tokenizer([text])
    wanted = [49406, *wanted[:75], 49407]
    assert row.dtype == np.int32 and row.tolist() == wanted + [0] * (77 - len(wanted))


def test_open_clip_on_all_prompts(prompts):
    name, texts = prompts
    tokenizer = OpenClipTokenizer()
    ids = tokenizer(texts)
    assert ids.shape == (len(texts), 77) and ids.dtype == np.int32
    assert hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest() == OPEN_CLIP_DIGESTS[name]
    long = [text for text in texts if len(tokenizer.encode(text)) > 75]
    assert len(long) == 1 and tokenizer(long)[0, -1] == 49407


def test_open_clip_equals_simple_tokenizer(prompts, simple_tokenizer):
    ours, (_, texts) = OpenClipTokenizer(), prompts
    np.testing.assert_array_equal(ours(texts), simple_tokenizer(texts).numpy())


def test_open_clip_equals_simple_tokenizer_on_anything(simple_tokenizer):
    letters = (
        "abcXYZ 019'\"!?<>|&;#_-/.,\n\t\0éñßİıſK’“–…½²①Ⅷﬁ一日あ한😀👩ا�अก\U0001d400"
        "\xa0\xad\u0301\u180e\u200b\u200d\u2003\u3000\ufeff"
    )
    pieces = [
        *letters,
        "'s",
        "'LL",
        "&amp;",
        "&#39;",
        "Ã©",
        "<end_of_text>",
        "<|endoftext|>",
        "the ",
    ]
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(pieces, rng.integers(1, 60))) for _ in range(2000)]
    texts += [*OPEN_CLIP_IDS, "\ud800"]
    ours, wanted = OpenClipTokenizer()(texts), simple_tokenizer(texts).numpy()
    different = [text for text, a, b in zip(texts, ours, wanted, strict=True) if (a != b).any()]
    assert not different


@pytest.mark.parametrize("pad, pad_id", [(END, 49407), ("!", 0)])
def test_clip_on_all_prompts(prompts, tmp_path, pad, pad_id):
    """transformers' ids are open_clip's where ftfy has nothing to repair: in all but 12 prompts."""
    import ftfy

    _, texts = prompts
    ours = ClipTokenizer(write_clip_tokenizer(tmp_path, pad_token=pad))
    wanted = padded(OpenClipTokenizer()(texts), pad_id)
    repaired = [text for text in texts if ftfy.fix_text(text) != text]
    same = (ours(texts) == wanted).all(1)
    # Where "!" is the pad token, transformers takes a text's "!" for it: 0, and not 256.
    marked = [text for text in texts if "!" in text and pad == "!"]
    assert [text for text, equal in zip(texts, same, strict=True) if not equal] == [
        text for text in texts if text in repaired or text in marked
    ]
    assert len(repaired) == 12 and all("’" in text or "‘" in text for text in repaired)
    plain = [ftfy.fix_text(text) for text in texts if text not in marked]
    wanted = padded(OpenClipTokenizer()(plain), pad_id)
    np.testing.assert_array_equal(ours(plain), wanted)
    assert marked == [] or len(marked) == 5


def test_clip_equals_plain_byte_pairs(simple_tokenizer, prompts, tmp_path, monkeypatch):
    """All prompts as they are: against OpenAI's code without its repairs of the text."""
    _, texts = prompts
    monkeypatch.setattr(simple_tokenizer, "clean_fn", lambda text: " ".join(text.lower().split()))
    texts = texts + [text for text in OPEN_CLIP_IDS if "_of_" not in text and "\x00" not in text]
    texts = [unicodedata.normalize("NFC", text) for text in texts]
    ours = ClipTokenizer(write_clip_tokenizer(tmp_path))
    wanted = padded(simple_tokenizer(texts).numpy(), 49407)
    np.testing.assert_array_equal(ours(texts), wanted)


@pytest.mark.parametrize("pad, pad_id", [(END, 49407), ("!", 0)])
def test_written_tokenizer(tmp_path, pad, pad_id):
    from transformers import AutoTokenizer, CLIPTokenizer

    folder = write_clip_tokenizer(tmp_path / "new" / "tokenizer", pad_token=pad)
    again = write_clip_tokenizer(tmp_path / "again", pad_token=pad)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert files == {path.name: path.read_bytes() for path in again.iterdir()}
    ours = ClipTokenizer(folder)
    assert (ours.max_length, ours.vocab_size, ours.pad_id, ours.eos_id) == (
        77,
        49408,
        pad_id,
        49407,
    )
    start = [49406, 320, 1125, 539, 320, 2368, 49407]
    assert ours(["A photo  of a CAT"]).tolist() == [start + [pad_id] * 70]
    assert ours(["word " * 100])[0, [0, 75, 76]].tolist() == [49406, 2653, 49407]
    for kind in (CLIPTokenizer, AutoTokenizer):
        theirs = kind.from_pretrained(folder)
        made = theirs(list(OPEN_CLIP_IDS), padding="max_length", truncation=True)
        np.testing.assert_array_equal(ours(list(OPEN_CLIP_IDS)), made["input_ids"])
        assert (theirs.model_max_length, theirs.pad_token, theirs.bos_token_id) == (77, pad, 49406)
    with pytest.raises(ValueError, match="'<pad>' is not among CLIP's 49408 tokens"):
        write_clip_tokenizer(tmp_path, pad_token="<pad>")


def test_open_clip_folders(clip_folder, tmp_path):
    """A folder's vocabulary and context length; transformers' ids where nothing is repaired."""
    config = {"model_cfg": {"text_cfg": {"context_length": 12}}}
    (clip_folder / "open_clip_config.json").write_text(json.dumps(config))
    ours, theirs = OpenClipTokenizer(clip_folder), ClipTokenizer(clip_folder)
    ids = ours(TEXTS)
    end = np.cumsum(ids == ours.eos_id, 1) - (ids == ours.eos_id) > 0
    np.testing.assert_array_equal(np.where(end, theirs.pad_id, ids), theirs(TEXTS))
    assert (ours.max_length, ours.pad_id, ours.vocab_size) == (12, 0, theirs.vocab_size)
    assert not ids[end].any() and ours([]).shape == (0, 12)
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    own = OpenClipTokenizer(tmp_path)
    assert (own.max_length, own.vocab_size) == (12, 49408) and OpenClipTokenizer().max_length == 77
    config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "xlm-roberta-base"
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="another tokenizer than CLIP's.*xlm-roberta-base"):
        OpenClipTokenizer(tmp_path)
    (tmp_path / "open_clip_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="vocab.json and merges.txt or open_clip_config"):
        OpenClipTokenizer(tmp_path)
    with pytest.raises(ValueError, match="list of texts"):
        own("one text")


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
    assert ours.encode("<image>", special=False) == theirs.convert_tokens_to_ids(["<image>"])
    assert (ours.vocab_size, ours.pad_id, ours.eos_id) == (len(theirs), 0, 1)


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
        "from agfsync_jax.data.tokenizers import ClipTokenizer, OpenClipTokenizer, TextTokenizer\n"
        "OpenClipTokenizer()(['red'])\n"
        f"ClipTokenizer({str(clip_folder)!r})(['red'])\n"
        f"TextTokenizer({str(t5_folder)!r})(['red'], 4)\n"
        "assert not {'torch', 'tensorflow'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
