"""`agfsync score`: every scorer on every candidate, shard by shard, with scorers that are quick."""

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from agfsync_jax import score
from agfsync_jax.data import images, records
from agfsync_jax.data.columns import Column
from agfsync_jax.parallel import multihost
from agfsync_jax.scorers import Scorer
from agfsync_jax.utils import modules
from configs import micro

PROMPTS = {f"p{n}": f"prompt {n}" for n in range(5)}
CANDIDATES, PER_SHARD = 3, 2


class Brightness(Scorer):
    """One column; what it was called with is on the class."""

    columns = {"whatever": Column()}
    calls: list = []

    def __init__(self, mesh, *, batch_size):
        self.mesh, self.batch_size = mesh, batch_size

    def __call__(self, images, prompts, questions):
        self.calls.append((images.shape, list(prompts)))
        return {"whatever": images.mean((1, 2, 3)) + [len(prompt) for prompt in prompts]}


class Asker(Scorer):
    """Two columns and answers."""

    columns = {"accuracy": Column(), "number": Column()}
    asks_questions = True

    def __init__(self, mesh, *, batch_size, bias=0.0):
        self.bias = bias

    def __call__(self, images, prompts, questions):
        answers = [
            [
                {
                    "question": q["question"],
                    "answer": None if q["question"] == "what?" else "no",
                    "p_yes": 0.25,
                    "p_expected": 0.25,
                    "correct": False,
                }
                for q in asked
            ]
            for asked in questions
        ]
        number = np.array([len(asked) for asked in questions])
        return {"accuracy": number + self.bias, "number": number, "answers": answers}


@pytest.fixture
def config(monkeypatch):
    fakes = {"brightness": Brightness, "asker": Asker}
    monkeypatch.setattr(modules, "load", lambda room, name: SimpleNamespace(Scorer=fakes[name]))
    monkeypatch.setattr(Brightness, "calls", [])
    config = micro.get_config("tiny")
    config.scorers = {"light": {"name": "brightness"}, "vqa": {"name": "asker", "bias": 0.5}}
    config.pair.weights = {"light": 1.0, "vqa/accuracy": 1.0}
    config.sample.num_candidates = CANDIDATES
    config.sample.prompts_per_shard = PER_SHARD
    config.score.device_batch_size = 4
    config.score.mesh = {"data": 1, "fsdp": 1, "tensor": -1}  # so that a batch is of 4
    return config


def image(prompt, candidate):
    return np.full((8, 8, 3), 40 * prompt + candidate, np.uint8)


def question(prompt_id, text):
    return {
        "id": prompt_id,
        "caption": PROMPTS[prompt_id],
        "question": text,
        "choices": ["yes", "no"],
        "answer": "yes",
        "element_type": "object",
        "element": "",
    }


@pytest.fixture
def workdir(tmp_path):
    """Five prompts with 1 to 5 questions, three candidates each, two prompts a shard."""
    folder = tmp_path / "round_000"
    rows = [
        {"id": i, "prompt": text, "category": "", "source": "test"} for i, text in PROMPTS.items()
    ]
    records.write_jsonl(folder / "prompts.jsonl", rows)
    asked = [question(f"p{n}", f"q{m}?") for n in range(5) for m in range(n + 1)]
    records.write_jsonl(folder / "questions.jsonl", asked)
    for shard in range(3):
        candidates = [
            {
                "prompt_id": f"p{n}",
                "candidate": c,
                "seed": 0,
                "image": images.encode_png(image(n, c)),
                "latents": np.zeros((2, 2, 4), np.float16),
            }
            for n in range(PER_SHARD * shard, min(PER_SHARD * (shard + 1), 5))
            for c in range(CANDIDATES)
        ]
        path = folder / "candidates" / f"{records.shard_name(shard, 3)}.tfrecord"
        records.write_shard(path, candidates, records.CANDIDATE_FEATURES)
    return tmp_path


def table(workdir, prefix=""):
    paths = sorted((workdir / "round_000/scores").glob(f"{prefix}[0-9]*.parquet"))
    return [row for path in paths for row in records.read_parquet(path)]


def test_every_candidate_is_scored(config, workdir, capsys):
    score.main(config, workdir)
    rows = table(workdir)
    assert [(row["prompt_id"], row["candidate"]) for row in rows] == [
        (f"p{n}", c) for n in range(5) for c in range(CANDIDATES)
    ]
    for row in rows:
        number = int(row["prompt_id"][1:])
        assert row["light"] == 40 * number + row["candidate"] + len("prompt 0")
        assert row["vqa/accuracy"] == number + 1.5 and row["vqa/number"] == number + 1
    assert set(rows[0]) == {"prompt_id", "candidate", "light", "vqa/accuracy", "vqa/number"}
    assert [shape[0] for shape, _ in Brightness.calls] == [4, 2, 4, 2, 3]
    stages = json.loads((workdir / "round_000/stages.json").read_text())
    assert stages["score"]["items"] == 15
    assert "15 images in" in capsys.readouterr().err


def test_shards_that_batches_divide(config, workdir, capsys):
    config.score.device_batch_size = 6  # a shard, and nothing is left
    score.main(config, workdir)
    assert [shape[0] for shape, _ in Brightness.calls] == [6, 6, 3]
    assert len(table(workdir)) == 15
    assert "15 images in" in capsys.readouterr().err


def test_answers(config, workdir):
    score.main(config, workdir)
    answers = table(workdir, "answers-")
    assert len(answers) == CANDIDATES * (1 + 2 + 3 + 4 + 5)
    assert answers[-1] == {
        "prompt_id": "p4",
        "candidate": 2,
        "scorer": "vqa",
        "index": 4,
        "question": "q4?",
        "element_type": "object",
        "expected": "yes",
        "answer": "no",
        "p_yes": 0.25,
        "p_expected": 0.25,
        "correct": False,
    }


def test_only_what_is_missing_is_scored(config, workdir, capsys):
    score.main(config, workdir)
    whole = table(workdir)
    (workdir / "round_000/scores/00001-of-00003.parquet").unlink()
    Brightness.calls.clear()
    score.main(config, workdir)
    assert [shape[0] for shape, _ in Brightness.calls] == [4, 2]
    assert table(workdir) == whole
    assert "skipped 2 of 3 shards already there" in capsys.readouterr().err
    Brightness.calls.clear()
    score.main(config, workdir)
    assert not Brightness.calls


def test_a_killed_run_leaves_whole_shards(config, workdir, monkeypatch):
    plain = Brightness.__call__

    def dies(self, images, prompts, questions):
        if "prompt 3" in prompts:
            raise KeyboardInterrupt
        return plain(self, images, prompts, questions)

    monkeypatch.setattr(Brightness, "__call__", dies)
    with pytest.raises(KeyboardInterrupt):
        score.main(config, workdir)
    scores = workdir / "round_000/scores"
    names = sorted(path.name for path in scores.iterdir())
    assert names == ["00000-of-00003.parquet", "answers-00000-of-00003.parquet"]


def test_without_questions(config, workdir):
    del config.scorers.vqa
    config.pair.weights = {"light": 1.0}
    (workdir / "round_000/questions.jsonl").unlink()
    score.main(config, workdir)
    assert set(table(workdir)[0]) == {"prompt_id", "candidate", "light"}
    assert not list((workdir / "round_000/scores").glob("answers-*"))


def test_errors_before_any_work(config, workdir):
    folder = workdir / "round_000"
    asked = records.read_jsonl(folder / "questions.jsonl")
    records.write_jsonl(folder / "questions.jsonl", [q for q in asked if q["id"] != "p3"])
    told = "1 of 5 prompts without a question are 20.0%, more than config.score.max_bad=0.01"
    with pytest.raises(ValueError, match=rf"{told} allows:\n  prompt p3: 'prompt 3'"):
        score.main(config, workdir)
    (folder / "questions.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="run `agfsync questions` first"):
        score.main(config, workdir)
    records.write_jsonl(folder / "questions.jsonl", asked)
    config.pair.weights = {"clipp": 1.0}
    with pytest.raises(ValueError, match="'clipp', which no scorer makes: .* 'light', 'vqa'"):
        score.main(config, workdir)
    config.pair.weights = {"light": 1.0}
    (folder / "candidates/00001-of-00003.tfrecord").unlink()
    with pytest.raises(FileNotFoundError, match="run `agfsync sample`"):
        score.main(config, workdir)
    assert not Brightness.calls


def test_a_prompt_that_is_not_listed(config, workdir):
    folder = workdir / "round_000"
    rows = records.read_jsonl(folder / "prompts.jsonl")
    records.write_jsonl(folder / "prompts.jsonl", rows[:4])
    with pytest.raises(ValueError, match="00002-of-00003.tfrecord draws prompt 'p4'"):
        score.main(config, workdir)


def test_a_scorer_with_wrong_shapes(config, workdir, monkeypatch):
    monkeypatch.setattr(Brightness, "__call__", lambda *_: {"whatever": np.zeros((4, 1))})
    with pytest.raises(ValueError, match=r"made light of shape \(4, 1\): expected \(4,\)"):
        score.main(config, workdir)
    monkeypatch.setattr(Brightness, "__call__", lambda *_: {"clip": np.zeros(4)})
    with pytest.raises(ValueError, match="'light' made clip: .* its columns are whatever"):
        score.main(config, workdir)


def test_repair(config, workdir):
    score.main(config, workdir)
    whole, folder = table(workdir), workdir / "round_000"
    for name in ("00000-of-00003.parquet", "answers-00001-of-00003.parquet"):
        path = folder / "scores" / name
        path.write_bytes(path.read_bytes()[:-9])
    Brightness.calls.clear()
    score.main(config, workdir, repair=True)
    assert len(Brightness.calls) == 4 and table(workdir) == whole
    path = folder / "candidates/00002-of-00003.tfrecord"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="00002-of-00003.tfrecord. Run `agfsync sample`"):
        score.main(config, workdir, repair=True)
    assert not path.exists()


def rewrite(path, change):
    rows = list(records.read_shard(path, records.CANDIDATE_FEATURES))
    records.write_shard(path, [change(row) for row in rows], records.CANDIDATE_FEATURES)


@pytest.fixture
def trouble(workdir, monkeypatch):
    """A shard that is cut off, a broken PNG, a prompt without a question, questions that cannot be
    asked or answered, and a score that is NaN."""
    folder = workdir / "round_000"
    path = folder / "candidates/00002-of-00003.tfrecord"
    path.write_bytes(path.read_bytes()[:-9])  # the last of p4's three images
    broken = {("p2", 1): b"PNG"}
    rewrite(
        folder / "candidates/00001-of-00003.tfrecord",
        lambda row: row | {"image": broken.get((row["prompt_id"], row["candidate"]), row["image"])},
    )
    asked = [q for q in records.read_jsonl(folder / "questions.jsonl") if q["id"] != "p0"]
    asked += [question("p1", " "), question("p1", "what?"), question("p1", "q?") | {"answer": "x"}]
    records.write_jsonl(folder / "questions.jsonl", asked)
    plain = Brightness.__call__

    def sometimes_nan(self, images, prompts, questions):
        (values,) = plain(self, images, prompts, questions).values()
        return {"whatever": np.where(values == 41 + len("prompt 1"), np.nan, values)}

    monkeypatch.setattr(Brightness, "__call__", sometimes_nan)
    return folder


def test_what_cannot_be_scored_is_named_and_the_rest_goes_on(config, workdir, trouble, capsys):
    config.score.max_bad = 0.5
    score.main(config, workdir)
    summary = json.loads((trouble / "score.json").read_text())
    left_out = summary.pop("left_out")
    assert summary.pop("answers")["vqa"]["tifa_average"] == 0
    assert summary == {
        "images": 15,
        "damaged": 1,
        "undecodable": 1,
        "nonfinite": 1,
        "no_questions": 1,
        "bad_questions": 2,
        "unanswered": 3,
    }
    told = capsys.readouterr().err
    for line in (
        "left out: 1 of 15 images in damaged shards",
        "left out: 1 of 15 images that cannot be decoded",
        "shard 00001-of-00003, prompt p2, candidate 1: 3 bytes are not a whole image",
        "prompt p1, candidate 1: light is nan",
        "left out: 1 of 5 prompts without a question",
        "prompt p1: the question is empty",
        "prompt p1: 'q?' expects 'x' of the choices ['yes', 'no']",
        "left out: 3 of 45 answers that could not be given",
        "prompt p1, candidate 0: vqa on 'what?'",
    ):
        assert line in told
        assert line.removeprefix("left out: ") in "\n".join(left_out)
    rows = {(row["prompt_id"], row["candidate"]): row for row in table(workdir)}
    assert len(rows) == 13 and not {("p2", 1), ("p4", 2)} & set(rows)
    assert np.isnan(rows["p1", 1]["light"]) and np.isfinite(rows["p1", 0]["light"])
    unanswered = [row for row in table(workdir, "answers-") if row["answer"] is None]
    assert [row["candidate"] for row in unanswered] == [0, 1, 2]
    names = ["00001-of-00003.jsonl", "00002-of-00003.jsonl"]
    assert {f"problems-{name}" for name in names} <= {
        p.name for p in (trouble / "scores").iterdir()
    }

    again = (trouble / "score.json").read_bytes()
    score.main(config, workdir)  # all is done, and what was left out is told once more
    assert (trouble / "score.json").read_bytes() == again
    assert "1 of 15 images in damaged shards" in capsys.readouterr().err


def test_too_much_that_cannot_be_scored_stops(config, workdir, trouble):
    config.score.max_bad = 0.1
    with pytest.raises(ValueError, match="1 of 5 prompts without a question are 20.0%, more than"):
        score.main(config, workdir)
    assert not Brightness.calls
    asked = [question(f"p{n}", "q?") for n in range(5)]
    records.write_jsonl(trouble / "questions.jsonl", asked)
    config.score.max_bad = 0.06
    with pytest.raises(ValueError, match="1 of 15 images that cannot be decoded are 6.7%, more"):
        score.main(config, workdir)
    assert len(table(workdir)) == 6 + 5  # what was scored is kept
    Brightness.calls.clear()
    with pytest.raises(ValueError, match="1 of 15 images that cannot be decoded"):
        score.main(config, workdir)
    assert not Brightness.calls


def test_mended_candidates_are_scored_after_repair(config, workdir, trouble):
    config.score.max_bad = 0.5
    score.main(config, workdir)
    with pytest.raises(ValueError, match="dropped: 00001-of-00003.tfrecord, 00002-of-00003.tf"):
        score.main(config, workdir, repair=True)
    left = sorted(path.name for path in (trouble / "scores").glob("[0-9]*"))
    assert left == []
    assert [p.name for p in (trouble / "candidates").iterdir()] == ["00000-of-00003.tfrecord"]


def test_a_run_killed_between_any_two_files_goes_on(config, workdir, trouble, monkeypatch):
    """The file that says that a shard is done is its last one."""
    config.score.max_bad = 0.5
    scores, summary, write = trouble / "scores", trouble / "score.json", records.write_file

    def made():
        files = [*scores.iterdir(), summary]
        # of a broken image Pillow tells an address in memory
        return {path.name: re.sub(rb"0x[0-9a-f]+", b"", path.read_bytes()) for path in files}

    score.main(config, workdir)
    whole = made()
    assert len(whole) == 10
    for count in range(len(whole)):
        shutil.rmtree(scores)
        summary.unlink()
        left = iter(range(count))

        def write_or_die(path, parts, left=left):
            if next(left, None) is None:
                raise KeyboardInterrupt
            write(path, parts)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(records, "write_file", write_or_die)
            score.main(config, workdir)
        score.main(config, workdir)
        assert made() == whole, count


def test_the_summary_waits_for_the_other_processes(config, trouble, tmp_path, monkeypatch):
    """This process makes shards 0 and 2; another one has made shard 1 when they meet."""
    config.score.max_bad = 0.5
    whole = shutil.copytree(trouble, tmp_path / "whole" / "round_000")
    score.main(config, whole.parent)
    own = [trouble / "scores" / f"0000{index}-of-00003.parquet" for index in (0, 2)]

    def meet(name):
        if all(path.exists() for path in own):
            for path in (whole / "scores").glob("*00001*"):
                shutil.copy(path, trouble / "scores")

    monkeypatch.setattr(multihost, "shards_of_process", lambda count: range(0, count, 2))
    monkeypatch.setattr(multihost, "barrier", meet)
    score.main(config, trouble.parent)
    summary = json.loads((trouble / "score.json").read_text())
    assert summary["undecodable"] == 1  # in shard 1
    assert summary["damaged"] == 1  # in shard 2
