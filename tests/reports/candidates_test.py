"""The gallery of pairs, from made-up scores, answers and pairs: no models."""

import json
import re
import shutil
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest
from ml_collections import ConfigDict

from agfsync_jax import cli, report
from agfsync_jax.data import records
from agfsync_jax.data.columns import Column
from agfsync_jax.data.images import encode_png
from agfsync_jax.data.pairs import pair_features, write_pairs
from agfsync_jax.reports.candidates import read_gallery
from agfsync_jax.reports.panels.pair_verdict import warnings
from agfsync_jax.scoring.columns import columns_of

EVIL = 'a <script>alert(1)</script> & "cat"'
PROMPTS, CANDIDATES = [f"p{i}" for i in range(8)], 4
NAMES = ("vqa", "clip", "aesthetic")
CONFIG = ConfigDict(
    {
        "seed": 3,
        "report": {"num_examples": 3},
        "evaluate": {"evaluators": ()},
        "scorers": {name: {"name": name} for name in NAMES},
    }
)
SETTINGS = {
    "strategy": "best_worst",
    "normalize": "none",
    "weights": {"clip": 0.01, "vqa": 1.0},
    "min_margin": 0.1,
    "path": "",
}
COUNTS = {"pairs": 5, "prompts": 8, "ties": 1, "margin": 1, "few_questions": 1, "nonfinite": 1}


def scores() -> dict[str, np.ndarray]:
    """Columns of a row a prompt and an entry a candidate; clip says the opposite of vqa."""
    rng = np.random.default_rng(0)
    vqa = rng.uniform(0.2, 1, (8, CANDIDATES))
    vqa[:, 0] = 0.1  # candidate 0 always loses
    clip = 30 - 5 * vqa + rng.normal(0, 0.3, vqa.shape)
    clip[7, 2] = np.nan
    return {"vqa": vqa, "clip": clip, "aesthetic": rng.normal(5, 1, vqa.shape)}


SCORES = scores()
BEST, WORST = SCORES["vqa"].argmax(1), SCORES["vqa"].argmin(1)


def picture(prompt: int, candidate: int) -> bytes:
    return encode_png(np.full((16, 16, 3), (20 * prompt, 60 * candidate, 99), np.uint8))


def right(prompt: int, candidate: int, index: int) -> bool:
    return (prompt + candidate * index) % 3 > 0


def make_scored(folder) -> None:
    """candidates/, scores/ and score.json, in two shards."""
    for shard, prompts in enumerate((range(4), range(4, 8))):
        keys = [(p, c) for p in prompts for c in range(CANDIDATES)]
        named = [{"prompt_id": PROMPTS[p], "candidate": c} for p, c in keys]
        latents = np.zeros((2, 2, 4), np.float16)
        name = records.shard_name(shard, 2)
        drawn = [
            row | {"seed": 1, "image": picture(*key), "latents": latents}
            for row, key in zip(named, keys, strict=True)
        ]
        path = folder / "candidates" / f"{name}.tfrecord"
        records.write_shard(path, drawn, records.CANDIDATE_FEATURES)
        rows = [
            row | {column: float(values[key]) for column, values in SCORES.items()}
            for row, key in zip(named, keys, strict=True)
        ]
        records.write_parquet(folder / "scores" / f"{name}.parquet", rows)
        answers = [
            row
            | {
                "scorer": "vqa",
                "index": index,
                "question": f"is {EVIL} number {index} there?",
                "element_type": ("object", "<i>color</i>")[index % 2],
                "expected": "yes",
                "answer": None if (key, index) == ((0, 0), 0) else "no<b>",
                "correct": right(*key, index),
            }
            for row, key in zip(named, keys, strict=True)
            for index in range(7)
        ]
        records.write_parquet(folder / "scores" / f"answers-{name}.parquet", answers)
    left_out = [f"left out: 2 of 34 images {EVIL}", "shard 1", "left out: 1 of 9 questions bad"]
    text = json.dumps({"images": 34, "damaged": 2, "left_out": left_out})
    (folder / "score.json").write_text(text)


def make_pairs(folder, *, ranked=False, images=True, with_scores=True, **settings) -> None:
    """pairs/ and pair.json: of prompts 0 to 4, or of all of them where people chose."""
    features = pair_features(ranked=ranked, images=images)
    rows = []
    for p in range(5):
        order = np.argsort(-SCORES["vqa"][p])
        totals = SCORES["vqa"][p][order]
        row = {"pair_id": f"pair{p}", "prompt_id": PROMPTS[p], "token_ids": [1, 2]}
        row |= {"prompt": EVIL if p == 1 else f"prompt {p}", "margin": totals[0] - totals[-1]}
        latents = np.zeros((len(order), 2, 2, 4), np.float16)
        pngs = [picture(p, c) for c in order]
        if ranked:
            row |= {"candidates": order.astype(np.int32), "latents": latents}
            row |= {"scores": totals.astype(np.float32), "images": pngs}
        else:
            for side, at in (("chosen", 0), ("rejected", -1)):
                row[f"{side}_latents"] = latents[0]
                row[f"{side}_candidate"] = int(order[at]) % (4 if with_scores else 2)
                row[f"{side}_image"] = pngs[at]
                row[f"{side}_score"] = float(totals[at]) if with_scores else 1.0 + at
            row["margin"] = row["margin"] if with_scores else 1.0
        rows.append({name: row[name] for name in features})
    write_pairs(folder / "pairs", rows, {}, features)
    text = json.dumps(COUNTS | {"settings": SETTINGS | settings, "made_from": "x"})
    (folder / "pair.json").write_text(text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work") / "round_000"
    make_scored(folder)
    make_pairs(folder, images=False)
    return folder


def read(folder, count=3, columns=None):
    return read_gallery(folder, columns or columns_of(CONFIG), count, seed=3)


def gallery(folder) -> str:
    report.main(CONFIG, folder.parent, stage="pair")
    text = (folder / "pairs.html").read_text()
    Page(text).finish()
    assert "<script" not in text and not re.search(r"url\(|@import|https?://(?!www.w3.org/)", text)
    return text


class Page(HTMLParser):
    """Fails on what is not closed, and on what is fetched."""

    def __init__(self, text):
        super().__init__()
        self.open = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        assert all(v.startswith("data:") for k, v in attrs if k in ("src", "href"))
        if tag not in ("meta", "img", "br", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def finish(self):
        assert not self.open


def words(text: str) -> str:
    """The page without its tags."""
    text = text[text.index("<body>") :]
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", text)).split())


def test_every_section_with_its_figures(folder, capsys):
    text = gallery(folder)
    assert f"report: {folder / 'pairs.html'} (" in capsys.readouterr().out
    told = words(text)
    headings = ("kept, and what was dropped", "Scores", "Do the scores agree?", "Answers")
    places = [text.index(f"{h}</h2>") for h in (*headings, "The pairs")]
    assert places == sorted(places)
    assert "5 pairs from 5 of 8 prompts (62% gave one)." in told
    assert "the best image of each prompt against its worst, at least 0.1 apart" in told
    assert "The total is 1 × vqa + 0.01 × clip, of the raw scores." in told
    # what became of 8 prompts, 7 pairs, 34 images
    assert "8 prompts that gave one or more 5 62%" in told
    assert "with fewer questions than the minimum 1 12% whose images are alike, or too" in told
    assert "7 pairs looked at kept 5 71% ties 1 14% below the margin 1" in told
    assert "34 images with all scores 31 91% with a score that is not finite 1 3%" in told
    assert "that could not be read 2 6% Scoring left out: 2 of 34 images a <script>" in told
    # candidate 0 lost all five, and clip is the worse one each time
    assert "in 100% of the pairs the rejected image is the better one by clip" in told
    assert "vqa and clip contradict each other" in told
    assert told.count('<script>alert(1)</script> & "cat"') > 3
    assert "&lt;i&gt;color&lt;/i&gt;" in text and "no&lt;b&gt;" in text and "no<b>" not in text
    assert text.count('<img class="crisp" src="data:image/png;base64,') == 4 * 3 * 2
    for heading in ("A random sample", "The largest margins", "The smallest margins"):
        assert f"<h3>{heading} " in text
    assert "Where the scores disagree most" in text
    assert not re.search(r"\bnan\b", told)


def test_figures_against_numpy(folder):
    source = read(folder)
    chosen, rejected = ({n: x[range(5), at[:5]] for n, x in SCORES.items()} for at in (BEST, WORST))
    for name in SCORES:
        np.testing.assert_array_equal(source.scores[name], SCORES[name].ravel())
        np.testing.assert_array_equal(source.chosen[name], chosen[name])
        np.testing.assert_array_equal(source.rejected[name], rejected[name])
        higher = (chosen[name] > rejected[name]).mean()
        assert source.agreement[name] == pytest.approx((higher, 0, 1 - higher))
    assert source.spreads["vqa"].within == pytest.approx(SCORES["vqa"].std(1).mean())
    assert source.wins[0] == (0, 5, 5) and sum(w.chosen for w in source.wins.values()) == 5
    # answers; question 0 of the first candidate has none
    for kind, parity in (("object", 0), ("<i>color</i>", 1)):
        sides = {
            "all": [(p, c) for p in range(8) for c in range(4)],
            "chosen": list(enumerate(BEST[:5])),
            "rejected": list(enumerate(WORST[:5])),
        }
        for side, keys in sides.items():
            asked = [
                (p, c, i) for p, c in keys for i in range(parity, 7, 2) if (p, c, i) != (0,) * 3
            ]
            expected = sum(right(*each) for each in asked), len(asked)
            assert tuple(source.answers["vqa"][kind][side]) == expected


def test_examples_are_whole_and_the_same_again(folder):
    source, again = (read(folder) for _ in range(2))
    assert source.examples == again.examples
    groups = source.examples
    assert [len(group) for group in groups.values()] == [3] * 4
    largest = [e["margin"] for e in groups["The largest margins"]]
    margins = np.float32(SCORES["vqa"].max(1) - SCORES["vqa"].min(1))[:5]
    assert largest == sorted(margins.tolist(), reverse=True)[:3]
    assert groups["The smallest margins"][0]["margin"] == margins.min()
    for example in sum(groups.values(), []):
        prompt = int(re.sub(r"\D", "", example["prompt"].replace(EVIL, "1")))
        for side, best in zip(example["sides"], (BEST, WORST), strict=True):
            candidate = best[prompt]
            assert side["candidate"] == candidate and side["png"] == picture(prompt, candidate)
            assert side["scores"] == {n: x[prompt, candidate] for n, x in SCORES.items()}
            assert [row["index"] for row in side["answers"]] == list(range(7))
            found = [row["correct"] for row in side["answers"]]
            assert found == [right(prompt, candidate, i) for i in range(7)]


def test_what_is_gone_is_said(folder, tmp_path):
    """Without candidates and stored images there are none; stored ones are shown."""
    work = shutil.copytree(folder, tmp_path / "round_000")
    shutil.rmtree(work / "candidates")
    text = gallery(work)
    assert "24 images cannot be shown" in text and "<img" not in text
    assert text.count("no image</div>") == 24 and "vqa <span" in text
    shutil.rmtree(work / "pairs")
    make_pairs(work)
    assert gallery(work).count("<img") == 24
    shutil.rmtree(work / "scores")
    (work / "pair.json").unlink()
    told = words(gallery(work))
    assert "scores/ is gone" in told and "How they were made is not known" in told
    assert "Correlation" not in told and "margin" in told
    shutil.rmtree(work / "pairs")
    with pytest.raises(FileNotFoundError, match=r"No pairs in .*: .* Run `agfsync pair`"):
        report.main(CONFIG, work.parent, stage="pair")


def test_people_chose(tmp_path):
    """An imported set has images of its own, and neither scores nor answers."""
    make_pairs(tmp_path / "round_000", with_scores=False, path=f"/sets/{EVIL}", split="train")
    counts = json.loads((tmp_path / "round_000" / "pair.json").read_text())
    counts |= {"unlabelled": 7, "bad_images": 2, "something <new>": 4}
    (tmp_path / "round_000" / "pair.json").write_text(json.dumps(counts))
    text = gallery(tmp_path / "round_000")
    told = words(text)
    assert f"People chose: the preferences come from /sets/{EVIL}, split train" in told
    assert "16 rows of the preference set kept 5" in told and "without a label 7 44%" in told
    assert "4 other counts something <new> 4 100%" in told
    assert "first image" in told and "Pairs by image of a row" in told
    assert text.count("<img") == 2 * 3 and "A random sample" in told
    for absent in ("margins", "disagree", "Scores", "Answers", "total", "candidate", "Green"):
        assert absent not in told


def test_rankings(folder, tmp_path):
    work = shutil.copytree(folder, tmp_path / "round_000")
    shutil.rmtree(work / "pairs")
    make_pairs(work, ranked=True, images=False, strategy="ranked")
    told = words(gallery(work))
    assert "5 rankings from 5 of 8 prompts" in told and "Rankings by candidate number" in told
    assert "all images of a prompt in order, best first, best and worst at least 0.1 apart" in told
    assert "candidate 0 is best" not in told  # five are too few to say so
    source = read(work)
    for example in source.examples["A random sample"]:
        prompt = int(re.sub(r"\D", "", example["prompt"].replace(EVIL, "1")))
        order = np.argsort(-SCORES["vqa"][prompt])
        assert [side["candidate"] for side in example["sides"]] == order.tolist()
        assert [side["png"] for side in example["sides"]] == [picture(prompt, c) for c in order]
    shutil.rmtree(work / "candidates")
    shutil.rmtree(work / "pairs")
    make_pairs(work, ranked=True, strategy="ranked")
    assert read(work).examples == source.examples  # stored images
    report.main(CONFIG, work.parent)  # the report knows rankings too
    assert "The largest margins" in (work.parent / "report.html").read_text()


def test_warnings(folder):
    source = read(folder, 1)
    source.settings = source.settings | {"shuffle_labels": True, "weights": {"vqa": 1, "flat": 1}}
    source.counts["prompts"] = 20
    rng, n = np.random.default_rng(0), len(source.prompts)
    source.columns["flat"] = Column()
    source.scores["flat"] = source.prompts + 0.001 * rng.random(n)
    source.chosen["flat"], source.rejected["flat"] = np.arange(5) % 2, np.ones(5)
    source.chosen["vqa"] = np.array([np.nan, 1, 1, 1, 1])
    found = " ".join(warnings(source))
    for sentence in (
        "left to chance (config.pair.shuffle_labels)",
        "75% of the prompts gave no pair",
        "1 pair of images that have no vqa score",
        "vqa decides almost alone. The chosen image is the better one by vqa in 100% of the pairs",
        "flat hardly tells the images of a prompt apart",
    ):
        assert sentence in found
    source.pairs.prompts = np.arange(40)
    source.pairs.chosen, source.pairs.rejected = np.ones(40, int), np.zeros(40, int)
    found = " ".join(warnings(source))
    assert "candidate 0 is chosen in 0% of its 40 pairs" in found
    assert "config.sample.conditioning_noise" in found


def test_nothing_odd(folder):
    source = read(folder, 1)
    source.columns, source.settings["weights"] = {"vqa": Column()}, {"vqa": 1.0}
    source.pairs.margin = np.ones(30)
    source.pairs.prompts = np.arange(30)
    source.pairs.chosen, source.pairs.rejected = np.arange(30) % 4, np.arange(1, 31) % 4
    source.chosen, source.rejected = {"vqa": np.ones(30)}, {"vqa": np.zeros(30)}
    source.counts["prompts"] = 40
    assert warnings(source) == []


def test_lower_is_better(folder):
    """As a weight says, and without one the column itself."""
    lower = {name: Column(higher_is_better=False) for name in NAMES}
    source = read(folder, columns=lower)
    assert source.signs == {"vqa": 1.0, "clip": 1.0, "aesthetic": -1.0}
    for name, sign in source.signs.items():
        better = sign * (source.chosen[name] - source.rejected[name]) > 0
        assert source.agreement[name][0] == pytest.approx(better.mean())
    report.main(CONFIG, folder.parent)
    assert "aesthetic (lower is better)" not in (folder / "pairs.html").read_text()


def test_command_line(folder, monkeypatch):
    verb, args, _ = cli.parse(["report", "--config=c", "--workdir=w", "--stage=pair"])
    assert (verb, args.stage) == ("report", "pair")
    assert not cli.parse(["report", "--config=c", "--workdir=w"])[1].stage
    with pytest.raises(SystemExit):
        cli.parse(["report", "--config=c", "--workdir=w", "--stage=train"])
