"""Sentence embeddings and the nearest choice are those of TIFA's formulas in torch."""

import json

import numpy as np
import pytest
import torch

from agfsync_jax.parallel.mesh import create_mesh
from agfsync_jax.scorers._sentences import SentenceEncoder
from tests.twins import relative_error, unit_gain

WORDS = "a red blue green dark light circle square dog cat surf ##er ##s yes no left of two 3 ,"
CUT = 24  # tokens; the network has positions for more


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random MPNet with a WordPiece tokenizer, in the files of all-mpnet-base-v2."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import MPNetConfig, MPNetModel

    folder = tmp_path_factory.mktemp("mpnet")
    special = {"cls_token": "<s>", "pad_token": "<pad>", "sep_token": "</s>", "unk_token": "[UNK]"}
    vocab = {word: i for i, word in enumerate([*special.values(), "<mask>", *WORDS.split()])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.add_special_tokens([*special.values(), "<mask>"])
    # the released file asks for this, and transformers does otherwise
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8, pad_id=1, pad_token="<pad>")
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "MPNetTokenizer",
        "model_max_length": CUT,
        "mask_token": "<mask>",
    }
    settings |= special | {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"vocab_size": len(vocab), "num_attention_heads": 4, "max_position_embeddings": 40}
    unit_gain(MPNetModel(MPNetConfig(**sizes, layer_norm_eps=1e-5))).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(folder):
    return SentenceEncoder(str(folder), mesh=create_mesh({"data": -1}), batch_size=8)


class Reference:
    """The formulas of TIFA: masked mean, division by the length, argmax of the products."""

    def __init__(self, folder):
        from transformers import AutoModel, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder).eval()

    def embed(self, texts):
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            states = self.model(**tokens)[0]
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
    assert np.abs(actual @ actual.T - np.eye(20)).max() < 0.99  # they differ


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


def test_no_choices(encoder):
    with pytest.raises(ValueError, match="the answer 'red' has no choices"):
        encoder.closest([("red", [])])
