"""Where weights lie: with the package, in a local folder, on the Hugging Face Hub, on gs://."""

import functools
import hashlib
import itertools
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from agfsync_jax.utils.files import Unreachable, is_url, to_path
from agfsync_jax.weights.tensor_files import PICKLES, SAFETENSORS, SHAPES

_CACHE = Path.home() / ".cache" / "agfsync_jax"
_SHIPPED = Path(__file__).parent.parent / "micro" / "weights"
_STEMS = (
    *("diffusion_pytorch_model", "model", "pytorch_model"),
    *("open_clip_model", "open_clip_pytorch_model"),
)
_FILE = r"(\w[\w.-]*/\w[\w.-]*)/(.+)"  # of a repository
_REPOSITORY = r"(\w[\w.-]*/\w[\w.-]*?)(?:@([\w./-]+))?"  # org/name, org/name@revision


def resolve_path(path: str | Path, *, variant: str = "") -> Path:
    """A folder or file of weights, downloaded first where it must be.

    Args:
      path: "micro:NAME", one that ships with the package; a local path; "org/name" or
        "org/name@revision", a repository of the Hugging Face Hub, or "org/name/file" in it; a URL
        such as gs://bucket/folder, whose tensors are streamed and not copied; or
        "https://.../file#sha256=...", one file, which is downloaded once and compared.
      variant: of the weights, such as "fp16": a repository's other ones are not downloaded.

    Returns:
      A local path, or an etils.epath.Path of a URL.

    Raises:
      FileNotFoundError: nothing is there; the message says what was looked for.
      ValueError: a URL of another kind; see `to_path`.
      Unreachable: the Hub or another host was not reached.
      OSError: the Hub wants a login.
    """
    text = str(path)
    if re.match(r"https?:", text):
        return _download_url(text)
    if text.startswith("micro:"):
        found = _SHIPPED / text.removeprefix("micro:")
    else:
        found = to_path(text).expanduser()
    if found.exists():
        return found
    if match := re.fullmatch(_REPOSITORY, text):
        return _download(match[1], match[2], variant=variant)
    if match := re.fullmatch(_FILE, text):
        if text.endswith(SAFETENSORS + PICKLES):
            return _download(match[1], None, file=match[2])
    shipped = ", ".join(f"micro:{child.name}" for child in sorted(_SHIPPED.glob("*"))) or "none"
    raise FileNotFoundError(
        f"No weights at {found} (from {text!r}). Give a local folder in the Hugging Face "
        f"layout, a repository of the Hub (org/name), or one of the shipped ones: {shipped}."
    )


def is_local(path: str) -> bool:
    """Whether `resolve_path` would not have to download it."""
    if re.match(r"https?:", path):
        return False
    if path.startswith("micro:") or to_path(path).expanduser().exists():
        return True
    in_a_repository = path.endswith(SAFETENSORS + PICKLES) and re.fullmatch(_FILE, path)
    return not (re.fullmatch(_REPOSITORY, path) or in_a_repository)


def local_files(source: Path) -> Path:
    """A local folder with the configs and tokenizers of a folder.

    Those of a URL are copied, to one that goes when the process does.
    """
    return Path(_copied(source).name) if is_url(source) else source


@functools.cache
def _copied(source: Any) -> tempfile.TemporaryDirectory:
    def copy(entry: Any, target: Path) -> None:
        if entry.is_dir():
            target.mkdir(exist_ok=True)
            for child in entry.iterdir():
                copy(child, target / child.name)
        elif _is_small(entry.name):
            target.write_bytes(entry.read_bytes())

    folder = tempfile.TemporaryDirectory(prefix="agfsync-")
    copy(source, Path(folder.name))
    return folder


def _download(repository: str, revision: str | None, *, variant: str = "", file: str = "") -> Path:
    """A repository's folder, or one file of it, in the local cache of huggingface_hub."""
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        if file:
            return Path(hf_hub_download(repository, file, revision=revision))
        try:
            files = HfApi().list_repo_files(repository, revision=revision)
        except (RepositoryNotFoundError, RevisionNotFoundError):
            raise
        except Exception as error:  # noqa: BLE001 - those of HTTP libraries have no common ancestor
            found = Path(snapshot_download(repository, revision=revision, local_files_only=True))
            why = f"{type(error).__name__}: {error}"
            print(f"The Hub was not reached ({why}): using the copy in {found}.", file=sys.stderr)
            return found
        wanted = choose_files(files, variant)
        return Path(snapshot_download(repository, revision=revision, allow_patterns=wanted))
    except GatedRepoError as error:
        raise OSError(
            f"{repository} wants a login: accept its terms on its page, then set HF_TOKEN."
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{repository!r} is neither a local folder nor a repository of the Hugging Face Hub "
            "that you may read (a private one needs HF_TOKEN)."
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"{repository} has no revision {revision!r}.") from error
    except LocalEntryNotFoundError as error:
        raise Unreachable(
            f"{repository!r} is no local folder, and the Hugging Face Hub was not reached: give a "
            "local folder, or download it once where there is a network, with "
            f"`hf download {repository}`."
        ) from error


def _download_url(url: str) -> Path:
    """One file, kept under its digest; what an interrupted download left is gone on with."""
    from filelock import FileLock
    from huggingface_hub.file_download import http_get

    match = re.fullmatch(r"(https://[^#]+/([^/#?]+)[^#/]*)#sha256=([0-9a-f]{64})", url)
    if not match:
        raise ValueError(
            f"{url}: a download is written https://HOST/FILE#sha256=DIGEST, with the 64 digits that"
            " `sha256sum FILE` prints."
        )
    address, name, digest = match.groups()
    folder = Path(os.environ.get("AGFSYNC_CACHE") or _CACHE) / "downloads" / digest
    target, part = folder / name, folder / f"{name}.part"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):  # of several processes on this host one downloads
        if target.exists():
            return target
        print(f"downloading {address} to {target}", file=sys.stderr)
        with part.open("ab") as file:
            try:
                http_get(address, file, resume_size=file.tell())
            except Exception as error:  # noqa: BLE001 - those of HTTP libraries have no ancestor
                raise Unreachable(
                    f"{address} was not downloaded ({type(error).__name__}: {error}): the same"
                    f" command goes on with it, or put the file at {target}."
                ) from error
        with part.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != digest:
            part.unlink()
            raise ValueError(
                f"{address} gave another file: sha256 {found}, expected {digest}. It was removed."
            )
        part.rename(target)
    return target


def choose_files(files: list[str], variant: str = "") -> list[str]:
    """Of a repository's files, those that loading one variant of it reads.

    Configs and tokenizers, and of the weights of each folder the safetensors, or the pickles where
    there are none; no other framework's files, and no single-file copies beside a whole pipeline.
    """
    pipeline = "model_index.json" in files
    weight_files = weight_names(variant)
    small, by_folder = [], {}
    for name in files:
        folder, _, base = name.rpartition("/")
        if pipeline and folder.partition("/")[0] in ("safety_checker", "feature_extractor"):
            continue
        if re.sub(r"-\d+-of-\d+", "", base) in weight_files and (folder or not pipeline):
            kind = "safetensors" if ".safetensors" in base else "bin"
            by_folder.setdefault(folder, {}).setdefault(kind, []).append(name)
        elif _is_small(base):
            small.append(name)
    weights = [kinds.get("safetensors") or kinds["bin"] for kinds in by_folder.values()]
    lora = [name for name in files if re.search(r"lora.*\.safetensors$", name) and not pipeline]
    return small + sum(weights, []) + (lora if not weights else [])


def weight_names(variant: str = "") -> list[str]:
    """The names that a network's weights may have, or the index of their parts; the best first."""
    infix = f".{variant}" if variant else ""
    names = []
    for suffix, stem in itertools.product(("safetensors", "bin"), _STEMS):
        names += [f"{stem}.{suffix}.index{infix}.json", f"{stem}{infix}.{suffix}.index.json"]
        names.append(f"{stem}{infix}.{suffix}")
    return [*names, f"model{SHAPES}"]


def _is_small(name: str) -> bool:
    """Whether a file is a config or of a tokenizer."""
    is_other = re.search(r"\.index\.|flax|tf_model", name)
    return name.endswith((".json", ".txt", ".model")) and not is_other
