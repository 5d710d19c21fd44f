"""Has the requests of a folder answered, by a server or by whoever writes the responses."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from agfsync_jax.llm import client
from agfsync_jax.llm.client import Server
from agfsync_jax.llm.exchange import Exchange
from agfsync_jax.llm.requests import Answer
from agfsync_jax.utils.clock import Stage, duration

_CHARACTERS = 4  # a token, of English
_TOKENS_PER_SECOND = 40  # that one of several requests at once gets, for the first estimate


class Desk(Protocol):
    """Where rows are made: `prompt_sources.Desk`."""

    folder: Path
    stage: Stage
    offline: bool


class Waiting(Exception):  # noqa: N818 - no error: the user has the next move
    """Requests are written, and wait for answers that others give."""


class Talk:
    """What is asked by one verb, in waves, of one server.

    Args:
        desk: its folder keeps requests and answers.
        verb: the command that goes on with them.
        model: the config's; empty: OpenAI's default, or the only one of a server.
        **settings: of `requests.request`, for all of them.
    """

    def __init__(self, desk: Desk, verb: str, server: Server, *, model: str, **settings: Any):
        self.desk, self.verb, self.server = desk, verb, server
        self.exchange = Exchange(desk.folder)
        self._model, self._settings = model, settings

    def wave(
        self,
        number: int,
        write: Callable[..., Iterator[dict[str, Any]]],
        *,
        tokens: int,
        note: Callable[[Answer], str] = lambda answer: "",
        **changes: Any,
    ) -> None:
        """Returns when every request of a wave has an answer.

        Args:
            write: (wave=, **settings) -> its requests; called unless they are there.
            tokens: that an answer may have, for the estimate.
            note: what the progress says beside its rate, with each answer.
            **changes: of the settings.

        Raises:
            Waiting: nothing is to be asked here, and answers are missing.
            ValueError, Unreachable: see `client.ask`; or there is no server to ask.
        """
        if not self.exchange.files(number):
            settings = {"model": self._model_of(), **self._settings, **changes}
            self.exchange.write(number, write(wave=number, **settings))
        _complete(self, number, tokens, note)

    def _model_of(self) -> str:
        """The model that requests name.

        Raises:
            ValueError: the server has several; lists them.
            Unreachable: nobody answers there.
        """
        if self._model:
            return self._model
        server = self.server
        if self.desk.offline or server.url.startswith(client.OPENAI):
            return client.OPENAI_MODEL
        known = client.models(server)
        if len(known) == 1:
            return known[0]
        has = f"has {', '.join(known[:20])}" if known else "does not say which models it has"
        raise ValueError(
            f"{server.url} {has}: name one, as in --config.prompts.model=... and"
            " --config.questions.model=..."
        )


def _complete(talk: Talk, wave: int, tokens: int, note: Callable[[Answer], str]) -> None:
    """Has what is missing of a wave answered."""
    exchange, server, desk, verb = talk.exchange, talk.server, talk.desk, talk.verb
    known = exchange.answered()
    count = written = 0
    for row in _missing(exchange, wave, known):
        count += 1
        written += sum(len(each["content"]) for each in row["body"]["messages"])
    total = sum(1 for _ in exchange.requests(wave))
    stage = desk.stage
    if total > count:
        stage.skipped(total - count, total, "requests")
    if not count:
        return
    files = " ".join(str(path) for path in exchange.files(wave))
    if desk.offline:
        first, answers = exchange.files(wave)[0], exchange.folder / f"responses-{wave:03d}.jsonl"
        model = next(exchange.requests(wave))["body"]["model"]
        raise Waiting(
            f"{count} requests wait for answers in\n  {files}\nHave them answered into {answers},"
            " by a batch service or, on a machine with the model,\n"
            f"  vllm run-batch -i {first} -o {answers} --model {model}\n"
            f"and give `agfsync {verb}` again."
        )
    if not server.is_known:
        exchange.withdraw(wave)  # a server that comes may have another model
        raise ValueError(
            f"no language model to ask: set config.{verb}.base_url to a server, such as"
            f" http://localhost:8000/v1, or export {server.api_key_env}=... for OpenAI's. `agfsync"
            f" {verb} --requests` writes the {count} requests that have no answer, for a batch"
            " program."
        )
    try:
        client.models(server)  # a wrong key, or nobody there, is told at once
        _ask(exchange, wave, server, stage, known, (count, written, tokens), note)
    except ValueError:
        if not exchange.answered():  # the config that they were written by cannot be
            exchange.withdraw(wave)
        raise


def _ask(
    exchange: Exchange,
    wave: int,
    server: Server,
    stage: Stage,
    known: Mapping[str, Any],
    sizes: tuple[int, int, int],
    note: Callable[[Answer], str],
) -> None:
    """`_complete`, where there is a server; sizes: requests, their characters, tokens of each
    answer."""
    count, written, tokens = sizes
    seconds = count * tokens / (_TOKENS_PER_SECOND * min(server.concurrency, count))
    stage.print(
        f"{count} requests to {server.url}, about {_thousands(written / _CHARACTERS)} tokens in and"
        f" {_thousands(count * tokens)} out; {duration(seconds)} if each of"
        f" {min(server.concurrency, count)} at once gets {_TOKENS_PER_SECOND} tokens a second"
    )
    spent: Counter[str] = Counter()
    began = time.monotonic()

    with exchange.log() as log, stage.progress(count, unit="requests") as progress:

        def on_answer(answer: Answer) -> None:
            spent["out"] += answer.completion_tokens
            spent["failed"] += bool(answer.error)
            rate = spent["out"] / max(time.monotonic() - began, 1e-3)
            said = [note(answer), f"{rate:.0f} tokens/s"]
            said += [f"{spent['failed']} failed"] * bool(spent["failed"])
            progress.update(note=", ".join(filter(None, said)))

        rows = _missing(exchange, wave, known)
        client.ask(server, rows, log, on_answer, stage.print, answered=bool(known))


def spent(answers: Iterable[Answer]) -> dict[str, int]:
    """Requests that were answered, and tokens in and out."""
    total = Counter(requests=0, prompt_tokens=0, completion_tokens=0)
    for each in answers:
        total["requests"] += 1
        total["prompt_tokens"] += each.prompt_tokens
        total["completion_tokens"] += each.completion_tokens
    return dict(total)


def _missing(
    exchange: Exchange, wave: int, known: Mapping[str, Any]
) -> Iterator[Mapping[str, Any]]:
    return (row for row in exchange.requests(wave) if row["custom_id"] not in known)


def _thousands(count: float) -> str:
    if count < 1e4:
        return f"{count:,.0f}"
    return f"{count / 1e6:.1f}M" if count >= 1e6 else f"{count / 1e3:.0f}k"
