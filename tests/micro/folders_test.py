"""The suite's tokenizers: each word of the world is one token, the same in every run."""

import pytest

from agfsync_jax.data.tokenizers import ClipTokenizer
from agfsync_jax.micro import folders
from agfsync_jax.micro.questions import VOCABULARY


def test_the_most_frequent_pair_is_merged_first_and_ties_go_by_the_alphabet():
    assert folders.byte_pair_merges(["bad", "bat", "at"]) == [
        ("b", "a"), ("ba", "t</w>"), ("ba", "d</w>"), ("a", "t</w>")
    ]  # fmt: skip
    assert folders.byte_pair_merges(["zat", "hat", "bat"])[0] == ("a", "t</w>")
    assert folders.byte_pair_merges(["aaa"]) == [("a", "a</w>"), ("a", "aa</w>")]
    assert folders.byte_pair_merges(["a"]) == []


def test_the_order_of_the_words_does_not_matter():
    words = list(VOCABULARY)
    assert folders.byte_pair_merges(words[::-1]) == folders.byte_pair_merges(words)


def test_each_word_is_one_token_for_us_and_for_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    folders.write_tokenizer(tmp_path)
    ours = ClipTokenizer(tmp_path)
    theirs = transformers.CLIPTokenizer.from_pretrained(str(tmp_path))
    ids = [theirs(word)["input_ids"] for word in VOCABULARY]
    assert all(len(each) == 3 for each in ids)
    assert len({each[1] for each in ids}) == len(ids)
    assert [row[:3].tolist() for row in ours(list(VOCABULARY))] == ids
