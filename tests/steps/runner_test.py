"""What the runner does around a step's work, and in which order."""

import types

import pytest

from agfsync_jax.parallel import multihost
from agfsync_jax.steps.runner import Step, of_process


@pytest.fixture(params=[0, 1])
def processes(request, monkeypatch):
    """Two processes, of which this is one; barriers are written down in `done`."""
    done = []
    monkeypatch.setattr(multihost, "is_main", lambda: request.param == 0)
    monkeypatch.setattr(multihost, "barrier", done.append)
    monkeypatch.setattr(
        multihost, "shards_of_process", lambda count: range(request.param, count, 2)
    )
    return types.SimpleNamespace(is_main=request.param == 0, done=done)


def step(done, **parts):
    """A step of three files, of which each process makes its own."""

    def files(job):
        done.append("files")
        return [job.folder / f"{index}.txt" for index in range(3)]

    def work(job):
        done.append("work")
        for path in of_process(job.files):
            if path in job.missing:
                path.parent.mkdir(exist_ok=True, parents=True)
                path.touch()

    parts = {"files": files, "outputs": ("0.txt",)} | parts
    return Step("sample", work, **parts)


def test_processes_wait_where_one_reads_what_another_writes(processes, tmp_path):
    """Above all, nothing is summed up before all have written their part."""
    done = processes.done
    sample = step(
        done,
        plan=lambda job: done.append("plan"),
        repair=lambda job: done.append("repair"),
        finish=lambda job: done.append("finish"),
    )
    sample(None, tmp_path, repair=True)
    main = processes.is_main
    assert done == [
        *("plan", "files"),
        *("repair", "sample repair", "sample plan", "work", "sample work"),
        *(["finish"] if main else []),
        "sample",
    ]
    names = {path.name for path in (tmp_path / "round_000").glob("*.txt")}
    assert names == ({"0.txt", "2.txt"} if main else {"1.txt"})


def test_nothing_is_repaired_unasked(processes, tmp_path):
    def repair(job):
        raise AssertionError

    step(processes.done, repair=repair)(None, tmp_path)
    assert "sample repair" in processes.done  # a process with the flag would wait for the others


def test_what_is_there_is_not_made_again(processes, tmp_path, capsys):
    folder = tmp_path / "round_004"
    folder.mkdir()
    for index in range(2):
        (folder / f"{index}.txt").touch()
    sample = step(processes.done, finish=lambda job: processes.done.append("finish"))
    sample(None, tmp_path, round_index=4)
    assert "work" in processes.done  # all work together while one file of any is missing
    (folder / "2.txt").touch()
    processes.done.clear()
    sample(None, tmp_path, round_index=4)
    assert "work" not in processes.done
    assert ("finish" in processes.done) == processes.is_main
    told = capsys.readouterr().err
    assert "sample: skipped 2 of 3 shards" in told and "skipped 3 of 3 shards" in told


def test_work_of_the_main_process_alone(processes, tmp_path):
    alone = step(processes.done, main_only=True, repair=lambda job: processes.done.append("repair"))
    alone(None, tmp_path, repair=True)
    assert ("work" in processes.done) == ("repair" in processes.done) == processes.is_main
    assert processes.done[-1] == "sample"


def test_a_missing_input_names_its_verb(processes, tmp_path):
    sample = step(processes.done, inputs={"prompts.jsonl": "prompts"})
    with pytest.raises(FileNotFoundError, match=r"no prompts.jsonl: run `agfsync prompts` first"):
        sample(None, tmp_path)
    assert not processes.done and not list(tmp_path.iterdir())


def test_an_input_that_changed_is_refused(tmp_path):
    """Or what one prompt gave would be compared with what another one gave."""
    folder, made = tmp_path / "round_000", []
    folder.mkdir()
    (folder / "prompts.jsonl").write_text("one")

    def work(job):
        made.append(sorted(path.name for path in job.missing))
        for path in sorted(job.missing)[:1]:  # and is stopped
            path.touch()

    def make(name, **parts):
        return Step(name, work, outputs=("files",), files=list_files, **parts)

    def list_files(job):
        return [job.folder / f"{index}.txt" for index in range(3)]

    sample = make("sample", inputs={"prompts.jsonl": "prompts"})
    sample(None, tmp_path)
    sample(None, tmp_path)
    assert made == [["0.txt", "1.txt", "2.txt"], ["1.txt", "2.txt"]]
    (folder / "prompts.jsonl").write_text("two")
    with pytest.raises(ValueError, match="prompts.jsonl changed since sample began.*remove files"):
        sample(None, tmp_path)
    (folder / "prompts.jsonl").write_text("one")
    sample(None, tmp_path)
    (folder / "prompts.jsonl").write_text("two")
    for index in range(3):
        (folder / f"{index}.txt").unlink()
    sample(None, tmp_path)  # all of it is made anew

    score = make("score", optional_inputs=("questions.jsonl",))
    for path in folder.glob("*.txt"):
        path.unlink()
    score(None, tmp_path)
    (folder / "questions.jsonl").write_text("one")
    with pytest.raises(ValueError, match="questions.jsonl changed since score began"):
        score(None, tmp_path)
