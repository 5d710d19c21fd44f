"""The suite's folders: each word of the world is one token, the same in every run."""

import json

import pytest

from agfsync_jax.data.tokenizers import ClipTokenizer, TextTokenizer
from agfsync_jax.micro import folders
from agfsync_jax.micro.questions import VOCABULARY


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The suite's folders before any training."""
    output = tmp_path_factory.mktemp("weights")
    folders.prepare(output)
    folders.write_clip_tokenizer(output)
    folders.write_blip2_tokenizer(output / "blip2")
    return output


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


def test_each_word_is_one_token_for_us_and_for_transformers(prepared):
    transformers = pytest.importorskip("transformers")
    ours = ClipTokenizer(prepared / "clip")
    theirs = transformers.CLIPTokenizer.from_pretrained(str(prepared / "clip"))
    ids = [theirs(word)["input_ids"] for word in VOCABULARY]
    assert all(len(each) == 3 for each in ids)
    assert len({each[1] for each in ids}) == len(ids)
    assert [row[:3].tolist() for row in ours(list(VOCABULARY))] == ids


def test_configs_have_the_ids_of_their_tokenizers(prepared):
    clip, blip2 = ClipTokenizer(prepared / "clip"), TextTokenizer(prepared / "blip2")
    config = json.loads((prepared / "clip/config.json").read_text())["text_config"]
    assert (
        config
        | {
            "bos_token_id": clip.eos_id - 1,
            "eos_token_id": clip.eos_id,
            "pad_token_id": clip.pad_id,
            "vocab_size": clip.vocab_size,
            "max_position_embeddings": clip.max_length,
        }
        == config
    )
    config = json.loads((prepared / "blip2/config.json").read_text())
    assert config["text_config"]["vocab_size"] == blip2.vocab_size
    assert [config["image_token_index"]] == blip2.encode("<image>", special=False)


def test_settings_of_ones_own_are_kept(tmp_path):
    config = tmp_path / "stable-diffusion/unet/config.json"
    config.parent.mkdir(parents=True)
    config.write_text("{}")
    folders.prepare(tmp_path)
    assert config.read_text() == "{}"
