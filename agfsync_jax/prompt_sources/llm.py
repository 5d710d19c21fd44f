"""A language model writes captions, and questions about them, over any server with OpenAI's
interface or by files that others answer.

Requests and answers lie in the round's folder: prompts.llm, questions.llm. What is answered is not
asked again. llm/captions.py and llm/questions.py say what is asked and what is kept.
"""

import json
import math
import re
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from agfsync_jax.llm import captions, requests
from agfsync_jax.llm import questions as llm_questions
from agfsync_jax.llm.asking import complete, model_of, spent
from agfsync_jax.llm.captions import Sieve, Themes, interleaved
from agfsync_jax.llm.client import Server
from agfsync_jax.llm.exchange import Exchange
from agfsync_jax.llm.filters import Filter
from agfsync_jax.llm.questions import Examiner
from agfsync_jax.llm.requests import Answer
from agfsync_jax.prompt_sources import Desk, prompt_id
from agfsync_jax.utils.files import write_text

SHOWN = 12  # of what is kept, in the report
COUNTS = "counts.json"  # beside requests and answers, for the report
_YIELD = 0.7  # of captions are kept, by the first estimate
_LEAST_YIELD = 0.05  # by later ones
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
        ValueError, Unreachable: see `asking.complete`; or nothing at all was left.
    """
    split = "train" if split == "all" else split
    themes = captions.load_themes(categories)
    if not num_prompts:
        raise ValueError("num_prompts=0: a language model has no end of prompts, say how many.")
    server = Server(base_url, api_key_env, concurrency, timeout)
    exchange = Exchange(desk.folder)
    share = captions.shares(num_prompts, themes)
    per_request = min(per_request, math.ceil(max(share.values()) / _YIELD))
    limit = max_requests or _MOST * (math.ceil(num_prompts / per_request) + len(themes.categories))
    encoder = _Encoder(embedder, similarity)
    if embedder and not desk.offline:
        encoder.load()  # what is wrong with it is told before anything is asked
    settings: dict[str, Any] = {}
    asked: Counter[str] = Counter()
    short, kept_of, wave = dict(share), Counter(), 0
    while True:
        if not exchange.files(wave):
            settings = settings or {
                "model": model_of(server, model, desk.offline),
                "max_tokens": max_tokens,
                "temperature": temperature,
                "top_p": top_p,
                "form": form,
            }
            more = _wave_of(short, kept_of, asked, per_request, limit)
            key = [seed, round_index, split != "train"]
            lines = captions.write_requests(
                *(themes, more, asked),
                **{"wave": wave, "per_request": per_request, "key": key} | settings,
            )
            exchange.write(wave, lines)
        for row in exchange.requests(wave):
            asked[captions.category_of(row["custom_id"], themes)] += 1
        sieve = Sieve(themes, too_long=too_long, known=desk.apart)
        complete(
            *(exchange, wave, server, desk),
            verb="prompts",
            tokens=per_request * _CAPTION_TOKENS,
            note=_tally(sieve, themes),
        )
        sieve = Sieve(themes, too_long=too_long, known=desk.apart)
        rows = _sifted(exchange, wave, themes, sieve, encoder, desk)
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
    chosen = _chosen(rows, share)
    if not chosen:
        raise ValueError(
            f"no prompt is left of {asked.total()} answers ({sieve.summary()}). Look at responses*"
            f" in {desk.folder}, then remove that folder, and take another model."
        )
    if extra := len(rows) - len(chosen):
        sieve.drop("more than are needed", count=extra)
    answers = exchange.answers(
        row["custom_id"] for each in range(wave + 1) for row in exchange.requests(each)
    )
    _write_counts(
        desk,
        sieve,
        answers,
        rows=len(chosen),
        kept_examples=[row["prompt"] for row in interleaved(chosen)[:SHOWN]],
        asked_for=num_prompts,
        waves=wave + 1,
        kept=Counter(row["category"] for row in chosen),
        prices=(price_in, price_out),
    )
    return [
        row | {"id": prompt_id(split, round_index, index), "source": "llm"}
        for index, row in enumerate(interleaved(chosen))
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
        check_answers: the model answers each question from its caption alone; what it answers
            otherwise is dropped.
        Others: as those of `prompts`.

    Raises: see `prompts`.
    """
    server = Server(base_url, api_key_env, concurrency, timeout)
    exchange = Exchange(desk.folder)
    settings: dict[str, Any] = {}

    def answered(wave: int, write: Callable[..., Iterator[dict]], rows: list[dict]) -> None:
        if not exchange.files(wave):
            settings.update(
                settings
                or {
                    "model": model_of(server, model, desk.offline),
                    "max_tokens": max_tokens,
                    "top_p": top_p,
                    "form": form,
                }
            )
            # A second sampling at the first one's temperature might say the same.
            heat = temperature if wave != 1 else max(temperature, 0.7)
            exchange.write(wave, write(rows, wave=wave, key=[seed], **settings, temperature=heat))
        tokens = num_questions * _QUESTION_TOKENS
        complete(exchange, wave, server, desk, verb="questions", tokens=tokens)

    def asking(rows: list[dict], **arguments: Any) -> Iterator[dict]:
        return llm_questions.write_requests(rows, style=style, number=num_questions, **arguments)

    examiner, waves = Examiner(style), [(0, prompt_rows)]
    answered(0, asking, prompt_rows)
    found: dict[str, list[dict]] = {row["id"]: [] for row in prompt_rows}
    _examine(exchange, 0, prompt_rows, found, examiner)
    if few := [row for row in prompt_rows if len(found[row["id"]]) < max(min_questions, 1)]:
        desk.stage.print(f"{len(few)} prompts have fewer than {min_questions} questions: once more")
        answered(1, asking, few)
        _examine(exchange, 1, few, found, examiner)
        waves.append((1, few))
    if check_answers:
        asked = [row for row in prompt_rows if found[row["id"]]]

        def checking(rows: list[dict], **arguments: Any) -> Iterator[dict]:
            arguments["temperature"] = 0.0
            return llm_questions.write_checks(rows, found, **arguments)

        answered(2, checking, asked)
        ids = (llm_questions.custom_id(row, 2) for row in asked)
        said = {answer.custom_id: answer for answer in exchange.answers(ids)}
        for row in asked:
            answer = said.get(llm_questions.custom_id(row, 2))
            found[row["id"]] = examiner.confirmed(answer, found[row["id"]])
        waves.append((2, asked))
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
    ids = (llm_questions.custom_id(row, wave) for wave, of in waves for row in of)
    _write_counts(
        desk,
        examiner,
        exchange.answers(ids),
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


class _Encoder:
    """Finds near duplicates; embeddings are made once over the waves."""

    def __init__(self, path: str, similarity: float):
        self.path, self.similarity = path, similarity
        self._model = None
        self._known: dict[str, Any] = {}

    def load(self) -> None:
        """Raises FileNotFoundError or ValueError for what is no sentence encoder."""
        if self._model is None:
            import jax

            from agfsync_jax.parallel.mesh import create_mesh
            from agfsync_jax.texts.sentences import SentenceEncoder

            mesh = create_mesh({"data": -1}, devices=jax.local_devices())
            self._model = SentenceEncoder(self.path, mesh=mesh)

    def near(self, texts: Sequence[str], known: int, stage: Any) -> Any:
        """For each text -1, or the earlier one that it is near; the first `known` ones are kept."""
        import numpy as np

        from agfsync_jax.texts.duplicates import near_duplicates

        if not self.path or len(texts) < 2:
            return np.full(len(texts), -1)
        self.load()
        if new := [text for text in texts if text not in self._known]:
            stage.print(f"embedding {len(new)} captions, to find those that are near another")
            self._known.update(zip(new, self._model.embed(new), strict=True))
        embeddings = np.stack([self._known[text] for text in texts])
        return near_duplicates(embeddings, self.similarity, known=known)


def _wave_of(
    short: Mapping[str, int],
    kept: Mapping[str, int],
    asked: Mapping[str, int],
    per_request: int,
    limit: int,
) -> dict[str, int]:
    """Requests of each category in the next wave, of which none has more than there may be."""
    wanted = {}
    for name, missing in short.items():
        before = asked[name] * per_request
        share = max(kept[name] / before, _LEAST_YIELD) if before else _YIELD
        wanted[name] = math.ceil(missing / (per_request * share)) if missing else 0
    left = limit - sum(asked.values())
    while sum(wanted.values()) > left:
        wanted[max(wanted, key=wanted.get)] -= 1
    return wanted


def _tally(sieve: Sieve, themes: Themes) -> Callable[[Answer], str]:
    """What the progress says: captions that are kept so far, and dropped, before near duplicates
    are looked for."""
    kept = 0

    def note(answer: Answer) -> str:
        nonlocal kept
        category = captions.category_of(answer.custom_id, themes)
        kept += sum(1 for _ in sieve.captions(answer, category))
        return f"{kept} kept, {sieve.read - kept} dropped"

    return note


def _sifted(
    exchange: Exchange, last: int, themes: Themes, sieve: Sieve, encoder: _Encoder, desk: Desk
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
    found = encoder.near(texts, len(known), desk.stage)[len(known) :]
    for row, near in zip(rows, found, strict=True):
        if near < 0:
            kept.append(row)
            continue
        whose = sieve.whose(of[near], row["category"]).strip()
        where = whose if whose.startswith("from") else f"in {whose.removeprefix('in ')}"
        sieve.drop(f"nearly repeated, {where}", f"{row['prompt']} — {texts[near]}")
    return kept


def _chosen(rows: Sequence[dict], share: Mapping[str, int]) -> list[dict]:
    """Each category's share, the first ones; of the others as many as are missing elsewhere."""
    taken: Counter[str] = Counter()
    chosen, others = [], []
    for row in rows:
        taken[row["category"]] += 1
        (chosen if taken[row["category"]] <= share[row["category"]] else others).append(row)
    return chosen + others[: sum(share.values()) - len(chosen)]


def _examine(
    exchange: Exchange, wave: int, rows: list[dict], found: dict, examiner: Examiner
) -> None:
    """Adds what a wave's answers hold."""
    by_id = {llm_questions.custom_id(row, wave): row for row in rows}
    for answer in exchange.answers(by_id):
        row = by_id[answer.custom_id]
        found[row["id"]] += examiner.questions(answer, row, found[row["id"]])


def _write_counts(
    desk: Desk,
    found: Filter,
    answers: Iterator[Answer],
    *,
    prices: tuple[float, float],
    **facts: Any,
) -> None:
    """Writes what the report shows, and says it in a line."""
    total = spent(answers)
    price = (prices[0] * total["prompt_tokens"] + prices[1] * total["completion_tokens"]) / 1e6
    told = facts | total | ({"price": round(price, 4)} if any(prices) else {})
    told |= found.facts()
    write_text(desk.folder / COUNTS, json.dumps(told, indent=1, ensure_ascii=False) + "\n")
    desk.stage.print(
        f"{facts['rows']:,} kept of {found.read:,} in {total['requests']:,} answers;"
        f" {found.summary()}"
    )
