"""Requests to a language model that are asked and kept a second, of a local server that answers
each at once with 20 captions.

`config.bench.num_requests` of them, `config.bench.concurrency` at once; the memory is that of the
process that asks.
"""

import asyncio
import json
import multiprocessing
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from agfsync_jax.benches import Bench, Measured, Sides, Task
from agfsync_jax.benches._processes import HostMemory
from agfsync_jax.benches._turns import Ours, in_turns
from agfsync_jax.llm import captions, client
from agfsync_jax.llm.exchange import Exchange
from agfsync_jax.utils.clock import Stage

_WARM = 200  # requests before the clock starts
_SETTINGS = {"model": "none", "max_tokens": 4096, "temperature": 0.9, "top_p": 0.7}


def check(config: Any) -> None:
    """Raises ValueError where the package for it is not installed."""
    client.load_openai()


def measure(config: Any, home: Path, sides: Sides, clock: Stage) -> Measured:
    """Every turn asks the same requests, of a folder of its own."""
    spec = config.bench
    task = Task("", "requests", spec.num_requests, 0, [])
    grown = []

    def start(side, ask):
        return [ask("ask", min(_WARM, spec.num_requests), spec.concurrency)["seconds"]]

    def turn(side, ask, task, number):
        row = ask("ask", spec.num_requests, spec.concurrency)
        grown.append(row.pop("grown"))
        return row

    options = {"turns": spec.repeats, "items": spec.num_requests, "start": start, "turn": turn}
    about = in_turns(sides, [task], clock, **options)
    note = f"between the first tenth and the last, memory grew by {max(grown) / 1e6:.0f} MB"
    return [task._replace(notes=(note,))], about


class Agfsync(Ours):
    """This package."""

    libraries = ("openai",)

    def ask(self, count: int, concurrency: int) -> dict[str, float]:
        """Seconds, peak memory, and by how much it grew while answers came."""
        self.memory, seen = HostMemory(), []
        with tempfile.TemporaryDirectory() as folder, _server() as url:
            exchange = Exchange(Path(folder))
            server = client.Server(url, "", concurrency)
            themes = captions.load_themes()
            names = [each.name for each in themes.categories]
            counts = {name: -(-count // len(names)) for name in names}
            more = {"wave": 0, "per_request": 20, "key": [0, 0, 0]} | _SETTINGS
            exchange.write(0, captions.write_requests(themes, counts, {}, **more))

            def on_answer(answer):
                seen.append(self.memory.now() if len(seen) % max(count // 10, 1) == 0 else 0)

            def all_of_them():
                with exchange.log() as log:
                    rows = (row for _, row in zip(range(count), exchange.requests(0), strict=False))
                    client.ask(server, rows, log, on_answer, print)

            seconds, _ = self.timed(all_of_them)
            assert len(exchange.answered()) == count
        marks = [mark for mark in seen if mark]
        grown = max(marks[-1] - marks[min(1, len(marks) - 1)], 0)
        return {"seconds": seconds, "peak_bytes": self.memory.peak(), "grown": grown}


@contextmanager
def _server() -> Iterator[str]:
    """The URL of a server in a process of its own, as long as the `with` block lasts."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there,), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{here.recv()}/v1"
    finally:
        process.kill()
        process.join()


def _serve(connection: Any) -> None:
    texts = [f"a wooden boat number {i} beside two grey ducks on a quiet lake" for i in range(20)]
    message = {"role": "assistant", "content": json.dumps({"captions": texts})}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    usage = {"prompt_tokens": 500, "completion_tokens": 400, "total_tokens": 900}
    body = json.dumps({"id": "x", "choices": [choice], "usage": usage}).encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    said = head.encode() + b"\r\n\r\n" + body

    async def answer(reader, writer):
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                lines = (await reader.readuntil(b"\r\n\r\n")).lower().split(b"\r\n")
                sizes = [line[15:] for line in lines if line.startswith(b"content-length:")]
                await reader.readexactly(int(sizes[0]) if sizes else 0)
                writer.write(said)
                await writer.drain()
        writer.close()

    async def serve():
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        connection.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(serve())


BENCH = Bench(
    unit="requests",
    sides={"agfsync": Agfsync},
    check=check,
    measure=measure,
    counts=("num_requests", "concurrency"),
    label="requests",
)
