"""The Hugging Face folders of the micro suite, without their weights.

Sizes and settings stand in the .json files that ship in micro/weights, and nowhere else. The
tokenizers, and with them some ids, are made anew from the words of the world.
"""

import json
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from agfsync_jax.data.tokenizers import clip_vocabulary
from agfsync_jax.micro.questions import VOCABULARY
from agfsync_jax.weights.networks import read_json
from agfsync_jax.weights.places import resolve_path


def prepare(output: Path) -> None:
    """Writes every setting that ships where `output` has none of its own."""
    shipped = resolve_path("micro:")
    for path in shipped.rglob("*.json"):
        copy = output / path.relative_to(shipped)
        if path.name != "figures.json" and not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())


def byte_pair_merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Byte-pair merges (Sennrich et al. 2016) until each word is one token: the most frequent pair
    first and, of equals, the last in the alphabet, so that two runs give the same token ids."""
    # Every part stands between spaces of its own, so that one replacement makes all merges.
    spelled = ["".join(f" {part} " for part in (*word[:-1], word[-1] + "</w>")) for word in words]
    merges = []
    while pairs := Counter(pair for text in spelled for pair in pairwise(text.split())):
        first, second = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append((first, second))
        spelled = [text.replace(f" {first}  {second} ", f" {first}{second} ") for text in spelled]
    return merges


def write_clip_tokenizer(output: Path) -> None:
    """A CLIP byte-pair tokenizer in which every word of the world is one token, for CLIP and for
    Stable Diffusion, and its ids in CLIP's config.json.

    Any other text falls apart into its bytes, as in the tokenizer of the real CLIP.
    """
    merges = byte_pair_merges(VOCABULARY)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    for folder in (output / "clip", output / "stable-diffusion" / "tokenizer"):
        (folder / "merges.txt").write_text("\n".join(lines) + "\n")
        write_json(folder / "vocab.json", clip_vocabulary(merges))
    size = len(clip_vocabulary(merges))  # the last two are the begin and the end of a text
    config = read_json(output / "clip" / "config.json")
    config["text_config"] |= {"bos_token_id": size - 2, "eos_token_id": size - 1}
    config["text_config"] |= {"pad_token_id": size - 1, "vocab_size": size}
    write_json(output / "clip" / "config.json", config)


def write_blip2_tokenizer(folder: Path) -> None:
    """A T5 tokenizer (Unigram) in which every word of the world is one token, and its ids in
    config.json; other words fall apart into letters. "<image>" is where transformers' processor
    puts the image tokens."""
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -8.0)]
    pieces += [("▁" + word, -1.0) for word in VOCABULARY]
    pieces += [(character, -8.0) for character in map(chr, range(33, 127))]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=64)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(str(folder))
    config = read_json(folder / "config.json")
    config["image_token_index"] = tokenizer.convert_tokens_to_ids("<image>")
    config["text_config"]["vocab_size"] = len(tokenizer)
    write_json(folder / "config.json", config)


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
