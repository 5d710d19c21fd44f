"""A folder of requests, on the disk before they are asked, and of answers, as they come.

    requests-000.jsonl     the first wave; one of more than 50,000 requests has several files
    responses-*.jsonl      answers, by whoever gave them, in any order

A request has one answer, the first without an error. Nothing that has one is asked again.
"""

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from agfsync_jax.data import records
from agfsync_jax.llm.requests import Answer, read_answer
from agfsync_jax.utils.files import is_url, make_folder

MOST_REQUESTS, MOST_BYTES = 50_000, 190 * 10**6  # of a file, as the Batch API takes it
_PART_SECONDS = 20.0  # of answers in a bucket, where nothing can be appended to


class Exchange:
    """The folder's requests and answers."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._written: set[int] = set()  # waves

    def write(self, wave: int, rows: Iterable[Mapping[str, Any]]) -> list[Path]:
        """Writes a wave's requests, unless they are there; its files."""
        if found := self.files(wave):
            return found
        self._written.add(wave)
        parts: list[list[bytes]] = [[]]
        size = 0
        for row in rows:
            line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
            if len(parts[-1]) == MOST_REQUESTS or size + len(line) > MOST_BYTES:
                parts.append([])
                size = 0
            parts[-1].append(line)
            size += len(line)
        names = [f"requests-{wave:03d}" + (f"-{i:02d}" if i else "") for i in range(len(parts))]
        paths = [self.folder / f"{name}.jsonl" for name in names]
        for path, lines in reversed(list(zip(paths, parts, strict=True))):  # the first one last
            records.write_file(path, lines)
        return paths

    def files(self, wave: int) -> list[Path]:
        """The files of a wave's requests; [] where they are not all there."""
        first = self.folder / f"requests-{wave:03d}.jsonl"
        more = sorted(self.folder.glob(f"requests-{wave:03d}-*.jsonl"))
        return [first, *more] if first.exists() else []

    def withdraw(self, wave: int) -> None:
        """Removes a wave's requests, if they were written in this run."""
        for path in self.files(wave) if wave in self._written else ():
            path.unlink()

    def requests(self, wave: int) -> Iterator[dict[str, Any]]:
        """A wave's requests, in order."""
        for path in self.files(wave):
            with path.open("rb") as file:
                for line in file:
                    yield json.loads(line)

    def answered(self) -> dict[str, tuple[Path, int]]:
        """custom_id -> where its answer lies: file, byte offset."""
        good: dict[str, tuple[Path, int]] = {}
        failed: dict[str, tuple[Path, int]] = {}
        for path in sorted(self.folder.glob("responses*.jsonl")):
            offset = 0
            with path.open("rb") as file:
                for line in file:
                    if (row := _row(line)) is not None:
                        kind = failed if read_answer(row).error else good
                        kind.setdefault(row["custom_id"], (path, offset))
                    offset += len(line)
        return failed | good

    def answers(self, ids: Iterable[str]) -> Iterator[Answer]:
        """The answers to requests that have one, in the order of `ids`."""
        places = self.answered()
        files: dict[Path, Any] = {}
        try:
            for each in ids:
                if each in places:
                    path, offset = places[each]
                    file = files.get(path) or files.setdefault(path, path.open("rb"))
                    file.seek(offset)
                    yield read_answer(_row(file.readline()))
        finally:
            for file in files.values():
                file.close()

    def log(self) -> "Log":
        """Where answers are written as they come."""
        return Log(self.folder)


class Log:
    """Answers as they come, each on the disk at once; in a bucket those of 20 s at a time."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._file, self._lines, self._put_at = None, [], time.monotonic()

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_) -> None:
        if self._file:
            self._file.close()
        self._put()

    def write(self, row: Mapping[str, Any]) -> None:
        """Keeps an answer; OSError where the disk is full."""
        line = json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        if is_url(self.folder):
            self._lines.append(line)
            if time.monotonic() - self._put_at >= _PART_SECONDS:
                self._put()
            return
        self._file = self._file or self._open()
        with records.explain_no_space(Path(self._file.name), len(line)):
            self._file.write(line)
            self._file.flush()

    def _open(self) -> Any:
        make_folder(self.folder)
        path = self.folder / "responses-online.jsonl"
        broken = path.exists() and path.stat().st_size and not _ends_with_newline(path)
        file = path.open("ab")
        if broken:  # whoever wrote it was killed within a line
            file.write(b"\n")
        return file

    def _put(self) -> None:
        if self._lines:
            number = len(list(self.folder.glob("responses-online-*.jsonl")))
            records.write_file(self.folder / f"responses-online-{number:05d}.jsonl", self._lines)
            self._lines = []
        self._put_at = time.monotonic()


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) == b"\n"


def _row(line: bytes) -> dict[str, Any] | None:
    """A line's answer; None for one that was cut off, or is none."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    known = isinstance(row, dict) and isinstance(row.get("custom_id"), str)
    return row if known else None
