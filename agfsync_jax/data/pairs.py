"""Preference pairs on disk: a TFDS dataset with a dataset card, read back without TensorFlow.

A pair has a chosen and a rejected side; a ranking has a prompt's candidates, best first. What a
dataset stores besides is up to config.pair, so the table of its fields lies with it (fields.json).
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agfsync_jax.data.records import (
    Features,
    RecordError,
    encode_record,
    explain_no_space,
    megabytes,
    read_shard,
    rename,
    write_file,
)
from agfsync_jax.utils.files import copy_tree, is_url, local_folder, remove_tree, to_path

_IDS: Features = {
    "pair_id": ("str", ()),
    "prompt_id": ("str", ()),
    "prompt": ("str", ()),
    "token_ids": ("int32", (None,)),
}
# Where pairs hold no table of their own, these are the fields.
PAIR_FEATURES: Features = _IDS | {
    "chosen_latents": ("float16", (None, None, None)),
    "rejected_latents": ("float16", (None, None, None)),
    "chosen_candidate": ("int32", ()),
    "rejected_candidate": ("int32", ()),
    "chosen_image": ("png", ()),
    "rejected_image": ("png", ()),
    "chosen_score": ("float32", ()),
    "rejected_score": ("float32", ()),
    "margin": ("float32", ()),
}
RANKING_FEATURES: Features = _IDS | {
    "candidates": ("int32", (None,)),
    "latents": ("float16", (None, None, None, None)),
    "images": ("png", (None,)),
    "scores": ("float32", (None,)),
    "margin": ("float32", ()),
}
# What stores a field that a dataset may lack, by how its name begins; the first that fits.
_STORED_BY = {
    ("embeddings/",): "config.pair.embeddings=True stores",
    ("chosen_latents_flipped", "rejected_latents_flipped", "latents_flipped"): (
        "config.pair.flips=True stores"
    ),
    ("chosen_image", "rejected_image"): "config.pair.images=True stores",
    ("images",): "config.pair.images=True and config.pair.strategy='ranked' store",
    ("candidates", "latents", "scores"): "config.pair.strategy='ranked' stores",
    ("columns/",): "config.pair.strategy='ranked' stores of each column of scores/",
    ("chosen_scores/", "rejected_scores/"): "a column of that name in scores/ stores",
    ("chosen_", "rejected_"): "every config.pair.strategy but 'ranked' stores",
}

# TFDS wants shards of 64 MiB to 1 GiB. At 256 MiB a hundred thousand pairs are some hundred files:
# enough to read many side by side, few enough to upload, and one lies in memory as it is written.
_SHARD_BYTES = 256 << 20
_FIELDS_FILE, _INFO_FILE = "fields.json", "dataset_info.json"


def pair_features(
    *,
    ranked: bool = False,
    columns: Iterable[str] = (),
    embeddings: Mapping[str, tuple[int, ...]] | None = None,
    images: bool = True,
    flips: bool = False,
) -> Features:
    """The table of a dataset's fields: of rankings if `ranked`, with PNGs if `images`.

    Args:
      columns: of scores, stored for both sides of a pair, or for each candidate.
      embeddings: name -> shape of what the prompt is encoded to.
      flips: latents of the mirrored images, too.
    """
    table = RANKING_FEATURES if ranked else PAIR_FEATURES
    table = {name: entry for name, entry in table.items() if images or entry[0] != "png"}
    groups = ("columns",) if ranked else ("chosen_scores", "rejected_scores")
    if flips:
        table |= {f"{n}_flipped": entry for n, entry in table.items() if n.endswith("latents")}
    entry = ("float32", (None,) if ranked else ())
    table |= {f"{group}/{name}": entry for name in columns for group in groups}
    for name, shape in (embeddings or {}).items():
        table[f"embeddings/{name}"] = ("float16", tuple(shape))
    return table


def write_pairs(
    folder: str | Path,
    rows: Iterable[Mapping[str, Any]],
    metadata: Mapping[str, Any],
    features: Features = PAIR_FEATURES,
    *,
    replace: bool = False,
) -> int:
    """Writes preference pairs as a TFDS dataset with a dataset card, whole or not at all.

    In a bucket, where no folder can be renamed, shards take their place one by one, and
    dataset_info.json, without which there are no pairs, comes last. One shard is in memory.

    Args:
      folder: must not exist yet, or is replaced.
      rows: dicts with exactly the names of `features`, which `pair_features` gives.
      metadata: what the card tells: "description" and "license", a table of "counts", and all else
        as a table of settings. It is read when the last row is written.
      replace: pairs that are there, once the new ones are whole; in a bucket, at once.

    Returns:
      The number of pairs.

    Raises:
      FileExistsError: the folder is there.
      ValueError: no rows, or a row that does not fit the table.
      OSError: no space left; see `write_file`.
    """
    folder = to_path(folder)
    if folder.exists() and not replace:
        raise FileExistsError(f"{folder} is there already. Remove it to make the pairs anew.")
    shards = folder if is_url(folder) else folder.with_name(folder.name + ".aside")
    remove_tree(shards)
    lengths, num_bytes = [], 0
    try:
        for records in _of_shards(encode_record(row, features) for row in rows):
            write_file(shards / _shard(len(lengths)), records)
            lengths.append(len(records))
            num_bytes += sum(map(len, records))
        if not lengths:
            raise ValueError(f"There are no pairs to write to {folder}.")
        texts = {"description": "Preference pairs of images.", "license": "other", **metadata}
        with local_folder(shards) as aside:
            with explain_no_space(aside.with_name(folder.name), num_bytes):
                _write_tfds_metadata(aside, lengths, num_bytes, texts, features)
            write_file(aside / _FIELDS_FILE, [json.dumps(features, indent=1).encode(), b"\n"])
            card = _dataset_card(sum(lengths), num_bytes, texts, features)
            write_file(aside / "README.md", [card.encode()])
            copy_tree(aside, shards, last=_INFO_FILE)
        if shards != folder:
            remove_tree(folder)
            rename(shards, folder)
    except BaseException:
        remove_tree(shards)
        raise
    return sum(lengths)


def _shard(index: int) -> str:
    return f"pairs-train.tfrecord-{index:05d}"


def _of_shards(records: Iterable[bytes]) -> Iterator[list[bytes]]:
    """The records of each shard."""
    pending, size = [], 0
    for record in records:
        pending.append(record)
        size += len(record)
        if size >= _SHARD_BYTES:
            yield pending
            pending, size = [], 0
    if pending:
        yield pending


def _write_tfds_metadata(
    folder: Path,
    lengths: list[int],
    num_bytes: int,
    texts: Mapping[str, Any],
    features: Features,
) -> None:
    import tensorflow_datasets as tfds

    def feature(dtype, shape):
        if dtype == "str":
            return tfds.features.Text()
        if dtype == "png":
            image = tfds.features.Image(shape=(None, None, 3), encoding_format="png")
            return tfds.features.Sequence(image) if shape else image
        encoding = "bytes" if dtype == "float16" else "none"
        return tfds.features.Tensor(shape=shape, dtype=np.dtype(dtype), encoding=encoding)

    nested: dict[str, Any] = {}
    for name, entry in features.items():
        # A dictionary for what stands before the first slash. The rest may have slashes too: that
        # way "vqa" and "vqa/color" can both be there.
        outer, slash, inner = name.partition("/")
        place, key = (nested.setdefault(outer, {}), inner) if slash else (nested, name)
        place[key] = feature(*entry)
    info = tfds.core.DatasetInfo(
        builder=tfds.core.dataset_info.DatasetIdentity(
            name="pairs",
            version=tfds.core.Version("1.0.0"),
            data_dir=str(folder),
            module_name="",
        ),
        features=tfds.features.FeaturesDict(nested),
        description=str(texts["description"]),
        license=str(texts["license"]),
    )
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder,
        dataset_name="pairs",
        split="train",
        filetype_suffix="tfrecord",
        template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}",
    )
    split = tfds.core.SplitInfo(
        name="train", shard_lengths=lengths, num_bytes=num_bytes, filename_template=template
    )
    info.set_file_format(template.filetype_suffix)
    info.set_splits(tfds.core.splits.SplitDict([split]))
    info.write_to_directory(folder)


_CARD = """---
license: {license}
task_categories: [text-to-image]
tags: [preference, diffusion-dpo, agfsync]
---
# Preference pairs

{description}

{num_pairs} pairs, {size}, split `train`, license {license_code}.
{tables}
```python
import tensorflow_datasets as tfds
dataset = tfds.builder_from_directory("path/to/this/folder").as_dataset(split="train")
```
"""


def _dataset_card(
    num_pairs: int, num_bytes: int, texts: Mapping[str, Any], features: Features
) -> str:
    license_name = str(texts["license"])
    settings = {k: v for k, v in texts.items() if k not in ("description", "license", "counts")}
    fields = [(name, dtype, list(shape)) for name, (dtype, shape) in features.items()]
    tables = (
        _table("How they were made", ("setting", "value"), settings.items()),
        _table("Counts", ("what", "number"), texts.get("counts", {}).items()),
        _table("Fields", ("field", "dtype", "shape"), fields),
    )
    return _CARD.format(
        license=json.dumps(license_name),  # a JSON string is one of YAML too
        description=texts["description"],
        num_pairs=num_pairs,
        size=megabytes(num_bytes),
        license_code=_code(license_name),
        tables="".join(tables),
    )


def _table(title: str, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A heading and a table in Markdown; nothing where there are no rows."""
    body = ["| " + " | ".join(map(_code, row)) + " |" for row in rows]
    lines = [f"\n## {title}\n", f"| {' | '.join(head)} |", "|---" * len(head) + "|", *body]
    return "\n".join([*lines, ""]) if body else ""


def _code(value: Any) -> str:
    """A value as code in one line of Markdown: whatever it holds, it stays text in its cell."""
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    # A backslash before a bar would undo the one that keeps the bar from ending the cell.
    text = re.sub(r"(\\*)\|", lambda m: f"{m[1]} " * bool(m[1]) + r"\|", " ".join(text.split()))
    if not text:
        return ""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if len(fence) > 1 else ""
    return f"{fence}{space}{text}{space}{fence}"


def is_pairs(folder: str | Path) -> bool:
    """Whether `write_pairs` made a folder, rather than `datasets.save_to_disk`, say."""
    folder = to_path(folder).expanduser()
    return (folder / _INFO_FILE).is_file() and not (folder / "state.json").exists()


def read_features(folder: str | Path) -> Features:
    """The table of the fields that a pairs folder holds.

    Raises:
      FileNotFoundError: no pairs there.
      RecordError: a damaged table.
    """
    folder = to_path(folder)
    path = folder / _FIELDS_FILE
    if not (folder / _INFO_FILE).is_file():
        raise FileNotFoundError(
            f"No pairs in {folder}: dataset_info.json is missing. Run `agfsync pair`."
        )
    if not path.is_file():
        return PAIR_FEATURES
    try:
        table = json.loads(path.read_bytes())
        return {name: (dtype, tuple(shape)) for name, (dtype, shape) in table.items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise RecordError(path, None, f"no table of fields ({error})") from error


def read_pairs(
    folder: str | Path, fields: Sequence[str] | None = None, *, once: Sequence[str] = ()
) -> dict[str, Any]:
    """Reads all pairs that `write_pairs` wrote into memory, without TensorFlow.

    Args:
      fields: the names to read; all by default. Latents and images are what takes the memory.
      once: names of what belongs to the prompt, kept once for all its pairs.

    Returns:
      name -> numpy array with one row per pair; a list for texts and PNG bytes, and for what a
      ranking has for each candidate, as rankings differ in length. The arrays of `once` have one
      row per prompt, and "prompt_row" int64 [n] says which of them each pair's is. Latents of
      several shapes are an array of arrays.

    Raises:
      FileNotFoundError: no pairs there.
      RecordError: a damaged or missing shard.
      ValueError: a field that this dataset lacks; pairs whose token ids differ in number.
    """
    folder = to_path(folder)
    features = read_features(folder)
    names = [n for n in (features if fields is None else fields) if n not in once]
    values: dict[str, list] = {name: [] for name in (*names, *once)}
    for name in values:
        if name not in features:
            raise ValueError(_lacks(folder, name, features))
    prompts: dict[str, int] = {}
    prompt_row = []
    for row in stream_pairs(folder, features, {*values, "prompt_id"} if once else values):
        new = once and row["prompt_id"] not in prompts
        for name in (*names, *(once if new else ())):
            values[name].append(row[name])
        if once:
            prompt_row.append(prompts.setdefault(row["prompt_id"], len(prompts)))
    found = {name: _stack(name, column, features) for name, column in values.items()}
    return found | ({"prompt_row": np.array(prompt_row)} if once else {})


def stream_pairs(
    folder: Path, features: Features, fields: Iterable[str]
) -> Iterator[dict[str, Any]]:
    """The same pairs row by row; the same errors."""
    info = folder / _INFO_FILE
    try:
        lengths = json.loads(info.read_bytes())["splits"][0]["shardLengths"]
    except (ValueError, LookupError) as error:
        raise RecordError(info, None, f"no split with shardLengths ({error})") from error
    for index, length in enumerate(lengths):
        path = folder / _shard(index)
        if not path.is_file():
            raise RecordError(path, None, "the file is missing")
        yield from read_shard(path, features, fields, num_rows=int(length))


def _lacks(folder: Path, name: str, features: Features) -> str:
    stored_by = (text for begins, text in _STORED_BY.items() if name.startswith(begins))
    hint = next((f", which {text}: run `agfsync pair` again with that" for text in stored_by), "")
    return f"{folder} has no field {name!r}{hint}; it has {', '.join(features)}."


def _stack(name: str, values: list[Any], features: Features) -> Any:
    dtype, _ = features[name]
    per_candidate = name in (
        "candidates",
        "latents",
        "latents_flipped",
        "scores",
    ) or name.startswith("columns/")
    if dtype in ("str", "png") or per_candidate:
        return values
    shapes = {np.shape(value) for value in values}
    if len(shapes) > 1 and "latents" in name:
        found = np.empty(len(values), object)
        found[:] = values
        return found
    if len(shapes) > 1:
        raise ValueError(f"Pairs differ in the shape of {name}: {sorted(shapes)}.")
    return np.array(values, dtype)


def repair_pairs(folder: str | Path) -> bool:
    """Drops a pairs folder if it is there and damaged, so that it is made anew; whether it was."""
    try:
        read_pairs(folder, ["pair_id"])
    except FileNotFoundError:
        return False
    except RecordError:
        remove_tree(to_path(folder))
        return True
    return False
