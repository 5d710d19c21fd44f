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
_IMAGES = ("chosen_image", "rejected_image", "images")
# What stores a field that a dataset may lack, by how its name begins; the first that fits.
_STORED_BY = {
    "embeddings/": "config.pair.embeddings=True stores",
    "chosen_image": "config.pair.images=True stores",
    "rejected_image": "config.pair.images=True stores",
    "images": "config.pair.images=True and config.pair.strategy='ranked' store",
    "candidates": "config.pair.strategy='ranked' stores",
    "latents": "config.pair.strategy='ranked' stores",
    "scores": "config.pair.strategy='ranked' stores",
    "columns/": "config.pair.strategy='ranked' stores of each column of scores/",
    "chosen_scores/": "a column of that name in scores/ stores",
    "rejected_scores/": "a column of that name in scores/ stores",
    "chosen_": "every config.pair.strategy but 'ranked' stores",
    "rejected_": "every config.pair.strategy but 'ranked' stores",
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
) -> Features:
    """The table of a dataset's fields.

    Args:
      ranked: rankings instead of pairs.
      columns: of scores, stored for both sides of a pair, or for each candidate.
      embeddings: name -> shape of what the prompt is encoded to.
      images: whether PNGs are stored.
    """
    table = dict(RANKING_FEATURES if ranked else PAIR_FEATURES)
    if not images:
        table = {name: entry for name, entry in table.items() if name not in _IMAGES}
    for column in columns:
        if ranked:
            table[f"columns/{column}"] = ("float32", (None,))
        else:
            table[f"chosen_scores/{column}"] = ("float32", ())
            table[f"rejected_scores/{column}"] = ("float32", ())
    for name, shape in (embeddings or {}).items():
        table[f"embeddings/{name}"] = ("float16", tuple(shape))
    return table


def write_pairs(
    folder: str | Path,
    rows: Iterable[Mapping[str, Any]],
    metadata: Mapping[str, Any],
    features: Features = PAIR_FEATURES,
) -> int:
    """Writes preference pairs as a TFDS dataset with a dataset card, whole or not at all.

    In a bucket, where no folder can be renamed, shards take their place one by one, and
    dataset_info.json, without which there are no pairs, comes last.

    `tfds.builder_from_directory(folder).as_dataset(split="train")` reads it. Shards have about
    256 MiB, of which one is in memory.

    Args:
      folder: must not exist yet.
      rows: dicts with exactly the names of `features`.
      metadata: what the card tells: "description" and "license", a table of "counts", and all else
        as a table of settings. It is read when the last row is written.
      features: from `pair_features`.

    Returns:
      The number of pairs.

    Raises:
      FileExistsError: the folder is there.
      ValueError: no rows, or a row that does not fit the table.
      OSError: no space left; see `write_file`.
    """
    folder = to_path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} is there already. Remove it to make the pairs anew.")
    shards = folder if is_url(folder) else folder.with_name(folder.name + ".aside")
    remove_tree(shards)
    try:
        lengths, num_bytes = _write_shards(shards, rows, features)
        if not lengths:
            raise ValueError(f"There are no pairs to write to {folder}.")
        with local_folder(shards) as aside:
            with explain_no_space(aside.with_name(folder.name), num_bytes):
                if aside != shards:
                    (aside / _shard(0)).touch()  # TFDS looks for the name of one
                _write_tfds_metadata(aside, lengths, num_bytes, metadata, features)
                if aside != shards:
                    (aside / _shard(0)).unlink()
            write_file(aside / _FIELDS_FILE, [json.dumps(features, indent=1).encode(), b"\n"])
            card = _dataset_card(sum(lengths), num_bytes, metadata, features)
            write_file(aside / "README.md", [card.encode()])
            copy_tree(aside, shards, last=_INFO_FILE)
        if shards != folder:
            rename(shards, folder)
    except BaseException:
        remove_tree(shards)
        raise
    return sum(lengths)


def _shard(index: int) -> str:
    return f"pairs-train.tfrecord-{index:05d}"


def _write_shards(
    folder: Path, rows: Iterable[Mapping[str, Any]], features: Features
) -> tuple[list[int], int]:
    """The rows of each shard, and the bytes of all."""
    lengths: list[int] = []
    num_bytes, num_pending = 0, 0
    pending: list[bytes] = []

    def flush() -> None:
        nonlocal num_pending
        write_file(folder / _shard(len(lengths)), pending)
        lengths.append(len(pending))
        pending.clear()
        num_pending = 0

    for row in rows:
        pending.append(encode_record(row, features))
        num_pending += len(pending[-1])
        num_bytes += len(pending[-1])
        if num_pending >= _SHARD_BYTES:
            flush()
    if pending:
        flush()
    return lengths, num_bytes


def _write_tfds_metadata(
    folder: Path,
    lengths: list[int],
    num_bytes: int,
    metadata: Mapping[str, Any],
    features: Features,
) -> None:
    import tensorflow_datasets as tfds

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
    nested: dict[str, Any] = {}
    for name, entry in features.items():
        # A dictionary for what stands before the first slash. The rest may have slashes too: that
        # way "vqa" and "vqa/color" can both be there.
        outer, slash, inner = name.partition("/")
        place, key = (nested.setdefault(outer, {}), inner) if slash else (nested, name)
        place[key] = _tfds_feature(*entry)
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=nested,
        split_infos=[split],
        filename_template=template,
        check_data=False,
        description=str(metadata.get("description", "Preference pairs of images.")),
        license=str(metadata.get("license", "other")),
    )


def _tfds_feature(dtype: str, shape: tuple[int | None, ...]) -> Any:
    import tensorflow_datasets as tfds

    if dtype == "str":
        return tfds.features.Text()
    if dtype == "png":
        image = tfds.features.Image(shape=(None, None, 3), encoding_format="png")
        return tfds.features.Sequence(image) if shape else image
    encoding = "bytes" if dtype == "float16" else "none"
    return tfds.features.Tensor(shape=shape, dtype=np.dtype(dtype), encoding=encoding)


def _dataset_card(
    num_pairs: int, num_bytes: int, metadata: Mapping[str, Any], features: Features
) -> str:
    license_name = str(metadata.get("license", "other"))
    settings = {k: v for k, v in metadata.items() if k not in ("description", "license", "counts")}
    fields = [(name, dtype, list(shape)) for name, (dtype, shape) in features.items()]
    lines = [
        "---",
        f"license: {json.dumps(license_name)}",  # a JSON string is one of YAML too
        "task_categories: [text-to-image]",
        "tags: [preference, diffusion-dpo, agfsync]",
        "---",
        "# Preference pairs",
        "",
        str(metadata.get("description", "Preference pairs of images.")),
        "",
        f"{num_pairs} pairs, {megabytes(num_bytes)}, split `train`, license {_code(license_name)}.",
        *_table("How they were made", ("setting", "value"), settings.items()),
        *_table("Counts", ("what", "number"), metadata.get("counts", {}).items()),
        *_table("Fields", ("field", "dtype", "shape"), fields),
        "",
        "```python",
        "import tensorflow_datasets as tfds",
        'dataset = tfds.builder_from_directory("path/to/this/folder").as_dataset(split="train")',
        "```",
        "",
    ]
    return "\n".join(lines)


def _table(title: str, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """A heading and a table in Markdown; nothing where there are no rows."""
    body = ["| " + " | ".join(map(_code, row)) + " |" for row in rows]
    if not body:
        return []
    return ["", f"## {title}", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|", *body]


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
    """Reads all pairs into memory, without TensorFlow.

    Args:
      folder: what `write_pairs` made.
      fields: the names to read; all by default. Latents and images are what takes the memory.
      once: names of what belongs to the prompt, kept once for all its pairs.

    Returns:
      name -> numpy array with one row per pair; a list for texts and PNG bytes, and for what a
      ranking has for each candidate, as rankings differ in length. The arrays of `once` have one
      row per prompt, and "prompt_row" int64 [n] says which of them each pair's is.

    Raises:
      FileNotFoundError: no pairs there.
      RecordError: a damaged or missing shard.
      ValueError: a field that this dataset lacks; pairs whose latents or token ids differ in shape.
    """
    folder = to_path(folder)
    features = read_features(folder)
    names = [n for n in (features if fields is None else fields) if n not in once]
    for name in (*names, *once):
        if name not in features:
            raise ValueError(_lacks(folder, name, features))
    values: dict[str, list] = {name: [] for name in (*names, *once)}
    prompts: dict[str, int] = {}
    prompt_row = []
    wanted = list(dict.fromkeys([*names, *once, *(["prompt_id"] if once else [])]))
    for row in _read_rows(folder, features, wanted):
        if once:
            if row["prompt_id"] not in prompts:
                prompts[row["prompt_id"]] = len(prompts)
                for name in once:
                    values[name].append(row[name])
            prompt_row.append(prompts[row["prompt_id"]])
        for name in names:
            values[name].append(row[name])
    found = {name: _stack(name, column, features) for name, column in values.items()}
    return found | ({"prompt_row": np.array(prompt_row)} if once else {})


def _read_rows(folder: Path, features: Features, fields: Sequence[str]) -> Iterator[dict[str, Any]]:
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
    there = f"it has {', '.join(features)}"
    for begins, stored_by in _STORED_BY.items():
        if name.startswith(begins):
            return (
                f"{folder} has no field {name!r}, which {stored_by}: run `agfsync pair` again with"
                f" that; {there}."
            )
    return f"{folder} has no field {name!r}; {there}."


def _stack(name: str, values: list[Any], features: Features) -> Any:
    dtype, _ = features[name]
    per_candidate = name in RANKING_FEATURES and name not in PAIR_FEATURES
    if dtype in ("str", "png") or per_candidate or name.startswith("columns/"):
        return values
    shapes = {np.shape(value) for value in values}
    if len(shapes) > 1:
        raise ValueError(f"Pairs differ in the shape of {name}: {sorted(shapes)}.")
    return np.array(values, dtype)


def repair_pairs(folder: str | Path) -> bool:
    """Drops a pairs folder if it is there and damaged, so that it is made anew; whether it was."""
    if not (to_path(folder) / _INFO_FILE).exists():
        return False
    try:
        read_pairs(folder, ["pair_id"])
    except RecordError:
        remove_tree(to_path(folder))
        return True
    return False
