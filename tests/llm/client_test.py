"""What servers do wrong: no answer is lost by it, none is asked twice, and no key is told."""

import json
import time
from email.utils import formatdate

import pytest

from agfsync_jax.llm import client, requests
from agfsync_jax.llm.client import Server
from agfsync_jax.llm.exchange import Exchange
from agfsync_jax.utils.files import Unreachable
from tests import llm_server
from tests.llm_server import KEY, reply

SCHEMA = requests.closed(captions=requests.listed({"type": "string"}))
SETTINGS = {"model": "writer", "max_tokens": 64, "temperature": 0.9, "top_p": 0.7}
FINE = reply({"captions": ["a red cat on a mat"]})


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(client, "_PAUSE", (0.01, 0.02))
    monkeypatch.setattr(client, "_FIRST_PATIENCE", 0.5)
    monkeypatch.setattr(client, "_PATIENCE", 0.5)
    monkeypatch.setattr(client, "_RETRIES", 2)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def rows(count):
    return [
        requests.request(f"r{i}", [("user", f"no. {i}")], seed=i, schema=SCHEMA, **SETTINGS)
        for i in range(count)
    ]


def ask(folder, answer, count=6, **settings):
    """What came of `count` requests: answers by custom_id, the server, what was told."""
    told, exchange = [], Exchange(folder)
    options = {"concurrency": 3, "timeout": 5.0} | settings
    with llm_server.Server(answer, **{"key": options.pop("key", None)}) as server:
        with exchange.log() as log:
            url = options.pop("base_url", server.url)
            client.ask(Server(url, **options), rows(count), log, lambda _: None, told.append)
    found = {a.custom_id: a for a in exchange.answers(f"r{i}" for i in range(count))}
    return found, server, told


def texts(found):
    return [requests.read_list(answer, "captions") for answer in found.values()]


def form_of(body):
    given = body.get("response_format", {"type": "text"})
    return given["type"] + "_schema" * ("schema" in given)


def is_number(body, number):
    return body["messages"][0]["content"] == f"no. {number}"


def test_each_request_is_sent_once_and_kept(tmp_path):
    found, server, _ = ask(tmp_path, lambda body, count: FINE, count=40)
    assert len(found) == 40 and set(server.seen.values()) == {1}
    assert all(answer.text == '{"captions": ["a red cat on a mat"]}' for answer in found.values())
    assert {answer.prompt_tokens for answer in found.values()} == {400}
    assert {body["response_format"]["type"] for body in server.bodies} == {"json_schema"}


@pytest.mark.parametrize(
    "fault",
    [
        (429, '{"error": {"message": "slow down"}}', {"Retry-After": "0.05"}),
        (500, "oops"),
        (503, '{"error": {"message": "loading"}}'),
        "reset",
        (200, "<html><body>sign in</body></html>", {"Content-Type": "text/html"}),
        (200, "<html>", {"Content-Type": "application/json"}),
        (200, '{"choices": []}'),
        (200, '{"choices": [{"index": 0, "mess'),
        (200, b'{"choices": [{"message": {"content": "\xff\xfe"}}]}'),
        (200, "[]"),
    ],
    ids="429 500 503 reset html html_as_json no_choices truncated unicode list".split(),
)
def test_what_passes_is_tried_again(fault, tmp_path):
    """Each request meets the fault twice, then an answer."""
    found, server, _ = ask(tmp_path, lambda body, count: FINE if count > 2 else fault)
    assert texts(found) == [["a red cat on a mat"]] * 6
    assert set(server.seen.values()) == {3}


def test_retry_after_is_waited_for(tmp_path):
    slow = (429, "{}", {"Retry-After": "1"})
    began = time.monotonic()
    ask(tmp_path, lambda body, count: FINE if count > 1 else slow, count=1)
    assert time.monotonic() - began >= 1


@pytest.mark.parametrize("date", [False, True])
def test_a_long_wait_that_the_server_wants_is_kept(date, tmp_path, monkeypatch):
    """Longer than the package waits by itself, and than the patience with a silent server."""
    slept, sleep = [], client.asyncio.sleep

    async def record(seconds):
        slept.append(seconds)
        await sleep(0)

    monkeypatch.setattr(client.asyncio, "sleep", record)
    when = formatdate(time.time() + 500, usegmt=True) if date else "500"
    slow = (429, '{"error": {"message": "daily limit"}}', {"Retry-After": when})
    found, _, told = ask(tmp_path, lambda body, count: FINE if count > 2 else slow, count=1)
    assert texts(found) == [["a red cat on a mat"]]
    long = [seconds for seconds in slept if seconds > 100]
    assert len(long) == 2 and all(abs(seconds - 500) < 3 for seconds in long)
    assert "wants 500 s of patience: " in told[0] or date


def test_a_timeout_is_tried_again(tmp_path):
    def answer(body, count):
        time.sleep(0.6 if count == 1 else 0)
        return FINE

    found, server, _ = ask(tmp_path, answer, count=2, timeout=0.3)
    assert len(texts(found)) == 2 and set(server.seen.values()) == {2}


def test_one_request_may_fail_where_others_do_not(tmp_path):
    def answer(body, count):
        return (500, "too hard") if is_number(body, 3) else FINE

    found, server, _ = ask(tmp_path, answer, count=12)
    assert found["r3"].error.endswith("500: too hard") and found["r3"].fault == "failed requests"
    assert sum(bool(each.error) for each in found.values()) == 1
    sendings = sum(is_number(body, 3) for body in server.bodies)
    assert sendings % 3 == 0 and sendings <= 18  # with the package's two retries each


@pytest.mark.parametrize("takes", requests.FORMATS[1:])
@pytest.mark.parametrize("status", [400, 422, 500])  # llama-cpp-python says 500
def test_a_server_that_refuses_the_form_is_asked_with_another(takes, status, tmp_path):
    """Once that is known, requests come in that form at once; others are told."""

    def answer(body, count):
        known = requests.FORMATS.index(form_of(body)) >= requests.FORMATS.index(takes)
        said = {"error": {"message": "response_format is not supported"}}
        return FINE if known else (status, json.dumps(said))

    found, server, told = ask(tmp_path, answer, count=20, concurrency=2)
    assert texts(found) == [["a red cat on a mat"]] * 20
    sent = 3 if status == 500 else 1  # by the package, which tries such again
    assert len(server.bodies) <= 20 + 3 * 2 * sent and len(told) == 1 and takes in told[0]


def test_a_bad_request_is_kept_as_failed(tmp_path):
    def answer(body, count):
        said = {"error": {"message": f"content policy, key {KEY}"}}
        return (400, json.dumps(said)) if is_number(body, 1) else FINE

    found, server, told = ask(tmp_path, answer)
    assert found["r1"].error == "400: content policy, key ***" and not told
    assert KEY not in (tmp_path / "responses-online.jsonl").read_text()
    last = [body for body in server.bodies if not is_number(body, 1)][-1]
    assert last["response_format"]["type"] == "json_schema"  # it was not the form


def test_parameters_that_a_model_does_not_take_are_left_out(tmp_path):
    """As OpenAI's reasoning models say it; each is told once, and asked with no more."""

    def answer(body, count):
        said = ""
        if "max_tokens" in body:
            said = "Unsupported parameter: 'max_tokens' is not supported with this model. Use"
            said += " 'max_completion_tokens' instead."
        elif "temperature" in body:
            said = "Unsupported value: 'temperature' does not support 0.9 with this model."
        return (400, json.dumps({"error": {"message": said}})) if said else FINE

    found, server, told = ask(tmp_path, answer, count=20, concurrency=2)
    assert texts(found) == [["a red cat on a mat"]] * 20 and len(told) == 2
    last = server.bodies[-1]
    assert (
        last["max_completion_tokens"] == 64 and "temperature" not in last and last["top_p"] == 0.7
    )
    assert last["response_format"]["type"] == "json_schema" and len(server.bodies) <= 20 + 4


def test_a_server_that_answers_nothing_is_wrong_and_not_the_requests(tmp_path):
    """Nothing is kept as failed: what it says can be mended."""
    long = (400, json.dumps({"error": {"message": "the maximum context length is 10 tokens"}}))
    with pytest.raises(ValueError, match="answers none of the first requests .*length is 10"):
        ask(tmp_path, lambda *_: long, count=20)
    assert not Exchange(tmp_path).answered()
    with pytest.raises(ValueError, match="answers none of the first requests"):
        ask(tmp_path, lambda *_: long, count=1)
    found, *_ = ask(tmp_path, lambda body, _: long if is_number(body, 0) else FINE, concurrency=9)
    assert found["r0"].error and len(found) == 6


def test_a_wrong_key_stops_at_once(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"refuses the key in \$MINE \(401: .*\*\*\*") as error:
        monkeypatch.setenv("MINE", "sk-mine-wrong-123")
        ask(tmp_path, lambda *_: FINE, key=KEY, api_key_env="MINE")
    assert "sk-mine-wrong-123" not in str(error.value)


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="no model 'writer' .*; it has big, small: set config"):
        with llm_server.Server(None, models=("big", "small")) as server:
            with Exchange(tmp_path).log() as log:
                client.ask(Server(server.url), rows(1), log, print, print)


def test_no_quota_is_not_waited_for(tmp_path):
    said = json.dumps({"error": {"message": "pay", "code": "insufficient_quota"}})
    with pytest.raises(ValueError, match="no quota left"):
        ask(tmp_path, lambda *_: (429, said))


def test_a_server_that_is_away(tmp_path):
    with pytest.raises(Unreachable, match="no language model answers at http://127.0.0.1:9/v1"):
        ask(tmp_path, lambda *_: FINE, base_url="http://127.0.0.1:9/v1")
    with pytest.raises(Unreachable, match="no language model answers"):
        client.models(Server("http://127.0.0.1:9/v1"))


def test_what_is_answered_stays_when_a_server_goes(tmp_path):
    answered = []

    def answer(body, count):
        if len(answered) >= 4:
            return 500, "gone"
        answered.append(body)
        return FINE

    with pytest.raises(Unreachable):
        ask(tmp_path, answer, count=20)
    assert len(Exchange(tmp_path).answered()) == 4


def test_openai_is_not_asked_without_a_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    assert not Server("").is_known and Server("http://localhost:1/v1").is_known
    with pytest.raises(ValueError, match="OpenAI wants a key: export OPENAI_API_KEY"):
        client.models(Server(""))


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openai", None)
    with pytest.raises(ValueError, match=r"pip install 'agfsync_jax\[llm\]'"):
        client.load_openai()
