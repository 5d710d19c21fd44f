"""Every kind of file of a workdir is damaged: who reads it names the verb that makes it anew."""

import re
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from agfsync_jax import backbones, evaluate, pair, prompts, questions, report, sample, score, train
from agfsync_jax.data import records
from agfsync_jax.data.columns import Column
from agfsync_jax.parallel.mesh import create_mesh
from agfsync_jax.scorers import Scorer
from agfsync_jax.training.checkpoints import Checkpoints
from agfsync_jax.utils import modules
from configs import micro
from tests.tiny_backbone import DrawingBackbone

VERBS = {verb.__name__.rpartition(".")[2]: verb for verb in (prompts, questions, sample, score)}
VERBS |= {"pair": pair, "evaluate": evaluate}


class Asker(Scorer):
    """Brightness, and an answer to every question."""

    columns = {"light": Column()}
    asks_questions = True

    def __init__(self, mesh, *, batch_size):
        pass

    def __call__(self, images, prompts, questions):
        reply = {"answer": "yes", "p_yes": 0.5, "p_expected": 0.5, "correct": True}
        answers = [[reply | {"question": q["question"]} for q in asked] for asked in questions]
        return {"light": images.mean((1, 2, 3)), "answers": answers}


@pytest.fixture(scope="module")
def config():
    config = micro.get_config("tiny")
    config.scorers = {"vqa": {"name": "vqa"}}
    config.pair.update({"min_margin": 0.0, "min_questions": 0, "strategy": "best_worst"})
    config.pair.weights = {"vqa": 1.0}
    config.prompts.num_prompts = config.evaluate.num_prompts = 4
    config.evaluate.update({"num_seeds": 2, "evaluators": ()})
    config.sample.update({"num_inference_steps": 1, "guidance_scale": 1.0})
    config.sample.update({"num_candidates": 3, "prompts_per_shard": 2})
    config.train.num_steps = 1
    return config


@pytest.fixture(scope="module", autouse=True)
def quick_models():
    load = modules.load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbones, "backbone_class", lambda config: DrawingBackbone)
        fake = SimpleNamespace(Scorer=Asker)
        patch.setattr(
            modules, "load", lambda room, name: fake if room == "scorers" else load(room, name)
        )
        yield


@pytest.fixture(scope="module")
def made(config, tmp_path_factory):
    """A workdir in which all verbs have run, but for the training."""
    workdir = tmp_path_factory.mktemp("made")
    for verb in (prompts, questions, sample, score, pair):
        verb.main(config, workdir)
    unet = backbones.load(config, create_mesh(config.mesh), only=["unet"]).params["unet"]
    with Checkpoints(workdir / "round_000/checkpoints") as checkpoints:
        checkpoints.save(1, {"params": jax.tree.map(lambda x: x * 1.1, unet)}, wait=True)
    evaluate.main(config, workdir)
    report.main(config, workdir)
    return workdir


@pytest.fixture
def workdir(made, tmp_path):
    return shutil.copytree(made, tmp_path / "a workdir")


def flip(path):
    data = bytearray(path.read_bytes())
    data[40] ^= 0x40  # of Parquet the rows have checksums, and what is around them has none
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def cut_between_records(path):
    """Well-formed, as if the last record had never been written."""
    *_, (last, _) = records._read_frames(path)
    path.write_bytes(path.read_bytes()[:last])


DAMAGES = (flip, cut, cut_between_records)
damages = pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)


def gallery(config, workdir):
    report.main(config, workdir, stage="pair")


def named(config, workdir, read):
    """The verb that a reader's error names."""
    with pytest.raises(ValueError, match="is damaged") as error:
        read(config, workdir)
    command = rf"`agfsync (\w+) --config=... --workdir={re.escape(str(workdir))} --repair`"
    return re.search(command, str(error.value))[1]


def check(config, workdir, path, damage, *readers):
    """The readers fail on the file; the verb that they name makes it anew, and they succeed."""
    whole = path.read_bytes()
    damage(path)
    verbs = {named(config, workdir, read) for read in readers}
    assert len(verbs) == 1
    (verb,) = verbs
    VERBS[verb].main(config, workdir, repair=True)
    assert path.read_bytes() == whole
    for read in readers:
        read(config, workdir)
    return verb


@damages
def test_candidates(config, workdir, damage):
    round_dir = workdir / "round_000"
    whole = np.array([row["vqa"] for row in score_rows(workdir)])

    def score_again(config, workdir):
        shutil.rmtree(round_dir / "scores")
        score.main(config, workdir)

    def pair_again(config, workdir):
        shutil.rmtree(round_dir / "pairs", ignore_errors=True)
        pair.main(config, workdir)

    path = round_dir / "candidates/00001-of-00002.tfrecord"
    before = path.read_bytes()
    damage(path)
    assert named(config, workdir, gallery) == "sample"
    assert named(config, workdir, pair_again) == "sample"
    assert named(config, workdir, score_again) == "sample"
    sample.main(config, workdir, repair=True)
    assert path.read_bytes() == before
    score.main(config, workdir)
    np.testing.assert_array_equal([row["vqa"] for row in score_rows(workdir)], whole)
    pair_again(config, workdir)
    gallery(config, workdir)


def score_rows(workdir):
    paths = sorted((workdir / "round_000/scores").glob("[0-9]*.parquet"))
    return [row for path in paths for row in records.read_parquet(path)]


@pytest.mark.parametrize("damage", [flip, cut], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", ["00000-of-00002.parquet", "answers-00001-of-00002.parquet"])
def test_scores(config, workdir, damage, name):
    """Parquet has its end in its foot: it cannot be cut between two rows."""
    path = workdir / "round_000/scores" / name
    assert check(config, workdir, path, damage, pair.main, gallery) == "score"


@damages
def test_pairs(config, workdir, damage):
    path = workdir / "round_000/pairs/pairs-train.tfrecord-00000"
    shutil.rmtree(workdir / "round_000/checkpoints")
    whole = path.read_bytes()
    damage(path)
    assert named(config, workdir, train.main) == "pair"
    path.write_bytes(whole)
    assert check(config, workdir, path, damage, gallery) == "pair"


@damages
@pytest.mark.parametrize("model", ["base", "tuned"])
def test_images_of_an_evaluation(config, workdir, damage, model):
    path = workdir / "round_000/evals" / model / "00001-of-00002.tfrecord"

    def judge_again(config, workdir):
        path.with_suffix(".parquet").unlink(missing_ok=True)
        evaluate.main(config, workdir)

    assert check(config, workdir, path, damage, report.main, judge_again) == "evaluate"


@pytest.mark.parametrize("damage", [flip, cut], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize(
    ("name", "reader"),
    [
        ("tuned/00001-of-00002.parquet", evaluate.main),
        ("tuned/answers-00001-of-00002.parquet", evaluate.main),
        ("base-rows.parquet", report.main),
    ],
)
def test_tables_of_an_evaluation(config, workdir, damage, name, reader):
    path = workdir / "round_000/evals" / name
    assert check(config, workdir, path, damage, reader) == "evaluate"


@pytest.mark.parametrize(
    ("name", "reader", "verb"),
    [
        ("prompts.jsonl", sample.main, "prompts"),
        ("questions.jsonl", score.main, "questions"),
        ("evals/prompts.jsonl", evaluate.main, "evaluate"),
        ("evals/questions.jsonl", evaluate.main, "evaluate"),
    ],
)
def test_rows(config, workdir, name, reader, verb):
    assert check(config, workdir, workdir / "round_000" / name, cut, reader) == verb


def test_the_round_is_named(tmp_path):
    path = tmp_path / "round_003/candidates/00000-of-00001.tfrecord"
    error = records.RecordError(path, 7, "cut")
    command = f"`agfsync sample --config=... --workdir={tmp_path} --round=3 --repair`"
    assert command in str(error)


@pytest.mark.parametrize(
    ("name", "reader", "verb"),
    [
        ("config.json", report.main, None),
        ("round_000/inputs.json", sample.main, sample.main),
        ("round_000/stages.json", report.main, None),
        ("round_000/score.json", gallery, score.main),
        ("round_000/pair.json", pair.main, pair.main),
        ("round_000/pair.json", train.main, pair.main),
        ("round_000/evals/base.json", report.main, evaluate.main),
        ("round_000/evals/comparison.json", report.main, evaluate.main),
    ],
)
def test_what_a_verb_tells(config, workdir, name, reader, verb):
    path = workdir / name
    (workdir / "config.json").write_text(config.to_json())
    shutil.rmtree(workdir / "round_000/checkpoints")  # an evaluation that is there needs none
    damaged = f"{re.escape(str(path))} is damaged .*: remove it"
    cut(path)
    with pytest.raises(ValueError, match=damaged):
        reader(config, workdir)
    path.unlink()
    if verb:
        verb(config, workdir)
    if reader is not train.main:
        reader(config, workdir)
