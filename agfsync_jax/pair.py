"""Pair: scores -> pairs/, the candidate that the scores prefer against the one that they do not.

Within a prompt every score column is normalized, the columns are summed with the weights of
`config.pair.weights`, and `config.pair.strategy` picks pairs by that sum, or ranks all candidates.
Ties, small margins, candidates whose questions were not all answered and the like are dropped, and
pair.json counts them. Nothing is scored again: with other settings the same scores make other pairs
in seconds.

With `config.pair.path`, pairs are what people preferred instead, read from a dataset in Hugging
Face's layouts: the backbone encodes its images, and `agfsync train` sees no difference. Where that
is the pairs/ of another workdir there is nothing to do: `agfsync train` reads them where they lie.
Where it is a round folder of another workdir, pairs are made of its candidates and scores.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from agfsync_jax import backbones
from agfsync_jax.data import preferences, records
from agfsync_jax.data.embeddings import BatchEncoder
from agfsync_jax.data.imports import PreferenceSet, bucket_sizes
from agfsync_jax.data.pair_rows import imported_rows, pair_rows, text_fields
from agfsync_jax.data.pairs import is_pairs, pair_features, repair_pairs, write_pairs
from agfsync_jax.data.scores import read_scores, scored_round
from agfsync_jax.data.shards import read_rows
from agfsync_jax.parallel.mesh import local_mesh
from agfsync_jax.parallel.sharding import batch_shards, round_up
from agfsync_jax.steps.runner import Job, Step
from agfsync_jax.utils.files import read_json, to_path

_PROMPTS = 32  # encoded at a time
_PIXELS = 2**20  # encoded at a time on a device: an encoder's activations take 50 times as much
_OF_SCORES = "weights normalize strategy k min_margin max_pairs min_questions".split()
_OF_IMPORTS = "path split columns buckets max_rows max_bad".split()

Row = dict[str, Any]
Texts = Callable[[Sequence[str]], list[Row]]  # `text_fields` of texts alone


class _Source(NamedTuple):
    """What pairs are made of, and how."""

    made_from: str  # changes when the choices do
    total: int  # of what the progress counts
    columns: Collection[str]  # of scores, which are stored with the pairs
    counts: dict[str, Any]  # of preferences.COUNTS, whole when the last row is made; and "sizes"
    rows: Callable[[Texts, BatchEncoder | None, Callable[[int], None]], Iterator[Row]]


def make_pairs(job: Job) -> None:
    """Writes pairs/ and pair.json, unless the same choices and settings made them.

    The main process does it all, on its own devices.

    Raises:
        FileNotFoundError: prompts, candidates or scores are not there, or nothing to import.
        RecordError: a damaged shard.
        ValueError: bad settings, or no pair is left.
    """
    config, spec, stage = job.config, job.config.pair, job.stage
    scored = scored_round(spec.path, job.folder)
    preferences.check_settings(spec, of_people=scored is None)
    if spec.path and is_pairs(to_path(spec.path).expanduser()):
        stage.print(f"{spec.path} are pairs already, which train reads where they lie")
        return
    source = _of_people(job) if scored is None else _of_scores(job, scored)
    settings = spec.to_dict() | {"backbone": config.backbone.path, "seed": config.seed}
    made_from = repr((source.made_from, sorted(settings.items())))
    made_from = hashlib.sha256(made_from.encode()).hexdigest()
    folder, summary = job.folder / "pairs", job.folder / "pair.json"
    whole = folder / "dataset_info.json"  # a stopped removal may leave the folder
    if whole.exists() and summary.exists():
        if read_json(summary).get("made_from") == made_from:
            stage.skipped(1, 1, "sets of pairs")
            return
    texts, encode = _load_encoders(config, of_people=scored is None)
    (prompt,) = texts([""])
    features = pair_features(
        ranked=spec.strategy == "ranked",
        columns=source.columns,
        embeddings={
            name.removeprefix("embeddings/"): value.shape
            for name, value in prompt.items()
            if name != "token_ids"
        },
        images=spec.images,
        flips=spec.flips,
    )
    card, counts = _card(config, scored), source.counts

    def rows(done):
        yield from source.rows(texts, encode, done)  # raises where there are none
        card["counts"] = {each.text: counts[name] for name, each in preferences.COUNTS.items()}
        sizes = counts.get("sizes", {}).items()
        card["counts"] |= {f"pairs of {size} pixels": count for size, count in sizes}
        summary.unlink(missing_ok=True)  # until here the former pairs stay, and what tells of them

    with stage.progress(source.total) as progress:
        write_pairs(folder, rows(progress.update), card, features, replace=True)
        result = {**counts, "settings": settings, "made_from": made_from}
        records.write_file(summary, [json.dumps(result, indent=2).encode(), b"\n"])
        stage.print(preferences.told(counts))


def drop_damaged(job: Job) -> None:
    """Removes damaged pairs."""
    repair_pairs(job.folder / "pairs")


def _of_scores(job: Job, folder: Path) -> _Source:
    """Pairs of the scores of a round, which is the job's or lies in another workdir."""
    spec = job.config.pair
    if folder != job.folder:
        job.stage.print(f"pairs of the candidates in {folder}")
        drawn = read_json(folder.parent / "config.json").get("backbone", {}).get("path")
        if drawn not in (None, job.config.backbone.path):
            job.stage.print(f"they were drawn with config.backbone.path={drawn}: it must fit")
    prompts = {row["id"]: row["prompt"] for row in read_rows(folder / "prompts.jsonl", "prompts")}
    scores = read_scores(folder / "scores", spec)
    choices, counts = preferences.choose(scores, prompts, spec)
    if not choices:
        raise ValueError(
            f"no pair is left of {counts['prompts']} prompts ({preferences.told(counts)}):"
            f" {preferences.advice(counts, spec)}."
        )
    if spec.shuffle_labels:
        choices = preferences.shuffle_labels(choices, job.config.seed, job.round_index)
    digest = hashlib.sha256("".join(map(repr, choices)).encode())
    for scored in scores.values():
        for name, column in scored.columns.items():
            digest.update(name.encode() + column.tobytes())

    def rows(texts, encode, done):
        for row in pair_rows(
            *(folder / "candidates", choices, prompts, scores, texts),
            ranked=spec.strategy == "ranked",
            with_images=spec.images,
            flip=encode,
        ):
            yield row
            done(1)

    columns = next(iter(scores.values())).columns
    return _Source(digest.hexdigest(), len(choices), columns, counts, rows)


def _of_people(job: Job) -> _Source:
    """Pairs of what people preferred."""
    config, stage, spec = job.config, job.stage, job.config.pair
    stage.unit = "rows"
    sizes = bucket_sizes(config.sample.height, config.sample.width, spec.buckets)
    found = PreferenceSet(spec)
    counts = dict.fromkeys(preferences.COUNTS, 0)

    def is_swapped(pair_id):
        return spec.shuffle_labels and preferences.is_swapped(pair_id, config.seed, job.round_index)

    def rows(texts, encode, done):
        for row in imported_rows(
            *(found.read(sizes, done), encode, texts),
            with_images=spec.images,
            is_swapped=is_swapped,
            with_flips=spec.flips,
        ):
            counts["pairs"] += 1
            yield row
        counts.update(found.counts)
        if not counts["pairs"]:
            told = preferences.told(counts)
            raise ValueError(f"no pair is left of {found.num_rows} rows ({told}).")
        if spec.buckets:
            counts["sizes"] = {f"{h}x{w}": count for (h, w), count in found.sizes.most_common()}
            told = ", ".join(f"{size}: {count}" for size, count in counts["sizes"].items())
            stage.print(f"sizes of images (height x width), and how many pairs have them: {told}")
        if bad := found.bad_rows():
            stage.print(f"dropped as bad: {bad}")

    return _Source(repr((found.fingerprint(), sizes)), found.num_rows, (), counts, rows)


def _card(config, scored: Path | None) -> dict[str, Any]:
    """What the dataset card tells, but for the counts; `scored` is None for pairs of people."""
    spec, pair, sample = config.pair, config.pair.to_dict(), config.sample.to_dict()
    what = "Rankings of images" if spec.strategy == "ranked" else "Preference pairs of images"
    who = "people" if scored is None else "AI feedback"
    told = [*(_OF_IMPORTS if scored is None else _OF_SCORES), "shuffle_labels"]
    if scored is None:
        sample = {key: sample[key] for key in ("height", "width")}
    elif spec.path:  # another workdir's candidates
        sample = read_json(scored.parent / "config.json").get("sample", {})
    return {
        "description": f"{what} made of one text prompt each, by the preference of {who}."
        " Latents are those of the diffusion model named below, scaled as it takes them.",
        "license": spec.license,
        "backbone.path": config.backbone.path,
        "seed": config.seed,
        **{f"pair.{key}": pair[key] for key in told},
        **{f"sample.{key}": value for key, value in sample.items()},
    }


def _load_encoders(config, *, of_people: bool) -> tuple[Texts, BatchEncoder | None]:
    """What makes the fields of texts, and latents of images where some are to be encoded.

    The backbone's frozen networks do it, on this process's own devices.
    """
    spec, mesh = config.pair, local_mesh()
    shards = batch_shards(mesh)
    tokenize, prompts, images = backbones.tokenizer(config), None, None
    encodes = of_people or spec.flips
    if spec.embeddings or encodes:
        cls = backbones.backbone_class(config)
        frozen = [name for name in cls.networks if name != cls.denoiser_name]
        backbone = backbones.load(config, mesh, only=frozen)
        encoder = functools.partial(BatchEncoder, params=backbone.params, mesh=mesh)
    if spec.embeddings:
        prompts = encoder(backbone.encode_prompt, batch_size=round_up(_PROMPTS, shards))
    if encodes:
        height, width = config.sample.height, config.sample.width
        for size in bucket_sizes(height, width, spec.buckets):
            backbone.latent_shape(*size)  # raises for a size that does not fit
        most = shards * max(1, _PIXELS // (height * width))
        size = max(2, min(config.sample.device_batch_size * shards, most))
        images = encoder(backbone.encode_image, batch_size=size)
    return functools.partial(text_fields, tokenize=tokenize, encode=prompts), images


main = Step(
    "pair",
    make_pairs,
    outputs=("pairs",),
    repair=drop_damaged,
    main_only=True,
    unit="pairs",
)
