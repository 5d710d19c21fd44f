"""Sentence embeddings and the nearest choice are those of the published formulas in torch."""

import json

import numpy as np
import pytest
import torch

from agfsync_jax.parallel.mesh import create_mesh
from agfsync_jax.texts import sentences as sentences_module
from agfsync_jax.texts.sentences import SentenceEncoder, check
from tests.twins import relative_error, unit_gain

WORDS = "a red blue green dark light circle square dog cat surf ##er ##s yes no left of two 3 ,"
CUT = 24  # tokens; the network has positions for more
SPECIAL = {
    "mpnet": {"cls_token": "<s>", "pad_token": "<pad>", "sep_token": "</s>"},
    "bert": {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"},
}


@pytest.fixture(scope="module", params=SPECIAL)
def folder(request, tmp_path_factory):
    """A tiny random MPNet or BERT with a WordPiece tokenizer, in the files of all-mpnet-base-v2, or
    of bge-large-en-v1.5, which takes the first token's state."""
    import transformers
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    kind = request.param
    folder = tmp_path_factory.mktemp(kind)
    special = SPECIAL[kind] | {"unk_token": "[UNK]"}
    vocab = {word: i for i, word in enumerate([*special.values(), "<mask>", *WORDS.split()])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    begin, pad, end = (special[f"{name}_token"] for name in ("cls", "pad", "sep"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}", special_tokens=[(t, vocab[t]) for t in (begin, end)]
    )
    tokenizer.add_special_tokens([*special.values(), "<mask>"])
    # the released file asks for this, and transformers does otherwise
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8, pad_id=vocab[pad], pad_token=pad)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"model_max_length": CUT, "mask_token": "<mask>"} | special
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"vocab_size": len(vocab), "num_attention_heads": 4, "max_position_embeddings": 40}
    if kind == "mpnet":
        settings |= {"tokenizer_class": "MPNetTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
        twin = transformers.MPNetModel(transformers.MPNetConfig(**sizes, layer_norm_eps=1e-5))
    else:
        settings |= {"tokenizer_class": "BertTokenizer"}
        twin = transformers.BertModel(transformers.BertConfig(**sizes))
        write_pooling(folder, cls_token=True, mean_tokens=False)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    unit_gain(twin).save_pretrained(folder)
    return folder


def write_pooling(folder, **modes):
    written = {f"pooling_mode_{name}": value for name, value in modes.items()}
    (folder / "1_Pooling").mkdir(exist_ok=True)
    path = folder / "1_Pooling" / "config.json"
    path.write_text(json.dumps({"word_embedding_dimension": 32} | written))


@pytest.fixture(scope="module")
def encoder(folder):
    return SentenceEncoder(str(folder), mesh=create_mesh({"data": -1}), batch_size=8)


class Reference:
    """TIFA's formulas: masked mean, division by the length, argmax of the products; or the first
    token's state, as bge's model card has it."""

    def __init__(self, folder):
        from transformers import AutoModel, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder).eval()
        path = folder / "1_Pooling" / "config.json"
        modes = json.loads(path.read_text()) if path.exists() else {}
        self.takes_first = modes.get("pooling_mode_cls_token", False)

    def embed(self, texts):
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            states = self.model(**tokens)[0]
        if self.takes_first:
            return torch.nn.functional.normalize(states[:, 0], dim=1)
        mask = tokens["attention_mask"][:, :, None].float()
        return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)

    def closest(self, pairs):
        new = list(dict.fromkeys(text for answer, of in pairs for text in (answer, *of)))
        table = dict(zip(new, self.embed(new), strict=True))
        found = []
        for answer, choices in pairs:
            products = torch.stack([table[choice] for choice in choices]) @ table[answer]
            found.append(choices[int(torch.argmax(products))])
        return found


def texts(count, longest, seed=0):
    """Different texts of 1 to `longest` words, some of them unknown."""
    random = np.random.default_rng(seed)
    words = [word for word in WORDS.split() if word[0] != "#"] + ["surfers", "Zebra"]
    made = (" ".join(random.choice(words, random.integers(1, longest + 1))) for _ in range(999))
    return list(dict.fromkeys(made))[:count]


def test_embeddings_equal_torch(folder, encoder):
    """More texts than a batch, of all lengths, some that are cut, one that is empty."""
    sentences = [*texts(19, 40), ""]
    expected = Reference(folder).embed(sentences)
    assert max(len(sentence.split()) for sentence in sentences) > CUT
    actual = encoder.embed(sentences)
    assert actual.dtype == np.float32 and actual.shape == (20, 32)
    assert relative_error(actual, expected) <= 1e-5
    assert np.abs(actual @ actual.T - np.eye(20)).max() < 0.999  # they differ


def test_the_nearest_choice_is_that_of_torch(folder, encoder):
    choices = texts(120, 3, seed=1)
    pairs = [(text, choices[4 * i : 4 * i + 4]) for i, text in enumerate(texts(30, 5, seed=2))]
    expected = Reference(folder).closest(pairs)
    assert encoder.closest(pairs) == expected
    assert len({of[1].index(said) for of, said in zip(pairs, expected, strict=True)}) == 4


def test_of_equal_choices_the_first(folder):
    encoder = SentenceEncoder(str(folder), mesh=create_mesh({"data": -1}), batch_size=8)
    same = np.random.default_rng(0).standard_normal(32, np.float32)
    encoder._texts = {"red": same} | {str(i): same for i in range(7)} | {"other": -same}
    for first in range(7):
        order = ["other", *(str((first + i) % 7) for i in range(7))]
        assert encoder.closest([("red", order)]) == [str(first)]


def test_each_text_is_embedded_once(folder, monkeypatch):
    encoder = SentenceEncoder(str(folder), mesh=create_mesh({"data": -1}), batch_size=3)
    seen, tokenizer, embed = [], encoder._tokenizer, encoder._embed
    shapes = []
    monkeypatch.setattr(encoder, "_tokenizer", lambda t, n: seen.extend(t) or tokenizer(t, n))
    monkeypatch.setattr(encoder, "_embed", lambda p, i, m: shapes.append(i.shape) or embed(p, i, m))
    encoder.closest([("red", ["blue", "green"]), ("blue", ["red", "dark"])])
    encoder.closest([("dark", ["cat", "red"])])
    assert seen == ["red", "blue", "green", "dark", "cat"]
    assert shapes == [(8, 16)] * 2  # the mesh has 8 devices
    assert encoder.embed([]).shape == (0, 32)


def test_a_stream_keeps_nothing(encoder, monkeypatch):
    """Embeddings in the list's order, also where it is longer than what is sorted at once."""
    monkeypatch.setattr(sentences_module, "_SORTED", 2)
    sentences = texts(40, 12, seed=3)
    before = dict(encoder._texts)
    parts = list(encoder.stream(sentences))
    assert [len(part) for part in parts] == [16, 16, 8]
    assert encoder._texts == before
    np.testing.assert_allclose(np.concatenate(parts), encoder.embed(sentences), atol=1e-6)


def test_what_an_embedding_is_of(tmp_path):
    """The mean of all tokens, the first one's state, or an error that names the file."""

    def write(path, value):
        path.write_text(json.dumps(value))

    with pytest.raises(FileNotFoundError, match="No config.json"):
        check(tmp_path)
    write(tmp_path / "config.json", {"model_type": "gpt2"})
    with pytest.raises(ValueError, match="holds a 'gpt2': expected a BERT or an MPNet"):
        check(tmp_path)
    write(tmp_path / "config.json", {"model_type": "bert"})
    assert sentences_module._pooling(tmp_path) == "mean"
    for modes, found in (((True, False), "first"), ((False, True), "mean")):
        write_pooling(tmp_path, cls_token=modes[0], mean_tokens=modes[1], max_tokens=False)
        check(tmp_path)
        assert sentences_module._pooling(tmp_path) == found
    for modes, told in (
        ({"mean_tokens": False, "max_tokens": True}, "asks for pooling_mode_max_tokens: expected"),
        ({"mean_tokens": True, "cls_token": True}, "pooling_mode_mean_tokens and pooling_mode_cls"),
        ({}, "asks for no pooling_mode"),
    ):
        write_pooling(tmp_path, **modes)
        with pytest.raises(ValueError, match=told):
            check(tmp_path)
    write_pooling(tmp_path, mean_tokens=True)
    kinds = ["Transformer", "Pooling", "Dense", "Normalize"]
    steps = [{"type": f"sentence_transformers.models.{kind}"} for kind in kinds]
    write(tmp_path / "modules.json", steps)
    with pytest.raises(ValueError, match="modules.json has Dense: only Normalize, Pooling, Tran"):
        check(tmp_path)
    write(tmp_path / "modules.json", [step for step in steps if "Dense" not in step["type"]])
    check(tmp_path)


PARAPHRASES = [
    ("a dog runs along the beach", "a dog is running on the beach"),
    ("two children play football in a park", "two kids playing soccer in the park"),
    ("a red car parked in front of a house", "a red automobile is parked outside a house"),
    ("a bowl of fresh fruit on a wooden table", "a wooden table with a bowl of fresh fruit"),
]


def test_the_pretrained_minilm(tmp_path):
    """all-MiniLM-L6-v2 gives what transformers gives; captions that mean the same are near."""
    from all_minilm_l6_v2 import extract_model

    folder = extract_model(str(tmp_path))
    encoder = SentenceEncoder(str(folder), mesh=create_mesh({"data": -1}), batch_size=8)
    captions = [caption for pair in PARAPHRASES for caption in pair]
    actual = encoder.embed(captions)
    assert relative_error(actual, Reference(folder).embed(captions)) <= 1e-5
    np.testing.assert_allclose(np.linalg.norm(actual, axis=1), 1, atol=1e-6)
    cosines = actual @ actual.T
    of = np.arange(len(captions)) // 2
    alike = (of[:, None] == of[None]) & ~np.eye(len(captions), dtype=bool)
    assert cosines[alike].min() > 0.8 and cosines[of[:, None] != of[None]].max() < 0.4
    things = ("cat", "dog", "car", "tree")
    asked = [("a puppy", things), ("kitten", things), ("a truck", things), ("an oak", things)]
    assert encoder.closest(asked) == ["dog", "cat", "car", "tree"]


def test_no_choices(encoder):
    with pytest.raises(ValueError, match="the answer 'red' has no choices"):
        encoder.closest([("red", [])])
