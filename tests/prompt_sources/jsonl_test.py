"""A user's own files: what is read, what is refused, and that rounds and splits do not mix."""

import json
from pathlib import Path

import pytest

from agfsync_jax.prompt_sources import jsonl

SHARED = Path(__file__).parents[2].parent / "shared/data"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason=f"{SHARED} is not there")


def write(path: Path, rows: list) -> str:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def draw(path, num_prompts, *, split="all", seed=0, round_index=0, **spec):
    return jsonl.prompts(
        num_prompts, split=split, seed=seed, round_index=round_index, path=path, **spec
    )


def test_text_file_with_repeats(tmp_path, capsys):
    path = write(tmp_path / "p.txt", ["a cat", "", "A  Cat ", "a dog", "a\u2028bird"])
    rows = draw(path, 3)
    assert {row["prompt"] for row in rows} == {"a cat", "a dog", "a\u2028bird"}
    assert [row["id"] for row in rows] == ["all-r000-00000", "all-r000-00001", "all-r000-00002"]
    assert {row["source"] for row in rows} == {"p.txt"}
    assert "1 repeated prompts were removed, 3 are left" in capsys.readouterr().out


def test_own_ids_and_categories_are_kept(tmp_path):
    path = write(
        tmp_path / "p.jsonl",
        [{"id": "x", "prompt": "a cat", "category": "animals"}, {"caption": "a dog"}],
    )
    rows = {row["prompt"]: row for row in draw(path, 2, split="all", round_index=3)}
    assert rows["a cat"]["id"] == "x" and rows["a cat"]["category"] == "animals"
    assert rows["a dog"]["id"].startswith("all-r003-") and rows["a dog"]["category"] == "none"


def test_rounds_share_no_prompt_until_the_file_is_used_up(tmp_path):
    path = write(tmp_path / "p.txt", [f"prompt {n}" for n in range(10)])
    rounds = [{row["prompt"] for row in draw(path, 3, round_index=r)} for r in range(4)]
    assert all(len(prompts) == 3 for prompts in rounds)
    assert len(set.union(*rounds[:3])) == 9
    assert draw(path, 3, round_index=3) == draw(path, 3, round_index=3)
    assert draw(path, 10, seed=1) != draw(path, 10, seed=0)


def test_splits_share_no_prompt(tmp_path):
    texts = [f"prompt {n}" for n in range(1000)]
    path = write(tmp_path / "p.txt", texts)
    with pytest.raises(ValueError, match="distinct prompts in split 'test'") as error:
        draw(path, 1000, split="test")
    heldout = int(str(error.value).split(" has ")[1].split()[0])
    assert 60 < heldout < 140
    test = {row["prompt"] for row in draw(path, heldout, split="test")}
    train = {row["prompt"] for row in draw(path, 1000 - heldout, split="train")}
    assert not test & train and test | train == set(texts)


def test_what_is_one_prompt_is_in_one_split(tmp_path):
    """Letters and spaces that make no other prompt of it do not move it to the other split."""
    texts = [f"a prompt of number {n}" for n in range(200)]
    first = write(tmp_path / "first.txt", texts)
    second = write(tmp_path / "second.txt", [text.upper().replace(" ", "  ") for text in texts])
    drawn = [{row["prompt"] for row in draw(path, 15, split="test")} for path in (first, second)]
    kept = {row["prompt"] for row in draw(first, 160, split="train")}
    assert not {" ".join(text.lower().split()) for text in drawn[1]} & kept


def test_splits_of_the_rows_are_followed(tmp_path):
    rows = [{"prompt": f"p{n}", "split": "test" if n < 2 else "train"} for n in range(5)]
    path = write(tmp_path / "p.jsonl", rows)
    assert {row["prompt"] for row in draw(path, 2, split="test")} == {"p0", "p1"}
    assert {row["prompt"] for row in draw(path, 3, split="train")} == {"p2", "p3", "p4"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{oops", r"p\.jsonl:2: not JSON"),
        ("[1]", r"p\.jsonl:2: expected an object"),
        ({"text": "a cat"}, r"p\.jsonl:2: no 'prompt' or 'caption'; the row has 'text'"),
        ({"prompt": " "}, r"p\.jsonl:2: 'prompt' must be text"),
        ({"prompt": 3}, r"p\.jsonl:2: 'prompt' must be text that is not empty, found 3"),
        ({"prompt": "b", "id": "x"}, r"p\.jsonl:2: id 'x' already names .*p\.jsonl:1"),
    ],
)
def test_bad_prompt_rows(tmp_path, row, message):
    path = write(tmp_path / "p.jsonl", [{"prompt": "a", "id": "x"}, row])
    with pytest.raises(ValueError, match=message):
        draw(path, 1)


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.txt"):
        draw(str(tmp_path / "nothing.txt"), 1)
    with pytest.raises(ValueError, match="set `path` in each block"):
        draw("", 1)
    with pytest.raises(ValueError, match=r"\.jsonl, \.json or \.txt"):
        draw(write(tmp_path / "p.csv", ["a"]), 1)
    with pytest.raises(ValueError, match="expected a JSON list"):
        draw(write(tmp_path / "p.json", ["{}"]), 1)
    with pytest.raises(ValueError, match="0 distinct prompts"):
        draw(write(tmp_path / "empty.txt", []), 1)


PROMPTS = [{"id": "p0", "prompt": "a red cat"}, {"id": "p1", "prompt": "a dog"}]


def test_questions_find_their_prompt_by_id_or_text(tmp_path, capsys):
    rows = [
        {"caption": "A  dog", "question": "is it a dog?", "answer": "yes"},
        {"id": "p0", "question": "color?", "answer": "red", "choices": ["red", "blue", "red"]},
        {"id": "p0", "question": "color?", "answer": "blue", "choices": ["red", "blue"]},
        {"id": "other", "question": "color?", "answer": "yes"},
    ]
    found = jsonl.questions(PROMPTS, seed=0, path=write(tmp_path / "q.jsonl", rows))
    assert found == [
        {
            "id": "p0",
            "caption": "a red cat",
            "question": "color?",
            "choices": ["red", "blue"],
            "answer": "red",
            "element_type": "other",
            "element": "",
        },
        {
            "id": "p1",
            "caption": "a dog",
            "question": "is it a dog?",
            "choices": ["yes", "no"],
            "answer": "yes",
            "element_type": "other",
            "element": "",
        },
    ]
    assert "1 questions that repeat" in capsys.readouterr().out


def test_dependencies_survive_repeated_questions(tmp_path):
    asked = [("cat?", []), ("cat?", []), ("red?", [1]), ("big?", [2, 0])]
    rows = [
        {"id": "p0", "question": text, "answer": "yes", "dependency": depends}
        for text, depends in asked
    ]
    found = jsonl.questions(PROMPTS, seed=0, path=write(tmp_path / "q.jsonl", rows))
    assert [row["dependency"] for row in found] == [[], [0], [1, 0]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "p0", "question": "q?", "answer": "maybe"}, "'q\\?' expects 'maybe' of the ch"),
        ({"id": "p0", "question": "q?"}, "no 'answer'"),
        ({"id": "p0", "answer": "yes"}, "no 'question'"),
        ({"question": "q?", "answer": "yes"}, "no 'id' and no 'caption'"),
        ({"id": "p0", "question": "q?", "answer": "a", "choices": ["a"]}, "two or more"),
        ({"id": "p0", "question": "q?", "answer": "a", "choices": "a"}, "must list texts"),
        ({"id": "p0", "question": "q?", "answer": "a", "choices": ["a", 1]}, "must list texts"),
        ({"id": "p0", "question": "q?", "answer": "yes", "dependency": "1"}, "depends on '1'"),
    ],
)
def test_bad_questions(tmp_path, row, message):
    good = {"id": "p0", "question": "q?", "answer": "yes"}
    path = write(tmp_path / "q.jsonl", [good, row])
    with pytest.raises(ValueError, match=rf"q\.jsonl:2: .*{message}"):
        jsonl.questions(PROMPTS, seed=0, path=path)


@needs_shared
def test_tifas_own_files():
    path = str(SHARED / "tifa_v1.0_text_inputs.json")
    rows = draw(path, 4000, split="all")
    assert len({row["prompt"] for row in rows}) == 4000
    path = str(SHARED / "tifa_sample_question_answers.json")
    raw = json.loads(Path(path).read_text())
    prompts = [{"id": row["id"], "prompt": row["caption"]} for row in raw]
    prompts = list({row["id"]: row for row in prompts}.values())
    found = jsonl.questions(prompts, seed=0, path=path)
    fields = ("id", "caption", "question", "choices", "answer", "element_type", "element")
    assert found == [{field: row[field] for field in fields} for row in raw]
