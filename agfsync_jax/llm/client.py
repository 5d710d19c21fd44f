"""Asks a server that speaks OpenAI's chat completions: vLLM, llama.cpp, Ollama, OpenAI, ...

Retries, and Retry-After, are those of the `openai` package; what stays wrong after them is decided
here: whether one request fails, or the server does.
"""

import asyncio
import dataclasses
import email.utils
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from agfsync_jax.llm.exchange import Log
from agfsync_jax.llm.requests import FORMATS, Answer, read_answer, response, with_form
from agfsync_jax.utils.files import Unreachable

OPENAI = "https://api.openai.com/v1"
OPENAI_MODEL = "gpt-4.1-mini"
_RETRIES = 4  # of the openai package, for one sending
_SENDINGS = 3  # of a request that fails while others are answered; then it is given up
_PATIENCE = 300.0  # seconds without any answer, after which the server is given up
_FIRST_PATIENCE = 30.0  # until the first one
_ENOUGH = 8  # failures at the start, without any answer
_habits: dict[str, "_Habits"] = {}  # by server, for all of a process's requests
_PARAMETERS = ("max_tokens", "temperature", "top_p", "seed")
_UNKNOWN = re.compile("unsupported|not support|unknown|unrecognized|not permitted", re.IGNORECASE)
_FORM = re.compile(r"response_format|json_schema|grammar|structured")
_PAUSE = 2.0, 30.0  # seconds between sendings: the first, and the longest


@dataclasses.dataclass(frozen=True)
class Server:
    """Where, as whom, and how many requests at once."""

    base_url: str
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: int = 32
    timeout: float = 600.0  #: seconds for an answer

    @property
    def url(self) -> str:
        """That of OpenAI where none is given, as $OPENAI_BASE_URL may change."""
        return self.base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI

    @property
    def key(self) -> str:
        """The secret; "" where the variable is not set."""
        return os.environ.get(self.api_key_env, "").strip() if self.api_key_env else ""

    @property
    def is_known(self) -> bool:
        """Whether there is something to talk to: a server of the user's, or a key for OpenAI's."""
        return bool(self.base_url or os.environ.get("OPENAI_BASE_URL") or self.key)

    def without_key(self, text: object) -> str:
        """What a server said, on one line and without the secret."""
        said = " ".join(str(text).split())
        return said.replace(self.key, "***") if self.key else said

    def client(self) -> Any:
        """An AsyncOpenAI; ValueError without the package, or without a key where one is needed."""
        openai = load_openai()
        if not self.key and self.url.startswith(OPENAI):
            raise ValueError(
                f"OpenAI wants a key: export {self.api_key_env or 'OPENAI_API_KEY'}=... , or name a"
                " server of your own, such as --config.prompts.base_url=http://localhost:8000/v1"
            )
        return openai.AsyncOpenAI(
            api_key=self.key or "none",
            base_url=self.url,
            max_retries=_RETRIES,
            timeout=openai.Timeout(self.timeout, connect=10.0),
        )


def load_openai() -> Any:
    """The package; ValueError where it is not installed."""
    try:
        import openai
    except ImportError:
        raise ValueError(
            "talking to a language model wants the package openai: pip install 'agfsync_jax[llm]'."
            " Without it, `agfsync prompts --requests` writes files for vllm run-batch."
        ) from None
    return openai


def models(server: Server) -> list[str]:
    """The names of the models that the server has; [] where it does not say.

    Raises:
        ValueError: the key is refused.
        Unreachable: nobody answers there.
    """

    async def ask() -> list[str]:
        openai = load_openai()
        async with server.client().with_options(max_retries=1, timeout=20.0) as client:
            try:
                return [each.id for each in (await client.models.list()).data]
            except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
                raise refused(server, error) from None
            except openai.APIConnectionError as error:
                raise unreachable(server, error.__cause__ or error) from None
            except (openai.APIError, AttributeError, TypeError, ValueError):
                return []  # a server without that list

    return asyncio.run(ask())


def refused(server: Server, error: Any) -> ValueError:
    """A wrong key."""
    key = f"the key in ${server.api_key_env}" if server.key else "a request without a key"
    said = server.without_key(_message(error))
    return ValueError(
        f"{server.url} refuses {key} ({error.status_code}: {said:.200}): export"
        f" {server.api_key_env or 'OPENAI_API_KEY'}=... , or set config.prompts.api_key_env and"
        " config.questions.api_key_env to the variable that holds it."
    )


def unreachable(server: Server, error: object) -> Unreachable:
    """A server that is not there, or stays silent."""
    return Unreachable(
        f"no language model answers at {server.url} ({server.without_key(error):.200}): start the"
        " server, or set base_url. What is answered already is kept, and the same command goes on."
    )


def ask(
    server: Server,
    rows: Iterable[Mapping[str, Any]],
    log: Log,
    on_answer: Callable[[Answer], None],
    tell: Callable[[str], None],
    answered: bool = False,
) -> None:
    """Sends requests, `server.concurrency` at once, and keeps each answer as it comes.

    A request that fails where others do not is kept as failed.

    Args:
        on_answer: told of each answer.
        tell: told in words of what a user should know.
        answered: whether the server is known to answer such requests. Else one that answers none
            of the first is wrong, and not the requests.

    Raises:
        ValueError: the key is refused, the model is not there, nothing is left to pay with, or
            none of the first requests is answered.
        Unreachable: no answer for a long time.
    """
    asyncio.run(_Asker(server, log, on_answer, tell, answered).run(iter(rows)))


@dataclasses.dataclass
class _Habits:
    """What is known of a server's likes: the strictest of FORMATS that it takes, and parameters
    that it has under another name, or not at all (None)."""

    form: int = 0
    names: dict[str, str | None] = dataclasses.field(default_factory=dict)

    def learn(self, said: str) -> str:
        """The parameter that the server refuses in these words; "" for none, or one that is known.

        OpenAI's reasoning models take max_completion_tokens, and no temperature.
        """
        for name in _PARAMETERS if _UNKNOWN.search(said) else ():
            if re.search(rf"\b{name}\b", said) and name not in self.names:
                other = f"max_completion_{name.removeprefix('max_')}"
                self.names[name] = other if other in said else None
                return name
        return ""

    def body(self, body: Mapping[str, Any], form: int) -> dict[str, Any]:
        """A request's body as the server likes it."""
        names = {key: self.names.get(key, key) for key in body}
        return {names[k]: v for k, v in with_form(body, FORMATS[form]).items() if names[k]}


class _Asker:
    def __init__(self, server: Server, log: Log, on_answer: Any, tell: Any, answered: bool):
        self.server, self.log, self.on_answer, self.tell = server, log, on_answer, tell
        self.habits = _habits.setdefault(server.url, _Habits())
        self.answered, self.exhausted = answered, False  # whether no request is left to send
        self.failed: list[dict] = []  # before anything was answered
        self.last = time.monotonic()  # when something was answered

    async def run(self, rows: Any) -> None:
        async with self.server.client() as client:
            workers = [
                asyncio.create_task(self._work(client, rows))
                for _ in range(self.server.concurrency)
            ]
            try:
                await asyncio.gather(*workers)
                if self.failed:
                    self._refuse()
            except BaseException:
                for each in workers:
                    each.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
                raise

    async def _work(self, client: Any, rows: Any) -> None:
        for row in rows:  # all workers take from one iterator
            found = await self._answer(client, row)
            self.failed += [found] if found["error"] else []
            if not self.answered:  # it may be the server that is wrong, or all of the requests
                if len(self.failed) >= min(_ENOUGH, self.server.concurrency):
                    self._refuse()
                continue
            for each in [*self.failed, *([] if found["error"] else [found])]:
                self.log.write(each)
                self.on_answer(read_answer(each))
            self.failed.clear()
        self.exhausted = True

    def _refuse(self) -> None:
        said = self.failed[0]["error"]["message"]
        raise ValueError(
            f"{self.server.url} answers none of the first requests ({said:.300}): nothing is kept"
            " of them; change what it says, and give the command again."
        )

    async def _answer(self, client: Any, row: Mapping[str, Any]) -> dict[str, Any]:
        """The line of the answer to a request, or of its failure."""
        openai, form, sendings, own = load_openai(), self.habits.form, 0, 0
        names = dict(self.habits.names)
        while True:
            began = time.monotonic()
            try:
                body = await self._send(client, row, form)
            except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
                raise refused(self.server, error) from None
            except openai.NotFoundError as error:
                raise await self._no_model(client, row, error) from None
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                said, before = self.server.without_key(_message(error)), dict(names)
                names = dict(self.habits.names)
                if names != before:  # learned from another request
                    continue
                if name := self.habits.learn(said):
                    names = dict(self.habits.names)
                    self.tell(f"{self.server.url} takes no {name}: it has {names[name] or 'none'}")
                    continue
                if form + 1 < len(FORMATS):  # it may be the form that it does not know
                    form = max(form + 1, self.habits.form)
                    continue
                return self._failed(row, f"{error.status_code}: {said:.500}")
            except (openai.APIError, _NoAnswerError) as error:
                said = self.server.without_key(_message(error))
                if form + 1 < len(FORMATS) and _FORM.search(said):  # a defect that it meets
                    form = max(form + 1, self.habits.form)
                    continue
                if getattr(error, "code", None) == "insufficient_quota":
                    raise ValueError(
                        f"{self.server.url} has no quota left for this key ({said:.200}). What is"
                        " answered already is kept, and the same command goes on."
                    ) from None
                sendings += 1
                own += self.last > began  # others were answered meanwhile: it is this one
                alone = self.exhausted and self.answered and sendings >= 2 * _SENDINGS
                if own >= _SENDINGS or (alone and await self._lives(client)):
                    return self._failed(row, said[:500])
                waited = time.monotonic() - self.last
                if waited > (_PATIENCE if self.answered else _FIRST_PATIENCE):
                    raise unreachable(self.server, said) from None
                pause = min(_PAUSE[0] * 2**sendings, _PAUSE[1])
                if wait := _retry_after(error):  # longer than the package waits
                    pause = max(pause, wait)
                    self.last = max(self.last, time.monotonic() + wait)
                    self.tell(f"{self.server.url} wants {wait:.0f} s of patience: {said:.200}")
                await asyncio.sleep(pause)
                continue
            if form > self.habits.form:
                self.habits.form = form
                self.tell(
                    f"{self.server.url} refuses {FORMATS[form - 1]}: asked with {FORMATS[form]}"
                )
            self.last, self.answered = time.monotonic(), True
            return response(row["custom_id"], body)

    async def _send(self, client: Any, row: Mapping[str, Any], form: int) -> dict[str, Any]:
        """The body of the answer."""
        body = self.habits.body(row["body"], form)
        try:
            found = await client.post("/chat/completions", cast_to=object, body=body)
        except ValueError as error:  # as JSON's errors are
            raise _NoAnswerError(f"no JSON: {error}") from None
        if not isinstance(found, dict):  # text, where the server says that it is no JSON
            raise _NoAnswerError(f"no JSON but {str(found)[:80]!r}")
        if not found.get("choices"):
            raise _NoAnswerError(f"an answer without choices: {json.dumps(found)[:200]}")
        return found

    async def _lives(self, client: Any) -> bool:
        """Whether the server says anything."""
        openai = load_openai()
        try:
            await client.models.list()
        except openai.APIStatusError as error:
            return error.status_code < 500
        except openai.APIError:
            return False
        except (AttributeError, TypeError, ValueError):
            pass
        return True

    async def _no_model(self, client: Any, row: Mapping[str, Any], error: Any) -> ValueError:
        openai, known = load_openai(), []
        try:
            known = [each.id for each in (await client.models.list()).data]
        except (openai.APIError, AttributeError, TypeError, ValueError):
            pass
        said = f"it has {', '.join(known[:20])}" if known else "it does not say which it has"
        return ValueError(
            f"{self.server.url} has no model {row['body'].get('model')!r}"
            f" ({self.server.without_key(_message(error)):.200}); {said}: set config.prompts.model"
            " and config.questions.model."
        )

    def _failed(self, row: Mapping[str, Any], said: str) -> dict[str, Any]:
        return response(row["custom_id"], error=said)


class _NoAnswerError(Exception):
    """What came was no answer of a language model."""


def _retry_after(error: Exception) -> float:
    """Seconds that the server asks to wait, 0 where it does not; an hour at most."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    said = headers.get("retry-after", "")
    try:
        return min(max(float(said), 0.0), 3600.0)
    except ValueError:
        pass
    try:
        until = email.utils.parsedate_to_datetime(said).timestamp()
    except (TypeError, ValueError):
        return 0.0
    return min(max(until - time.time(), 0.0), 3600.0)


def _message(error: Exception) -> str:
    """What the server said."""
    body = getattr(error, "body", None)
    if isinstance(body, dict) and isinstance(body.get("message"), str):
        return body["message"]
    if isinstance(body, str) and body.strip():
        return f"{error}: {body}"
    cause = error.__cause__
    return str(cause) if cause is not None and str(cause) else str(error)
