"""A language model writes captions, and questions about them, over any server with OpenAI's
interface or by files that others answer.

Requests and answers lie in the round's folder: prompts.llm, questions.llm. What is answered is not
asked again. llm/captions.py and llm/questions.py say what is asked and what is kept.
"""

import functools
import json
import math
import re
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from agfsync_jax.llm import captions, requests
from agfsync_jax.llm import questions as llm_questions
from agfsync_jax.llm.asking import Talk, spent
from agfsync_jax.llm.captions import Sieve, Themes
from agfsync_jax.llm.client import Server
from agfsync_jax.llm.exchange import Exchange
from agfsync_jax.llm.filters import Filter
from agfsync_jax.llm.questions import Examiner
from agfsync_jax.llm.requests import Answer
from agfsync_jax.prompt_sources import Desk, prompt_id
from agfsync_jax.texts.near import NearTexts
from agfsync_jax.utils.files import write_text

SHOWN = 12  # of what is kept, in the report
COUNTS = "counts.json"  # beside requests and answers, for the report
_MOST = 5  # times as many requests as without any loss, where max_requests does not say
_CAPTION_TOKENS, _QUESTION_TOKENS = 35, 40  # of an answer, for estimates


def check(**spec: Any) -> None:
    """Raises ValueError or FileNotFoundError for settings of either block that cannot be."""
    form, style = (spec.get(key) for key in ("form", "style"))
    if form is not None and form not in requests.FORMATS:
        raise ValueError(f"form={form!r}: expected one of {', '.join(requests.FORMATS)}.")
    if style is not None and style not in llm_questions.STYLES:
        raise ValueError(f"style={style!r}: expected one of {', '.join(llm_questions.STYLES)}.")
    if spec.get("too_long", "keep") not in ("keep", "drop"):
        raise ValueError(f"too_long={spec['too_long']!r}: expected keep or drop.")
    if not re.fullmatch("[A-Z_][A-Z0-9_]*|", spec.get("api_key_env", "")):
        raise ValueError(
            "api_key_env: expected the name of a variable of the environment that holds the key,"
            " such as OPENAI_API_KEY, and not the key."
        )
    url = urllib.parse.urlsplit(spec.get("base_url", ""))
    if spec.get("base_url") and (url.scheme not in ("http", "https") or not url.hostname):
        raise ValueError("base_url: expected a URL such as http://localhost:8000/v1.")
    if url.username or url.password:
        raise ValueError("base_url: a user and a password do not belong there; see api_key_env.")
    least = {"concurrency": 1, "per_request": 1, "max_tokens": 16, "num_questions": 1}
    for key, low in (least | dict.fromkeys(("max_requests", "min_questions"), 0)).items():
        if spec.get(key, low) < low:
            raise ValueError(f"{key}={spec[key]}: expected {low} or more.")
    if not 0 < spec.get("similarity", 1) <= 1 or not 0 < spec.get("top_p", 1) <= 1:
        raise ValueError("similarity and top_p: expected a number above 0 and at most 1.")
    if spec.get("temperature", 0) < 0 or spec.get("timeout", 1) <= 0:
        raise ValueError("temperature must be 0 or more, and timeout, in seconds, above 0.")
    if "categories" in spec:
        captions.load_themes(spec["categories"])


def prompts(
    num_prompts: int,
    *,
    split: str,
    seed: int,
    round_index: int,
    desk: Desk,
    base_url: str = "",
    model: str = "",
    api_key_env: str = "OPENAI_API_KEY",
    temperature: float = 0.9,
    top_p: float = 0.7,
    max_tokens: int = 4096,
    concurrency: int = 32,
    timeout: float = 600.0,
    max_requests: int = 0,
    form: str = "json_schema",
    per_request: int = 20,
    categories: str = "",
    too_long: str = "keep",
    similarity: float = 0.9,
    embedder: str = "sentence-transformers/all-MiniLM-L6-v2",
    price_in: float = 0.0,
    price_out: float = 0.0,
) -> list[dict]:
    """`num_prompts` captions, as many of each category; fewer where `max_requests` are not enough.

    Args:
        desk: where the requests lie, and what new captions must be apart from.
        base_url: of the server, such as http://localhost:8000/v1; OpenAI's where it is empty.
        model: its name there; the only one of a server, gpt-4.1-mini of OpenAI.
        api_key_env: the environment's variable that holds the key.
        max_requests: 0: five times as many as without any loss.
        form: of the answers, see `requests.FORMATS`. A server that refuses one is asked with the
            next.
        per_request: captions that one request asks for.
        categories: a JSON file of yours, in place of llm/categories.json.
        too_long: keep or drop captions of more than 75 tokens.
        similarity: the cosine from which captions count as near duplicates.
        embedder: a sentence encoder (BERT, MPNet); empty: only equal captions are duplicates.
        price_in, price_out: of a million tokens, for the report.

    Raises:
        Waiting: requests are written, and nothing is to be asked here.
        ValueError, Unreachable: see `asking.Talk`; or nothing at all was left.
    """
    split = "train" if split == "all" else split
    themes = captions.load_themes(categories)
    if not num_prompts:
        raise ValueError("num_prompts=0: a language model has no end of prompts, say how many.")
    talk = Talk(
        *(desk, "prompts", Server(base_url, api_key_env, concurrency, timeout)),
        **dict(model=model, temperature=temperature, top_p=top_p, max_tokens=max_tokens, form=form),
    )
    share = captions.shares(num_prompts, themes)
    per_request = min(per_request, math.ceil(max(share.values()) / captions.YIELD))
    limit = max_requests or _MOST * (math.ceil(num_prompts / per_request) + len(themes.categories))
    near = NearTexts(embedder, similarity)
    if not desk.offline:
        near.load()  # what is wrong with it is told before anything is asked
    asked: Counter[str] = Counter()
    short, kept_of, wave = dict(share), Counter(), 0
    while True:
        write = functools.partial(
            captions.write_requests,
            *(
                themes,
                captions.next_counts(short, kept_of, asked, per_request, limit),
                asked.copy(),
            ),
            per_request=per_request,
            key=[seed, round_index, split != "train"],
        )
        sieve = Sieve(themes, too_long=too_long, known=desk.apart)

        def read(answer: Answer, sieve: Sieve = sieve) -> Iterable[str]:
            return sieve.captions(answer, captions.category_of(answer.custom_id, themes))

        tokens = per_request * _CAPTION_TOKENS
        talk.wave(wave, write, tokens=tokens, note=_note(sieve, read))
        for row in talk.exchange.requests(wave):
            asked[captions.category_of(row["custom_id"], themes)] += 1
        sieve = Sieve(themes, too_long=too_long, known=desk.apart)
        rows = _sifted(talk.exchange, wave, themes, sieve, near, desk)
        kept_of = Counter(row["category"] for row in rows)
        short = {name: max(count - kept_of[name], 0) for name, count in share.items()}
        if not any(short.values()):
            break
        if asked.total() >= limit:
            desk.stage.print(
                f"categories lack {sum(short.values())} of {num_prompts} prompts after"
                f" {asked.total()} requests (config.prompts.max_requests): it goes on with those"
                " that are there"
            )
            break
        desk.stage.print(
            f"{num_prompts - sum(short.values())} of {num_prompts} prompts are there,"
            f" of {sieve.read} captions that were read: another wave"
        )
        wave += 1
    chosen = captions.chosen(rows, share)
    if not chosen:
        raise ValueError(
            f"no prompt is left of {asked.total()} answers ({sieve.summary()}). Look at responses*"
            f" in {desk.folder}, then remove that folder, and take another model."
        )
    if extra := len(rows) - len(chosen):
        sieve.drop("more than are needed", count=extra)
    _write_counts(
        talk,
        sieve,
        (row["custom_id"] for each in range(wave + 1) for row in talk.exchange.requests(each)),
        rows=len(chosen),
        kept_examples=[row["prompt"] for row in chosen[:SHOWN]],
        asked_for=num_prompts,
        waves=wave + 1,
        kept=Counter(row["category"] for row in chosen),
        prices=(price_in, price_out),
    )
    return [
        row | {"id": prompt_id(split, round_index, index), "source": "llm"}
        for index, row in enumerate(chosen)
    ]


def questions(
    prompt_rows: list[dict],
    *,
    seed: int,
    desk: Desk,
    base_url: str = "",
    model: str = "",
    api_key_env: str = "OPENAI_API_KEY",
    temperature: float = 0.2,
    top_p: float = 1.0,
    max_tokens: int = 2048,
    concurrency: int = 32,
    timeout: float = 600.0,
    max_requests: int = 0,
    form: str = "json_schema",
    style: str = "yes_no",
    num_questions: int = 15,
    min_questions: int = 5,
    check_answers: bool = False,
    price_in: float = 0.0,
    price_out: float = 0.0,
) -> list[dict]:
    """The questions about each caption; a caption that is left with fewer than `min_questions` has
    none.

    Args:
        style: yes_no, multiple_choice or dsg (each question with its `dependency`).
        num_questions: asked for in a request.
        min_questions: captions with fewer are asked once more.
        max_requests: 0: one a caption, and what is asked once more or checked.
        check_answers: the model answers each question from its caption alone; what it answers
            otherwise is dropped.
        Others: as those of `prompts`.

    Raises: see `prompts`.
    """
    talk = Talk(
        *(desk, "questions", Server(base_url, api_key_env, concurrency, timeout)),
        **dict(model=model, temperature=temperature, top_p=top_p, max_tokens=max_tokens, form=form),
    )
    examiner, tokens = Examiner(style), num_questions * _QUESTION_TOKENS
    found: dict[str, list[dict]] = {row["id"]: [] for row in prompt_rows}
    waves: list[tuple[int, list[dict]]] = []

    def in_limit(rows: list[dict]) -> list[dict]:
        left = max_requests - sum(len(of) for _, of in waves)
        if not max_requests or len(rows) <= left:
            return rows
        desk.stage.print(
            f"{len(rows) - left} of {len(rows)} requests are not asked"
            f" (config.questions.max_requests={max_requests})"
        )
        return rows[:left]

    def ask(wave: int, rows: list[dict], **changes: Any) -> None:
        rows = in_limit(rows)
        asking = functools.partial(
            llm_questions.write_requests, rows, style=style, number=num_questions, key=[seed]
        )
        by_id = {llm_questions.custom_id(row, wave): row for row in rows}
        seen = Examiner(style)
        note = _note(seen, lambda answer: seen.questions(answer, by_id[answer.custom_id]))
        talk.wave(wave, asking, tokens=tokens, note=note, **changes)
        waves.append((wave, rows))
        for answer in talk.exchange.answers(by_id):
            row = by_id[answer.custom_id]
            found[row["id"]] += examiner.questions(answer, row, found[row["id"]])

    ask(0, prompt_rows)
    if few := [row for row in prompt_rows if len(found[row["id"]]) < max(min_questions, 1)]:
        desk.stage.print(f"{len(few)} prompts have fewer than {min_questions} questions: once more")
        # At the first one's temperature a second sampling might say the same.
        ask(1, few, temperature=max(temperature, 0.7))
    if check_answers:
        rows = in_limit([row for row in prompt_rows if found[row["id"]]])
        checking = functools.partial(llm_questions.write_checks, rows, found, key=[seed])
        talk.wave(2, checking, tokens=tokens, temperature=0.0)
        waves.append((2, rows))
        ids = (llm_questions.custom_id(row, 2) for row in rows)
        said = {answer.custom_id: answer for answer in talk.exchange.answers(ids)}
        for row in rows:
            answer = said.get(llm_questions.custom_id(row, 2))
            found[row["id"]] = examiner.confirmed(answer, found[row["id"]])
    for row in prompt_rows:
        if 0 < len(found[row["id"]]) < min_questions:
            examiner.drop(
                f"of prompts with fewer than {min_questions}", count=len(found[row["id"]])
            )
            found[row["id"]] = []
    rows = [each for row in prompt_rows for each in found[row["id"]]]
    if not rows:
        raise ValueError(
            f"no question is left ({examiner.summary()}). Look at responses* in {desk.folder}, then"
            " remove that folder, and take another model."
        )
    _write_counts(
        talk,
        examiner,
        (llm_questions.custom_id(row, wave) for wave, of in waves for row in of),
        rows=len(rows),
        kept_examples=[
            f"{each['question']} {each['answer']} — {each['caption']}" for each in rows[:SHOWN]
        ],
        waves=len(waves),
        kept=Counter(each["element_type"] for each in rows),
        prompts=sum(bool(each) for each in found.values()),
        asked_for=len(prompt_rows),
        per_prompt=Counter(len(each) for each in found.values()),
        prices=(price_in, price_out),
    )
    return rows


def _note(found: Filter, read: Callable[[Answer], Iterable[Any]]) -> Callable[[Answer], str]:
    """What the progress says with each answer: how much of all is kept so far, and dropped."""
    kept = 0

    def note(answer: Answer) -> str:
        nonlocal kept
        kept += sum(1 for _ in read(answer))
        return f"{kept} kept, {found.read - kept} dropped"

    return note


def _sifted(
    exchange: Exchange, last: int, themes: Themes, sieve: Sieve, near: NearTexts, desk: Desk
) -> list[dict]:
    """What is kept of all waves so far, in the order of the requests."""
    rows: list[dict] = []
    for wave in range(last + 1):
        models = {row["custom_id"]: row["body"].get("model", "") for row in exchange.requests(wave)}
        for answer in exchange.answers(models):
            category = captions.category_of(answer.custom_id, themes)
            made_by = {"model": models[answer.custom_id], "request": answer.custom_id}
            rows += [
                {"prompt": text, "category": category, **made_by, "wave": wave}
                for text in sieve.captions(answer, category)
            ]
    known = list(desk.apart)
    texts = known + [row["prompt"] for row in rows]
    of = [*desk.apart.values(), *(row["category"] for row in rows)]
    kept = []
    places = near(texts, len(known), desk.stage)[len(known) :]
    for row, place in zip(rows, places, strict=True):
        if place < 0:
            kept.append(row)
            continue
        whose = sieve.whose(of[place], row["category"]).strip()
        where = whose if whose.startswith("from") else f"in {whose.removeprefix('in ')}"
        sieve.drop(f"nearly repeated, {where}", f"{row['prompt']} — {texts[place]}")
    return kept


def _write_counts(
    talk: Talk,
    found: Filter,
    asked: Iterable[str],
    *,
    prices: tuple[float, float],
    **facts: Any,
) -> None:
    """Writes what the report shows, and says it in a line."""
    total = spent(talk.exchange.answers(asked))
    price = (prices[0] * total["prompt_tokens"] + prices[1] * total["completion_tokens"]) / 1e6
    told = facts | total | ({"price": round(price, 4)} if any(prices) else {})
    told |= found.facts()
    write_text(talk.desk.folder / COUNTS, json.dumps(told, indent=1, ensure_ascii=False) + "\n")
    talk.desk.stage.print(
        f"{facts['rows']:,} kept of {found.read:,} in {total['requests']:,} answers;"
        f" {found.summary()}"
    )
