"""What is asked for captions, and what the sieve lets through: each kind of loss under its name."""

import json

import pytest

from agfsync_jax.llm import captions
from agfsync_jax.llm.captions import Sieve, load_themes
from agfsync_jax.llm.requests import Answer

THEMES = load_themes()
FIRST, SECOND, *_ = (each.name for each in THEMES.categories)
SETTINGS = {"model": "m", "max_tokens": 64, "temperature": 0.9, "top_p": 0.7}


def requests(counts, first=(), seed=0, **more):
    options = {"wave": 0, "per_request": 20, "key": [seed, 0, 0]} | SETTINGS | more
    return list(captions.write_requests(THEMES, counts, dict(first), **options))


def user(row):
    return row["body"]["messages"][1]["content"]


def sift(items, sieve=None, category=FIRST):
    sieve = sieve or Sieve(THEMES, too_long="keep", known={})
    answer = Answer("captions-000-00-00000", json.dumps({"captions": items}), "stop")
    return list(sieve.captions(answer, category)), sieve


def test_the_twelve_categories_have_examples_of_their_own():
    assert len(THEMES.categories) == 12
    texts = [text for each in THEMES.categories for text in each.examples]
    assert len(set(texts)) == len(texts) == 120
    kept, sieve = sift(texts)
    assert not kept and sieve.dropped["copies of an example"] == 120


def test_no_two_requests_are_alike():
    """Within a wave, in a later one, in another round, for what is held out, by another seed."""
    counts = {each.name: 60 for each in THEMES.categories}
    sets = [requests(counts), requests(counts, counts), requests(counts, seed=1)]
    sets += [requests(counts, key=[0, 1, 0]), requests(counts, key=[0, 0, 1])]
    told = [user(row) for each in sets for row in each]
    assert len(set(told)) > 0.99 * len(told)
    assert len({(user(row), row["body"]["seed"]) for each in sets for row in each}) == len(told)
    assert sets[0] == requests(counts)  # the same again
    assert all("Write 20 new captions" in text for text in told)
    ids = [row["custom_id"] for row in sets[0] + sets[1]]
    assert len(set(ids)) == len(ids)
    names = {captions.category_of(name, THEMES) for name in ids}
    assert names == {each.name for each in THEMES.categories}


def test_each_request_shows_examples_of_its_category():
    for row in requests({FIRST: 3, SECOND: 2}):
        category = next(each for each in THEMES.categories if each.name in user(row))
        shown = [text for text in category.examples if text in user(row)]
        assert len(shown) == captions.SHOWN and category.theme in user(row)


def test_shares_add_up():
    assert sum(captions.shares(45_800, THEMES).values()) == 45_800
    assert sorted(set(captions.shares(100, THEMES).values())) == [8, 9]


def test_what_is_dropped_is_counted_under_its_name():
    fine = "a wooden boat beside two ducks"
    copied = THEMES.categories[3].examples[0]
    items = [
        fine,
        7,
        None,
        "",
        "  ",
        "two ducks",
        "07:45 46 47",
        "I'm sorry, but I cannot do that",
        copied,
    ]
    items += [
        copied.upper() + ".",
        "A wooden boat, beside two ducks!",
        {"caption": "a cat on a mat"},
    ]
    items += ["2. a held out caption", '"a quoted red house"']
    sieve = Sieve(THEMES, too_long="keep", known={"A held-out caption": "held-out prompts"})
    kept, _ = sift(items, sieve)
    assert kept == [fine, "a cat on a mat", "a quoted red house"]
    assert sieve.read == 14
    assert sieve.dropped == {
        "not a text": 2,
        "empty": 2,
        "too short": 2,
        "refusals": 1,
        "copies of an example": 2,
        "repeated in their category": 1,
        "repeated from held-out prompts": 1,
    }
    again, _ = sift([fine], sieve, SECOND)
    assert not again and sieve.dropped["repeated from another category"] == 1
    assert sieve.examples["too short"] == ["two ducks", "07:45 46 47"]


@pytest.mark.parametrize("too_long", ["keep", "drop"])
def test_captions_that_the_text_encoder_cuts_are_counted(too_long):
    """As transformers' tokenizer counts them: 75 and the two at its ends."""
    fits, over = " ".join(["cat"] * 75), " ".join(["cat"] * 76)
    kept, sieve = sift([fits, over], Sieve(THEMES, too_long=too_long, known={}))
    assert kept == ([fits, over] if too_long == "keep" else [fits])
    cut = "have over 75 tokens, of which the text encoder cuts"
    assert (sieve.dropped["too long"], sieve.remarks[cut]) in [(1, 0), (0, 1)]


def test_whole_answers_are_counted_too():
    sieve = Sieve(THEMES, too_long="keep", known={})
    name = "captions-000-00-00000"
    for answer in (
        Answer(name, error="500: oops"),
        Answer(name, "I'm sorry, no."),
        Answer(name, "   \n", "length"),
        Answer(name, "hm"),
        Answer(name, '{"captions": ["a red cat on a mat", "a bl', "length"),
    ):
        list(sieve.captions(answer, FIRST))
    lost = "failed requests", "refused answers", "empty answers", "unreadable answers"
    assert sieve.lost == dict.fromkeys(lost, 1) and sieve.read == 1 and not sieve.dropped
    assert sieve.remarks == {"answers were cut off, and read as far as they went": 1}
    assert sieve.examples["failed requests"] == ["500: oops"]


def test_a_list_written_as_text_is_read():
    text = "Here you go\n1. a red cat on a mat\n2) a blue dog in a car\n- a green bird on a wire"
    sieve = Sieve(THEMES, too_long="keep", known={})
    found = list(sieve.captions(Answer("captions-000-00-00000", text, "stop"), FIRST))
    assert found == ["a red cat on a mat", "a blue dog in a car", "a green bird on a wire"]


def test_the_first_few_have_all_categories():
    rows = [{"category": name, "n": n} for name in "abc" for n in range(3)] + [{"category": "a"}]
    order = captions.interleaved(rows)
    assert [row["category"] for row in order] == list("abcabcabca") and order[0]["n"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("theme"), "holds no categories .KeyError: 'theme'"),
        (lambda c: c.update(examples=["a", "b"]), "'mine' has fewer than 5 different examples"),
        (lambda c: c.update(examples=["a", "b", "c", "d", ""]), "texts that are not empty"),
        (lambda c: c.update(name=" "), "a name of its own each"),
    ],
)
def test_categories_of_ones_own(change, message, tmp_path):
    mine = {"name": "mine", "theme": "things", "examples": list("abcde")}
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"categories": [mine]}))
    assert load_themes(str(path)).categories[0].examples == tuple("abcde")
    change(mine)
    path.write_text(json.dumps({"categories": [mine]}))
    with pytest.raises(ValueError, match=message):
        load_themes(str(path))
    with pytest.raises(FileNotFoundError, match="shows the form"):
        load_themes(str(tmp_path / "other.json"))
