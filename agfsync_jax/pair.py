"""Pair: scores -> pairs/, the candidate that the scores prefer against the one that they do not.

Within a prompt every score column is normalized, the columns are summed with the weights of
`config.pair.weights`, and `config.pair.strategy` picks pairs by that sum, or ranks all candidates.
Ties, small margins, candidates whose questions were not all answered and the like are dropped, and
pair.json counts them. Nothing is scored again: with other settings the same scores make other pairs
in seconds.

With `config.pair.path`, pairs are what people preferred instead, read from a dataset in Hugging
Face's layouts: the backbone encodes its images, and `agfsync train` sees no difference.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from agfsync_jax import backbones
from agfsync_jax.data import preferences, records
from agfsync_jax.data.embeddings import in_batches
from agfsync_jax.data.imports import PreferenceSet
from agfsync_jax.data.pair_rows import imported_rows, pair_rows, text_fields
from agfsync_jax.data.pairs import pair_features, repair_pairs, write_pairs
from agfsync_jax.data.scores import read_scores
from agfsync_jax.data.shards import read_rows, shard_paths
from agfsync_jax.parallel.mesh import local_mesh
from agfsync_jax.parallel.sharding import batch_shards, round_up
from agfsync_jax.steps.runner import Job, Step
from agfsync_jax.utils.files import remove_tree

_PROMPTS = 32  # encoded at a time
_PIXELS = 2**20  # encoded at a time on a device: an encoder's activations take 50 times as much
_OF_SCORES = "weights normalize strategy k min_margin max_pairs min_questions".split()
_OF_IMPORTS = "path split columns max_rows max_bad".split()


def make_pairs(job: Job) -> None:
    """Writes pairs/ and pair.json, unless the same choices and settings made them.

    The main process does it all, on its own devices.

    Raises:
        FileNotFoundError: prompts, candidates or scores are not there, or nothing to import.
        RecordError: a damaged shard.
        ValueError: bad settings, or no pair is left.
    """
    preferences.check_settings(job.config.pair)
    make = _import if job.config.pair.path else _pair
    make(job)


def drop_damaged(job: Job) -> None:
    """Removes damaged pairs."""
    repair_pairs(job.folder / "pairs")


def _pair(job: Job) -> None:
    """Pairs of this round's scores."""
    config, round_dir, stage = job.config, job.folder, job.stage
    spec = config.pair
    prompt_rows = read_rows(round_dir / "prompts.jsonl", "prompts")
    prompts = {row["id"]: row["prompt"] for row in prompt_rows}
    scores = _read_all_scores(round_dir / "scores", spec)
    choices, counts = preferences.choose(scores, prompts, spec)
    if spec.shuffle_labels:
        choices = preferences.shuffle_labels(choices, config.seed, job.round_index)
    digest = hashlib.sha256()
    for choice in choices:
        digest.update(repr(choice).encode())
    for scored in scores.values():
        for name, column in scored.columns.items():
            digest.update(name.encode() + column.tobytes())
    output = _Output(job, digest.hexdigest())
    if output.is_there():
        return
    if not choices:
        raise ValueError(
            f"no pair is left of {counts['prompts']} prompts ({told(counts)}):"
            f" lower config.pair.min_margin ({spec.min_margin}) or draw more candidates."
        )
    texts, shapes = _texts(config, _Encoders(config) if spec.embeddings else None)
    columns = next(iter(scores.values())).columns
    rows = pair_rows(
        *(round_dir / "candidates", choices, prompts, scores, texts),
        ranked=spec.strategy == "ranked",
        with_images=spec.images,
    )
    with stage.progress(len(choices)) as progress:
        output.write(_noted(rows, progress.update), counts, columns, shapes)


def _read_all_scores(folder: Path, spec) -> dict[str, preferences.Scored]:
    """Shard -> its scores; all have the same columns."""
    asking = {name.split("/")[0] for name, weight in spec.weights.items() if weight}
    paths = shard_paths(folder, ".parquet", "score")
    if spec.min_questions and not any(folder.glob("answers-*.parquet")):
        raise ValueError(
            f"config.pair.min_questions={spec.min_questions}: {folder} has no answers, as no scorer"
            " asked questions. Set it to 0, or score again with one that asks."
        )
    scores = {path.stem: read_scores(path, asking) for path in paths}
    first, *others = scores
    for shard in others:
        if scores[shard].columns.keys() != scores[first].columns.keys():
            raise ValueError(
                f"{folder}: {first} has the columns {', '.join(scores[first].columns)}, {shard} has"
                f" {', '.join(scores[shard].columns)}. Remove the stale ones and run"
                " `agfsync score`."
            )
    return scores


def _import(job: Job) -> None:
    """Pairs of what people preferred."""
    config, stage = job.config, job.stage
    stage.unit, spec = "rows", config.pair
    height, width = config.sample.height, config.sample.width
    source = PreferenceSet(spec.path, spec.split, spec.columns.to_dict(), max_rows=spec.max_rows)
    made_from = repr((source.fingerprint(), height, width))
    output = _Output(job, made_from)
    if output.is_there():
        return
    encoders = _Encoders(config)
    encode, num_pairs = encoders.images(height, width, config.sample.batch_size)
    texts, shapes = _texts(config, encoders if spec.embeddings else None)
    counts = dict.fromkeys(preferences.COUNTS, 0)

    def is_swapped(pair_id):
        return spec.shuffle_labels and preferences.is_swapped(pair_id, config.seed, job.round_index)

    def rows(done):
        found = source.read(height, width, max_bad=spec.max_bad, done=done)
        for row in imported_rows(
            found, encode, num_pairs, texts, with_images=spec.images, is_swapped=is_swapped
        ):
            counts["pairs"] += 1
            yield row
        counts.update(source.counts)
        if not counts["pairs"]:
            raise ValueError(f"no pair is left of {source.num_rows} rows ({told(counts)}).")

    with stage.progress(source.num_rows) as progress:
        output.write(rows(progress.update), counts, (), shapes)
    if bad := source.bad_rows():
        stage.print(f"dropped as bad: {bad}")


def _noted(rows: Iterable, done: Callable[[int], None]) -> Iterator:
    for row in rows:
        yield row
        done(1)


@dataclasses.dataclass
class _Output:
    """pairs/ and pair.json of a job.

    Args:
        made_from: changes when the choices do; the settings are added here.
    """

    job: Job
    made_from: str

    def __post_init__(self):
        self.config = config = self.job.config
        self.folder, self.summary = self.job.folder / "pairs", self.job.folder / "pair.json"
        self.settings = config.pair.to_dict()
        self.settings |= {"backbone": config.backbone.path, "seed": config.seed}
        text = repr((self.made_from, sorted(self.settings.items())))
        self.made_from = hashlib.sha256(text.encode()).hexdigest()

    def is_there(self) -> bool:
        """Whether the very same is there; it is told then."""
        whole = self.folder / "dataset_info.json"  # a stopped removal may leave the folder
        if not (whole.exists() and self.summary.exists()):
            return False
        if json.loads(self.summary.read_text())["made_from"] != self.made_from:
            return False
        self.job.stage.skipped(1, 1, "sets of pairs")
        return True

    def write(
        self,
        rows: Iterable[Mapping[str, Any]],
        counts: Mapping[str, int],
        columns: Iterable[str],
        embeddings: Mapping[str, tuple[int, ...]],
    ) -> None:
        """Replaces what is there; `counts` is read after the last row."""
        spec = self.config.pair
        ranked = spec.strategy == "ranked"
        features = pair_features(
            ranked=ranked, columns=columns, embeddings=embeddings, images=spec.images
        )
        card = self._card(ranked)

        def counted():
            yield from rows
            card["counts"] = {each.text: counts[name] for name, each in preferences.COUNTS.items()}

        self.summary.unlink(missing_ok=True)
        remove_tree(self.folder)
        write_pairs(self.folder, counted(), card, features)
        result = {**counts, "settings": self.settings, "made_from": self.made_from}
        records.write_file(self.summary, [json.dumps(result, indent=2).encode(), b"\n"])
        self.job.stage.print(told(counts))

    def _card(self, ranked: bool) -> dict[str, Any]:
        """What the dataset card tells, but for the counts."""
        config = self.config
        what = "Rankings of images" if ranked else "Preference pairs of images"
        who = "people" if config.pair.path else "AI feedback"
        settings = {"backbone.path": config.backbone.path, "seed": config.seed}
        for key in _OF_IMPORTS if config.pair.path else _OF_SCORES:
            settings[f"pair.{key}"] = self.settings[key]
        settings["pair.shuffle_labels"] = config.pair.shuffle_labels
        sample = config.sample.to_dict()
        for key in ("height", "width") if config.pair.path else sample:
            settings[f"sample.{key}"] = sample[key]
        return {
            "description": f"{what} made of one text prompt each, by the preference of {who}."
            " Latents are those of the diffusion model named below, scaled as it takes them.",
            "license": config.pair.license,
            **settings,
        }


class _Encoders:
    """The frozen networks of the backbone, on this process's own devices."""

    def __init__(self, config):
        self.mesh = local_mesh()
        cls = backbones.backbone_class(config)
        frozen = [name for name in cls.networks if name != cls.denoiser_name]
        self.backbone = backbones.load(config, self.mesh, only=frozen)

    def prompts(self) -> tuple[Callable, int]:
        """Token ids -> conditioning, see `in_batches`; and the rows it takes at a time."""
        size = self._whole(_PROMPTS)
        return in_batches(self.backbone.encode_prompt, self.backbone.params, size, self.mesh), size

    def images(self, height: int, width: int, batch_size: int) -> tuple[Callable, int]:
        """Images -> latents, see `in_batches`; and the pairs it takes at a time.

        Of `batch_size` images at most, and of fewer where they are large.
        """
        self.backbone.latent_shape(height, width)  # raises for a size that does not fit
        most = batch_shards(self.mesh) * max(1, _PIXELS // (height * width))
        size = max(2, min(self._whole(batch_size), most))
        run = in_batches(self.backbone.encode_image, self.backbone.params, size, self.mesh)
        return run, size // 2

    def _whole(self, size: int) -> int:
        return round_up(size, batch_shards(self.mesh))


def _texts(config, encoders: _Encoders | None) -> tuple[Callable, dict[str, tuple[int, ...]]]:
    """`text_fields` of texts alone, and the shapes of their embeddings."""
    tokenize = backbones.tokenizer(config)
    if encoders is None:
        return functools.partial(text_fields, tokenize=tokenize, encode=None, batch_size=0), {}
    encode, size = encoders.prompts()
    backbone = encoders.backbone
    abstract = jax.eval_shape(backbone.encode_prompt, backbone.params, tokenize([""]))
    shapes = {name: leaf.shape[1:] for name, leaf in abstract.items()}
    return functools.partial(text_fields, tokenize=tokenize, encode=encode, batch_size=size), shapes


def told(counts: Mapping[str, int]) -> str:
    """The counts in one line; of what was dropped, the reasons that there are."""
    reasons = [name for name in preferences.COUNTS if name not in ("pairs", "prompts")]
    dropped = ", ".join(
        f"{counts[name]} {preferences.COUNTS[name].text}" for name in reasons if counts[name]
    )
    head = f"{counts['pairs']} pairs from {counts['prompts']} prompts"
    return f"{head}; dropped: {dropped or 'nothing'}"


main = Step(
    "pair",
    make_pairs,
    outputs=("pairs",),
    repair=drop_damaged,
    main_only=True,
    unit="pairs",
)
