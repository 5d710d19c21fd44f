"""What is wrong with a config is told before any work, all at once."""

import json
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ml_collections import ConfigDict

from agfsync_jax import checks, cli
from agfsync_jax.diffusion.schedules import Schedule
from agfsync_jax.plans import _holdings, _room
from agfsync_jax.utils import configs, modules
from configs import micro
from tests import released_folders
from tests.variants import RELEASED

MICRO = "configs/micro.py:tiny"


def check(verb, spec=MICRO, num_devices=8, **overrides):
    overrides = {key.replace("__", "."): str(value) for key, value in overrides.items()}
    checks.check(configs.load(spec, overrides), verb, num_devices=num_devices)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_a_good_config_passes(verb):
    check(verb)


def test_every_key_has_a_rule_and_every_rule_a_key():
    flat = configs.flatten(configs.load("configs/micro.py", {}))
    known = configs.schema().KEYS
    open_keys = [key for key in flat if key.startswith(("scorers.", "pair.weights."))]
    assert flat.keys() - known.keys() == set(open_keys)
    assert known.keys() - flat.keys() == {"pair.weights"}


def test_adapters_of_text_encoders_want_what_they_need():
    good = {"train__lora_rank": 4, "train__lora_text_encoder": True, "train__embeddings": "step"}
    check("run", **good)
    for key, value, message in (
        ("train__lora_rank", 0, "lora_text_encoder is for adapters, and config.train.lora_rank"),
        ("train__embeddings", "cached", "set config.train.embeddings='step'"),
        ("backbone__dtype", "float16", "too small for float16"),
        ("export__lora", "peft", "one network's adapters"),
    ):
        with pytest.raises(ValueError, match=message):
            check("export" if key == "export__lora" else "run", **good | {key: value})


def test_all_is_told_at_once():
    with pytest.raises(ValueError) as told:
        check("run", train__num_steps=-5, loss__name="dpo", score__max_bad=2)
    first, *lines = str(told.value).splitlines()
    assert first == "3 things are wrong:" and len(lines) == 3
    assert "did you mean" not in lines[0] and "Did you mean 'diffusion_dpo'?" in lines[2]


@pytest.mark.parametrize(
    ("verb", "key", "value", "message"),
    [
        ("train", "train.num_steps", -5, "train.num_steps=-5: expected a whole number of at leas"),
        ("train", "train.batch_size", 0, "train.batch_size=0: expected a whole number"),
        ("train", "train.save_every", 0, "train.save_every=0: expected a whole number"),
        (
            "train",
            "train.learning_rate",
            "nan",
            "rate=nan: expected a finite number above 0",
        ),
        ("train", "train.learning_rate", 0, "learning_rate=0.0: expected a finite number above 0"),
        ("train", "train.ema_decay", 1, "ema_decay=1.0: expected a number from 0 to below 1"),
        ("train", "train.reference_decay", 1, "decay=1.0: expected a number from 0 to below 1"),
        ("train", "train.auto_beta", 0.5, "auto_beta=0.5: expected a number from 0 to below 0.5"),
        ("train", "train.schedule", "linear", "schedule='linear': expected constant | cosine"),
        ("train", "train.optimizer", "sgd", "optimizer='sgd': expected adamw | adafactor | lion"),
        ("train", "train.remat", "some", "remat='some': expected none | dots | full"),
        ("train", "train.best", "vqa", "train.best='vqa' needs config.train.validate_every"),
        ("train", "train.held_out", 0.1, "held_out=0.1 needs config.train.validate_every"),
        ("train", "train.lora_dropout", 1, "lora_dropout=1.0: expected a number from 0 to below"),
        (
            "train",
            "train.lora_dropout",
            0.1,
            "lora_dropout=0.1 is for adapters, and config.train.l",
        ),
        ("train", "loss.name", "dpo", "Did you mean 'diffusion_dpo'?"),
        ("train", "backbone.dtype", "fp16", "dtype='fp16': expected float32 | bfloat16 | float16"),
        ("train", "mesh.data", 3, "Mesh data=3, fsdp=1, tensor=1 does not fit 8"),
        ("prompts", "prompts.num_prompts", -1, "prompts.num_prompts=-1: expected a whole number"),
        ("prompts", "prompts.source", "jsonlines", "Did you mean 'jsonl'?"),
        ("prompts", "prompts.split", "tset", "config.prompts: "),
        ("sample", "sample.sampler", "dmp", "is not in agfsync_jax/samplers"),
        ("sample", "sample.guidance_scale", "inf", "guidance_scale=inf: expected a finite number"),
        ("sample", "sample.refiner", "no/where/at/all", "config.sample.refiner: No weights at"),
        ("sample", "backbone.attention", "flsh", "backbone.attention='flsh': expected one of auto"),
        ("sample", "backbone.path", "", "backbone.path='': expected text that is not empty"),
        ("sample", "backbone.path", "./nothing", "config.backbone.path: No weights at nothing"),
        ("score", "scorers.clip.path", "./nothing", "config.scorers.clip.path: No weights at noth"),
        ("score", "scorers.aesthetic.head", "./a.pth", "config.scorers.aesthetic.head: No weights"),
        ("score", "scorers.vqa.closest", "micro:clip", "closest='micro:clip' is for written ans"),
        ("score", "scorers.vqa.prompt", "{q}", "config.scorers.vqa: prompt '{q}' has the fields"),
        ("score", "scorers.vqa.score", "mean", "config.scorers.vqa: score is 'mean', expected one"),
        ("pair", "pair.weights.vqa", "inf", "config.pair.weights.vqa=inf: expected a finite num"),
        ("pair", "pair.strategy", "best", "pair.strategy='best': expected best_worst | all_above"),
        ("pair", "pair.path", "./nothing", "config.pair.path=nothing: no such file or folder"),
        ("evaluate", "evaluate.num_seeds", 0, "evaluate.num_seeds=0: expected a whole number"),
        ("evaluate", "evaluate.evaluators", "('judge',)", "config.evaluate.evaluators: 'judge' is"),
        ("export", "export.lora", "peff", "export.lora='peff': expected '' | diffusers | kohya"),
        ("bench", "bench.unet_width", 0, "unet_width=0.0: expected a finite number above 0 and"),
        ("plan", "train.warmup_steps", -1, "warmup_steps=-1: expected a whole number of at leas"),
    ],
)
def test_a_value_that_cannot_be(verb, key, value, message, tmp_path, capsys):
    """One line, by the verb that reads it and by `run`, and nothing is made."""
    workdir = tmp_path / "workdir"
    for each in {verb, "run"} - ({"run"} if verb in ("bench", "export", "plan") else set()):
        args = [each, f"--config={MICRO}", f"--workdir={workdir}", f"--config.{key}={value}"]
        assert cli.main(args) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("agfsync: error: ") and message in line
        assert not workdir.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.train.update(lerning_rate=1), "train.lerning_rate is no key of the config: d"),
        (lambda c: c.scorers.vqa.update(promt="x"), "scorers.vqa.promt is not known there: did yo"),
        (lambda c: c.scorers.vqa.update(dtype=16), "scorers.vqa.dtype=16: expected str"),
        (lambda c: c.scorers.clip.__delitem__("path"), "config.scorers.clip.path is missing"),
        (lambda c: c.scorers.clip.__delitem__("name"), "config.scorers.clip has no name"),
        (lambda c: c.scorers.clip.update(name="clp"), "Did you mean 'clip'?"),
        (lambda c: c.prompts.update(path="p.jsonl"), "config.prompts.path is not known there"),
        (lambda c: c.evaluate.update(heldout=0.1), "config.evaluate.heldout is not known there"),
        (lambda c: c.pair.weights.update(vila=1.0), "config.pair.weights names 'vila', which no s"),
        (
            lambda c: c.train.__delitem__("keep"),
            "config.train.keep is missing: start from get_config()",
        ),
        (lambda c: c.train.update(keep=True), "config.train.keep=True: expected a whole number"),
        (lambda c: c.backbone.update(lora=("a", 1.0)), "backbone.lora=('a', 1.0): expected (path,"),
    ],
)
def test_a_config_of_the_users_that_cannot_be(change, message):
    config = configs.load(MICRO, {})
    config.unlock()
    change(config)
    with pytest.raises(ValueError) as told:
        checks.check(config, "run", num_devices=8)
    assert message in str(told.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"loss__name": "sft", "train__reference_decay": 0.9},
            "moves a reference, and config.loss",
        ),
        ({"loss__name": "sft", "train__auto_beta": 0.2}, "auto_beta=0.2 sets the beta that scales"),
        ({"loss__name": "mapo", "train__auto_beta": 0.2}, "auto_beta=0.2 sets the beta that scale"),
        ({"loss__name": "dspo", "train__auto_beta": 0.2}, "auto_beta=0.2 sets the beta that scale"),
        ({"loss__name": "diffusion_nft", "train__auto_beta": 0.2}, "auto_beta=0.2 sets the beta"),
        ({"loss__name": "smpo", "pair__shuffle_labels": True}, "which undo config.pair.shuffle_la"),
        ({"loss__name": "smpo", "pair__path": "people"}, "path=people has none: those are choices"),
    ],
)
def test_what_a_loss_cannot_do(overrides, message):
    with pytest.raises(ValueError, match=message) as told:
        check("train", **overrides)
    assert "things are wrong" not in str(told.value)
    for name in ("kto", "dgpo", "rankdpo", "agfsync_norm", "smpo"):
        check("plan", loss__name=name, train__auto_beta=0.2)


def test_scores_of_another_workdir_are_scores(tmp_path):
    (tmp_path / "candidates").mkdir()
    (tmp_path / "prompts.jsonl").touch()
    check("train", loss__name="smpo", pair__path=str(tmp_path))


def test_lora_files_are_looked_for(tmp_path):
    missing = str(tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="config.backbone.lora: .*lora.safetensors"):
        check("sample", backbone__lora=f"(({missing!r}, 1.0),)")


def test_what_a_verb_does_not_read_is_not_looked_for():
    check("prompts", backbone__path="./nothing", scorers__clip__path="./nothing")
    check("sample", scorers__clip__path="./nothing")


def test_a_sentence_encoder_of_another_kind_is_seen_before_blip2_is_read(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    overrides = {"scorers.vqa.answer_by": "generation", "scorers.vqa.closest": str(tmp_path)}
    with pytest.raises(ValueError, match="config.scorers.vqa: .* holds a 'gpt2': expected a BERT"):
        check("score", **overrides, **{"scorers.vqa.score": "accuracy"})


@pytest.mark.parametrize("name", modules.names("scorers"))
def test_every_optional_argument_of_a_scorer_can_be_set(name):
    """From the command line, where the block does not list it."""
    known = modules.settings("scorers", name)
    assert "path" in known
    config = configs.load(MICRO, {})
    config.unlock()
    config.scorers = ConfigDict({"it": {"name": name, "path": "micro:clip", "head": "h"}})
    if "dtype" in known:
        configs.override(config, {"scorers.it.dtype": "bfloat16"})
        assert config.scorers.it.dtype == "bfloat16"
    with pytest.raises(ValueError, match="config.scorers.it.dtpe is no key of the config"):
        configs.override(config, {"scorers.it.dtpe": "bfloat16"})


@pytest.fixture
def files(tmp_path):
    """Prompts, questions and held-out prompts of a user, and the keys that name them."""

    def write(name, rows):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    prompts = [{"prompt": f"a cat in a box, number {n}"} for n in range(300)]
    held = [{"prompt": f"a dog on a mat, number {n}"} for n in range(30)]
    asked = [
        {"caption": row["prompt"], "question": "is it there?", "answer": "yes"}
        for row in prompts + held
    ]
    write("prompts.jsonl", prompts)
    write("heldout.jsonl", held)
    write("questions.jsonl", asked)
    write("few.jsonl", asked[:310])
    write("both.jsonl", [{"prompt": row["prompt"].upper()} for row in prompts[:2]] + held)
    return {
        "prompts.path": tmp_path / "prompts.jsonl",
        "questions.path": tmp_path / "questions.jsonl",
        "evaluate.path": tmp_path / "heldout.jsonl",
        "prompts.num_prompts": 300,
        # the weights are not there, which is told
        "backbone.path": "./sd",
        "scorers.vqa.path": "./blip2",
        "scorers.clip.path": "./clip",
        "scorers.aesthetic.path": "./clip",
        "scorers.aesthetic.head": "./head",
    }


def told_of(spec, num_devices, overrides):
    with pytest.raises(ValueError) as told:
        check("run", spec, num_devices, **overrides)
    lines = str(told.value).splitlines()[1:]
    weights = [line for line in lines if "No weights at" in line]
    assert len(weights) == 5
    return [line for line in lines if line not in weights]


@pytest.mark.parametrize("num_devices", [1, 8, 16, 32, 256])
@pytest.mark.parametrize("spec", RELEASED)
def test_a_released_config_starts_on_any_number_of_devices(spec, num_devices, files):
    if spec.endswith(":lcm"):
        files = files | {"backbone.lora": "()"}
    assert told_of(spec, num_devices, files) == []


def test_a_file_for_one_purpose_is_whole(files):
    config = configs.load("configs/sd15.py", {key: str(value) for key, value in files.items()})
    assert list(checks.prompts(config, "run", 0, None)) == []
    assert config.prompts.num_prompts == 300
    assert len(checks.held_out(config, files["prompts.path"].parent)[0]) == 30


def test_prompts_of_both_purposes_are_seen(files, tmp_path):
    (line,) = told_of(
        "configs/sd15.py",
        8,
        files
        | {
            "evaluate.path": tmp_path / "both.jsonl",
            "questions.path": tmp_path / "questions.jsonl",
        },
    )
    assert "2 of 32 held-out prompts are among those that training draws" in line
    same = files | {"evaluate.path": files["prompts.path"]}
    (line,) = told_of("configs/sd15.py", 8, same)
    assert "300 of 300 held-out prompts" in line
    split = same | {
        "prompts.split": "train",
        "evaluate.split": "heldout",
        "prompts.num_prompts": 200,
    }
    assert told_of("configs/sd15.py", 8, same | split) == []


def test_prompts_without_questions_are_seen(files, tmp_path):
    few = files | {"questions.path": tmp_path / "few.jsonl"}
    (line,) = told_of("configs/sd15.py", 8, few)
    assert line.strip().startswith("config.evaluate: 20 of 30 prompts have no question")


def test_too_few_prompts_are_seen(files):
    (line,) = told_of("configs/sd15.py", 8, files | {"prompts.num_prompts": 301})
    assert "300 distinct prompts in split 'all', and num_prompts asks for 301" in line


def test_peoples_pairs_need_no_prompts(files, tmp_path):
    """With `config.pair.path` nothing is drawn for training."""
    del files["prompts.path"], files["prompts.num_prompts"]
    cells = {"caption": ["a cat"], "jpg_0": [b""], "jpg_1": [b""], "label_0": [1.0]}
    files["pair.path"] = tmp_path / "train.parquet"
    pq.write_table(pa.table(cells), files["pair.path"])
    assert told_of("configs/sd15.py:dpo", 8, files) == []
    files["pair.path"] = tmp_path / "nothing"
    (line,) = told_of("configs/sd15.py:dpo", 8, files)
    assert "nothing: no such file or folder" in line


def test_another_workdirs_pairs_are_no_peoples(tmp_path):
    (tmp_path / "dataset_info.json").write_text("{}")
    check("run", pair__path=tmp_path)


def test_peoples_pairs_in_a_bucket_are_refused(monkeypatch):
    monkeypatch.setattr(checks, "check_reachable", lambda path: None)
    monkeypatch.setattr(checks, "is_pairs", lambda path: False)
    monkeypatch.setattr(checks, "scored_round", lambda *_: None)
    with pytest.raises(ValueError, match="copy them here first"):
        check("pair", pair__path="gs://bucket/pairs")


def test_weights_elsewhere_are_asked_for_last(files, monkeypatch):
    """What is wrong here is told before anything is downloaded."""
    asked = []
    monkeypatch.setattr(checks, "resolve_path", lambda path, variant="": asked.append(path))
    for key in ("backbone.path", "scorers.vqa.path"):
        del files[key]
    with pytest.raises(ValueError, match="301"):
        check("run", "configs/sd15.py", **files | {"prompts.num_prompts": 301})
    assert not any("/" in path and not path.startswith("./") for path in asked)
    check("run", "configs/sd15.py", **files)
    assert "Salesforce/blip2-flan-t5-xxl" in asked


def room(monkeypatch, memory=2**40, free=2**50):
    monkeypatch.setattr(_holdings, "memory", lambda device: memory)
    usage = SimpleNamespace(total=2**50, used=0, free=free)
    monkeypatch.setattr(_room.shutil, "disk_usage", lambda path: usage)


def released(spec, **changes):
    """A released config, whose sizes are known without weights."""
    return configs.load(spec, {key.replace("__", "."): value for key, value in changes.items()})


def told_of_memory(config, verb):
    return list(_room.memory(config, verb, _room.trained_bytes(config, verb)[0]))


def told_of_disk(config, verb, workdir):
    return list(_room.disk(config, verb, workdir, _room.trained_bytes(config, verb)[1]))


def test_weights_that_do_not_fit_are_told(monkeypatch):
    room(monkeypatch, memory=12 * 10**9)
    config = released("configs/sd15.py", mesh__fsdp="1", mesh__data="-1", score__mesh__fsdp="1")
    config.unlock().score.mesh.data = -1
    lines = told_of_memory(config, "run")
    assert [line.split(" takes ")[0] for line in lines] == [
        "the scorers",
        "what is trained, with moments and gradients,",
    ]
    # FLAN-T5-XXL and EVA-g in bfloat16; five copies of 3.44 GB, and a base of half
    assert "22.78 GiB" in lines[0] and "17.61 GiB" in lines[1] and "lora_rank=8" in lines[1]
    assert told_of_memory(config, "sample") == []
    room(monkeypatch, memory=30 * 10**9)
    assert told_of_memory(config, "run") == []


def test_a_policy_of_other_sizes_is_told(tmp_path):
    released_folders.stable_diffusion(tmp_path / "sd15", "sd15")
    config = micro.get_config("tiny")
    config.backbone.path = config.train.start = str(tmp_path / "sd15")
    checks.check(config, "train", num_devices=8)
    config.train.start = "micro:stable-diffusion"
    with pytest.raises(ValueError, match="micro:stable-diffusion has a denoiser of other sizes"):
        checks.check(config, "train", num_devices=8)
    checks.check(config, "sample", num_devices=8)  # which has no policy yet


def test_weights_that_devices_share_fit(monkeypatch):
    room(monkeypatch, memory=12 * 10**9)
    assert told_of_memory(released("configs/sd15.py"), "run") == []  # over 8 devices


def test_a_disk_that_is_too_small_is_told(monkeypatch, tmp_path):
    config = released("configs/sd15.py")
    room(monkeypatch, free=20 * 2**30)
    (line,) = told_of_disk(config, "run", tmp_path / "not" / "there")
    assert "candidates 100.63 GiB a round, checkpoints 28.82 GiB a round" in line
    assert "20.00 GiB are free" in line
    assert told_of_disk(config, "score", tmp_path) == []
    (line,) = told_of_disk(config, "train", tmp_path)
    assert "candidates 1" not in line
    room(monkeypatch, free=130 * 2**30)
    assert told_of_disk(config, "run", tmp_path) == []
    room(monkeypatch, free=2**30)
    config.train.inversion_steps = 10  # of 45,800 pairs of latents of 32 KiB
    monkeypatch.setattr(checks.backbones, "schedule", lambda config: Schedule.from_config({}))
    (line,) = told_of_disk(config, "train", tmp_path)
    assert ", inversion 27.95 GiB a round" in line
    config.train.timesteps = "800:1000"
    (line,) = told_of_disk(config, "train", tmp_path)
    assert ", inversion 5.59 GiB a round" in line


def test_what_is_there_needs_no_room(monkeypatch, tmp_path):
    config = configs.load("configs/micro.py", {})
    needed = _holdings.drawn_bytes(config)
    room(monkeypatch, free=needed - 1000)
    (line,) = told_of_disk(config, "sample", tmp_path)
    assert "13.50 MiB" in line
    folder = tmp_path / "round_000" / "candidates"
    folder.mkdir(parents=True)
    (folder / "00000-of-00012.tfrecord").write_bytes(bytes(1000))
    assert told_of_disk(config, "sample", tmp_path) == []


def test_the_command_line_looks_at_memory_and_disk(monkeypatch, tmp_path, capsys):
    room(monkeypatch, memory=1000, free=1000)
    args = ["run", "--config=configs/micro.py", f"--workdir={tmp_path}"]
    assert cli.main(args) == 2
    err = capsys.readouterr().err
    assert "4 things are wrong" in err and "of disk (candidates" in err
    assert "the model that draws takes 21.31 MiB of a device" in err


def test_a_dtype_that_costs_more_than_it_saves_is_told(monkeypatch):
    config = released("configs/sd15.py")
    lines = list(_room.advice(config, "run"))  # the tests' devices are CPUs
    assert len(lines) == 4 and "config.scorers.aesthetic.dtype=bfloat16: on CPUs" in lines[0]
    assert list(_room.advice(config, "train")) == []
    assert list(_room.advice(configs.load("configs/micro.py", {}), "run")) == []


def test_peoples_pairs_are_looked_at(tmp_path):
    pq.write_table(pa.table({"caption": ["a cat"]}), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="jpg_0"):
        check("run", "configs/micro.py", 8, **{"pair.path": tmp_path})


def test_buckets_are_looked_at_before_anything_is_drawn(tmp_path):
    """They are for people's images, and for steps that need not have one shape."""
    rows = {"caption": ["a cat"], "label_0": [1.0], "jpg_0": [b"png"], "jpg_1": [b"png"]}
    pq.write_table(pa.table(rows), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="pair.buckets=16: expected 0, as candidates have one"):
        check("run", pair__buckets=16)
    people = {"pair__path": str(tmp_path), "pair__buckets": 16}
    check("run", **people)
    with pytest.raises(ValueError, match="buckets=128: images of config.sample.height=64 and"):
        check("pair", **people | {"pair__buckets": 128})
    for verb in ("run", "train", "plan"):
        with pytest.raises(ValueError, match="inversion_steps=10 wants images of one shape"):
            check(verb, **people, train__inversion_steps=10)
        check(verb, **people | {"pair__buckets": 0}, train__inversion_steps=10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"has 'referee': caption 'a turquoise .*' is not in the micro world's grammar"),
        ({"evaluate.evaluators": "()"}, "source=micro and prompts of a language model: caption"),
    ],
)
def test_what_knows_the_micro_world_alone_is_told_before_a_language_model_writes(changes, message):
    changes = {"prompts.source": "llm", "evaluate.source": "llm"} | changes
    config = configs.load("configs/micro.py", changes)
    with pytest.raises(ValueError, match=message):
        checks.check(config, "run", num_devices=1)
    config = configs.load("configs/micro.py", changes | {"questions.source": "llm"})
    config.evaluate.evaluators = ()
    checks.check(config, "run", num_devices=1)
