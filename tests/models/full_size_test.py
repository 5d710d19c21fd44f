"""The released checkpoints fit: every config.json is understood, every key and shape is placed.

The torch modules and ours are built without memory. The slow tests run some of them at full size
with random weights, one at a time; one at a time is also how to start them, as
`pytest -m slow -s tests/models/full_size_test.py -k "sd15 and unet"`.
"""

import dataclasses
import functools
import gc
import json
import math
import re
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from flax import nnx

from agfsync_jax.models.__main__ import page
from agfsync_jax.weights.networks import abstract_model, checkpoint_key
from tests.released import CHECKPOINTS, NETWORKS, Part, VisionTower
from tests.twins import relative_error, unit_gain


@functools.cache
def our_table(cls, config):
    """Checkpoint key -> shape in the checkpoint, of a network built without memory."""
    _, abstract = abstract_model(cls, config)
    table = {}
    for path, leaf in nnx.to_flat_state(abstract):
        shape = tuple(leaf.shape)
        key, axes = checkpoint_key(path, len(shape))
        assert key not in table
        table[key] = tuple(shape[axis] for axis in axes) if axes else shape
    return table


@functools.cache
def torch_shapes(theirs, config):
    """Key -> shape of a torch module built without memory from a config.json's text."""
    with torch.device("meta"):
        module = Part(None, theirs, json.loads(config)).twin()
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}


def spellings(part):
    """State dicts of shapes in each spelling that files of this network have."""
    shapes = torch_shapes(part.theirs, json.dumps(part.config, sort_keys=True))
    yield shapes
    if part.theirs.startswith("transformers.CLIPText"):
        length = part.config["max_position_embeddings"]
        old = {re.sub(r"^(?!text_)", "text_model.", key): shape for key, shape in shapes.items()}
        yield old | {"text_model.embeddings.position_ids": (1, length)}
    if part.theirs == "transformers.CLIPModel":
        tokens = shapes["vision_model.embeddings.position_embedding.weight"][0]
        yield (
            shapes
            | {"text_model.embeddings.position_ids": (1, 77)}
            | {"vision_model.embeddings.position_ids": (1, tokens)}
        )
    if part.theirs == "diffusers.AutoencoderKL":
        names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        old = shapes
        for new, name in names.items():
            old = {key.replace(f".{new}.", f".{name}."): value for key, value in old.items()}
        assert old.keys() != shapes.keys()
        yield old
    if part.theirs.startswith("transformers.Blip2"):  # transformers 4 keeps one of equal tensors
        tied = r"language_model\.(encoder|decoder)\.embed_tokens\.weight"
        yield {key: shape for key, shape in shapes.items() if not re.fullmatch(tied, key)}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_key_is_placed_once(name):
    part = NETWORKS[name]
    config = part.ours.config_class.from_dict(part.config)
    if hasattr(config, "sample_size"):  # which shapes nothing: one table serves more checkpoints
        config = dataclasses.replace(config, sample_size=0)
    table = our_table(part.ours, config)
    aliases = getattr(part.ours, "key_aliases", ())
    ignored = getattr(part.ours, "ignored_keys", ())
    for shapes in spellings(part):
        placed = {}
        for stored, shape in shapes.items():
            key = stored
            for pattern, replacement in aliases:
                key = re.sub(pattern, replacement, key)
            if key not in table:
                assert any(re.fullmatch(pattern, key) for pattern in ignored), stored
                continue
            assert key not in placed, f"{stored} is another spelling of {key}, which is there"
            assert shape == table[key], stored
            placed[key] = stored
        assert placed.keys() == table.keys()
    if part.parameters is not None:
        assert sum(map(math.prod, table.values())) == part.parameters


@pytest.mark.parametrize("name", [name for name in NETWORKS if "saved again" in name])
def test_both_spellings_are_one_network(name):
    """A file that a newer library saved again means the same."""
    part = NETWORKS[name]
    config = part.ours.config_class.from_dict(part.config)
    checkpoint, label = name.split(": ")
    first = CHECKPOINTS[checkpoint][label.split(",")[0]]
    assert config == first.ours.config_class.from_dict(first.config)


def test_the_page_of_fields_is_the_printed_one():
    path = Path(__file__).parents[2] / "docs" / "config_fields.md"
    assert path.read_text() == f"{page()}\n", (
        "write it again: python -m agfsync_jax.models > docs/config_fields.md"
    )


@pytest.mark.parametrize("name", [name for name in CHECKPOINTS if "scheduler" in CHECKPOINTS[name]])
def test_schedulers_are_those_of_diffusers(name):
    twin = CHECKPOINTS[name]["scheduler"].twin()
    assert twin.config.beta_schedule == "scaled_linear"


# Full size with random weights


def run_both(part, torch_run, our_run):
    """The outputs of the torch module, and of ours with the same weights, by name.

    The weights move over one by one, so that a network is in memory once.
    """
    started = time.perf_counter()
    twin = unit_gain(part.twin())
    built = time.perf_counter()
    with torch.no_grad():
        expected = {name: value.numpy() for name, value in torch_run(twin).items()}
    torch_ran = time.perf_counter()
    graph, abstract = abstract_model(part.ours, part.ours.config_class.from_dict(part.config))
    keys = {re.sub("^(text|vision)_model[.]", "", key): key for key, _ in twin.named_parameters()}
    filled = []
    for path, leaf in nnx.to_flat_state(abstract):
        key, axes = checkpoint_key(path, len(leaf.shape))
        key = keys[re.sub("^(text|vision)_model[.]", "", key)]
        parameter = twin.get_parameter(key)
        value = parameter.detach().numpy()
        value = np.array(value.transpose(np.argsort(axes)) if axes else value, order="C")
        filled.append((path, leaf.replace(jax.device_put(value))))
        parameter.data = torch.empty(0)
    del twin, parameter
    gc.collect()
    params = nnx.from_flat_state(filled)
    del filled
    loaded = time.perf_counter()
    run = jax.jit(lambda params: our_run(nnx.merge(graph, params))).lower(params).compile()
    compiled = time.perf_counter()
    actual = jax.device_get(run(params))
    seconds = [built - started, torch_ran - built, loaded - torch_ran, compiled - loaded]
    seconds.append(time.perf_counter() - compiled)
    labels = ("torch built", "torch ran", "moved", "compiled", "ran")
    print()
    print(", ".join(f"{label} {each:.1f} s" for label, each in zip(labels, seconds, strict=True)))
    return actual, expected


def check(part, torch_run, our_run):
    actual, expected = run_both(part, torch_run, our_run)
    for name, value in expected.items():
        error = relative_error(actual[name], value)
        print(f"{name} {list(value.shape)}: std {value.std():.3g}, relative error {error:.2g}")
        assert np.isfinite(value).all() and 1e-2 < value.std() < 1e3
        assert error <= 1e-4


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def channels_first(x):
    return torch.from_numpy(np.moveaxis(x, -1, 1).copy())


def channels_last(x):
    return x.permute(0, 2, 3, 1)


UNETS = {
    "sd15": ("stable-diffusion-v1-5/stable-diffusion-v1-5", 64),
    "sd21": ("stabilityai/stable-diffusion-2-1-base", 64),
    "sdxl": ("stabilityai/stable-diffusion-xl-base-1.0", 128),
    "refiner": ("stabilityai/stable-diffusion-xl-refiner-1.0", 128),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", UNETS)
def test_unet_at_full_size(name):
    checkpoint, size = UNETS[name]
    part = CHECKPOINTS[checkpoint]["unet"]
    sample, context = normal(1, size, size, 4), normal(1, 77, part.config["cross_attention_dim"])
    timesteps, added = np.array([601], np.int32), {}
    if part.config.get("addition_embed_type"):
        sizes = [[1024, 768, 16, 0, 1024, 1024], [1024, 768, 16, 0, 6]][name == "refiner"]
        added = {"text_embeds": normal(1, 1280), "time_ids": np.array([sizes], np.float32)}

    def torch_run(twin):
        conditions = {key: torch.from_numpy(value) for key, value in added.items()}
        inputs = channels_first(sample), torch.from_numpy(timesteps), torch.from_numpy(context)
        return {"sample": channels_last(twin(*inputs, added_cond_kwargs=conditions).sample)}

    check(part, torch_run, lambda ours: {"sample": ours(sample, timesteps, context, **added)})


@pytest.mark.slow
def test_vae_at_full_size():
    part = CHECKPOINTS["stable-diffusion-v1-5/stable-diffusion-v1-5"]["vae"]
    images, latents = normal(1, 512, 512, 3), normal(1, 64, 64, 4)

    def torch_run(twin):
        posterior = twin.encode(channels_first(images)).latent_dist
        outputs = {"mean": posterior.mean, "log variance": posterior.logvar}
        outputs["images"] = twin.decode(channels_first(latents)).sample
        return {name: channels_last(value) for name, value in outputs.items()}

    def our_run(ours):
        mean, log_variance = ours.encode(images)
        return {"mean": mean, "log variance": log_variance, "images": ours.decode(latents)}

    check(part, torch_run, our_run)


TEXTS = {
    "clip_l": ("stable-diffusion-v1-5/stable-diffusion-v1-5", "text_encoder"),
    "clip_h": ("stabilityai/stable-diffusion-2-1-base", "text_encoder"),
    "clip_bigg": ("stabilityai/stable-diffusion-xl-base-1.0", "text_encoder_2"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TEXTS)
def test_text_tower_at_full_size(name):
    checkpoint, part = TEXTS[name]
    part = CHECKPOINTS[checkpoint][part]
    ids = np.random.default_rng(0).integers(0, 49406, (2, 77)).astype(np.int32)
    ids[:, 0], ids[0, 9:], ids[1, 76] = 49406, 49407, 49407

    def torch_run(twin):
        output = twin(torch.from_numpy(ids).long(), output_hidden_states=True)
        outputs = {"last": output.last_hidden_state, "penultimate": output.hidden_states[-2]}
        projected = name == "clip_bigg"
        return outputs | {"pooled": output.text_embeds if projected else output.pooler_output}

    def our_run(ours):
        output = ours(ids)
        last, penultimate = output.last_hidden_state, output.penultimate_hidden_state
        pooled = output.pooler_output if output.text_embeds is None else output.text_embeds
        return {"last": last, "penultimate": penultimate, "pooled": pooled}

    check(part, torch_run, our_run)


@pytest.mark.slow
def test_vision_tower_at_full_size():
    whole = CHECKPOINTS["openai/clip-vit-large-patch14"]["clip"]
    config = whole.config["vision_config"]
    part = Part(VisionTower, "transformers.CLIPVisionModel", config)
    pixels = normal(2, 224, 224, 3)

    def torch_run(twin):
        output = twin(channels_first(pixels))
        return {"last": output.last_hidden_state, "pooled": output.pooler_output}

    check(part, torch_run, lambda ours: dict(zip(("last", "pooled"), ours(pixels), strict=True)))
