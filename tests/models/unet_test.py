"""UNet2DConditionModel equals diffusers: forward, gradient, weights both ways."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel as TorchUNet
from flax import nnx

from agfsync_jax.models.layers import rematerialized
from agfsync_jax.models.unet import UNet2DConditionConfig, UNet2DConditionModel
from agfsync_jax.weights.networks import abstract_model, load_model, read_json, save_model
from tests.twins import assert_same_gradients, relative_error, unit_gain

SIZES = {
    "sample_size": 8,
    "block_out_channels": (16, 32, 32),
    "layers_per_block": 2,
    "cross_attention_dim": 12,
    "norm_num_groups": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
TEXT_TIME = {
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "layers_per_block": 1,
}
VARIANTS = {
    "sd1": {"attention_head_dim": 4},
    "sd2, turbo": {
        "attention_head_dim": (2, 4, 4),
        "use_linear_projection": True,
        "layers_per_block": 1,
    },
    "sdxl": TEXT_TIME
    | {
        "attention_head_dim": (2, 4, 8),
        "transformer_layers_per_block": (1, 2, 3),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "projection_class_embeddings_input_dim": 10 + 6 * 8,
    },
    "refiner": TEXT_TIME
    | {
        "block_out_channels": (16, 32, 48),
        "attention_head_dim": (2, 4, 6),
        "transformer_layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "projection_class_embeddings_input_dim": 10 + 5 * 8,
    },
    "no transformer blocks at the top": {
        "attention_head_dim": (2, 4, 4),
        "transformer_layers_per_block": (0, 1, 2),
        "layers_per_block": 1,
        "freq_shift": 1,
    },
}
# Their transformers become loops.
VARIANTS["two blocks"] = VARIANTS["sdxl"] | {
    "block_out_channels": (16, 32),
    "attention_head_dim": (2, 4),
    "transformer_layers_per_block": (0, 2),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}


def make_batch(variant="sd1"):
    rng = np.random.default_rng(0)
    sample = rng.standard_normal((2, 8, 8, 4), np.float32)
    batch = sample, np.array([3, 901], np.int32), rng.standard_normal((2, 5, 12), np.float32)
    if "addition_embed_type" not in VARIANTS[variant]:
        return batch
    count = 5 if variant == "refiner" else 6
    sizes = rng.integers(0, 1025, (2, count)).astype(np.float32)
    sizes[:, -1] = 2.5  # scores, the refiner's last, are no whole numbers
    return *batch, rng.standard_normal((2, 10), np.float32), sizes


def make_twin(variant, folder):
    twin = unit_gain(TorchUNet(**SIZES | VARIANTS[variant]))
    twin.save_pretrained(folder)
    return twin


def run_torch(twin, sample, timesteps, context, text_embeds=None, time_ids=None):
    sample = torch.from_numpy(sample).permute(0, 3, 1, 2)
    added = {}
    if text_embeds is not None:
        added = {
            "text_embeds": torch.from_numpy(text_embeds),
            "time_ids": torch.from_numpy(time_ids),
        }
    timesteps, context = torch.from_numpy(timesteps), torch.from_numpy(context)
    return twin(sample, timesteps, context, added_cond_kwargs=added).sample.permute(0, 2, 3, 1)


@pytest.mark.parametrize(
    "variant",
    [
        *list(VARIANTS)[:-3],
        # The backbone's test draws with a refiner, and the two blocks have none at the top either.
        *(pytest.param(each, marks=pytest.mark.slow) for each in list(VARIANTS)[-3:-1]),
    ],
)
def test_forward_gradient_and_weights(tmp_path, variant):
    twin = make_twin(variant, tmp_path / "torch")
    graph, params = load_model(UNet2DConditionModel, tmp_path / "torch")
    batch = make_batch(variant)
    expected = run_torch(twin, *batch)
    weights = np.random.default_rng(1).standard_normal(expected.shape, np.float32)

    actual, grads = forward_and_gradient(graph, params, batch, weights)
    assert relative_error(actual, expected) <= 1e-5
    (expected * torch.from_numpy(weights)).sum().backward()
    assert_same_gradients(grads, twin)

    config = read_json(tmp_path / "torch" / "config.json")
    save_model(UNet2DConditionModel, tmp_path / "ours", params, config)
    back = TorchUNet.from_pretrained(tmp_path / "ours").state_dict()
    for name, value in twin.state_dict().items():
        assert torch.equal(back[name], value), name


@pytest.mark.parametrize("policy", [pytest.param("dots", marks=pytest.mark.slow), "full"])
def test_rematerialized_it_is_the_same(tmp_path, policy):
    twin, batch = make_twin("two blocks", tmp_path), make_batch("two blocks")
    graph, params = load_model(UNet2DConditionModel, tmp_path)
    expected = run_torch(twin, *batch)
    weights = np.random.default_rng(1).standard_normal(expected.shape, np.float32)
    with rematerialized(policy):
        actual, grads = forward_and_gradient(graph, params, batch, weights)
        text = jax.jit(lambda p: nnx.merge(graph, p)(*batch)).lower(params).as_text()
    assert relative_error(actual, expected) <= 1e-5
    (expected * torch.from_numpy(weights)).sum().backward()
    assert_same_gradients(grads, twin)
    assert "stablehlo.while" in text


def forward_and_gradient(graph, params, batch, weights):
    """The prediction and the gradient of its product with weights, in one compilation."""

    def loss(params):
        prediction = nnx.merge(graph, params)(*batch)
        return (prediction * weights).sum(), prediction

    (_, prediction), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return prediction, grads


@pytest.mark.parametrize(
    "variant",
    ["sd1", *(pytest.param(each, marks=pytest.mark.slow) for each in ("sd2, turbo", "sdxl"))],
)
def test_bfloat16_points_the_same_way(tmp_path, variant):
    twin, batch = make_twin(variant, tmp_path), make_batch(variant)
    graph, params = load_model(UNet2DConditionModel, tmp_path, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    half = jax.jit(lambda p: nnx.merge(graph, p)(*batch))(params)
    assert half.dtype == jnp.bfloat16
    with torch.no_grad():
        exact = run_torch(twin, *batch).numpy().ravel()
        torch_half = twin.bfloat16()
        # torch's own: the inputs must be bfloat16 too, timesteps and sizes stay as they are
        inputs = [torch.from_numpy(each) for each in batch]
        added = {}
        if len(batch) == 5:
            added = {"text_embeds": inputs[3].bfloat16(), "time_ids": inputs[4]}
        sample = inputs[0].permute(0, 3, 1, 2).bfloat16()
        torch_half = torch_half(
            sample, inputs[1], inputs[2].bfloat16(), added_cond_kwargs=added
        ).sample
        torch_half = torch_half.float().permute(0, 2, 3, 1).numpy().ravel()
    half = np.asarray(half, np.float32).ravel()
    assert cosine(half, exact) >= 0.999
    assert np.abs(half - exact).mean() <= 1.5 * np.abs(torch_half - exact).mean()


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def test_added_conditions_must_fit(tmp_path):
    for variant, given, message in (
        ("sdxl", slice(0, 3), r"needs text_embeds \[b, p\] and time_ids"),
        ("sdxl", slice(0, 4), r"needs text_embeds \[b, p\] and time_ids"),
        ("sd1", slice(0, 5), "this one has none: leave them out"),
        ("refiner", slice(0, 5), "10 numbers and 6 time_ids of 8 make 58, the network takes 50"),
    ):
        config = UNet2DConditionConfig.from_dict(SIZES | VARIANTS[variant])
        graph, params = abstract_model(UNet2DConditionModel, config)
        batch = make_batch("sdxl")[given]
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda p, graph=graph, b=batch: nnx.merge(graph, p)(*b), params)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_embed_type": "timestep"}, r"class_embed_type='timestep' \(supported: None\)"),
        ({"num_attention_heads": 8}, "num_attention_heads=8"),
        ({"time_cond_proj_dim": 256}, "time_cond_proj_dim=256"),
        ({"mid_block_type": None}, "mid_block_type=None .*'UNetMidBlock2DCrossAttn'"),
        ({"only_cross_attention": [True, True, False]}, "only_cross_attention"),
        ({"layers_per_block": [2, 2, 1]}, "layers_per_block=.*a whole number"),
        ({"norm_num_groups": None}, "norm_num_groups=None .*a whole number"),
        ({"addition_embed_type": "text"}, 'addition_embed_type=.text. .*`"text_time"` or `null`'),
        ({"addition_embed_type": "text_time"}, "needs addition_time_embed_dim"),
        ({"attention_head_dim": [8, 8]}, "attention_head_dim=.*each of the 3"),
        ({"transformer_layers_per_block": [1, 2]}, "transformer_layers_per_block=.*each of the 3"),
        ({"transformer_layers_per_block": [1, [2, 2], 1]}, "transformer_layers_per_block"),
        ({"down_block_types": ["AttnDownBlock2D"] * 3}, 'down_block_types=.*"DownBlock2D"` or'),
        ({"up_block_types": ["UpBlock2D"] * 2}, "up_block_types=.*each of the 3"),
        ({"a_new_field": None}, "a_new_field=None .unknown field"),
    ],
)
def test_the_config_must_be_supported(change, message):
    with pytest.raises(ValueError, match=message):
        UNet2DConditionConfig.from_dict(SIZES | change)
