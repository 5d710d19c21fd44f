"""Train: pairs -> checkpoints/, the denoiser tuned on a round's preference pairs.

The loss is a file of agfsync_jax/losses (`config.loss`; Diffusion-DPO by default). All of the
denoiser is trained, or LoRA adapters on its attention (`config.train.lora_rank`). Round 0 starts
from `config.backbone`, a later round from the one before; where a round starts is its reference,
which may follow the policy slowly (`config.train.reference_decay`).

Text embeddings are computed once per distinct prompt and kept in main memory, as the text encoder
is frozen; where the pairs store them (`config.pair.embeddings`), they are read instead, and with
`config.train.embeddings="step"` the step computes them. Order and noise depend on (seed, round,
step) alone: stopped and started again, on any number of devices, the training goes on as if it had
never stopped.
"""

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from agfsync_jax import backbones
from agfsync_jax.data.embeddings import BatchEncoder, PromptEmbeddings
from agfsync_jax.data.loader import PairLoader, pad_rankings
from agfsync_jax.data.pairs import is_pairs, read_features, read_pairs, repair_pairs
from agfsync_jax.parallel import multihost
from agfsync_jax.steps.runner import Job, Step
from agfsync_jax.training import inversion, program
from agfsync_jax.training.checkpoints import (
    STARTED_FROM,
    Checkpoints,
    is_higher_better,
    restore_denoiser,
    restore_trained,
    trained_rounds,
)
from agfsync_jax.training.loop import Training, conditioned, fit, restore_state
from agfsync_jax.training.step import StepSpec
from agfsync_jax.training.validation import HeldOutPairs, Validation
from agfsync_jax.utils.clock import Stage
from agfsync_jax.utils.files import read_json, to_path, write_text

_DRAWS = 4  # of noise and timesteps, for each pair that is held out


def train(job: Job) -> None:
    """Trains to `config.train.num_steps` steps, from the round's newest checkpoint if there is one.

    Ctrl-C and SIGTERM save the step that is under way, then stop.

    Raises:
        FileNotFoundError: no pairs, or no checkpoint of the round before.
        ValueError: settings that do not fit each other, the mesh, the model or the pairs.
        FloatingPointError: a loss or gradient that is not finite; names the step.
    """
    spec, before = job.config.train, []
    if job.round_index:
        before = trained_rounds(job.workdir, job.round_index - 1, job.config, job.step)
    higher = is_higher_better(job.config)
    with Checkpoints(job.folder / "checkpoints", spec.keep, spec.best, higher) as checkpoints:
        start = checkpoints.latest_step() or 0
        job.stage.skipped(start, spec.num_steps, "steps")
        if not checkpoints.has_ended(spec.num_steps):
            pin_pairs(job, start)
            pin_start(job, start, before)
            training = prepare(job.config, job.folder, before, checkpoints, start)
            tell_repeats(job.stage, training.loader)
            tell_shapes(job.stage, training.loader)
            tell_pairs(job, training.spec)
            fit(spec, training, start, job.stage, checkpoints)


def drop_damaged(job: Job) -> None:
    """Removes damaged pairs of this round, which all processes read."""
    if multihost.is_main():
        repair_pairs(job.folder / "pairs")


def pairs_folder(config: Any, round_dir: Path) -> Path:
    """A round's pairs: its own, or the pairs/ of another workdir that `config.pair.path` names.

    Raises:
        ValueError: those of another workdir with shuffled labels.
    """
    path = to_path(config.pair.path).expanduser() if config.pair.path else None
    if path is None or not is_pairs(path):
        return round_dir / "pairs"
    if config.pair.shuffle_labels:
        raise ValueError(
            f"config.pair.path={path} are pairs already, which are read as they are:"
            " config.pair.shuffle_labels needs pairs of its own, made by `agfsync pair`."
        )
    return path


def pin_pairs(job: Job, start: int) -> None:
    """Remembers in pairs_from.json which pairs of another workdir a training has begun with.

    Raises ValueError where it goes on from step `start` and they are others now.
    """
    pairs, note = pairs_folder(job.config, job.folder), job.folder / "pairs_from.json"
    if pairs.parent == job.folder:
        return
    told = [pairs / "dataset_info.json", pairs.with_name("pair.json")]
    digests = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in told if path.exists()
    }
    if start and read_json(note).get("sha256", digests) != digests:
        raise ValueError(
            f"{pairs} are other pairs than this training has begun with: put the former ones back,"
            f" or remove {job.folder / 'checkpoints'} to begin anew."
        )
    job.stage.print(f"pairs of {pairs}")
    made = read_json(told[1]).get("settings", {}).get("backbone")
    if made not in (None, job.config.backbone.path):
        job.stage.print(f"they were made with config.backbone.path={made}: it must fit")
    if multihost.is_main():
        write_text(note, json.dumps({"path": str(pairs), "sha256": digests}, indent=2) + "\n")


def pin_start(job: Job, start: int, before: Sequence[tuple[Path, int]]) -> None:
    """Remembers in started_from.json at which steps of the rounds before a training has begun.

    Raises ValueError where it goes on from step `start` and they are others now.
    """
    if not before:
        return
    note, now = job.folder / STARTED_FROM, {f.parent.name: step for f, step in before}
    was = read_json(note)
    if start and was and was != now:
        raise ValueError(
            f"{job.folder / 'checkpoints'} began where {was} ended, and --step={job.step} means"
            f" {now}: give the former --step, or remove it to begin anew."
        )
    if multihost.is_main():
        write_text(note, json.dumps(now) + "\n")


def tell_repeats(stage: Stage, loader: PairLoader) -> None:
    """Says so where a batch holds pairs more than once."""
    if loader.batch_size > loader.fewest:
        of_shape = " of a shape" if len(loader.shapes) > 1 else ""
        stage.print(
            f"config.train.batch_size={loader.batch_size} is more than the {loader.fewest} pairs"
            f" that there are{of_shape}: a batch has the same pairs several times, with the same"
            " noise, and teaches no more than a smaller one"
        )


def tell_shapes(stage: Stage, loader: PairLoader) -> None:
    """Says so where images have several shapes."""
    if len(loader.shapes) > 1:
        stage.print(
            f"images have {len(loader.shapes)} shapes: a batch has one of them, and the step is"
            " compiled once for each when its turn comes first"
        )


def tell_pairs(job: Job, spec: StepSpec) -> None:
    """Says so where a loss of rankings is given pairs."""
    if spec.loss.is_listwise and "scores" not in read_features(
        pairs_folder(job.config, job.folder)
    ):
        job.stage.print(
            f"config.loss.name={job.config.loss.name} takes all candidates of a prompt, and these"
            " are pairs: it learns from two of them (config.pair.strategy='ranked' stores all)"
        )


def check_pairs(folder: Path, config: Any) -> None:
    """Raises ValueError for pairs that other settings of `config.pair` made."""
    path = folder / "pair.json"
    if pairs_folder(config, folder).parent != folder:
        return
    made, now = read_json(path).get("settings", {}), json.loads(config.pair.to_json())
    differ = [key for key in now if key != "max_bad" and made.get(key, now[key]) != now[key]]
    if differ:
        raise ValueError(
            f"{folder / 'pairs'} was made with another config.pair.{differ[0]}"
            f" ({made[differ[0]]!r}, now {now[differ[0]]!r}): run `agfsync pair` again."
        )


def load_pairs(
    folder: Path, config: Any, spec: StepSpec, mesh: Mesh
) -> tuple[PairLoader, PairLoader | None]:
    """The pairs, or rankings, in `folder` that are learned, and those that are held out.

    Raises:
        FileNotFoundError, RecordError: no pairs, or damaged ones.
        ValueError: see `read_examples`; or `config.train.held_out` leaves none to learn, or to look
            at.
    """
    train, examples = config.train, read_examples(folder, config, spec)
    empty = backbones.tokenizer(config)([""])[0] if train.empty_prompts else None
    more = {"empty": empty, "empty_prompts": train.empty_prompts, "flip": train.flip}
    load = functools.partial(PairLoader, seed=spec.seed, mesh=mesh)
    if not train.held_out:
        return load(examples, train.batch_size, parts=spec.accumulate, **more), None
    held = is_held_out(examples["token_ids"], train.held_out)
    if held.all() or not held.any():
        raise ValueError(
            f"config.train.held_out={train.held_out} of {len(held)} pairs are"
            f" {'all' if held.all() else 'none'} of them: set another share, or 0."
        )
    learned, kept = (
        {
            name: values if name.startswith("embeddings/") else np.asarray(values)[rows]
            for name, values in examples.items()
        }
        for rows in (np.flatnonzero(~held), np.flatnonzero(held))
    )
    part = train.batch_size // spec.accumulate
    learned = load(learned, train.batch_size, parts=spec.accumulate, **more)
    return learned, load(kept, part, whole=True)


def is_held_out(token_ids: np.ndarray, share: float) -> np.ndarray:
    """Which rows' prompts are held out, bool [n]: by the prompt alone, whatever else there is."""
    digests = [hashlib.sha256(np.asarray(ids, np.int32).tobytes()).digest() for ids in token_ids]
    return np.array([int.from_bytes(each[:4], "big") < share * 2**32 for each in digests])


def read_examples(folder: Path, config: Any, spec: StepSpec) -> dict[str, Any]:
    """What `PairLoader` takes of the pairs, or rankings, in `folder`.

    A pair is a ranking of two for a loss that takes those.

    Raises:
        FileNotFoundError, RecordError: no pairs, or damaged ones.
        ValueError: rankings for a loss of pairs; pairs without scores, or with labels that are not
            theirs, for a loss that uses them.
    """
    features, loss = read_features(folder), spec.loss
    ranked = "scores" in features
    if ranked and not loss.is_listwise:
        raise ValueError(
            f"{folder} holds rankings, and config.loss.name wants pairs: run `agfsync pair` with"
            " config.pair.strategy another than 'ranked', or set another loss."
        )
    if loss.uses_scores and not any(name.startswith("chosen_scores/") for name in features):
        raise ValueError(
            f"{folder} holds pairs that people made, and config.loss.name={config.loss.name} learns"
            " from how far two scores are apart: take another loss, such as diffusion_dpo."
        )
    stored = [name for name in features if name.startswith("embeddings/") and not spec.encode]
    latents = ("latents",) if ranked else ("chosen_latents", "rejected_latents")
    flipped = [f"{name}_flipped" for name in latents if config.train.flip]
    of_sides = ("chosen_score", "rejected_score") if loss.uses_scores else ()
    scores = ("scores",) if ranked else of_sides
    names = ("pair_id", "token_ids", *latents, *flipped, *scores)
    pairs = read_pairs(folder, names, once=stored)
    if loss.uses_scores:
        pairs["scores"] = np.stack([pairs.pop(name) for name in of_sides], axis=1)
        if (pairs["scores"][:, 0] < pairs["scores"][:, 1]).any():
            raise ValueError(
                f"{folder} has chosen images with the lower score (config.pair.shuffle_labels),"
                f" which config.loss.name={config.loss.name} would turn round: take another loss."
            )
    elif loss.is_listwise and not ranked:
        pairs["scores"] = np.tile(np.array([1.0, 0.0], np.float32), (len(pairs["pair_id"]), 1))
        pairs["mask"] = np.ones(pairs["scores"].shape, bool)
    if ranked:
        padded = {n: pad_rankings(pairs.pop(n), pairs["scores"]) for n in (*flipped, *latents)}
        pairs |= {name: found["latents"] for name, found in padded.items()}
        pairs |= {name: padded["latents"][name] for name in ("scores", "mask")}
    return pairs


def prepare(
    config: Any,
    round_dir: Path,
    before: Sequence[tuple[Path, int]],
    checkpoints: Checkpoints,
    start: int,
) -> Training:
    """Everything that a round needs to go on from step `start`.

    What is no longer needed is let go of as soon as that is so, for the memory.

    Args:
        before: (folder of checkpoints, step) of the rounds before, see `restore_denoiser`.
    """
    mesh = program.create_train_mesh(config)
    spec = program.step_spec(config, mesh, int(round_dir.name.removeprefix("round_")))
    check_pairs(round_dir, config)
    loader, kept = load_pairs(pairs_folder(config, round_dir), config, spec, mesh)
    shapes = {*loader.shapes, *(kept.shapes if kept else ())}
    if config.train.inversion_steps and len(shapes) > 1:
        raise ValueError(
            "config.train.inversion_steps wants images of one shape, and these pairs have"
            f" {len(shapes)}: make them with config.pair.buckets=0."
        )
    backbone = load_backbone(config, loader, mesh)
    spec = spec._replace(backbone=backbone)
    first = backbone.params.pop(backbone.denoiser_name)
    if before:
        known = {backbone.denoiser_name: first, **program.text_encoders(backbone.params)}
        tuned = restore_trained(before, known, backbone.denoiser_name)
        denoiser = tuned.pop(backbone.denoiser_name)
        backbone.params |= tuned
        del known, tuned
    else:
        denoiser = start_of(config, first, mesh)
    reference = first if is_reference_first(config, bool(before)) else denoiser
    del first
    embeddings, of_kept, text = None, None, {}
    if spec.encode:
        text = program.text_encoders(backbone.params)
    else:
        embeddings = embed_prompts(config, loader, backbone, mesh)
        of_kept = embed_prompts(config, kept, backbone, mesh) if kept else None
    validation = Validation(config, round_dir.parent, mesh, backbone) if draws(config) else None
    backbone.params.clear()  # who needs them has them

    init = program.init_program(denoiser, spec, mesh, config.sharding, text)
    if start:
        state = restore_state(checkpoints, start, jax.eval_shape(init, denoiser))
    else:
        state = init(denoiser)
        if spec.reference_decay and reference is not denoiser:
            state = state._replace(reference=reference)  # steps take its memory
    del denoiser
    base = program.freeze_program(reference, spec)(reference) if spec.needs_base else None
    frozen = {"base": base, "text": text}
    if config.train.inversion_steps:
        model = reference if base is None else base
        invert(
            config,
            round_dir,
            before,
            model,
            text,
            spec,
            mesh,
            (loader, embeddings),
            (kept, of_kept),
        )
        del model
    del reference
    step = program.step_program(state, frozen, spec, mesh)
    held_out = None
    if kept:
        held_out = HeldOutPairs(
            program.held_out_program(state, frozen, spec, mesh),
            functools.partial(conditioned, kept, of_kept),
            weights=kept.weights(_DRAWS),
        )

    def load_base():
        again = backbones.load(config, mesh, only=[backbone.denoiser_name])
        base = again.params[backbone.denoiser_name]
        return restore_denoiser(before, base) if before else base

    return Training(
        *(spec, state, frozen, step, loader, embeddings, validation, held_out),
        higher_is_better=is_higher_better(config),
        load_base=load_base,
    )


def invert(
    config: Any,
    round_dir: Path,
    before: Sequence[tuple[Path, int]],
    params: Any,
    text: Any,
    spec: StepSpec,
    mesh: Mesh,
    *loaders: tuple[PairLoader | None, PromptEmbeddings | None],
) -> None:
    """Gives loaders, of what is learned and of what is held out, the noise of their examples by
    inversion; see training/inversion.py.

    Args:
        before: see `prepare`.
        params, text: of the model that a round begins with.
    """
    schedule = spec.backbone.schedule
    wanted = inversion.wanted(config, schedule)
    timesteps = inversion.grid(schedule, config.train.inversion_steps)
    timesteps = timesteps[timesteps <= wanted[-1]]  # later ones lead to none of them
    compiled = program.inversion_program(params, text, spec, mesh, timesteps, wanted)
    of_rounds = [[folder.parent.name, step] for folder, step in before]
    made_by = [config.backbone.path, *map(list, config.backbone.lora), *of_rounds]
    for name, (loader, embeddings) in zip(("learned", "held_out"), loaders, strict=True):
        if loader:

            def noise_of(examples, loader=loader, embeddings=embeddings):
                return compiled(params, text, conditioned(loader, embeddings, examples=examples))

            folder = round_dir / "inversion" / name
            loader.noise = inversion.inverted_noise(
                *(folder, loader, noise_of, timesteps, wanted, made_by)
            )


def start_of(config: Any, first: Any, mesh: Mesh) -> Any:
    """Where round 0 starts: `first`, the denoiser of `config.backbone`, or that of
    `config.train.start`.

    Raises:
        FileNotFoundError, ValueError: see the backbone's `load`; or a denoiser of another shape.
    """
    path = config.train.start
    if not path:
        return first
    name = backbones.backbone_class(config).denoiser_name
    other = backbones.load(config, mesh, path=path, variant="", kind="", lora=(), only=[name])
    program.check_start(config, first, other.params[name])
    return other.params[name]


def is_reference_first(config: Any, is_later: bool) -> bool:
    """Whether the reference is what `config.backbone` has, wherever a round starts."""
    return config.train.reference == "first" or bool(config.train.start and not is_later)


def load_backbone(config: Any, loader: PairLoader, mesh: Mesh) -> Any:
    """The backbone, or its denoiser alone where nothing is encoded and nothing drawn."""
    empty = bool(config.train.empty_prompts)  # which no pair has
    if loader.stored_embeddings and not (draws(config) or empty):
        return backbones.load(config, mesh, only=[backbones.backbone_class(config).denoiser_name])
    return backbones.load(config, mesh)


def draws(config: Any) -> bool:
    """Whether validations draw pictures."""
    return bool(config.train.validate_every and config.train.num_validation_prompts)


def embed_prompts(config: Any, loader: PairLoader, backbone: Any, mesh: Mesh) -> PromptEmbeddings:
    """The embeddings that the pairs store; else what the text encoder makes of each prompt."""
    table, index, size = loader.stored_embeddings, loader.prompt_row, config.train.batch_size
    if not table:
        return PromptEmbeddings.encode(backbone, loader.token_ids, size, mesh)
    if loader.empty_prompts:
        encoder = BatchEncoder(backbone.encode_prompt, backbone.params, size, mesh)
        empty = encoder(loader.token_ids[-1:])
        index = np.append(index, len(next(iter(table.values()))))
        table = {
            name: np.concatenate([each, empty[name].astype(each.dtype)])
            for name, each in table.items()
        }
    return PromptEmbeddings(table, index, mesh)


main = Step(
    "train",
    train,
    outputs=("checkpoints",),
    settings=("pair", "loss", "train"),
    repair=drop_damaged,
    unit="pairs",
)
