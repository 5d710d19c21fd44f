"""Paths in a local folder, or in a bucket by a URL such as gs://bucket/run.

In a bucket a file appears whole when it is closed; nothing can be renamed or appended to, and a
folder is no more than names that begin alike.
"""

import contextlib
import datetime
import importlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath

_SCHEMES = ("gs", "s3", "az", "hf")  # that etils.epath knows


class Unreachable(OSError):
    """A host, the Hub or a bucket was not reached: the same command may work later."""


def to_path(path: str | os.PathLike) -> Path:
    """A pathlib.Path of a local path, an etils.epath.Path, which has the same methods, of a URL;
    ValueError for a URL of another kind."""
    text = os.fspath(path)
    match = re.match(r"(\w+):/+", text)  # a Path turns gs://a into gs:/a
    if not match:
        return Path(text)
    if match[1] not in _SCHEMES:
        known = ", ".join(f"{scheme}://" for scheme in _SCHEMES)
        raise ValueError(f"{text}: expected a local path, or a URL that begins with one of {known}")
    return epath.Path(f"{match[1]}://{text[match.end() :]}")


def is_url(path: Path) -> bool:
    """Whether `to_path` gave the path of a URL."""
    return not isinstance(path, Path)


def absolute(path: Path) -> Path:
    """The path from the root; that of a URL is one."""
    return path if is_url(path) else path.absolute()


def check_reachable(path: Path) -> None:
    """Raises OSError or Unreachable, with what to do, for a URL that cannot be a workdir."""
    if not is_url(path):
        return
    if str(path).startswith("gs://"):
        try:
            importlib.import_module("google.cloud.storage")
        except ImportError as error:
            raise OSError(
                f"{path} needs google-cloud-storage, by which Orbax lists checkpoints:"
                " pip install 'agfsync_jax[gcs]'"
            ) from error
    try:
        path.exists()
    except Exception as error:  # each library has its own
        raise Unreachable(
            f"{path} cannot be reached ({' '.join(str(error).split())}). gs:// takes the machine's"
            " account, or that of `gcloud auth application-default login`; TensorFlow reads no"
            " other URL: set EPATH_USE_TF=0 for the libraries of fsspec, such as s3fs."
        ) from error


def make_folder(path: Path) -> None:
    """Makes a folder and those above it; in a bucket there is nothing to make."""
    if not is_url(path):
        path.mkdir(parents=True, exist_ok=True)


def remove_tree(path: Path) -> None:
    """Removes a folder and all in it, if it is there."""
    if is_url(path):
        path.rmtree(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Writes a small file, whole or not at all; its folder is made."""
    if is_url(path):
        path.write_bytes(text.encode())
        return
    make_folder(path.parent)
    aside = path.with_name(f"{path.name}.tmp")
    aside.write_text(text)
    os.replace(aside, path)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a workdir; {} where there is no file.

    Raises ValueError for a damaged one.
    """
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_bytes())
        if isinstance(found, dict):
            return found
        told = f"a {type(found).__name__}, no object"
    except ValueError as error:
        told = str(error)
    raise ValueError(
        f"{path} is damaged ({told}): remove it, and run the verb that writes it once more."
    )


def size_of(path: Path) -> int:
    """Bytes of a file."""
    return path.stat().length if is_url(path) else path.stat().st_size


def date_of(path: Path) -> datetime.date:
    """When a file was written, in UTC."""
    seconds = path.stat().mtime if is_url(path) else path.stat().st_mtime
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).date()


def copy_tree(source: Path, target: Path, last: str = "") -> None:
    """Copies the files of a local folder elsewhere, where that is not itself; `last` is a name."""
    if source == target:
        return
    files = [path for path in sorted(source.rglob("*")) if path.is_file()]
    for path in sorted(files, key=lambda path: path.name == last):
        place = target / path.relative_to(source).as_posix()
        make_folder(place.parent)
        with path.open("rb") as file, place.open("wb") as out:
            shutil.copyfileobj(file, out, 2**24)


@contextlib.contextmanager
def local_folder(path: Path) -> Iterator[Path]:
    """The folder itself, or for a URL one that takes its place, and goes after the `with` block."""
    if not is_url(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="agfsync-") as folder:
        yield Path(folder)
