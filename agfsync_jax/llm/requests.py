"""Requests to a language model and its answers, in the format of OpenAI's Batch API.

A line is a JSON object: of a request `custom_id`, `method`, `url` and `body`, of an answer
`custom_id`, `response` and `error`. `vllm run-batch` reads and writes the same.
https://platform.openai.com/docs/guides/batch
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

URL = "/v1/chat/completions"
# How an answer's form is asked for, the strictest first: as OpenAI has it; with the schema inside
# json_object, as llama-cpp-python wants it; JSON of any form; "text" leaves it to the words.
FORMATS = ("json_schema", "json_object_schema", "json_object", "text")
REFUSALS = re.compile(
    r"\s*(i['’]?m (very |really )?sorry|sorry[,.! ]|i (can(no|['’])t|am (unable|not able)|won['’]t)"
    r"|i['’]m (not able|unable)|as an? (ai|language model)|unfortunately, i)",
    re.IGNORECASE,
)


class Answer(NamedTuple):
    """What came back for a request."""

    custom_id: str
    text: str = ""  #: what the model wrote
    finish_reason: str = ""  #: stop; length, where it was cut off
    refusal: str = ""  #: why the model would not, in its words
    error: str = ""  #: why there is no answer
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def fault(self) -> str:
        """Why nothing can be read from it, in a few words; empty where something may be."""
        if self.error:
            return "failed requests"
        if self.refusal or self.finish_reason == "content_filter" or REFUSALS.match(self.text):
            return "refused answers"
        return "" if self.text.strip() else "empty answers"


def request(
    custom_id: str,
    messages: Sequence[tuple[str, str]],
    *,
    model: str,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    schema: Mapping[str, Any],
    form: str = FORMATS[0],
) -> dict[str, Any]:
    """A line of a file of requests.

    Args:
        messages: (role, text) each.
        seed: of the server's sampling.
        schema: of the answer; objects are closed and have all their properties required, without
            bounds, which is what servers have in common.
        form: one of `FORMATS`.
    """
    body = {
        "model": model,
        "messages": [{"role": role, "content": text} for role, text in messages],
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
    }
    json_schema = {"name": "answer", "strict": True, "schema": dict(schema)}
    body["response_format"] = {"type": "json_schema", "json_schema": json_schema}
    return {"custom_id": custom_id, "method": "POST", "url": URL, "body": with_form(body, form)}


def with_form(body: Mapping[str, Any], form: str) -> dict[str, Any]:
    """The body with its answer's form asked for in another way, one of `FORMATS`."""
    others = {key: value for key, value in body.items() if key != "response_format"}
    given = body.get("response_format", {})
    if form == "text" or given.get("type") != "json_schema":  # it was not asked for from the start
        return others if form == "text" else dict(body)
    if form == "json_object_schema":
        given = {"type": "json_object", "schema": given["json_schema"]["schema"]}
    elif form == "json_object":
        given = {"type": "json_object"}
    return others | {"response_format": given}


def closed(**properties: Any) -> dict[str, Any]:
    """The schema of an object with these properties and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def listed(items: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a list."""
    return {"type": "array", "items": dict(items)}


def response(custom_id: str, body: Any = None, *, status: int = 200, error: str = "") -> dict:
    """A line of a file of answers."""
    found = {"status_code": status, "body": body} if body is not None else None
    return {
        "custom_id": custom_id,
        "response": found,
        "error": {"message": error} if error else None,
    }


def read_answer(row: Mapping[str, Any]) -> Answer:
    """An answer from its line, of whichever program wrote it."""
    found = row.get("response") or {}
    body = found.get("body") if isinstance(found, Mapping) else None
    body = body if isinstance(body, Mapping) else {}
    error = row.get("error") or body.get("error")
    status = found.get("status_code", 200) if isinstance(found, Mapping) else 0
    if not error and status != 200:
        error = f"status {status}"
    usage = body.get("usage") if isinstance(body.get("usage"), Mapping) else {}
    tokens = [usage.get(f"{kind}_tokens") for kind in ("prompt", "completion")]
    tokens = [count if isinstance(count, int) else 0 for count in tokens]
    choices = body.get("choices")
    if error or not isinstance(choices, list) or not choices or not isinstance(choices[0], Mapping):
        said = error.get("message", error) if isinstance(error, Mapping) else error
        return Answer(row["custom_id"], "", "", "", str(said or "no choices"), *tokens)
    message = choices[0].get("message")
    message = message if isinstance(message, Mapping) else {}
    text, refusal = (message.get(key) for key in ("content", "refusal"))
    if isinstance(text, list):  # in parts
        text = "".join(part.get("text", "") for part in text if isinstance(part, Mapping))
    return Answer(
        row["custom_id"],
        text if isinstance(text, str) else "",
        str(choices[0].get("finish_reason") or ""),
        refusal if isinstance(refusal, str) else "",
        "",
        *tokens,
    )


def read_list(answer: Answer, key: str) -> list[Any]:
    """The list that an answer holds, in an object under `key` or by itself; [] for none.

    Where the form was not kept it is looked for: in a fence, under another key, in JSON that has
    faults or was cut off, of which the last item is left out.
    """
    text = re.sub(r"^.*?</think>", "", answer.text, flags=re.DOTALL).strip()
    try:
        found = json.loads(text)
    except ValueError:
        found = _repaired(text)
    items = _list_in(found, key)
    cut = answer.finish_reason == "length" and not text.endswith(("}", "]"))
    return items[:-1] if cut else items


def _repaired(text: str) -> Any:
    import json_repair

    start = re.search(r"[\[{]", text)
    return json_repair.loads(text[start.start() :]) if start else None


def _list_in(found: Any, key: str) -> list[Any]:
    if isinstance(found, dict):
        lists = [value for value in found.values() if isinstance(value, list)]
        if isinstance(found.get(key), list):
            return found[key]
        if lists:
            return lists[0] if len(lists) == 1 else []
        values = list(found.values())  # {"caption 1": "...", "caption 2": "..."}
        alike = all(isinstance(each, str) for each in values)
        return values if alike or all(isinstance(each, dict) for each in values) else []
    if isinstance(found, list):
        inside = [each for each in found if isinstance(each, dict) and key in each]
        return [item for each in inside for item in _list_in(each, key)] if inside else found
    return []


def clean(text: str) -> str:
    """Text of a model on one line, without characters that no file or page can hold."""
    text = text.encode("utf-8", "replace").decode("utf-8")  # lone surrogates
    return " ".join(re.sub(r"[\x00-\x1f\x7f]", " ", text).split())
