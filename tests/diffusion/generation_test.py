"""The generator with a stand-in backbone of a few matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agfsync_jax.diffusion.generation import Generator, row_seed
from agfsync_jax.diffusion.schedules import Schedule
from agfsync_jax.parallel.mesh import create_mesh

PROMPTS = [f"prompt {index // 3}" for index in range(11)]
SEEDS = [row_seed(0, 0, prompt, index % 3) for index, prompt in enumerate(PROMPTS)]
PERTURB = [index % 3 > 0 for index in range(11)]


class FakeBackbone:
    schedule = Schedule.from_config({"clip_sample": False})

    def latent_shape(self, height, width):
        return height // 4, width // 4, 4

    def tokenize(self, prompts):
        return np.array([[ord(letter) for letter in f"{text:12.12}"] for text in prompts], np.int32)

    def encode_prompt(self, params, tokens):
        return {"encoder_hidden_states": jnp.sin(params["table"][tokens])}  # [b, 12, 8]

    def denoise(self, params, latents, timesteps, conditioning):
        context = conditioning["encoder_hidden_states"].mean(axis=1) @ params["mix"]  # [b, 4]
        time = jnp.cos(timesteps.astype(jnp.float32) / 300)[:, None, None, None]
        return jnp.tanh(latents @ params["weight"] + context[:, None, None, :]) * time

    def decode_latents(self, params, latents):
        pixels = jnp.repeat(jnp.repeat(latents[..., :3], 4, axis=1), 4, axis=2)
        return jnp.round(jax.nn.sigmoid(pixels) * 255).astype(jnp.uint8)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    shapes = {"table": (128, 8), "mix": (8, 4), "weight": (4, 4)}
    return {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in shapes.items()}


def make(num_devices=8, **changes):
    settings = {"height": 16, "width": 16, "num_inference_steps": 5, "guidance_scale": 3.0}
    settings |= {"batch_size": 8, "conditioning_noise": 0.5}
    mesh = create_mesh({"data": -1}, devices=jax.devices()[:num_devices])
    return Generator(FakeBackbone(), mesh, **(settings | changes))


@pytest.fixture(scope="module")
def reference(params):
    return make()(params, PROMPTS, SEEDS, PERTURB)


def test_shapes_and_types(reference):
    latents, images = reference
    assert latents.shape == (11, 4, 4, 4) and latents.dtype == np.float16
    assert images.shape == (11, 16, 16, 3) and images.dtype == np.uint8


@pytest.mark.parametrize("num_devices", [1, 8])
@pytest.mark.parametrize("batch_size", [3, 8])
def test_rows_depend_neither_on_batches_nor_on_devices(params, reference, num_devices, batch_size):
    latents, images = make(num_devices, batch_size=batch_size)(params, PROMPTS, SEEDS, PERTURB)
    # One unit in the last place of float16 at most: 2^-10 of the value.
    np.testing.assert_allclose(latents, reference[0], rtol=1e-3, atol=1e-4)
    assert np.abs(images.astype(int) - reference[1].astype(int)).max() <= 1


def test_rows_depend_not_on_their_neighbors(params, reference):
    order = [7, 2, 9]
    rows = [[column[i] for i in order] for column in (PROMPTS, SEEDS, PERTURB)]
    latents, _ = make()(params, *rows)
    np.testing.assert_allclose(latents, reference[0][order], rtol=1e-3, atol=1e-4)


def test_seed_prompt_and_perturbation_each_matter(params, reference):
    generate = make()

    def first(prompt=PROMPTS[1], seed=SEEDS[1], perturb=PERTURB[1]):
        return generate(params, [prompt], [seed], [perturb])[0][0]

    np.testing.assert_allclose(first(), reference[0][1], rtol=1e-3, atol=1e-4)
    for change in ({"prompt": "another"}, {"seed": SEEDS[1] ^ 1}, {"perturb": False}):
        assert np.abs(first(**change) - reference[0][1]).max() > 0.01


def test_without_noise_perturbed_rows_are_clean_rows(params):
    generate = make(conditioning_noise=0.0)
    clean = generate(params, PROMPTS, SEEDS, [False] * 11)[0]
    assert (generate(params, PROMPTS, SEEDS, PERTURB)[0] == clean).all()
    unperturbed = [not perturb for perturb in PERTURB]
    with_noise = make()(params, PROMPTS, SEEDS, PERTURB)[0]
    np.testing.assert_allclose(with_noise[unperturbed], clean[unperturbed], rtol=1e-3, atol=1e-4)


def test_initial_latents_come_from_the_seed_alone(params):
    class Identity(FakeBackbone):
        def denoise(self, params, latents, timesteps, conditioning):
            return jnp.zeros_like(latents)

    seed = 2**32 - 5
    mesh = create_mesh({"data": 1}, devices=jax.devices()[:1])
    generate = Generator(
        Identity(),
        mesh,
        height=16,
        width=16,
        num_inference_steps=1,
        guidance_scale=1.0,
        batch_size=2,
    )
    latents = generate(params, ["x"], [seed], [False])[0][0]
    start = jax.random.normal(jax.random.key(seed), (4, 4, 4))
    scale = (1 / Identity.schedule.alphas_cumprod[0]) ** 0.5  # one step from timestep 0 to clean
    np.testing.assert_allclose(latents, start * scale, rtol=1e-3, atol=1e-4)


def test_one_compilation_and_no_guidance_at_scale_one(params):
    generate = make(batch_size=8)
    for count in (11, 3, 8):
        generate(params, PROMPTS[:count], SEEDS[:count], PERTURB[:count])
    assert generate._program._cache_size() == 1
    plain = make(guidance_scale=1.0)(params, PROMPTS, SEEDS, PERTURB)[0]
    assert np.abs(plain - make()(params, PROMPTS, SEEDS, PERTURB)[0]).max() > 0.01


def test_stream_yields_every_row_once_in_order(params, reference):
    rows = [rows for rows, latents, _ in make().stream(params, PROMPTS, SEEDS, PERTURB)]
    assert [(each.start, each.stop) for each in rows] == [(0, 8), (8, 11)]
    assert list(make().stream(params, [], [], [])) == []


def test_bad_arguments(params):
    with pytest.raises(ValueError, match="Unknown sampler 'heun'"):
        make(sampler="heun")
    with pytest.raises(ValueError, match="takes 1 to 1000"):
        make(num_inference_steps=1001)
    with pytest.raises(ValueError, match="2 prompts, 1 seeds, 1 perturb"):
        make()(params, ["a", "b"], [1], [False])
    with pytest.raises(ValueError, match="no prompts"):
        make()(params, [], [], [])


def test_row_seeds_are_spread_and_fixed():
    seeds = {
        row_seed(seed, round_index, prompt, candidate)
        for seed in range(3)
        for round_index in range(3)
        for prompt in ("p0", "p1", "p00")
        for candidate in range(8)
    }
    assert len(seeds) == 3 * 3 * 3 * 8
    assert all(0 <= seed < 2**32 for seed in seeds)
    # Another value, and the candidates of earlier runs could not be drawn again.
    assert row_seed(0, 0, "p0", 0) == 2066567606
