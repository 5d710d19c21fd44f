"""A made-up workdir goes through the report; headless Chromium draws what comes out."""

import datetime
import html
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from agfsync_jax import report
from agfsync_jax.data import records
from agfsync_jax.data.columns import Column
from agfsync_jax.data.images import encode_png
from agfsync_jax.data.pairs import write_pairs
from agfsync_jax.evaluation.comparison import compare
from agfsync_jax.evaluators.referee import Evaluator
from agfsync_jax.micro.drawing import render
from agfsync_jax.micro.questions import fixed_questions
from agfsync_jax.micro.scenes import mutate, sample_scenes
from agfsync_jax.reports.examples import pick_examples
from agfsync_jax.reports.rounds import read_report
from agfsync_jax.scoring.columns import columns_of

METRICS = ["vqa", "clip", "aesthetic", "referee", "referee_strict"]
EVIL = 'a <script>alert(1)</script> & "cat"'
LONG = "a very long prompt of ten thousand characters, " * 220
ARABIC, JAPANESE = "قطة حمراء على خلفية بيضاء", "白い背景に赤い猫がいる"
LATENTS = np.zeros((2, 2, 4), np.float16)


def get_config(**blocks) -> ConfigDict:
    scorers = {name: {"name": name} for name in ("vqa", "clip", "aesthetic")}
    config = {
        "seed": 3,
        "backbone": {"path": "a/model"},
        "scorers": scorers,
        "evaluate": {"evaluators": ("referee",)},
        "report": {"num_examples": 6},
        "note": EVIL,
    }
    return ConfigDict(config | blocks)


def draw(scene, rng, skill: float) -> np.ndarray:
    """A picture of the scene, or, the more often the lower the skill, of one like it."""
    drawn = scene if rng.random() < skill else mutate(scene, rng)
    return render(drawn, rng)


def make_evals(round_dir, *, skill: float, num_prompts: int, num_seeds: int = 2) -> None:
    """Images, scores and answers of a base of skill 0.5 and a tuned model of skill `skill`."""
    rng = np.random.default_rng(0)
    scenes = sample_scenes(rng, num_prompts, split="heldout", unique=True)
    captions = {f"p{i:03d}": scene.caption() for i, scene in enumerate(scenes)}
    evals = round_dir / "evals"
    odd = dict(zip(captions, (ARABIC, EVIL, JAPANESE, LONG), strict=False))
    shown = [
        {"id": i, "prompt": odd.get(i, text), "category": f"kind <{len(text) % 2}>"}
        for i, text in captions.items()
    ]
    records.write_jsonl(evals / "prompts.jsonl", shown)
    tables = {}
    for model, ability in (("base", 0.5), ("tuned", skill)):
        rows, answers, shard = [], [], []
        for scene, prompt_id in zip(scenes, captions, strict=True):
            for candidate in range(num_seeds):
                key = {"prompt_id": prompt_id, "candidate": candidate}
                image = draw(scene, rng, ability)
                shard.append(key | {"seed": 1, "image": encode_png(image), "latents": LATENTS})
                columns = Evaluator()(image[None], [captions[prompt_id]])
                judged = {name: float(value[0]) for name, value in columns.items()}
                wrong = [rng.random() > 0.3 + 0.65 * judged["referee"] for _ in range(99)]
                questions = fixed_questions(scene)
                for number, question in enumerate(questions):
                    answers.append(
                        key
                        | {
                            "scorer": "vqa",
                            "index": number,
                            "question": question["question"],
                            "element_type": question["element_type"],
                            "expected": question["answer"],
                            "answer": ("<b>no</b>" if number == 0 else "no")
                            if wrong[number]
                            else question["answer"],
                            "p_yes": 0.5,
                            "correct": not wrong[number],
                        }
                    )
                scores = {
                    "vqa": 1 - float(np.mean(wrong[: len(questions)])),
                    "clip": 28 + 3 * judged["referee"] + rng.normal(),
                    "aesthetic": 5 + 0.3 * rng.normal(),
                }
                rows.append(key | scores | judged)
        for index in range(2):
            name = f"{records.shard_name(index, 2)}.tfrecord"
            half = shard[index::2]
            records.write_shard(evals / model / name, half, records.CANDIDATE_FEATURES)
        records.write_parquet(evals / f"{model}-rows.parquet", rows)
        records.write_parquet(evals / f"{model}-answers.parquet", answers)
        tables[model] = rows
    means, comparison = compare(tables["base"], tables["tuned"])
    for name, result in (means | {"comparison": comparison}).items():
        (evals / f"{name}.json").write_text(json.dumps(result))


def make_training(round_dir, *, num_pairs: int = 20, seed: int = 0) -> None:
    """Prompts, candidates, scores, pairs, metrics and costs of a round."""
    rng = np.random.default_rng([1, seed])
    scenes = sample_scenes(rng, num_pairs, unique=True)
    prompts, shard, scores, pairs = [], [], [], []
    for index, scene in enumerate(scenes):
        prompt_id = f"r000-{index:05d}"
        prompt = EVIL if index == 0 else scene.caption()
        prompts.append({"id": prompt_id, "prompt": prompt})
        images = [encode_png(draw(scene, rng, 1.0 - candidate)) for candidate in range(2)]
        for candidate, image in enumerate(images):
            key = {"prompt_id": prompt_id, "candidate": candidate}
            shard.append(key | {"seed": 1, "image": image, "latents": LATENTS})
            vqa = 0.95 - 0.4 * candidate * rng.random()
            scores.append(key | {"vqa": vqa, "clip": 30 - candidate, "aesthetic": 5.0})
        score = {"chosen": 1.2, "rejected": 1.0 - 0.1 * index}
        pair = {"prompt_id": prompt_id, "prompt": prompt, "token_ids": [1, 2]}
        for candidate, side in enumerate(score):
            pair[f"{side}_latents"] = LATENTS
            pair[f"{side}_candidate"] = candidate
            pair[f"{side}_image"] = images[candidate]
            pair[f"{side}_score"] = score[side]
        margin = score["chosen"] - score["rejected"]
        pairs.append(pair | {"pair_id": prompt_id, "margin": margin})
    records.write_jsonl(round_dir / "prompts.jsonl", prompts)
    records.write_shard(
        round_dir / "candidates" / "00000-of-00001.tfrecord", shard, records.CANDIDATE_FEATURES
    )
    records.write_parquet(round_dir / "scores" / "00000-of-00001.parquet", scores)
    write_pairs(round_dir / "pairs", pairs, {})
    (round_dir / "pair.json").write_text(json.dumps({"pairs": num_pairs, "ties": 3, "margin": 0}))
    steps = np.arange(1, 201)
    curve = [
        {
            "step": int(step),
            "loss": 0.55 + 0.143 * np.exp(-step / 60) + 0.02 * rng.normal(),
            "rewards/margin": 0.4 * (1 - np.exp(-step / 60)) + 0.03 * rng.normal(),
            "rewards/chosen": -0.1 * (1 - np.exp(-step / 60)) + 0.03 * rng.normal(),
            "rewards/rejected": -0.5 * (1 - np.exp(-step / 60)) + 0.03 * rng.normal(),
            "rewards/accuracy": float(np.clip(0.75 - 0.25 * np.exp(-step / 40), 0, 1)),
        }
        for step in steps
    ]
    records.write_jsonl(round_dir / "checkpoints" / "metrics.jsonl", curve)
    names = ("prompts", "questions", "sample", "score", "pair", "train", "evaluate")
    seconds = (0.2, 0.1, 130.0, 25.0, 0.9, 140.0, 61.0)
    stages = {
        name: {"seconds": s, "items": 100, "items_per_second": round(100 / s, 4)}
        for name, s in zip(names, seconds, strict=True)
    }
    (round_dir / "stages.json").write_text(json.dumps(stages))


def make_workdir(folder, *, skills=(0.75,), num_prompts: int = 24):
    for index, skill in enumerate(skills):
        round_dir = folder / f"round_{index:03d}"
        make_training(round_dir, seed=index)
        make_evals(round_dir, skill=skill, num_prompts=num_prompts)
    (folder / "config.json").write_text(get_config().to_json(indent=2))
    return folder


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = make_workdir(tmp_path_factory.mktemp("runs") / "micro", skills=(0.7, 0.95))
    report.main(get_config(), folder)
    return folder


class Page(HTMLParser):
    """Counts tags, and fails on what is not closed."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.outside = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.outside += [v for k, v in attrs if k in ("src", "href") and not v.startswith("data:")]
        if tag not in ("meta", "img", "br", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_is_whole_safe_and_alone(workdir):
    text = (workdir / "report.html").read_text()
    page = Page(text)
    assert not page.open
    assert page.outside == ["round_000/pairs.html", "round_001/pairs.html"]
    assert all((workdir / path).exists() for path in page.outside)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert "<script" not in text and "&lt;script&gt;alert(1)" in text
    assert "<b>no</b>" not in text and "&lt;b&gt;no&lt;/b&gt;" in text
    assert not re.search(r"url\(|@import|https?://(?!www.w3.org/)", text)
    assert len(text) < 4e6
    assert not re.search(r">[^<]*\bnan\b", text, re.IGNORECASE)
    for heading in (
        "Round by round",
        "Before and after",
        "A random sample",
        "Most improved",
        "What it gets right",
        "Scores before and after",
        "Training",
        "By category of prompt",
        "The largest margins",
        "The smallest margins",
        "What it cost",
        "Setting",
    ):
        assert f">{heading}</h" in text
    # 12 pictures of the sample at least, all with hard pixels, beside those of the pairs.
    assert text.count('<img class="crisp" src="data:image/png;base64,') >= 12 + 16


def test_summary_has_the_promised_form(workdir):
    summary = json.loads((workdir / "summary.json").read_text())
    assert set(summary) == {"rounds", "device", "versions"}
    assert len(summary["rounds"]) == 2
    for entry in summary["rounds"]:
        keys = {"stages", "pairs", "ties_dropped", "base", "tuned", "delta", "win_rate"}
        assert set(entry) == keys
        assert entry["pairs"] == 20 and entry["ties_dropped"] == 3
        assert set(entry["stages"]["train"]) == {"seconds", "items", "items_per_second"}
        for part in ("base", "tuned", "delta", "win_rate"):
            assert set(entry[part]) == set(METRICS)
            for interval in entry[part].values():
                assert interval["low"] <= interval["mean"] <= interval["high"]
    assert summary["versions"]["jax"]


def test_contact_sheet(workdir):
    sheet = Image.open(workdir / "before_after.png")
    assert sheet.width > 900 and sheet.height > 400
    assert np.asarray(sheet).std() > 20


def read(workdir, **columns):
    config = get_config()
    known = columns_of(config) | columns
    return read_report(workdir, known, ["referee", "referee_strict"], device="", versions={})


def test_examples_pair_the_same_image(workdir):
    last = read(workdir)
    examples = pick_examples(last, 6, seed=3)
    assert examples == pick_examples(last, 6, seed=3)
    assert [len(items) for items in examples.values()] in ([6, 3, n] for n in (1, 2, 3))
    for heading, sign in (("Most improved", 1), ("Most worsened", -1)):
        changes = [
            item["tuned"]["scores"]["referee"] - item["base"]["scores"]["referee"]
            for item in examples[heading]
        ]
        assert all(sign * change > 0 for change in changes)
        assert changes == sorted(changes, reverse=sign > 0)
    for item in sum(examples.values(), []):
        asked = [[row["question"] for row in item[side]["answers"]] for side in ("base", "tuned")]
        assert asked[0] == asked[1] and len(asked[0]) >= 9
    turned = pick_examples(read(workdir, referee=Column(higher_is_better=False)), 6, seed=3)
    for item in turned["Most improved"]:
        assert item["tuned"]["scores"]["referee"] < item["base"]["scores"]["referee"]


def test_what_stands_at_the_top(workdir):
    text = (workdir / "report.html").read_text()
    facts = text[text.index('<p class="facts">') : text.index("<section>")]
    date = (workdir / "round_001" / "stages.json").stat().st_mtime
    date = datetime.datetime.fromtimestamp(date, datetime.UTC).date().isoformat()
    for fact in ("micro", "a/model", date, "2 rounds of 200 training steps", "CPU cores"):
        assert f"<span>{fact}</span>" in facts or fact == "CPU cores" in facts


@pytest.mark.timeout(300)  # the longest prompt must not keep it
def test_odd_prompts(workdir):
    """In every page as they are: nothing is interpreted, and the longest is clipped."""
    config = get_config(report={"num_examples": 24})
    folder = shutil.copytree(workdir, workdir.parent / "odd")
    report.main(config, folder)
    text = (folder / "report.html").read_text()
    for prompt in (ARABIC, JAPANESE):
        assert f'<div class="caption" dir="auto">{prompt}</div>' in text
    assert '<div class="caption" dir="auto">a &lt;script&gt;alert(1)&lt;/script&gt; &amp;' in text
    cards = text.count('<summary dir="auto">a very long')
    assert cards and text.count(LONG) == cards  # whole once a card, and not in alt


def test_categories_with_intervals(workdir):
    text = (workdir / "report.html").read_text()
    table = text[text.index("<summary>referee</summary>") :]
    table = table[: table.index("</details>")]
    last = read(workdir).last
    kinds = [last.prompts[row["prompt_id"]]["category"] for row in last.rows["base"]]
    for kind in ("kind <0>", "kind <1>"):
        assert html.escape(kind) in table
        scores = [
            [
                row["referee"]
                for row, its in zip(last.rows[model], kinds, strict=True)
                if its == kind
            ]
            for model in ("base", "tuned")
        ]
        mean = 100 * (np.mean(scores[1]) - np.mean(scores[0]))
        assert f">{mean:+.1f} pt".replace("-", "−") in table
    assert table.count(" to ") == 2


def test_the_same_workdir_gives_the_same_bytes(workdir):
    names = ("report.html", "before_after.png", "summary.json", "round_001/pairs.html")
    before = [(workdir / name).read_bytes() for name in names]
    report.main(get_config(), workdir)
    assert before == [(workdir / name).read_bytes() for name in names]


def test_partial_workdirs(tmp_path):
    with pytest.raises(FileNotFoundError, match="no round_000"):
        report.main(get_config(), tmp_path)
    round_dir = tmp_path / "round_000"
    round_dir.mkdir()
    report.main(get_config(), tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert "No evaluation yet" in text and "Not there yet" in text and "agfsync train" in text
    assert json.loads((tmp_path / "summary.json").read_text())["rounds"][0]["base"] == {}

    make_training(round_dir)
    shutil.rmtree(round_dir / "candidates")
    report.main(get_config(), tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert ">Training</h2>" in text and "No evaluation yet" in text

    make_evals(round_dir, skill=0.9, num_prompts=6)
    for name in ("base-answers.parquet", "tuned-answers.parquet"):
        (round_dir / "evals" / name).unlink()
    shutil.rmtree(round_dir / "evals" / "tuned")
    report.main(get_config(), tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert "Win rate" in text and ">Before and after</h2>" not in text


def test_no_scores_but_one_metric(tmp_path):
    """A config with a single scorer and no referee still gets a page."""
    evals = tmp_path / "round_000" / "evals"
    rows = [{"prompt_id": f"p{i}", "candidate": 0, "clip": float(i)} for i in range(4)]
    means, comparison = compare(rows, rows)
    for name in ("base", "tuned"):
        records.write_parquet(evals / f"{name}-rows.parquet", rows)
    for name, result in (means | {"comparison": comparison}).items():
        (evals / f"{name}.json").write_text(json.dumps(result))
    config = get_config(evaluate={"evaluators": ()}, scorers={"clip": {"name": "clip"}})
    report.main(config, tmp_path)
    assert "clip does not clearly change" in (tmp_path / "report.html").read_text()
    report.main(get_config(), tmp_path)  # a config of other columns
    assert "clip does not clearly change" in (tmp_path / "report.html").read_text()


BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.mark.skipif(BROWSER is None, reason="no chromium on PATH to draw the report")
@pytest.mark.parametrize("width", [390, 1200])
def test_screenshot(workdir, tmp_path, width):
    picture = screenshot(workdir / "report.html", tmp_path / "report.png", width)
    assert picture.width == width
    gray = np.asarray(picture.convert("L")).astype(float)
    # Something in every quarter of the page, and lettering as dark as ink.
    for quarter in np.array_split(gray, 4):
        assert quarter.std() > 10
    assert gray.min() < 60


def screenshot(page, out, width: int, height: int = 3000) -> Image.Image:
    """The page as Chromium draws it at `width`: in a frame, as a window is 500 px at the least."""
    frame = out.with_suffix(".html")
    frame.write_text(
        f'<body style="margin:0"><iframe src="{page.absolute().as_uri()}" scrolling="no" '
        f'style="border:0;width:{width}px;height:{height}px"></iframe>'
    )
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += ["--disable-dev-shm-usage", f"--user-data-dir={out.with_suffix('.profile')}"]
    command += [f"--screenshot={out}", f"--window-size={max(width, 500)},{height}"]
    subprocess.run([*command, frame.as_uri()], check=True, timeout=300, capture_output=True)
    picture = Image.open(io.BytesIO(out.read_bytes())).convert("RGB")
    return picture.crop((0, 0, width, height))


@pytest.mark.skipif(BROWSER is None, reason="no chromium on PATH to draw the report")
@pytest.mark.parametrize("width", [390, 1200])
def test_a_picture_can_be_enlarged(workdir, tmp_path, width):
    text = (workdir / "report.html").read_text()
    page = tmp_path / "enlarged.html"
    page.write_text(text.replace('<input type="checkbox"', '<input type="checkbox" checked', 1))
    picture = screenshot(page, tmp_path / "picture.png", width, height=1000)
    dark = np.asarray(picture.convert("L")) < 40
    assert dark[:20].all() and dark[-20:].all()  # what the picture is shown before
    third = min(width, 1000) // 3
    middle = np.asarray(picture)[500 - third : 500 + third, width // 2 - third : width // 2 + third]
    away = np.abs(middle - np.asarray(picture)[2, 2].astype(int)).max(-1)
    assert (away > 10).mean() > 0.9


def test_a_round_that_begins_with_pairs_misses_nothing_of_its_own(tmp_path):
    (tmp_path / "round_000").mkdir()

    def parts(pairs):
        (tmp_path / "config.json").write_text(json.dumps({"pair": {"path": str(pairs)}}))
        report.main(get_config(), tmp_path)
        return re.findall(r"\(agfsync (\w+)\)", (tmp_path / "report.html").read_text())

    assert parts("people.parquet") == ["pair", "train", "evaluate"]
    make_training(tmp_path / "other")
    assert parts(tmp_path / "other" / "pairs") == ["train", "evaluate"]


def test_what_a_language_model_wrote(tmp_path):
    """Counts, shares, examples as text, and where it is that something is missing."""
    counts = {
        "rows": 30,
        "asked_for": 40,
        "read": 50,
        "waves": 2,
        "requests": 8,
        "prompt_tokens": 1234,
        "completion_tokens": 5678,
        "price": 1.5,
        "kept": {EVIL: 20, "food": 10},
        "kept_examples": [EVIL],
        "dropped": {"too short": 20},
        "lost": {"failed requests": 2},
        "remarks": {"have over 75 tokens": 3},
        "examples": {"too short": [EVIL], "failed requests": [EVIL]},
    }
    folder = tmp_path / "round_000"
    asked = counts | {"prompts": 40, "per_prompt": {"5": 1, "10": 39}, "lost": {}}
    for place, found in (("prompts", counts), ("heldout/questions", asked)):
        (folder / f"{place}.llm").mkdir(parents=True)
        (folder / f"{place}.llm/counts.json").write_text(json.dumps(found))
    stages = {"prompts": {"seconds": 90.0, "items": 30, "items_per_second": 0.3}}
    (folder / "stages.json").write_text(json.dumps(stages))
    report.main(get_config(), tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "<script>alert" not in page
    part = page[page.index("What the language model wrote") : page.index("What it cost")]
    said = " ".join(html.unescape(re.sub("<[^>]+>", " ", part)).split())
    for text in (
        "8 answers in 2 waves · 1,234 tokens in, 5,678 out · 2 min with what is held out",
        "price 1.50 · 10 of 40 prompts are missing · 3 have over 75 tokens",
        f"50 that were read kept {EVIL} 30 60% too short {EVIL} 20 40% failed requests",
        "By category",
        "questions about them",
        "Prompts by their number of questions",
    ):
        assert " ".join(text.split()) in said, text
    assert said.count("prompts are missing") == 1
