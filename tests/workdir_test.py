"""A workdir in a bucket: every verb leaves there what it leaves in a local folder.

The bucket lies in memory, and is as strict as one: nothing in it is renamed, appended to, or a
folder that was made. Orbax' own files stay out of it: they are written by TensorStore, in C++.
"""

import functools
import io
import json
import os
import sys
import time
import types
from pathlib import Path

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.numpy import save

from agfsync_jax import (
    evaluate,
    export,
    pair,
    prompts,
    questions,
    report,
    sample,
    score,
    train,
)
from agfsync_jax.data import records
from agfsync_jax.data.pairs import read_features
from agfsync_jax.parallel.sharding import infer_shardings
from agfsync_jax.scoring import engine
from agfsync_jax.steps import settings
from agfsync_jax.training import checkpoints
from agfsync_jax.utils import files, metrics, modules
from agfsync_jax.utils.clock import read_stages
from agfsync_jax.utils.files import to_path
from agfsync_jax.weights import tensor_files
from tests import evaluate_test
from tests.evaluate_test import Brightness


def steps():
    return [verb.main for verb in (prompts, questions, sample, score, pair, train, evaluate)]


RUN = "gs://bucket/folder/run"
DIFFER = ("stages.json", "metrics.jsonl")  # seconds


class Bucket(MemoryFileSystem):
    """Raises where an object store would, and for what `broken` names."""

    protocol = ("gs", "gcs")
    store, pseudo_dirs = {}, []
    broken = ""

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.removeprefix("gs://").strip("/")

    def info(self, path, **kwargs):
        found = super().info(path, **kwargs)
        return found | {"mtime": found.get("created")}

    def glob(self, path, **kwargs):
        return [each.lstrip("/") for each in super().glob(path, **kwargs)]

    def open(self, path, mode="rb", **kwargs):
        assert mode in ("r", "rb", "wb"), f"{path} is opened for {mode}"
        if mode == "wb" and self.broken and self.broken in path:
            raise OSError(f"the network is down for {path}")
        file = super().open(path, mode, **kwargs)
        return io.BytesIO(file.getvalue()) if mode == "rb" else file  # each reader has its place

    def refuse(self, *args, **kwargs):
        raise AssertionError(f"no object store does this: {args}")

    mkdir = makedirs = mv = cp_file = refuse


@pytest.fixture
def bucket(monkeypatch):
    """Its objects, by name."""
    for name in Bucket.protocol:
        fsspec.register_implementation(name, Bucket, clobber=True)
    monkeypatch.setattr(epath.gpath, "_is_tf_installed", lambda: False)
    monkeypatch.setitem(sys.modules, "google.cloud.storage", types.ModuleType("storage"))
    monkeypatch.setattr(Bucket, "store", {})
    return Bucket.store


class Backbone(evaluate_test.Backbone):
    """That of the evaluation's tests, for the other verbs too."""

    dtype = jnp.float32

    @classmethod
    def load(cls, path, *, mesh=None, rules=(), **settings):
        self = cls()
        self.params = jax.device_put(self.params, infer_shardings(self.params, mesh, rules))
        return self

    @classmethod
    def open(cls, path, **settings):
        return path

    @classmethod
    def read_schedule(cls, files):
        return cls.schedule

    @classmethod
    def tokenizer(cls, files):
        return functools.partial(cls.tokenize, None)

    def describe(self):
        return []

    def count_truncated(self, texts):
        return 0

    def save(self, folder, params, *, dtype, scheduler):
        for name in ("model_index.json", "unet/big.safetensors"):
            records.write_file(folder / name, [str(params["unet"]["weight"]).encode()])


@pytest.fixture(autouse=True)
def fakes(monkeypatch, tmp_path):
    load, fake = modules.load, types.SimpleNamespace(Backbone=Backbone)
    monkeypatch.setattr(
        modules, "load", lambda room, name: fake if room == "backbones" else load(room, name)
    )
    monkeypatch.setattr(
        engine, "load_scorers", lambda mesh, specs, batch_size: {n: Brightness(n) for n in specs}
    )
    manager = checkpoints.ocp.CheckpointManager

    def local(folder, **options):
        assert str(folder).startswith(("gs://", "/"))
        return manager(str(folder).replace("gs://", f"{tmp_path}/orbax/"), **options)

    monkeypatch.setattr(checkpoints.ocp, "CheckpointManager", local)


def make_config(prompts_file):
    changes = {
        "sample.num_candidates": 3,
        "sample.sampler": "ddim",
        "prompts.num_prompts": 10,
        "evaluate.num_seeds": 1,
        "train.batch_size": 8,
        "train.num_steps": 4,
        "train.save_every": 2,
        "train.warmup_steps": 1,
        "train.inversion_steps": 2,
        "report.num_examples": 2,
    }
    config = evaluate_test.make_config(**changes).copy_and_resolve_references().unlock()
    config.pair.weights = {"vqa": 1.0}
    config.prompts.source = "jsonl"
    config.prompts.path, config.prompts.split = str(prompts_file), "all"
    return config


def contents(folder):
    """Name -> bytes of all files below a local folder or a URL; of a checkpoint, metrics alone."""
    if files.is_url(folder):
        start = Bucket._strip_protocol(str(folder)) + "/"
        found = {name: file.getvalue() for name, file in Bucket.store.items()}
        found = {n.removeprefix(start): x for n, x in found.items() if n.startswith(start)}
    else:
        paths = [path for path in folder.rglob("*") if path.is_file()]
        found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    return {n: x for n, x in found.items() if "checkpoints/" not in n or n.endswith(".jsonl")}


def timeless(text):
    rows = [json.loads(line) for line in text.splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def break_off(verb, config, place):
    """The verb stops where it would write `place`."""
    Bucket.broken = place
    try:
        with pytest.raises(OSError, match="the network is down"):
            verb.main(config, RUN)
    finally:
        Bucket.broken = ""
    assert not (to_path(RUN) / "round_000" / place).exists()


def break_training_off(config, monkeypatch):
    """At step 4, after a checkpoint of step 2."""
    write = metrics.MetricWriter.write

    def limited(self, step, values):
        if step == 4:
            raise OSError("the network is down")
        write(self, step, values)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="the network is down"):
        patch.setattr(metrics.MetricWriter, "write", limited)
        train.main(config, RUN)
    path = to_path(RUN) / "round_000/checkpoints/metrics.jsonl"
    assert [row["step"] for row in metrics.read_metrics(path)] == [1, 2, 3]


def test_every_verb(bucket, tmp_path, capsys, monkeypatch):
    """All stop once on their way and go on; what they leave is what they leave in a folder."""
    local, remote = tmp_path / "run", to_path(RUN)
    drawn = modules.load("prompt_sources", "micro").prompts(
        10, split="train", seed=0, round_index=0
    )
    text = "\ufeff" + "".join(row["prompt"] + "\r\n" for row in drawn)
    (tmp_path / "prompts.txt").write_bytes(text.encode())
    to_path("gs://bucket/prompts.txt").write_bytes(text.encode())
    here, there = make_config(tmp_path / "prompts.txt"), make_config("gs://bucket/prompts.txt")
    for config, workdir in ((here, local), (there, RUN)) * 2:
        settings.claim(workdir, config, steps)
    places = {
        prompts: "prompts.jsonl",
        questions: "questions.jsonl",
        sample: "candidates/00001-of-00003.tfrecord",
        score: "scores/00001-of-00003.parquet",
        pair: "pairs/dataset_info.json",
        train: None,
        evaluate: "evals/tuned/00000-of-00002.parquet",
    }
    for verb, place in places.items():
        verb.main(here, local)
        if place:
            break_off(verb, there, place)
        else:
            break_training_off(there, monkeypatch)
        if verb is pair:
            pairs = remote / "round_000/pairs"
            assert not pairs.exists()
            (pairs / "pairs-train.tfrecord-00000").write_bytes(b"a killed one")
            (pairs / "pairs-train.tfrecord-00001").write_bytes(b"left these")
            with pytest.raises(FileNotFoundError, match="dataset_info.json is missing"):
                read_features(pairs)
        verb.main(there, RUN)

    # Nothing is done twice, and what is damaged is seen.
    capsys.readouterr()
    before = {name: file.getvalue() for name, file in bucket.items()}
    for verb in places:
        verb.main(there, RUN, repair=True)
    assert capsys.readouterr().err.count("skipped") == len(places)
    assert before == {name: file.getvalue() for name, file in bucket.items()}
    whole = remote / "round_000/pairs/dataset_info.json"
    whole.unlink()  # the pairs were half removed by a process that was killed
    pair.main(there, RUN)
    assert whole.exists()
    scores = remote / "round_000/scores/00001-of-00003.parquet"
    scores.write_bytes(scores.read_bytes()[:-9])
    with pytest.raises(records.RecordError, match="gs://.*is damaged.*--repair"):
        pair.main(there, RUN)
    score.main(there, RUN, repair=True)
    with pytest.raises(ValueError, match=r"gs://bucket/folder/run was made by another config"):
        settings.claim(RUN, make_config(tmp_path / "prompts.txt"), steps)

    # The same files as in a folder, but for seconds.
    for name in ("stages.json", "checkpoints/metrics.jsonl"):
        mine, theirs = ((folder / "round_000" / name).read_text() for folder in (local, remote))
        if name == "stages.json":
            assert json.loads(mine).keys() == json.loads(theirs).keys()
        else:
            assert timeless(mine) == timeless(theirs)
            assert len(timeless(mine)) == 4
        (local / "round_000" / name).write_text(theirs)
    for config, workdir in ((here, local), (there, RUN)):
        report.main(config, workdir)
        report.main(config, workdir, stage="pair")
    mine, theirs = contents(local), contents(remote)
    assert mine.keys() == theirs.keys()
    assert {"report.html", "before_after.png", "round_000/pairs.html"} < theirs.keys()
    for name, data in mine.items():
        data = data.replace(str(tmp_path).encode(), b"gs://bucket")
        assert data == theirs[name], name


def test_tensorboard(bucket, tmp_path):
    """Event files are written aside and copied."""
    events = []
    for folder in (tmp_path, to_path(RUN)):
        board, path = folder / "tensorboard", folder / "metrics.jsonl"
        with metrics.MetricWriter(path, tensorboard=board) as writer:
            writer.write(1, {"loss": 1.5})
            assert len(metrics.read_metrics(path)) == (folder == tmp_path)
            writer.flush()
            assert len(metrics.read_metrics(path)) == len(list(board.iterdir())) == 1
            writer.write_image(2, "grid", np.zeros((8, 8, 3), np.uint8))
        (file,) = board.iterdir()
        events.append([len(data) for _, data in records._read_frames(file)])
    assert events[0] == events[1] and len(events[0]) > 3


def test_export_is_copied(bucket, monkeypatch, capsys):
    monkeypatch.setattr(export, "trained_rounds", lambda *args: [])
    monkeypatch.setattr(export, "restore_trained", lambda trained, params, name: params)
    config = make_config("")
    with pytest.raises(OSError, match="network"):
        Bucket.broken = "model_index.json"
        export.main(config, RUN)
    Bucket.broken = ""
    assert list(bucket) == ["/bucket/folder/run/round_000/export/unet/big.safetensors"] + [
        "/bucket/folder/run/round_000/stages.json"
    ]
    with pytest.raises(FileExistsError, match="gs://.*/export is not empty"):
        export.main(config, RUN)
    config.export.output = "gs://bucket/out"
    export.main(config, RUN)
    assert "to gs://bucket/out" in capsys.readouterr().err
    names = {"/bucket/out/model_index.json", "/bucket/out/unet/big.safetensors"}
    assert names < bucket.keys()


def test_paths(tmp_path):
    assert to_path("runs/x") == Path("runs/x")
    assert not files.is_url(to_path(epath.Path(tmp_path)))
    eaten = Path("gs://bucket/run")  # has one slash left
    assert to_path(eaten) == to_path(to_path("gs://bucket/run"))
    assert str(to_path(eaten)) == "gs://bucket/run"
    with pytest.raises(ValueError, match="http://a/b: expected a local path, or a URL .* gs://"):
        to_path("http://a/b")


def test_unreachable(bucket, monkeypatch):
    def fail(self):
        raise RuntimeError("no\naccount")

    monkeypatch.setattr(type(to_path(RUN)), "exists", fail)
    with pytest.raises(OSError, match=r"run cannot be reached \(no account\).*gcloud auth"):
        settings.claim(to_path(RUN), make_config(""), steps)
    monkeypatch.delitem(sys.modules, "google.cloud.storage")
    monkeypatch.setitem(sys.modules, "google.cloud", None)
    with pytest.raises(OSError, match=r"pip install 'agfsync_jax\[gcs\]'"):
        settings.claim(to_path(RUN), make_config(""), steps)


class Renamed:
    """TensorFlow's own file system in memory, under the name of another."""

    def __init__(self, gfile):
        self._gfile = gfile

    def __getattr__(self, name):
        def call(path, *args, **kwargs):
            found = getattr(self._gfile, name)(path.replace("gs://", "ram://"), *args, **kwargs)
            return [each.replace("ram://", "gs://") for each in found] if name == "glob" else found

        return call


def test_tensorflow_is_what_asks_a_bucket(monkeypatch):
    """It is always installed, and its files are not quite those of Python."""
    import tensorflow as tf

    backend = epath.backend.tf_backend
    monkeypatch.setattr(type(backend), "gfile", Renamed(tf.io.gfile))
    folder = to_path("gs://bucket/run")
    assert folder._backend is backend

    rows = [{"prompt_id": f"p{n}", "candidate": n} for n in range(3)]
    features = {name: records.CANDIDATE_FEATURES[name] for name in rows[0]}
    readers = {"shard.tfrecord": lambda path: list(records.read_shard(path, features, num_rows=3))}
    readers |= {"rows.parquet": records.read_parquet, "rows.jsonl": records.read_jsonl}
    records.write_shard(folder / "shard.tfrecord", rows, features)
    records.write_parquet(folder / "rows.parquet", rows)
    records.write_jsonl(folder / "rows.jsonl", rows)
    for name, read in readers.items():
        path = folder / name
        assert read(path) == rows
        assert not records.repair_shard(path)
        path.write_bytes(path.read_bytes()[:-7])
        assert records.repair_shard(path) and not path.exists()
        path.unlink(missing_ok=True)
        with pytest.raises(FileNotFoundError):
            read(path)
    files.write_text(folder / "stages.json", "{}\n")
    assert read_stages(folder / "stages.json") == {}
    with metrics.MetricWriter(folder / "metrics.jsonl") as writer:
        writer.write(1, {"loss": 2})
    assert metrics.read_metrics(folder / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]
    assert sorted(folder.glob("*.json")) == [folder / "stages.json"]

    values = np.arange(60, dtype=np.float32).reshape(12, 5)
    (folder / "model.safetensors").write_bytes(save({"x": values}))
    tensor = tensor_files.open_tensors(folder / "model.safetensors")["x"]
    np.testing.assert_array_equal(tensor.read(), values)
    np.testing.assert_array_equal(tensor.read((slice(3, 7), slice(1, 3))), values[3:7, 1:3])
    files.remove_tree(folder)
    files.remove_tree(folder)
    assert not folder.exists()


def test_a_bucket_is_one_runs_at_a_time(bucket, monkeypatch):
    """And a holder that gives no sign of life any more holds nothing."""
    monkeypatch.setattr(settings, "_ALIVE_SECONDS", 0.05)
    monkeypatch.setattr(settings, "_DEAD_SECONDS", 0.5)
    holder = to_path(RUN) / ".running.json"
    with settings.held(RUN):
        wait_until(holder.exists)
        message = rf"in use by another run \(host .*, pid {os.getpid()}"
        with pytest.raises(ValueError, match=message), settings.held(RUN):
            pass
    assert not holder.exists()
    killed = {"host": "gone", "pid": 1, "alive": time.time()}  # just now
    holder.write_bytes(json.dumps(killed).encode())
    began = time.monotonic()
    with settings.held(RUN):
        assert 0.3 < time.monotonic() - began < 5
        wait_until(lambda: "gone" not in holder.read_text())


def wait_until(holds):
    for _ in range(500):
        if holds():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen in five seconds")
