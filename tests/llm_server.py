"""A local server that speaks OpenAI's chat completions by a script, and misbehaves as told.

with Server(answer) as server: ...   # answer(body, count) -> what to say, see `reply`
"""

import contextlib
import hashlib
import json
import re
import socket
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "sk-test-0123456789abcdef"
NOUNS = """
    apple boat candle dog elephant fox guitar hat igloo jar kettle lamp mirror needle owl piano
    quilt rabbit spoon table umbrella violin window yacht zebra anchor basket camera drum
    engine feather glove hammer island jacket kite ladder magnet notebook orange pillow
    ribbon saddle teapot vase wagon bench clock door eagle flute gate horse ink kayak leaf
    mug nest oar peach rope sail tent urn wheel crab bell coin dish egg fern goat hook iron
    jug key lion moth nut pear ring star tree vine worm bridge cactus desk arrow brush chair
    daisy fence grape harp""".split()
COLORS = "red blue green yellow purple white black brown pink grey golden silver".split()
PLACES = """beach forest kitchen street garden station market library hall roof field harbor cellar
    meadow attic temple valley bakery stadium desert""".split()


class Server(ThreadingHTTPServer):
    """Answers on a port of its own; `seen` counts requests by a digest of their bodies, which
    `bodies` holds."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, answer, models=("writer",), key=None):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer, self.models, self.key = answer, models, key
        self.seen, self.bodies, self.lock = Counter(), [], threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        pass  # a client that went away


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def _send(self, status, text, headers=()):
        data = text if isinstance(text, bytes) else text.encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **dict(headers)}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _refused(self):
        key = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.server.key in (None, key):
            return False
        said = {"error": {"message": f"Incorrect API key provided: {key}", "code": "invalid"}}
        self._send(401, json.dumps(said))
        return True

    def do_GET(self):
        if not self._refused():
            models = [{"id": name, "object": "model"} for name in self.server.models]
            self._send(200, json.dumps({"object": "list", "data": models}))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._refused():
            return
        digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        with self.server.lock:
            self.server.seen[digest] += 1
            self.server.bodies.append(body)
            count = self.server.seen[digest]
        if body["model"] not in self.server.models:
            said = {"error": {"message": f"The model {body['model']} does not exist"}}
            self._send(404, json.dumps(said))
            return
        made = self.server.answer(body, count)
        if made == "reset":  # in the middle of the body
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [')
            self.wfile.flush()
            self.connection.setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00"
            )
            self.connection.close()
            self.close_connection = True
            return
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._send(*(made if isinstance(made, tuple) else (200, made)))


def reply(content, finish_reason="stop", **message):
    """The text of a completion."""
    content = content if isinstance(content, str | None) else json.dumps(content)
    choice = {"index": 0, "finish_reason": finish_reason}
    choice["message"] = {"role": "assistant", "content": content} | message
    tokens = len(content or "") // 4
    usage = {"prompt_tokens": 400, "completion_tokens": tokens, "total_tokens": 400 + tokens}
    return json.dumps({"id": "x", "object": "chat.completion", "choices": [choice], "usage": usage})


def write(body, count=1):
    """Captions, questions or answers to questions, as the request asks; the same for the same."""
    system, user = (message["content"] for message in body["messages"])
    seed = body["seed"]
    if "captions" in system:
        number = int(re.search(r"Write (\d+) new captions", user)[1])
        return reply({"captions": [caption(seed, i) for i in range(number)]})
    if '"answers"' in system:
        return reply({"answers": ["yes"] * len(re.findall(r"^\d+\. ", user, re.MULTILINE))})
    return reply({"questions": questions(user)})


def caption(seed, index):
    """Words by chance: few captions of many are near another one."""
    pick = int.from_bytes(hashlib.sha256(f"{seed} {index}".encode()).digest()[:12], "big")
    words = []
    for choices in (COLORS, NOUNS, COLORS, NOUNS, PLACES):
        pick, which = divmod(pick, len(choices))
        words.append(choices[which])
    return "a {} {} beside a {} {} in a {}".format(*words)


def questions(text):
    """Fifteen about a caption of `caption`: ten are right, five a sieve must find."""
    words = text.split()
    things = ([word for word in words if word in NOUNS] + [words[-1], *words])[:3]
    colors = ([word for word in words if word in COLORS] + words[1:])[:2]
    made = [ask(f"Is there a {thing}?", "object", thing) for thing in things]
    made += [ask(f"Is there something {color}?", "color", color) for color in colors]
    made += [ask(f"Is the {things[0]} {colors[0]}?", "color", colors[0])]
    made += [ask(f"Is the {things[1]} {colors[-1]}?", "color", colors[-1])]
    made += [ask(f"Is a {things[0]} beside a {things[1]}?", "spatial", "beside")]
    made += [ask(f"Is the place a {things[2]}?", "location", things[2])]
    made += [ask(f"Can the {things[0]} be seen?", "object", things[0])]
    made = made[:10]
    made.append(made[0])  # repeated
    made.append(ask("Is there a dinosaur?", "animal", "dinosaur"))  # not in the caption
    made.append(ask(f"Is the {things[0]} shiny?", "sheen", things[0]))  # no such type
    made.append(ask(f"What color is the {things[0]}?", "color", colors[0]))
    made.append({"question": 7, "type": "other", "element": "x"})
    return made


def ask(question, kind, element):
    return {"question": question, "type": kind, "element": element}
