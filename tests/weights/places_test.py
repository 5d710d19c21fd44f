"""Where weights lie. The Hub is played by functions, as no test may need a network."""

import functools
import hashlib
import http.server
import threading
import types

import huggingface_hub
import pytest
from etils import epath
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from agfsync_jax.weights.places import choose_files, resolve_path

PIPELINE = """model_index.json README.md .gitattributes v1-5-pruned.safetensors v1-5-pruned.ckpt
    safety_checker/config.json safety_checker/model.safetensors feature_extractor/config.json
    scheduler/scheduler_config.json tokenizer/merges.txt tokenizer/vocab.json
    text_encoder/config.json text_encoder/model.safetensors text_encoder/model.fp16.safetensors
    text_encoder/pytorch_model.bin text_encoder/flax_model.msgpack text_encoder/model.onnx
    unet/config.json unet/diffusion_pytorch_model.bin unet/diffusion_pytorch_model.fp16.bin
    unet/diffusion_pytorch_model-00001-of-00002.safetensors
    unet/diffusion_pytorch_model-00002-of-00002.safetensors
    unet/diffusion_pytorch_model.safetensors.index.json
    unet/diffusion_pytorch_model.non_ema.safetensors
    unet/diffusion_pytorch_model.fp16.safetensors vae/config.json
    vae/diffusion_pytorch_model.bin vae/diffusion_pytorch_model.fp16.bin""".split()
SMALL = """model_index.json scheduler/scheduler_config.json tokenizer/merges.txt
    tokenizer/vocab.json text_encoder/config.json unet/config.json vae/config.json""".split()


def test_of_a_repository_only_what_is_read_is_downloaded():
    assert sorted(choose_files(PIPELINE)) == sorted(
        [
            *SMALL,
            "text_encoder/model.safetensors",
            "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
            "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
            "unet/diffusion_pytorch_model.safetensors.index.json",
            "vae/diffusion_pytorch_model.bin",  # there is no other
        ]
    )
    assert sorted(choose_files(PIPELINE, "fp16")) == sorted(
        [
            *SMALL,
            "text_encoder/model.fp16.safetensors",
            "unet/diffusion_pytorch_model.fp16.safetensors",
            "vae/diffusion_pytorch_model.fp16.bin",
        ]
    )
    clip = ["config.json", "model.safetensors", "pytorch_model.bin", "tf_model.h5", "vocab.json"]
    assert sorted(choose_files(clip)) == ["config.json", "model.safetensors", "vocab.json"]
    open_clip = ["open_clip_config.json", "open_clip_pytorch_model.bin", "vocab.json"]
    assert sorted(choose_files(open_clip)) == open_clip
    assert choose_files(["README.md", "pytorch_lora_weights.safetensors"]) == [
        "pytorch_lora_weights.safetensors"
    ]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub with one pipeline; records what is asked of it."""
    asked = []

    def list_repo_files(self, repository, *, revision=None):
        return PIPELINE

    def snapshot_download(repository, **kwargs):
        asked.append((repository, kwargs))
        return str(tmp_path)

    def hf_hub_download(repository, file, **kwargs):
        asked.append((repository, file))
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", list_repo_files)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    return asked


def test_a_repository_a_revision_and_a_file_of_the_hub(hub, tmp_path):
    assert resolve_path("org/model", variant="fp16") == tmp_path
    repository, kwargs = hub.pop()
    assert repository == "org/model" and kwargs["revision"] is None
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in kwargs["allow_patterns"]
    resolve_path("org/model@v1.0")
    assert hub.pop()[1]["revision"] == "v1.0"
    assert resolve_path("org/model/sub/x.safetensors") == tmp_path / "sub/x.safetensors"
    assert hub.pop() == ("org/model", "sub/x.safetensors")


def test_without_a_network_the_cache_will_do(hub, monkeypatch, tmp_path, capsys):
    class Unreached(Exception):
        """As those of the Hub's HTTP library, which are no OSError."""

    def unreached(*args, **kwargs):
        raise Unreached("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", unreached)
    assert resolve_path("org/model") == tmp_path
    assert hub.pop()[1] == {"revision": None, "local_files_only": True}
    assert "not reached (Unreached: no route): using the copy in" in capsys.readouterr().err

    def nothing(*args, **kwargs):
        raise LocalEntryNotFoundError("not in the cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", nothing)
    with pytest.raises(OSError, match="Hub was not reached.*hf download org/model"):
        resolve_path("org/model")


def test_what_the_hub_does_not_have(hub, monkeypatch):
    response = types.SimpleNamespace(headers={}, request=None, status_code=404)
    for error, message in (
        (RepositoryNotFoundError, "neither a local folder nor a repository"),
        (RevisionNotFoundError, "org/model has no revision 'v9'"),
        (GatedRepoError, "accept its terms on its page, then set HF_TOKEN"),
    ):

        def refuse(*args, error=error, **kwargs):
            raise error("no", response=response)

        monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", refuse)
        with pytest.raises(OSError, match=message):
            resolve_path("org/model@v9")
    assert not hub


def test_local_comes_first_and_what_is_nowhere_says_what_to_give(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert resolve_path("org/model").resolve() == tmp_path / "org" / "model"
    assert not hub
    for text in ("no/such/folder", "/no", "micro:none", "no.safetensors"):
        with pytest.raises(FileNotFoundError, match="repository of the Hub.*micro:blip2"):
            resolve_path(text)


def test_a_url_is_a_path_of_etils():
    path = epath.Path("gs://bucket/folder")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(path), "exists", lambda self: True)
        assert resolve_path("gs://bucket/folder") == path


class Ranges(http.server.BaseHTTPRequestHandler):
    """Serves `server.content`, from where a request wants it; remembers where that was."""

    def do_GET(self):
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.server.starts.append(start)
        body = self.server.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        if start:
            whole = len(self.server.content)
            self.send_header("Content-Range", f"bytes {start}-{whole - 1}/{whole}")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A web server on this machine that answers for https://host."""
    from huggingface_hub import file_download

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Ranges)
    server.content, server.starts = bytes(range(256)) * 999, []
    server.digest = hashlib.sha256(server.content).hexdigest()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here, get = f"http://127.0.0.1:{server.server_port}", file_download.http_get
    monkeypatch.setattr(
        file_download,
        "http_get",
        lambda url, *args, **kwargs: get(url.replace("https://host", here), *args, **kwargs),
    )
    monkeypatch.setenv("AGFSYNC_CACHE", str(tmp_path))
    yield server
    server.shutdown()


def test_a_file_of_a_web_server_is_downloaded_once(server):
    resolve = functools.partial(resolve_path, f"https://host/a/head.pth#sha256={server.digest}")
    path = resolve()
    assert path.name == "head.pth" and path.read_bytes() == server.content
    assert resolve() == path and server.starts == [0]


def test_a_download_goes_on_where_it_stopped(server, tmp_path):
    folder = tmp_path / "downloads" / server.digest
    folder.mkdir(parents=True)
    (folder / "head.pth.part").write_bytes(server.content[:1000])
    path = resolve_path(f"https://host/head.pth#sha256={server.digest}")
    assert path.read_bytes() == server.content and server.starts == [1000]


def test_another_file_than_expected_is_not_kept(server, tmp_path):
    url = f"https://host/head.pth#sha256={'0' * 64}"
    with pytest.raises(ValueError, match=f"another file: sha256 {server.digest}, expected 0000"):
        resolve_path(url)
    assert not list(tmp_path.rglob("head.pth")) and not list(tmp_path.rglob("*.part"))
    for bad in ("http://host/a#sha256=" + "0" * 64, "https://host/head.pth", url[:-1]):
        with pytest.raises(ValueError, match="is written https://HOST/FILE#sha256=DIGEST"):
            resolve_path(bad)


def test_a_host_that_is_not_reached_is_told(monkeypatch, tmp_path):
    from huggingface_hub import file_download

    def refuse(*args, **kwargs):
        raise RuntimeError("no route")

    monkeypatch.setattr(file_download, "http_get", refuse)
    monkeypatch.setenv("AGFSYNC_CACHE", str(tmp_path))
    with pytest.raises(OSError, match="RuntimeError: no route.*put the file at .*head.pth"):
        resolve_path(f"https://host/head.pth#sha256={'0' * 64}")
