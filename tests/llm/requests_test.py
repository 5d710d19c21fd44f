"""Requests are what the Batch API and vLLM read; answers of both, and of small models, are read."""

import json

import pytest
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from agfsync_jax.llm import captions, questions, requests
from agfsync_jax.llm.exchange import Exchange
from agfsync_jax.llm.requests import Answer, read_answer, read_list
from tests.llm_server import reply

SETTINGS = {"model": "writer", "max_tokens": 64, "temperature": 0.9, "top_p": 0.7}
ROW = {"id": "r000-00001", "prompt": "two red cats on a sofa"}


class VllmRequest(BaseModel):
    """The fields of BatchRequestInput, vllm/entrypoints/openai/run_batch.py; others are refused."""

    model_config = ConfigDict(extra="forbid")
    custom_id: str
    method: str = Field(pattern="^POST$")
    url: str = Field(pattern="^/v1/chat/completions$")
    body: dict


class VllmBody(BaseModel):
    """Those fields of ChatCompletionRequest, vllm/entrypoints/openai/protocol.py, that are set."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str | None
    messages: list[dict]
    max_tokens: int
    temperature: float
    top_p: float
    seed: int = Field(ge=-(2**63), lt=2**63)
    response_format: dict | None = None


def written():
    """One request of each kind."""
    themes = captions.load_themes()
    counts = {themes.categories[0].name: 1}
    more = {"wave": 0, "per_request": 20, "key": [0, 0, 0]}
    yield from captions.write_requests(themes, counts, {}, **more, **SETTINGS)
    for style in questions.STYLES:
        more = {"wave": 0, "style": style, "number": 15, "key": [0]}
        yield from questions.write_requests([ROW], **more, **SETTINGS)
    asked = {ROW["id"]: [{"question": "Are there cats?", "choices": ["yes", "no"]}]}
    yield from questions.write_checks([ROW], asked, wave=2, key=[0], **SETTINGS)


@pytest.mark.parametrize("row", written(), ids="captions yes_no choices dsg check".split())
@pytest.mark.parametrize("form", requests.FORMATS)
def test_requests_are_what_others_read(row, form):
    from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming

    row = json.loads(json.dumps(row | {"body": requests.with_form(row["body"], form)}))
    body = VllmBody(**VllmRequest(**row).body)
    TypeAdapter(CompletionCreateParamsNonStreaming).validate_python(row["body"])
    assert [message["role"] for message in body.messages] == ["system", "user"]
    given = body.response_format or {"type": "text"}
    assert given["type"] + "_schema" * ("schema" in given) == form


@pytest.mark.parametrize("row", written(), ids="captions yes_no choices dsg check".split())
def test_schemas_are_in_the_common_subset(row):
    """Objects closed with all properties required, strings, integers, enums, lists: no bounds."""

    def check(schema):
        assert schema["type"] in ("object", "array", "string", "integer")
        allowed = {"object": {"properties", "required", "additionalProperties"}, "array": {"items"}}
        known = allowed.get(schema["type"], {"enum"})
        assert set(schema) - {"type"} <= known
        if schema["type"] == "object":
            assert schema["required"] == list(schema["properties"])
            assert schema["additionalProperties"] is False
            for each in schema["properties"].values():
                check(each)
        if schema["type"] == "array":
            check(schema["items"])

    given = row["body"]["response_format"]["json_schema"]
    assert given["strict"] is True
    check(given["schema"])


BODY = json.loads(reply('{"captions": ["a cat"]}'))
READ = Answer("a", '{"captions": ["a cat"]}', "stop", "", "", 400, 5)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        # the Batch API's, and its file of errors
        (
            {"id": "batch_req_1", "response": {"status_code": 200, "request_id": "x", "body": BODY}}
            | {"error": None},
            READ,
        ),
        (
            {"response": None, "error": {"code": "batch_expired", "message": "too late"}},
            Answer("a", error="too late"),
        ),
        (
            {"response": {"status_code": 400, "body": {"error": {"message": "bad"}}}},
            Answer("a", error="bad"),
        ),
        # vLLM's
        ({"id": "vllm-1", "response": {"request_id": "vllm-batch-1", "body": BODY}}, READ),
        (
            {"id": "vllm-1", "response": {"status_code": 400, "request_id": "x", "body": None}}
            | {"error": "the model takes 10 tokens"},
            Answer("a", error="the model takes 10 tokens"),
        ),
        ({"response": {"status_code": 500, "body": None}}, Answer("a", error="status 500")),
        ({"response": {"body": {"choices": []}}}, Answer("a", error="no choices")),
        ({}, Answer("a", error="no choices")),
    ],
)
def test_answers_of_all_programs_are_read(row, expected):
    assert read_answer({"custom_id": "a"} | row) == expected


def answer(text, finish_reason="stop"):
    return Answer("a", text, finish_reason)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"captions": ["a", "b"]}', ["a", "b"]),
        ('["a", "b"]', ["a", "b"]),
        ('{"descriptions": ["a", "b"]}', ["a", "b"]),
        ('Sure! Here:\n```json\n{"captions": ["a", "b"]}\n```\nEnjoy.', ["a", "b"]),
        ('<think>["x"] or so</think>\n{"captions": ["a", "b"]}', ["a", "b"]),
        ('{"captions": ["a", "b",]}', ["a", "b"]),
        ("{'captions': ['a', 'b']}", ["a", "b"]),
        ('[{"captions": ["a"]}, {"captions": ["b"]}]', ["a", "b"]),
        ('{"first": "a", "second": "b"}', ["a", "b"]),
        ('{"first": "a", "second": 2}', []),
        ("no list at all", []),
        ("{}", []),
        ("7", []),
    ],
)
def test_a_list_is_found_in_what_models_write(text, expected):
    assert read_list(answer(text), "captions") == expected


def test_of_an_answer_that_was_cut_off_the_last_item_goes():
    cut = answer('{"captions": ["a red cat", "a blue d', "length")
    assert read_list(cut, "captions") == ["a red cat"]
    whole = answer('{"captions": ["a red cat"]}', "length")
    assert read_list(whole, "captions") == ["a red cat"]


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        (answer(" \n\t " * 100, "length"), "empty answers"),
        (answer(""), "empty answers"),
        (answer("I'm sorry, but I can't help with that."), "refused answers"),
        (answer("As an AI language model, I"), "refused answers"),
        (Answer("a", "", "stop", "I will not"), "refused answers"),
        (answer("{}", "content_filter"), "refused answers"),
        (Answer("a", error="x"), "failed requests"),
        (answer("icy lake"), ""),
    ],
)
def test_answers_without_content_are_told_apart(given, fault):
    assert given.fault == fault


def test_text_of_any_bytes_can_be_kept():
    assert requests.clean("a\x00b\n c\ud83d d") == "a b c? d"


def test_a_wave_of_many_requests_has_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr("agfsync_jax.llm.exchange.MOST_REQUESTS", 2)
    exchange, rows = Exchange(tmp_path), [{"custom_id": str(i)} for i in range(5)]
    assert exchange.files(0) == []
    names = [path.name for path in exchange.write(0, rows)]
    assert names == ["requests-000.jsonl", "requests-000-01.jsonl", "requests-000-02.jsonl"]
    assert list(exchange.requests(0)) == rows
    exchange.write(0, [])  # is there
    assert list(exchange.requests(0)) == rows


def test_answers_are_joined_by_name(tmp_path):
    """In any order, in several files; the first without an error; a line that was cut off is none,
    and what is appended behind it is whole."""
    exchange = Exchange(tmp_path)

    def line(name, text="", **more):
        return json.dumps(requests.response(name, json.loads(reply(text)), **more)) + "\n"

    bad = json.dumps(requests.response("b", error="x")) + "\n"
    (tmp_path / "responses-1.jsonl").write_text(line("c", "C") + bad + line("a", "A"))
    (tmp_path / "responses-2.jsonl").write_text(line("b", "B") + line("a", "other"))
    (tmp_path / "responses-online.jsonl").write_text('{"custom_id": "d", "respo')
    with exchange.log() as log:
        log.write(requests.response("e", json.loads(reply("E"))))
    found = list(exchange.answers("abcdef"))
    assert [each.text for each in found] == ["A", "B", "C", "E"]
