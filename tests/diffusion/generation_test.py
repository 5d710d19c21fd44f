"""The generator with a stand-in backbone of a few matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agfsync_jax import backbones
from agfsync_jax.diffusion import generation
from agfsync_jax.diffusion.generation import Generator, row_seed
from agfsync_jax.diffusion.schedules import Schedule
from agfsync_jax.parallel.mesh import create_mesh
from agfsync_jax.samplers import ddim, euler
from configs import micro

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
    settings |= {"batch_size": 8, "conditioning_noise": 0.5, "sampler": ddim.SAMPLER}
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
        sampler=ddim.SAMPLER,
    )
    latents = generate(params, ["x"], [seed], [False])[0][0]
    start = jax.random.normal(jax.random.key(seed), (4, 4, 4))
    scale = (1 / Identity.schedule.alphas_cumprod[0]) ** 0.5  # one step from timestep 0 to clean
    np.testing.assert_allclose(latents, start * scale, rtol=1e-3, atol=1e-4)


def test_one_compilation_and_no_guidance_at_scale_one(params):
    generate = make(batch_size=8)
    for count in (11, 3, 8):
        generate(params, PROMPTS[:count], SEEDS[:count], PERTURB[:count])
    assert generate._draw_program._cache_size() == generate._encode_program._cache_size() == 1
    plain = make(guidance_scale=1.0)(params, PROMPTS, SEEDS, PERTURB)[0]
    assert np.abs(plain - make()(params, PROMPTS, SEEDS, PERTURB)[0]).max() > 0.01


def test_stream_yields_every_row_once_in_order(params, reference):
    rows = [rows for rows, latents, _ in make().stream(params, PROMPTS, SEEDS, PERTURB)]
    assert [each.tolist() for each in rows] == [list(range(8)), [8, 9, 10]]
    assert list(make().stream(params, [], [], [])) == []


# 3 candidates a prompt: groups of 24 rows, 8 prompts, in batches of 8.
NAMES = [f"prompt {index}" for index in range(11)]
GRID = np.array([[row_seed(0, 0, name, k) for k in range(3)] for name in NAMES], np.uint32)
FLAGS = np.array([[False, True, True]] * 11)


@pytest.fixture(scope="module")
def grid(params):
    return make()(params, NAMES, GRID, FLAGS)


@pytest.mark.parametrize("num_devices", [1, 2, 8])
@pytest.mark.parametrize("batch_size", [3, 8])
def test_candidates_of_several_prompts_share_batches(params, grid, num_devices, batch_size):
    flat = make()(params, np.repeat(NAMES, 3).tolist(), GRID.reshape(-1), FLAGS.reshape(-1))
    other = make(num_devices, batch_size=batch_size)(params, NAMES, GRID, FLAGS)
    for latents, images in (flat, other):
        np.testing.assert_allclose(latents, grid[0], rtol=1e-3, atol=1e-4)
        assert np.abs(images.astype(int) - grid[1].astype(int)).max() <= 1


@pytest.mark.parametrize("batch_size", [3, 8, 24])
def test_a_prompt_is_encoded_once(params, batch_size):
    generate = make(1, batch_size=batch_size)
    seen, sizes, program = [], [], generate._encode_program

    def encode(params, tokens):
        seen.extend(dict.fromkeys(map(bytes, np.asarray(tokens[0]))))  # copies fill it up
        sizes.append(len(tokens[0]))
        return program(params, tokens)

    generate._encode_program = encode
    generate(params, NAMES, GRID, FLAGS)
    own = [bytes(ids) for ids in FakeBackbone().tokenize(NAMES)]
    assert sorted(ids for ids in seen if ids in own) == sorted(own)
    batches = -(-33 // batch_size)
    assert sum(sizes) <= len(own) + 2 * batches * batch_size  # the rest is padding and the negative


def test_rows_that_are_wanted_come_from_the_same_batches(params, grid, monkeypatch):
    generate = make()
    wanted = np.zeros(33, bool)
    wanted[[1, 2, 30]] = True
    drawn = []
    program = generate._draw_program
    monkeypatch.setattr(
        generate, "_draw_program", lambda *args: drawn.append(np.asarray(args[3])) or program(*args)
    )
    batches = list(generate.stream(params, NAMES, GRID, FLAGS, wanted=wanted))
    assert np.concatenate([rows for rows, _, _ in batches]).tolist() == [1, 2, 30]
    latents, images = (np.concatenate([batch[i] for batch in batches]) for i in (1, 2))
    # Not close: the same. Each row was drawn beside the same others as when all were.
    np.testing.assert_array_equal(latents, grid[0][wanted])
    np.testing.assert_array_equal(images, grid[1][wanted])
    np.testing.assert_array_equal(drawn[0], GRID.reshape(-1)[:8])
    np.testing.assert_array_equal(drawn[1], GRID.reshape(-1)[24:32])
    assert len(drawn) == 2
    assert list(generate.stream(params, NAMES, GRID, FLAGS, wanted=np.zeros(33, bool))) == []


def test_decoding_a_few_at_a_time_gives_the_same(params, grid, monkeypatch):
    for pixels in (1, 2 * 16 * 16):
        monkeypatch.setattr(generation, "_DECODED_PIXELS", pixels)
        latents, images = make(2, batch_size=12)(params, NAMES, GRID, FLAGS)
        np.testing.assert_allclose(latents, grid[0], rtol=1e-3, atol=1e-4)
        assert np.abs(images.astype(int) - grid[1].astype(int)).max() <= 1


class FakeRefiner(FakeBackbone):
    negative_conditioning = {"aesthetic_score": 2.5}

    def __init__(self, params):
        self.params = params

    def encode_prompt(self, params, tokens):
        return super().encode_prompt(params, tokens) | {"aesthetic_score": jnp.full(len(tokens), 6)}

    def denoise(self, params, latents, timesteps, conditioning):
        score = conditioning["aesthetic_score"].reshape(-1, 1, 1, 1)
        return super().denoise(params, latents, timesteps, conditioning) * score / 6.0


def test_a_refiner_goes_on_where_the_base_stops(params, grid):
    settings = {"sampler": euler.SAMPLER, "num_inference_steps": 10, "conditioning_noise": 0.0}
    whole = make(**settings)(params, NAMES, GRID, FLAGS)[0]
    same = FakeBackbone()
    same.params = params
    handed = make(**settings, refiner=same, refiner_start=0.6)(params, NAMES, GRID, FLAGS)[0]
    np.testing.assert_allclose(handed, whole, rtol=2e-3, atol=1e-3)
    # Without guidance the score it avoids has no say; with it, it has.
    for scale, differs in ((1.0, False), (3.0, True)):
        settings["guidance_scale"] = scale
        plain = make(**settings)(params, NAMES, GRID, FLAGS)[0]
        scored = make(**settings, refiner=FakeRefiner(params))(params, NAMES, GRID, FLAGS)[0]
        assert (np.abs(scored.astype(float) - plain).max() > 0.01) == differs
    with pytest.raises(ValueError, match="refiner_start=1.0"):
        make(refiner=same, refiner_start=1.0)


def test_base_and_refiner_share_a_sampler(params):
    config = micro.get_config("tiny")
    base, refiner = FakeRefiner(params), FakeRefiner(params)
    refiner.schedule = Schedule.from_config({"_class_name": "EulerDiscreteScheduler"})
    mesh = create_mesh({"data": 1}, devices=jax.devices()[:1])
    with pytest.raises(ValueError, match="base and refiner differ"):
        backbones.generator(config, mesh, base, refiner=refiner)
    config.sample.sampler = "heun"
    steps = config.sample.num_inference_steps
    assert backbones.generator(config, mesh, base).num_calls == 2 * steps - 1
    assert backbones.generator(config, mesh, base, refiner=refiner).num_calls == 2 * steps - 1


def test_pooled_embeddings_are_perturbed_at_the_same_strength(params):
    class Pooled(FakeBackbone):
        def encode_prompt(self, params, tokens):
            hidden = super().encode_prompt(params, tokens)["encoder_hidden_states"]
            return {
                "encoder_hidden_states": 0 * hidden,
                "text_embeds": jnp.zeros((len(tokens), 4096)),
            }

        def denoise(self, params, latents, timesteps, conditioning):
            pooled = conditioning["text_embeds"].reshape(-1, 16, 16, 16)
            return pooled[:, :4, :4, :4]  # what the sampler takes for noise

    settings = {"num_inference_steps": 1, "guidance_scale": 1.0, "conditioning_noise": 0.1}
    settings["sampler"] = ddim.SAMPLER
    mesh = create_mesh({"data": 1}, devices=jax.devices()[:1])
    generate = Generator(Pooled(), mesh, height=16, width=16, batch_size=8, **settings)
    seeds = np.arange(64, dtype=np.uint32).reshape(8, 8)
    flags = np.tile(np.arange(8) > 0, (8, 1))
    latents, _ = generate(params, NAMES[:8], seeds, flags)
    clean, _ = generate(params, NAMES[:8], seeds, np.zeros_like(flags))
    alpha = Pooled.schedule.alphas_cumprod[0]
    noise = (clean.astype(float) - latents) * (alpha / (1 - alpha)) ** 0.5
    perturbed = flags.reshape(-1)
    assert np.abs(noise[~perturbed]).max() < 0.02  # float16's rounding, scaled up
    assert noise[perturbed].std() == pytest.approx(0.1, rel=0.1)


def test_bad_arguments(params):
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
