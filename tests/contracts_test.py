"""Every file of a room meets its seam. The folders are walked: a new file is tested once it exists.

What a file says of itself is checked for all; scorers and backbones that configs/micro.py names are
also run, with the weights that ship.
"""

import ast
import inspect
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import agfsync_jax
from agfsync_jax import cli, losses, samplers
from agfsync_jax.backbones import Backbone
from agfsync_jax.benches import Bench
from agfsync_jax.data import questions
from agfsync_jax.data.columns import without_parts
from agfsync_jax.diffusion.schedules import Schedule
from agfsync_jax.evaluators import Evaluator
from agfsync_jax.losses import Residuals, pair_errors
from agfsync_jax.parallel.mesh import create_mesh
from agfsync_jax.prompt_sources import PROMPT_FIELDS, PromptSource
from agfsync_jax.reports import pages, panels
from agfsync_jax.scorers import Scorer
from agfsync_jax.utils import configs, modules
from configs import micro
from tests import released_configs_test
from tests.variants import RELEASED, VARIANTS

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
    asked = questions.by_prompt(asked)
    return [row["prompt"] for row in rows], [asked[row["id"]] for row in rows]


def check_columns(columns):
    """A part of a sentence about each whole column, a way to write its values."""
    assert columns
    for name, column in columns.items():
        assert column.about and column.about[-1] != ".", name
        assert column.format == "%" or format(0.5, column.format), name
        assert isinstance(column.higher_is_better, bool), name
    assert without_parts(columns)


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
    assert positional(module.Scorer.__call__) == positional(Scorer.__call__)
    assert Scorer in module.Scorer.__mro__ and module.Scorer.__doc__
    assert isinstance(module.Scorer.asks_questions, bool)
    assert isinstance(module.Scorer.reads_prompt, bool)
    check_columns(module.Scorer.columns)


@NEEDS_WEIGHTS
@pytest.mark.parametrize("name", list(CONFIG.scorers))
def test_scorer_runs(name):
    """Columns [B] of finite numbers, the same for an image in whatever batch it comes."""
    spec = CONFIG.scorers[name].to_dict()
    module = modules.load("scorers", spec.pop("name"))
    scorer = module.Scorer(create_mesh({"data": -1, "fsdp": 1, "tensor": 1}), **spec, batch_size=8)
    prompts, asked = prompts_and_questions(3)
    size = (3, CONFIG.sample.height, CONFIG.sample.width, 3)
    images = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    columns = scorer(images, prompts, asked)
    numbers = {key: value for key, value in columns.items() if key != "answers"}
    assert numbers.keys() == scorer.columns.keys()
    for key, values in numbers.items():
        assert np.shape(values) == (3,), key
        assert np.isfinite(values).all(), key
    answers = columns.get("answers")
    assert (answers is not None) <= scorer.asks_questions
    if answers is not None:
        assert [len(of_image) for of_image in answers] == [len(of_prompt) for of_prompt in asked]
    alone = scorer(images[1:2], prompts[1:2], asked[1:2])
    for key, values in numbers.items():
        np.testing.assert_allclose(alone[key], values[1:2], rtol=1e-4, atol=1e-4, err_msg=key)


@pytest.mark.parametrize("module", members("losses"))
def test_loss(module):
    """Residuals in, loss [B] and metrics out; a row depends on its own only, unless it says so."""
    loss = module.LOSS
    parameters = inspect.signature(loss.formula).parameters.values()
    settings = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert settings == {p.name: p.default for p in losses.settings_of(module).values()}
    assert all(isinstance(value, int | float) for value in settings.values())
    # Policy and reference are near each other, as no loss is steep far from there.
    rng = np.random.default_rng(0)
    size, rows = (5, 3 if loss.is_listwise else 2), jnp.arange(5)
    reference = rng.uniform(0.2, 0.4, (*size, 4)) * rng.choice([-1, 1], (*size, 4))
    policy = jnp.asarray(reference * rng.uniform(0.9999, 1.0001, (*size, 1)), jnp.float32)
    residuals = Residuals(
        policy,
        jnp.asarray(reference, jnp.float32) if loss.uses_reference else None,
        jnp.broadcast_to(jnp.array([3.0, 1.0, 2.0])[: size[1]], size),  # candidate 0 is the best
        jnp.ones(size, bool),
        jnp.full(5, 0.5),
    )
    names = positional(loss.formula)
    assert len(names) == len(loss.inputs(residuals))
    if loss.inputs is pair_errors:
        models = ["policy", "reference"] if loss.uses_reference else ["policy"]
        assert names == [f"{model}_{image}" for model in models for image in ("chosen", "rejected")]

    def compute(policy):
        values, metrics = loss(residuals._replace(policy=policy))
        return values, (values, metrics)

    slope, (values, metrics) = jax.jit(jax.jacobian(compute, has_aux=True))(policy)
    assert values.shape == (5,) and values.dtype == jnp.float32
    assert np.isfinite(values).all()
    for name, metric in metrics.items():
        assert metric.shape in {(), (5,)}, name
        assert np.isfinite(metric).all(), name
    if loss.uses_reference:
        wanted = {f"rewards/{name}" for name in ("chosen", "rejected", "margin", "accuracy")}
        assert wanted <= set(metrics)
    farther = jnp.sum(slope * policy[None], axis=-1)[..., 0]  # all chosen residuals grow
    own = farther[rows, rows]
    assert (own > 0).all(), "a better denoised chosen image must lower the loss"
    if loss.beta and loss.uses_reference and loss.scales_rewards:
        _, twice = loss.with_beta(jnp.float32(2 * loss.beta))(residuals)
        margin = 2 * metrics["rewards/margin"]
        rounding = 1e-7 * loss.beta
        np.testing.assert_allclose(twice["rewards/margin"], margin, rtol=1e-4, atol=rounding)
    if not loss.is_batchwise:
        np.testing.assert_array_equal(farther, jnp.diag(own))


def test_a_loss_has_no_settings_but_its_own():
    loss = modules.load("losses", "cdpo").LOSS
    assert loss.configured(beta=3.0, label_smoothing=0.0).formula.keywords == {
        "beta": 3.0,
        "label_smoothing": 0.0,
    }
    for name in ("margin", "policy_chosen"):
        with pytest.raises(ValueError, match=f"config.loss has {name}, .*: it has beta, label_sm"):
            loss.configured(**{name: 1.0})
    for value in (0.0, -1.0, math.nan, math.inf, True, "1"):
        with pytest.raises(ValueError, match="config.loss.cdpo.beta=.*: expected"):
            loss.configured(beta=value)
    with pytest.raises(ValueError, match="label_smoothing is 0.5, expected .* less than 0.5"):
        loss.configured(label_smoothing=0.5)


BACKBONE_METHODS = [
    name
    for name in vars(Backbone)
    if callable(getattr(Backbone, name)) and not name.startswith("_")
]


@pytest.mark.parametrize("module", members("backbones"))
def test_backbone_signature(module):
    """That of backbones.Backbone, but for annotations."""

    def parameters(cls, name):
        found = inspect.signature(getattr(cls, name)).parameters.values()
        return [(each.name, each.kind, each.default) for each in found]

    for name in BACKBONE_METHODS:
        assert parameters(module.Backbone, name) == parameters(Backbone, name), name
    for name in ("pipelines", "networks", "denoiser_name", "negative_conditioning"):
        assert hasattr(module.Backbone, name), name


@NEEDS_WEIGHTS
def test_backbone_runs():
    """Shapes and dtypes of every part, from the shipped weights."""
    module = modules.load("backbones", CONFIG.backbone.name)
    backbone = module.Backbone.load(CONFIG.backbone.path, dtype=CONFIG.backbone.dtype)
    params, size = backbone.params, (CONFIG.sample.height, CONFIG.sample.width)
    assert all(hasattr(backbone, name) for name in Backbone.__annotations__)
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


@pytest.mark.parametrize("module", members("samplers"))
def test_sampler(module):
    """A value with a trajectory and three parts; tests/samplers compares it with diffusers."""
    sampler = module.SAMPLER
    assert isinstance(sampler, samplers.Sampler)
    assert positional(sampler.trajectory) == ["fields", "num_steps", "span"]
    assert positional(sampler.step)[:3] == ["model", "row", "latents"]
    latents = jnp.ones((2, 4, 4, 1))
    schedule = Schedule.from_config({"skip_prk_steps": True, "clip_sample": False})
    state = sampler.start(latents)
    assert {leaf.shape for leaf in state} == {latents.shape}
    assert sampler.end(state) is latents
    steps = sampler.steps(schedule, 6)
    assert sampler.num_calls(schedule, 6) == len(steps.timesteps) >= 6
    assert {"signal", "sigma"} <= set(steps.rows)
    assert ("index" in steps.rows) == sampler.draws_noise
    assert {len(row) for row in steps.rows.values()} == {len(steps.timesteps)}


@pytest.mark.parametrize("module", members("prompt_sources"))
def test_prompt_source_signature(module):
    for name in ("prompts", "questions"):
        function, wanted = getattr(module, name), getattr(PromptSource, name)
        assert positional(function) == positional(wanted)
        known = set(inspect.signature(wanted).parameters) - {"self", "spec"}
        assert known <= set(inspect.signature(function).parameters)
        assert function.__doc__


def test_the_source_of_the_shipped_config():
    module = modules.load("prompt_sources", CONFIG.prompts.source)
    draw = {"num_prompts": 12, "seed": 3, "round_index": 0}
    train = module.prompts(split="train", **draw)
    assert train == module.prompts(split="train", **draw)
    assert all(tuple(row) == PROMPT_FIELDS for row in train)
    texts = {row["prompt"] for row in train}
    assert len(texts) == len({row["id"] for row in train}) == 12
    assert not texts & {row["prompt"] for row in module.prompts(split="heldout", **draw)}
    assert texts != {row["prompt"] for row in module.prompts(split="train", **draw | {"seed": 4})}
    asked = module.questions(train, seed=3)
    questions.check(train, asked)
    assert all(tuple(row) == questions.FIELDS for row in asked)


@pytest.mark.parametrize("module", members("evaluators"))
def test_evaluator(module):
    """Evaluator()(images, prompts, questions): columns [B], NaN where one does not apply."""
    evaluator = module.Evaluator()
    assert Evaluator in module.Evaluator.__mro__ and evaluator.__doc__
    check_columns(evaluator.columns)
    assert positional(evaluator.__call__) == positional(Evaluator.__call__)
    assert positional(evaluator.check) == positional(Evaluator.check)
    prompts, asked = prompts_and_questions(2)
    size = (2, CONFIG.sample.height, CONFIG.sample.width, 3)
    columns = evaluator(np.zeros(size, np.uint8), prompts, asked)
    assert columns.keys() == evaluator.columns.keys()
    for name, values in columns.items():
        assert np.shape(values) == (2,), name
        assert "/" in name or np.isfinite(values).all(), name


@pytest.mark.parametrize("module", members("reports.panels"))
def test_panel(module):
    """PANEL, of a page and at a place of its own, with a template that Jinja can read."""
    panel = module.PANEL
    assert module.__doc__ and isinstance(panel, panels.Panel)
    arguments = {"report": "report", "pairs": "gallery", "compare": "comparison"}
    assert [each.place for each in panels.of_page(panel.page)].count(panel.place) == 1
    assert positional(panel.show) == [arguments[panel.page]]
    assert pages.environment().from_string(panel.template)


@pytest.mark.parametrize("verb", cli.VERBS)
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
    """A stage of `agfsync bench`, whose peers the command line knows."""
    bench = module.BENCH
    assert isinstance(bench, Bench)
    assert positional(bench.check) == ["config"]
    assert positional(bench.measure) == ["config", "home", "sides", "clock"]
    ours, *peers = bench.sides
    assert ours == "agfsync" and set(peers) <= set(cli.FLAGS["bench"]["against"]["choices"])
    assert bench.unit and all(side.libraries for side in bench.sides.values())


@pytest.mark.parametrize("module", members("plans"))
def test_plan_signature(module):
    """A verb of `agfsync plan`, whose batch is a key of the config."""
    assert positional(module.work) == ["config", "devices", "name"]
    block, key = module.BATCH.split(".")
    assert CONFIG[block][key] > 0


def released_configs():
    """{file: its switches} of the configs that load released weights, as the files have them."""
    found = {}
    for path in sorted((configs.BESIDE_PACKAGE / "configs").glob("*.py")):
        if "def get_config(arg" in path.read_text():
            if not configs.load(str(path), {}).backbone.path.startswith("micro:"):
                with pytest.raises(ValueError, match=r"known: (.*)") as told:
                    configs.load(f"{path}:none", {})
                found[path.stem] = re.search(r"known: (.*)", str(told.value))[1].split(", ")
    return found


def test_every_released_config_and_variant_runs_in_a_test():
    """That of all verbs walks the table, and the table has what the configs have."""
    assert {name: list(each) for name, each in VARIANTS.items()} == released_configs()
    (mark,) = released_configs_test.test_all_verbs_of.pytestmark
    assert set(RELEASED) < {each.values[0] for each in mark.args[1]}
    assert released_configs_test.SOON  # all take 20 minutes
