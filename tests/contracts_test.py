"""Every file of a room meets its seam. The folders are walked: a new file is tested once it exists.

What a file says of itself is checked for all; scorers and backbones that configs/micro.py names are
also run, with the weights that ship.
"""

import ast
import inspect
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import agfsync_jax
from agfsync_jax import cli
from agfsync_jax.parallel.mesh import create_mesh
from agfsync_jax.utils import modules
from configs import micro

PACKAGE = Path(agfsync_jax.__file__).parent
CONFIG = micro.get_config("tiny")
ROOMS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
NEEDS_WEIGHTS = pytest.mark.skipif(
    not (PACKAGE / "micro" / "weights").is_dir(),
    reason="agfsync_jax/micro/weights is made by `python -m agfsync_jax.micro.suite`",
)


def members(room):
    return [pytest.param(modules.load(room, name), id=name) for name in modules.names(room)]


def positional(function):
    """Names of the arguments that may be given by place, without self."""
    kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    found = inspect.signature(function).parameters.values()
    return [item.name for item in found if item.kind in kinds and item.name != "self"]


def prompts_and_questions(count):
    source = modules.load("prompt_sources", CONFIG.prompts.source)
    rows = source.prompts(count, split="train", seed=0, round_index=0)
    asked = source.questions(rows, seed=0)
    by_prompt = [[q for q in asked if q["id"] == row["id"]] for row in rows]
    return [row["prompt"] for row in rows], by_prompt


@pytest.mark.parametrize("room", ROOMS)
def test_every_file_says_what_it_is(room):
    for path in (PACKAGE / room).glob("*.py"):
        text = ast.get_docstring(ast.parse(path.read_text()))
        assert text or not path.read_text().strip(), f"{path} has no docstring"


@pytest.mark.parametrize("module", members("scorers"))
def test_scorer_signature(module):
    """Scorer(mesh, **spec), then scorer(images, prompts, questions)."""
    parameters = list(inspect.signature(module.Scorer).parameters.values())
    assert parameters[0].name == "mesh"
    assert {"batch_size"} <= {item.name for item in parameters}
    keywords = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)
    assert all(item.kind in keywords for item in parameters[1:])
    assert positional(module.Scorer.__call__) == ["images", "prompts", "questions"]
    assert module.Scorer.__doc__


@NEEDS_WEIGHTS
@pytest.mark.parametrize("name", list(CONFIG.scorers))
def test_scorer_runs(name):
    """Columns [B] of finite numbers, the same for an image in whatever batch it comes."""
    spec = CONFIG.scorers[name].to_dict()
    module = modules.load("scorers", spec.pop("name"))
    scorer = module.Scorer(create_mesh({"data": -1, "fsdp": 1, "tensor": 1}), **spec, batch_size=8)
    prompts, questions = prompts_and_questions(3)
    size = (3, CONFIG.sample.height, CONFIG.sample.width, 3)
    images = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    columns = scorer(images, prompts, questions)
    numbers = {key: value for key, value in columns.items() if key != "answers"}
    assert name in numbers
    for key, values in numbers.items():
        assert np.shape(values) == (3,), key
        assert np.isfinite(values).all(), key
    answers = columns.get("answers")
    if answers is not None:
        assert [len(of_image) for of_image in answers] == [len(asked) for asked in questions]
    alone = scorer(images[1:2], prompts[1:2], questions[1:2])
    for key, values in numbers.items():
        np.testing.assert_allclose(alone[key], values[1:2], rtol=1e-4, atol=1e-4, err_msg=key)


@pytest.mark.parametrize("module", members("losses"))
def test_loss(module):
    """Errors [B] in, loss [B] and metrics out; a row depends on its own errors only."""
    names = ["policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected"]
    assert positional(module.loss) == names
    assert "beta" in inspect.signature(module.loss).parameters
    assert isinstance(module.uses_reference, bool)
    errors = [jnp.asarray(x) for x in np.random.default_rng(0).uniform(0.05, 0.2, (4, 5))]
    errors = [x.astype(jnp.float32) for x in errors]

    def loss(policy_chosen):
        return module.loss(policy_chosen, *errors[1:], beta=100.0)[0]

    values, metrics = jax.jit(lambda *e: module.loss(*e, beta=100.0))(*errors)
    assert values.shape == (5,) and values.dtype == jnp.float32
    assert np.isfinite(values).all()
    for name, metric in metrics.items():
        assert metric.shape in {(), (5,)}, name
        assert np.isfinite(metric).all(), name
    slope = jax.jacobian(loss)(errors[0])
    assert (jnp.diagonal(slope) > 0).all(), "a better denoised chosen image must lower the loss"
    np.testing.assert_array_equal(slope, jnp.diag(jnp.diagonal(slope)))
    if not module.uses_reference:
        alone = module.loss(errors[0], errors[1], None, None, beta=100.0)[0]
        np.testing.assert_allclose(alone, values, rtol=1e-6)


BACKBONE = {
    "tokenize": ["prompts"],
    "encode_prompt": ["params", "tokens"],
    "encode_image": ["params", "images"],
    "decode_latents": ["params", "latents"],
    "denoise": ["params", "latents", "timesteps", "conditioning"],
    "latent_shape": ["height", "width"],
    "count_truncated": ["prompts"],
    "describe": [],
    "save": ["path", "params"],
}


@pytest.mark.parametrize("module", members("backbones"))
def test_backbone_signature(module):
    backbone = module.Backbone
    for name, arguments in BACKBONE.items():
        assert positional(getattr(backbone, name)) == arguments, name
        assert getattr(backbone, name).__doc__, name
    assert positional(backbone.load)[0] == "path"
    assert {"dtype", "mesh", "rules"} <= set(inspect.signature(backbone.load).parameters)
    assert isinstance(backbone.denoiser_name, str)


@NEEDS_WEIGHTS
def test_backbone_runs():
    """Shapes and dtypes of every part, from the shipped weights."""
    module = modules.load("backbones", CONFIG.backbone.name)
    backbone = module.Backbone.load(CONFIG.backbone.path, dtype=CONFIG.backbone.dtype)
    params, size = backbone.params, (CONFIG.sample.height, CONFIG.sample.width)
    assert backbone.denoiser_name in params
    tokens = backbone.tokenize(["a red circle on a white background", ""])
    assert tokens.dtype == np.int32 and tokens.shape[0] == 2
    images = jax.ShapeDtypeStruct((2, *size, 3), jnp.uint8)
    conditioning = jax.eval_shape(backbone.encode_prompt, params, tokens)
    latents = jax.eval_shape(backbone.encode_image, params, images)
    assert latents.shape == (2, *backbone.latent_shape(*size)) and latents.dtype == jnp.float32
    timesteps = jax.ShapeDtypeStruct((2,), jnp.int32)
    denoised = jax.eval_shape(backbone.denoise, params, latents, timesteps, conditioning)
    assert (denoised.shape, denoised.dtype) == (latents.shape, latents.dtype)
    drawn = jax.eval_shape(backbone.decode_latents, params, latents)
    assert (drawn.shape, drawn.dtype) == (images.shape, images.dtype)


PROMPT_FIELDS = {"id", "prompt", "category", "source"}
QUESTION_FIELDS = {"id", "caption", "question", "choices", "answer", "element_type", "element"}


@pytest.mark.parametrize("module", members("prompt_sources"))
def test_prompt_source_signature(module):
    assert positional(module.prompts) == ["num_prompts"]
    assert {"split", "seed", "round_index"} <= set(inspect.signature(module.prompts).parameters)
    assert positional(module.questions) == ["prompt_rows"]
    assert "seed" in inspect.signature(module.questions).parameters


def test_the_source_of_the_shipped_config():
    module = modules.load("prompt_sources", CONFIG.prompts.source)
    draw = {"num_prompts": 12, "seed": 3, "round_index": 0}
    train = module.prompts(split="train", **draw)
    assert train == module.prompts(split="train", **draw)
    assert all(set(row) == PROMPT_FIELDS for row in train)
    texts = {row["prompt"] for row in train}
    assert len(texts) == len({row["id"] for row in train}) == 12
    assert not texts & {row["prompt"] for row in module.prompts(split="heldout", **draw)}
    assert texts != {row["prompt"] for row in module.prompts(split="train", **draw | {"seed": 4})}
    questions = module.questions(train, seed=3)
    assert all(set(row) == QUESTION_FIELDS for row in questions)
    assert {row["id"] for row in questions} == {row["id"] for row in train}
    assert all(row["answer"] in row["choices"] for row in questions)


@pytest.mark.parametrize("module", members("evaluators"))
def test_evaluator(module):
    """Evaluator()(images, prompts, questions): columns [B], NaN where one does not apply."""
    evaluator = module.Evaluator()
    assert positional(evaluator.__call__) == ["images", "prompts", "questions"]
    prompts, questions = prompts_and_questions(2)
    size = (2, CONFIG.sample.height, CONFIG.sample.width, 3)
    columns = evaluator(np.zeros(size, np.uint8), prompts, questions)
    for name, values in columns.items():
        assert np.shape(values) == (2,), name
        assert "/" in name or np.isfinite(values).all(), name


@pytest.mark.parametrize("verb", cli.verbs())
def test_verb(verb):
    """main(config, workdir, *, round_index=0, repair=False), and a first line for --help."""
    module = __import__(f"agfsync_jax.{verb}", fromlist=[verb])
    parameters = inspect.signature(module.main).parameters
    assert positional(module.main) == ["config", "workdir"]
    assert parameters["round_index"].default == 0
    assert parameters["repair"].default is False
    paragraph = cli.docstring(verb).split("\n\n")[0]
    assert "\n" not in paragraph and len(paragraph) <= 100


@pytest.mark.parametrize("module", members("benches"))
def test_bench_signature(module):
    """A stage of `agfsync bench`, which the command line knows."""
    assert positional(module.check) == ["config", "against", "platform"]
    assert positional(module.measure) == ["config", "home", "against", "clock"]
    assert module.UNIT and module.LIBRARIES
    assert set(module.PEERS) <= set(cli.FLAGS["bench"]["against"]["choices"])
    assert module.__name__.rpartition(".")[2] in cli.FLAGS["bench"]["stage"]["choices"]
