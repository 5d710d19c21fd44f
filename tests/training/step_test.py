"""One step: against torch, on several devices, in parts, and with every loss."""

import copy
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from agfsync_jax.backbones.stable_diffusion import StableDiffusion
from agfsync_jax.backbones.stable_diffusion_xl import StableDiffusionXL
from agfsync_jax.losses import diffusion_dpo, sft
from agfsync_jax.models import lora
from agfsync_jax.models.unet import UNet2DConditionModel
from agfsync_jax.parallel.mesh import create_mesh
from agfsync_jax.parallel.sharding import batch_sharding
from agfsync_jax.training import program
from agfsync_jax.training.objective import draw_noise, preference_loss
from agfsync_jax.training.optimizer import make_optimizer
from agfsync_jax.training.step import (
    StepSpec,
    _accumulated,
    auto_beta,
    held_out_metrics,
    init_state,
    train_step,
)
from agfsync_jax.utils import modules
from agfsync_jax.weights.networks import load_model
from tests.tiny_backbone import ReadingBackbone, TinyBackbone, assert_equal, largest_difference
from tests.twins import tiny_stable_diffusion, tiny_stable_diffusion_xl

BETA = 100.0
LN2 = pytest.approx(math.log(2), abs=BETA * 1e-7)  # beta times the rounding of an error


@pytest.fixture
def backbone():
    return TinyBackbone.load("")


def make_batch(backbone, tokens, size):
    """Random latents [len(tokens), size, size, 4]."""
    rng = np.random.default_rng(3)
    latents = rng.normal(size=(2, len(tokens), size, size, 4)).astype(np.float32)
    return {
        "chosen_latents": jnp.asarray(latents[0]),
        "rejected_latents": jnp.asarray(latents[1]),
        "example": jnp.arange(len(tokens), dtype=jnp.int32) * 1000,
        "conditioning": jax.jit(backbone.encode_prompt)(backbone.params, tokens),
    }


def make_step(backbone, loss=diffusion_dpo, mesh=None, rules=(), changes=None, **optimizer):
    """init(base) -> state; step(state, base, batch) -> (state, metrics)."""
    optimizer, learning_rate = make_optimizer(num_steps=10, **optimizer)
    loss = loss.LOSS.configured(**({} if loss is sft else {"beta": BETA}))
    spec = StepSpec(loss, optimizer, learning_rate, seed=7, backbone=backbone)
    spec = spec._replace(**(changes or {}))
    quick = {"xla_backend_optimization_level": "0"}  # to compile; these steps are few and small
    step = jax.jit(functools.partial(train_step, spec=spec), compiler_options=quick)

    def init(base):
        if mesh:
            return program.init_program(base, spec, mesh, rules)(base)
        return jax.jit(functools.partial(init_state, spec=spec))(base)

    return init, lambda state, base, batch: step(state, {"base": base, "text": {}}, batch)


TORCH_STEPS = {
    "sd1": (StableDiffusion, tiny_stable_diffusion, {}),
    "sd2": (StableDiffusion, tiny_stable_diffusion, {"prediction_type": "v_prediction"}),
    "sdxl": (StableDiffusionXL, tiny_stable_diffusion_xl, {}),
}


@pytest.mark.parametrize(
    "model", ["sd1", *(pytest.param(each, marks=pytest.mark.slow) for each in ("sd2", "sdxl"))]
)
def test_steps_equal_a_torch_reference(tmp_path, model):
    """Diffusion-DPO with AdamW on a UNet, as its script does it, with the same noise."""
    import torch

    cls, make_twin, settings = TORCH_STEPS[model]
    unet = make_twin(tmp_path / "tiny", **settings).unet.eval()
    backbone = cls.load(tmp_path / "tiny")
    prediction_type = settings.get("prediction_type", "epsilon")
    tokens = backbone.tokenize(["red circle", "blue square"])
    batch, base = make_batch(backbone, tokens, 16), backbone.params["unet"]
    init, step = make_step(
        backbone, learning_rate=1e-4, warmup_steps=2, weight_decay=0.01, max_grad_norm=1.0
    )
    state, got = init(base), []
    for _ in range(3):
        state, values = step(state, base, batch)
        got.append(jax.device_get(values))

    def to_torch(x):
        x = torch.from_numpy(np.array(x))
        return x.permute(0, 3, 1, 2) if x.ndim == 4 else x

    policy, reference = copy.deepcopy(unet), unet
    adamw = torch.optim.AdamW(policy.parameters(), lr=1e-4, eps=1e-8, weight_decay=0.01)
    alphas = torch.from_numpy(backbone.schedule.alphas_cumprod)
    given = {name: to_torch(value) for name, value in batch["conditioning"].items()}
    if model == "sdxl":  # images of 32 pixels, not cropped
        sizes = torch.tensor([[32, 32, 0, 0, 32, 32]] * len(tokens))
        given["added_cond_kwargs"] = {"text_embeds": given.pop("text_embeds"), "time_ids": sizes}
    chosen, rejected = (to_torch(batch[f"{side}_latents"]) for side in ("chosen", "rejected"))
    for index in range(3):
        noise, times = draw_noise(7, jnp.int32(index), batch["example"], (16, 16, 4), range(1000))
        noise, times = to_torch(noise[:, 0]), to_torch(times).long()
        signal_, sigma = (a.sqrt()[times].view(-1, 1, 1, 1) for a in (alphas, 1 - alphas))

        def error(network, latents, noise=noise, times=times, a=signal_, s=sigma):
            target = noise if prediction_type == "epsilon" else a * noise - s * latents
            prediction = network(a * latents + s * noise, times, **given).sample
            return (prediction - target).pow(2).mean(dim=(1, 2, 3))

        with torch.no_grad():
            reference_gap = error(reference, chosen) - error(reference, rejected)
        gap = error(policy, chosen) - error(policy, rejected)
        loss = -torch.nn.functional.logsigmoid(-0.5 * BETA * (gap - reference_gap)).mean()
        adamw.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        rate = 1e-4 * (index + 1) / 3
        adamw.param_groups[0]["lr"] = rate
        adamw.step()
        np.testing.assert_allclose(got[index]["loss"], loss.item(), rtol=1e-4)
        np.testing.assert_allclose(got[index]["grad_norm"], norm.item(), rtol=1e-3)
        np.testing.assert_allclose(got[index]["learning_rate"], rate, rtol=1e-6)
    assert got[0]["loss"] == LN2

    policy.save_pretrained(tmp_path / "trained")
    _, expected = load_model(UNet2DConditionModel, tmp_path / "trained")
    assert largest_difference(state.params, base) > 1e-4
    assert largest_difference(state.params, expected) < 1e-5


@pytest.mark.slow
def test_a_step_of_the_shipped_unet_is_the_same_on_8_devices():
    results = []
    rules = ((r"kernel$", "fsdp"),)
    for devices, axes in ((1, {"data": 1}), (8, {"data": 2, "fsdp": 4})):
        mesh = create_mesh(axes, devices=jax.devices()[:devices])
        backbone = StableDiffusion.load("micro:stable-diffusion", mesh=mesh, rules=rules)
        tokens = backbone.tokenize(["a large red circle on a white background"] * 8)
        batch = jax.device_put(make_batch(backbone, tokens, 16), batch_sharding(mesh))
        settings = {"mesh": mesh, "rules": rules, "changes": {"remat": "full"}}
        optimizer = {"learning_rate": 1e-5, "warmup_steps": 1, "max_grad_norm": 1.0}
        init, step = make_step(backbone, **settings, weight_decay=0.01, **optimizer)
        base = backbone.params["unet"]
        state, values = step(init(base), base, batch)
        largest = max(jax.tree.leaves(state.params), key=lambda leaf: leaf.size)
        assert len(largest.sharding.device_set) == devices
        assert largest.is_fully_replicated == (devices == 1)
        results.append(jax.device_get((state, values)))
    (one, one_values), (eight, eight_values) = results
    assert one_values["grad_norm"] > 0
    # At the start, policy = reference: which of two equal rewards is larger is left to rounding.
    del one_values["rewards/accuracy"]
    for key, value in one_values.items():
        assert eight_values[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key
    # The moments of the optimizer, from which the parameters follow: they hold the gradient.
    for left, right in zip(*map(jax.tree.leaves, (one.opt_state, eight.opt_state)), strict=True):
        assert np.abs(left - right).max() <= 1e-4 * np.abs(left).max()
    assert largest_difference(one.params, eight.params) <= 1e-5


def test_adapters_train_beside_a_base_that_stays(backbone):
    batch, base = make_batch(backbone, jnp.arange(6).reshape(2, 3), 8), backbone.params["unet"]
    before = jax.tree.map(np.array, base)
    init, step = make_step(backbone, changes={"lora_rank": 2}, learning_rate=1e-2)
    state = init(base)
    state, values = step(state, base, batch)
    # B is zero at first: policy and reference are the same
    assert float(values["loss"]) == LN2
    state, values = step(state, base, batch)
    assert float(values["loss"]) != LN2
    assert_equal(base, before)
    names = {"attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"}
    assert set(state.params) == names
    assert all(float(jnp.abs(factors["B"]).max()) > 0 for factors in state.params.values())


@pytest.mark.parametrize("decay", [0.0, 0.5], ids=["frozen reference", "one that follows"])
def test_adapters_of_a_text_encoder(decay):
    """The loss and its gradient are those of merged networks; the reference reads its own text."""
    backbone = ReadingBackbone.load("")
    base, text = backbone.params["unet"], {"text_encoder": backbone.params["text_encoder"]}
    keep = optax.GradientTransformation(  # the state is the last gradient
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda grads, _, params: (jax.tree.map(jnp.zeros_like, grads), grads),
    )
    spec = StepSpec(
        diffusion_dpo.LOSS.configured(beta=BETA), keep, lambda step: 0.0, 7, backbone=backbone
    )
    spec = spec._replace(lora_rank=2, lora_text_encoder=True, encode=True, reference_decay=decay)
    state, rng = init_state(base, spec, text), np.random.default_rng(0)
    assert "text_encoder.self_attn.q_proj" in state.params and len(state.params) == 5

    def some():
        return {
            name: pair | {"B": 0.3 * rng.standard_normal(pair["B"].shape, np.float32)}
            for name, pair in state.params.items()
        }

    trained, moved = some(), some()
    state = state._replace(params=trained, reference=moved if decay else None)
    batch = make_batch(backbone, jnp.arange(6).reshape(2, 3), 8)
    tokens = jnp.arange(6).reshape(2, 3)
    given = {name: batch[name] for name in batch if name != "conditioning"} | {"token_ids": tokens}
    frozen = {"base": base, "text": text}
    after, metrics = jax.jit(functools.partial(train_step, spec=spec))(state, frozen, given)

    def networks(adapters):
        read = lora.merge(text["text_encoder"], lora.of_network(adapters, "text_encoder"))
        return lora.merge(base, lora.of_network(adapters)), read

    def wanted(adapters):
        nets = [networks(adapters), networks(moved) if decay else (base, text["text_encoder"])]
        rows = {"latents": jnp.stack([batch["chosen_latents"], batch["rejected_latents"]], 1)}
        rows |= {"example": batch["example"], "conditioning": {}}

        def denoise(both, latents, times, _):
            hidden = backbone.encode_prompt({"text_encoder": both[1]}, tokens)
            hidden = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), hidden)
            return backbone.denoise({"unet": both[0]}, latents, times, hidden)

        return preference_loss(
            *(nets[0], nets[1], rows),
            loss=spec.loss,
            denoise=denoise,
            schedule=backbone.schedule,
            seed=spec.seed,
            step=state.step,
        )

    gradient, expected = jax.jit(jax.grad(wanted, has_aux=True))(trained)
    assert abs(float(expected["loss"]) - math.log(2)) > 0.01
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-4)
    for name, pair in gradient.items():
        for factor, value in pair.items():
            scale = float(jnp.abs(value).max())
            assert scale > 0
            np.testing.assert_allclose(after.opt_state[name][factor], value, atol=1e-4 * scale)


def test_dropout_is_of_the_step_and_not_of_validations(backbone):
    batch, base = make_batch(backbone, jnp.arange(6).reshape(2, 3), 8), backbone.params["unet"]
    losses = {}
    for rate in (0.0, 0.5):
        changes = {"lora_rank": 2, "lora_dropout": rate}
        init, step = make_step(backbone, changes=changes, learning_rate=1e-2)
        state = init(base)
        params = {name: pair | {"B": pair["B"] + 0.3} for name, pair in state.params.items()}
        own = {"loss": diffusion_dpo.LOSS.configured(beta=BETA), "lora_rank": 2}
        spec = step_spec_of(backbone)._replace(lora_dropout=rate, **own)
        looked = jax.jit(functools.partial(held_out_metrics, spec=spec))
        state = state._replace(params=params)
        held = looked(state, {"base": base, "text": {}}, batch, jnp.int32(0))["loss"]
        losses[rate] = [float(held)]
        for index in (0, 0):
            at = jax.tree.map(jnp.copy, state)._replace(step=jnp.int32(index))
            losses[rate].append(float(step(at, base, batch)[1]["loss"]))
    (held, first, again), (of_dropped, dropped, same) = losses.values()
    assert held == pytest.approx(first, rel=1e-5) and first == again
    assert of_dropped == pytest.approx(held, rel=1e-5)
    assert dropped == same and abs(dropped - first) > 1e-3


def test_another_step_and_another_part_drop_others(backbone, monkeypatch):
    batch, base = make_batch(backbone, jnp.arange(6).reshape(2, 3), 8), backbone.params["unet"]
    seen, attach = [], lora.attach

    def watch(params, adapters, key, rate):
        seen.append((jax.random.key_data(key).tolist(), rate))
        return attach(params, adapters, key, rate)

    monkeypatch.setattr(lora, "attach", watch)
    spec = step_spec_of(backbone)._replace(lora_rank=2, lora_dropout=0.5)
    state, frozen = init_state(base, spec), {"base": base, "text": {}}
    for index, part in ((0, slice(0, 1)), (1, slice(0, 1)), (0, slice(1, 2)), (0, slice(0, 1))):
        given = jax.tree.map(lambda x, part=part: x[part], batch)
        train_step(state._replace(step=jnp.int32(index)), frozen, given, spec=spec)
    keys = [tuple(key) for key, _ in seen]
    assert len(set(keys[:3])) == 3 and keys[3] == keys[0] and {rate for _, rate in seen} == {0.5}


@pytest.mark.parametrize(
    "changes",
    [{"accumulate": 4}, {"remat": "full"}, {"remat": "dots", "accumulate": 2}],
    ids=["accumulate", "remat", "both"],
)
def test_less_memory_is_the_same_step(backbone, changes):
    batch = make_batch(backbone, jnp.arange(24).reshape(8, 3) % 10, 8)
    base, results = backbone.params["unet"], []
    for each in ({}, changes):
        init, step = make_step(backbone, learning_rate=1e-3, changes=each)
        state = init(base)
        for _ in range(2):
            state, values = step(state, base, batch)
        results.append((state, values))
    (whole, want), (parts, got) = results
    assert largest_difference(whole.params, parts.params) < 1e-5
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-4, atol=1e-4, err_msg=name)
    assert float(jnp.sum(got["count_by_time"])) == 8


@pytest.mark.parametrize("parts", [2, 4])
def test_noise_and_signal_of_the_gradient(parts):
    """On the mean of many batches, what is true of the numbers that are drawn."""
    mean, deviation = np.array([[0.5, -1.0, 0.0]]), np.array([[1.0, 2.0, 0.5]])

    def differentiate(params, batch):
        return batch["x"].mean(0), {"loss": batch["x"].sum(1).mean()}

    @jax.jit
    @jax.vmap
    def metrics(key):
        x = mean + deviation * jax.random.normal(key, (8, 3))
        grads, metrics = _accumulated(differentiate, jnp.zeros(3), {"x": x}, parts)
        return grads - x.mean(0), metrics

    wrong, found = metrics(jax.random.split(jax.random.key(0), 20_000))
    assert abs(wrong).max() < 1e-6 and found.keys() == {"loss", "gradient/noise", "gradient/signal"}
    assert found["gradient/noise"].mean() == pytest.approx((deviation**2).sum(), rel=0.03)
    assert found["gradient/signal"].mean() == pytest.approx((mean**2).sum(), rel=0.05)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_reference_that_moves(backbone, rank):
    """It follows the policy after each step, and is what the next step compares with."""
    batch, base = make_batch(backbone, jnp.arange(6).reshape(2, 3), 8), backbone.params["unet"]
    changes = {"reference_decay": 0.7, "lora_rank": rank}
    init, step = make_step(backbone, learning_rate=1e-2, changes=changes)
    _, frozen_step = make_step(backbone, learning_rate=1e-2)
    state = init(base)
    average = jax.tree.map(np.array, state.params)
    assert_equal(state.reference, state.params)
    for index in range(3):
        before = state
        state, values = step(state, base if rank else None, batch)
        assert (values["loss"] == LN2) == (index == 0)
        average = jax.tree.map(
            lambda old, new: np.float32(0.7) * old + np.float32(0.3) * np.array(new),
            *(average, state.params),
        )
        assert largest_difference(state.reference, average) < 1e-6
        assert largest_difference(state.reference, state.params) > 1e-4
        # A step with that reference frozen is the same one.
        policy, reference = (
            lora.merge(base, each) if rank else each for each in (before.params, before.reference)
        )
        same = init_state(policy, step_spec_of(backbone))._replace(step=before.step)
        _, wanted = frozen_step(same, reference, batch)
        np.testing.assert_allclose(values["loss"], wanted["loss"], atol=1e-5)


@pytest.mark.parametrize("parts", [1, 2])
def test_beta_follows_the_margins(backbone, parts):
    """Against a loop on the host, and steps whose beta is fixed; in parts, too."""
    tokens, base = jnp.arange(12).reshape(4, 3) % 10, backbone.params["unet"]
    batch, mean = make_batch(backbone, tokens, 8), math.log(4) / BETA
    changes = {"auto_beta": 0.2, "accumulate": parts}
    init, step = make_step(backbone, learning_rate=3e-3, changes=changes)
    state = init(base)
    for _ in range(3):
        before = state
        state, values = step(state, base, batch)
        beta = math.log(4) / mean
        assert float(values["beta"]) == pytest.approx(beta, rel=1e-4)
        mean = 0.99 * mean + 0.01 * float(values["rewards/margin_size"]) / beta
        assert float(state.margin) == pytest.approx(mean, rel=1e-5)
    assert BETA / 10 < beta < BETA * 10 and abs(beta / BETA - 1) > 1e-3
    fixed = {"loss": diffusion_dpo.LOSS.configured(beta=beta)}
    _, step = make_step(backbone, learning_rate=3e-3, changes=fixed)
    _, wanted = step(before, base, batch)
    for name in ("loss", "grad_norm", "rewards/margin", "rewards/margin_size"):
        np.testing.assert_allclose(values[name], wanted[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_beta_is_bounded_and_its_mean_pair_counts_the_target():
    optimizer, rate = make_optimizer(num_steps=9, learning_rate=1e-4)
    loss = diffusion_dpo.LOSS.configured(beta=50.0)
    spec = StepSpec(loss, optimizer, rate, seed=7, auto_beta=0.3)
    betas = [float(auto_beta(jnp.float32(margin), spec)) for margin in (0.0, 1e-6, 0.02, 10.0)]
    assert betas[:2] == [500.0, 500.0] and betas[3] == 5.0
    assert float(jax.nn.sigmoid(-betas[2] * 0.02)) == pytest.approx(0.3)
    state = init_state({"w": jnp.ones(2)}, spec)
    assert float(auto_beta(state.margin, spec)) == pytest.approx(50.0)


def step_spec_of(backbone):
    optimizer, learning_rate = make_optimizer(num_steps=10, learning_rate=1e-2)
    return StepSpec(diffusion_dpo.LOSS, optimizer, learning_rate, seed=7, backbone=backbone)


@pytest.mark.parametrize("optimizer", ["adafactor", "lion", "adamw"])
def test_other_optimizers_lower_the_loss(backbone, optimizer):
    batch = make_batch(backbone, jnp.arange(6).reshape(2, 3), 8)
    init, step = make_step(
        backbone, learning_rate=1e-3, optimizer=optimizer, momentum_dtype="bfloat16"
    )
    base = backbone.params["unet"]
    state = init(base)
    for _ in range(4):
        state, values = step(state._replace(step=jnp.int32(0)), base, batch)  # the same noise
    assert float(values["loss"]) < math.log(2) - 0.01
    momentum = {x.dtype for x in jax.tree.leaves(state.opt_state) if x.dtype == jnp.bfloat16}
    assert momentum == ({jnp.dtype(jnp.bfloat16)} if optimizer != "adafactor" else set())


def test_half_precision_keeps_master_weights(backbone):
    """The policy computes in bfloat16, and what is trained is float32."""
    batch = make_batch(backbone, jnp.arange(6).reshape(2, 3), 8)
    seen = set()
    plain = backbone.denoise

    def denoise(params, *args):
        seen.update(leaf.dtype for leaf in jax.tree.leaves(params) if leaf.ndim > 1)
        return plain(params, *args)

    backbone.denoise, backbone.dtype = denoise, jnp.bfloat16
    init, step = make_step(backbone, learning_rate=1e-6)
    state = init(backbone.params["unet"])
    after, _ = step(state, backbone.params["unet"], batch)
    assert seen >= {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(after.params)} == {jnp.dtype(jnp.float32)}
    assert 0 < largest_difference(after.params, state.params) < 1e-5


@pytest.mark.parametrize("name", modules.names("losses"))
def test_every_loss_trains(backbone, name):
    loss = modules.load("losses", name).LOSS
    if loss.is_listwise:
        pytest.skip("of rankings, which tests/train_test.py trains on")
    batch = make_batch(backbone, jnp.arange(6).reshape(2, 3), 8)
    if loss.uses_scores:
        batch["scores"] = jnp.array([[3.0, 1.0], [2.0, 1.5]])
    optimizer, rate = make_optimizer(num_steps=9, learning_rate=1e-4)
    spec = StepSpec(loss, optimizer, rate, seed=7, backbone=backbone)
    base = backbone.params["unet"] if loss.uses_reference else None
    state, values = jax.jit(
        functools.partial(train_step, spec=spec),
        compiler_options={"xla_backend_optimization_level": "0"},
    )(init_state(backbone.params["unet"], spec), {"base": base, "text": {}}, batch)
    assert np.isfinite(values["loss"]) and values["grad_norm"] > 0
    assert largest_difference(state.params, backbone.params["unet"]) > 1e-5


def test_a_loss_without_reference(backbone):
    batch = make_batch(backbone, jnp.arange(6).reshape(2, 3), 8)
    init, step = make_step(backbone, loss=sft, learning_rate=1e-4)
    _, values = step(init(backbone.params["unet"]), None, batch)
    assert float(values["loss"]) == pytest.approx(float(values["chosen_error"]))


@pytest.mark.parametrize(
    ("batch_size", "at_once", "devices", "parts"),
    [(64, 0, 8, 1), (64, 2, 8, 4), (64, 2, 1, 32), (64, 3, 8, 4), (8, 100, 8, 1), (24, 4, 2, 3)],
)
def test_a_batch_is_taken_in_the_fewest_parts_that_a_device_can(
    batch_size, at_once, devices, parts
):
    mesh = create_mesh(devices=jax.devices()[:devices])
    assert program.num_parts(batch_size, at_once, mesh) == parts
