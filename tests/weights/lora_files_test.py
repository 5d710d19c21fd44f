"""LoRA files against diffusers and PEFT, in and out.

The tiny networks get random adapters of several ranks and alphas on every kind of module that
LCM-LoRA adapts. What they give in torch is what a file of them must give here.
"""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import (
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from flax import nnx
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.numpy import load_file
from safetensors.torch import save_file

from agfsync_jax.backbones.stable_diffusion import Backbone
from agfsync_jax.diffusion.denoising import guide
from agfsync_jax.models import clip, lora, unet
from agfsync_jax.samplers import ddim
from agfsync_jax.weights.lora_files import load_lora, read_lora, write_lora
from agfsync_jax.weights.networks import abstract_model, load_model
from agfsync_jax.weights.tensor_files import Tensor, from_array, write_tensors
from tests.twins import relative_error, tiny_stable_diffusion

# The modules that LCM-LoRA adapts: diffusers' train_lcm_distill_lora_*.py.
LCM = """to_q to_k to_v to_out.0 proj_in proj_out ff.net.0.proj ff.net.2 conv1 conv2 conv_shortcut
downsamplers.0.conv upsamplers.0.conv time_emb_proj""".split()
UNET = {
    "r": 4,
    "lora_alpha": 2,
    "rank_pattern": {"to_k": 3, "attn1.to_q": 2, "conv1": 5},
    "alpha_pattern": {"to_k": 5, "conv2": 1, "up_blocks.0.resnets.0.conv1": 7},
}
TEXT = {"r": 3, "lora_alpha": 6, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"fc1": 1}}
TEXT_TARGETS = "q_proj k_proj v_proj out_proj fc1 fc2".split()
PLACES = {"lora_A": "down", "lora_B": "up"}


def randomize(model, seed=0):
    """Gives adapters weights with which they change the output by about as much as it is."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.copy_(torch.randn_like(value) * value[0].numel() ** -0.5)


def add_adapters(pipe, unet_settings, text_settings):
    pipe.unet.add_adapter(LoraConfig(target_modules=LCM, **unet_settings))
    pipe.text_encoder.add_adapter(LoraConfig(target_modules=TEXT_TARGETS, **text_settings))
    for network in (pipe.unet, pipe.text_encoder):
        randomize(network)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stable_diffusion")
    tiny_stable_diffusion(folder)
    return folder


def open_pipe(folder):
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def adapted(folder):
    """A pipeline with the adapters of UNET and TEXT."""
    pipe = open_pipe(folder)
    add_adapters(pipe, UNET, TEXT)
    return pipe


@pytest.fixture(scope="module")
def backbone(folder):
    return Backbone.load(folder)


INPUTS = {
    "sample": np.random.default_rng(0).normal(size=(2, 16, 16, 4)).astype(np.float32),
    "timesteps": np.array([7, 801]),
    "text": np.random.default_rng(1).normal(size=(2, 12, 16)).astype(np.float32),
    "tokens": np.random.default_rng(2).integers(0, 50, (2, 12)),
}


def their_outputs(pipe, scale=1.0):
    """The UNet's prediction and the text encoder's hidden states."""
    sample, timesteps, text, tokens = (torch.from_numpy(value) for value in INPUTS.values())
    with torch.no_grad():
        prediction = pipe.unet(
            sample.permute(0, 3, 1, 2), timesteps, text, cross_attention_kwargs={"scale": scale}
        ).sample
        return {
            "unet": prediction.permute(0, 2, 3, 1).numpy(),
            "text_encoder": pipe.text_encoder(tokens)[0].numpy(),
        }


@pytest.fixture(scope="module")
def our_outputs(backbone):
    @jax.jit
    def apply(params):
        sample, timesteps, text, tokens = (jnp.asarray(value) for value in INPUTS.values())
        conditioning = {"encoder_hidden_states": text}
        return {
            "unet": backbone.denoise(params, sample, timesteps, conditioning),
            "text_encoder": backbone.encode_prompt(params, tokens)["encoder_hidden_states"],
        }

    def outputs(adapters, scale=1.0):
        params = dict(backbone.params)
        for name, each in adapters.items():
            params[name] = lora.merge(params[name], each, scale=scale)
        return jax.device_get(apply(params))

    return outputs


def assert_equal_outputs(ours, theirs, names=("unet", "text_encoder")):
    for name in names:
        assert relative_error(ours[name], theirs[name]) <= 1e-5, name


def factors(model):
    """{module: (down, up, scaling, alpha)} of a torch model with adapters."""
    return {
        name: (
            module.lora_A["default"].weight.detach(),
            module.lora_B["default"].weight.detach(),
            module.scaling["default"],
            float(module.lora_alpha["default"]),
        )
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }


def by_key(pipe):
    """{(network, module as checkpoints call it): factors}."""
    parts = {"unet": factors(pipe.unet)}
    text = factors(pipe.text_encoder)
    parts["text_encoder"] = {f"text_model.{name}": each for name, each in text.items()}
    return {(n, module): each for n, part in parts.items() for module, each in part.items()}


# Writers of the layouts that are read: (pipeline with adapters, folder) -> file.


def save_diffusers(pipe, path):
    """As diffusers' training scripts end, with the settings in the header."""
    StableDiffusionPipeline.save_lora_weights(
        path,
        get_peft_model_state_dict(pipe.unet),
        get_peft_model_state_dict(pipe.text_encoder),
        unet_lora_adapter_metadata=pipe.unet.peft_config["default"].to_dict(),
        text_encoder_lora_adapter_metadata=pipe.text_encoder.peft_config["default"].to_dict(),
    )
    return path


def save_without_settings(pipe, path):
    """As older diffusers: alpha is the rank."""
    tensors = {}
    for (network, module), (down, up, scaling, _) in by_key(pipe).items():
        tensors[f"{network}.{module}.lora_A.weight"] = down
        tensors[f"{network}.{module}.lora_B.weight"] = up * scaling
    path.mkdir()
    save_file({key: value.contiguous() for key, value in tensors.items()}, path / "x.safetensors")
    return path / "x.safetensors"


def save_old(pipe, path, prefix=True):
    """diffusers 0.17 to 0.21."""
    tensors = {}
    for (network, module), (down, up, scaling, _) in by_key(pipe).items():
        match = re.fullmatch(r"(.*\.)(?:to_)?(q|k|v|out)(?:_proj|\.0)?", module)
        if "attn" in module and match:
            module = f"{match[1]}{'processor.' * (network == 'unet')}to_{match[2]}_lora"
        else:
            module += ".lora" if network == "unet" else ".lora_linear_layer"
        name = f"{network}.{module}" if prefix else module
        if prefix or network == "unet":
            tensors |= {f"{name}.down.weight": down, f"{name}.up.weight": up * scaling}
    path.mkdir()
    save_file({key: value.contiguous() for key, value in tensors.items()}, path / "x.safetensors")
    return path / "x.safetensors"


def save_old_without_prefix(pipe, path):
    return save_old(pipe, path, prefix=False)


def save_kohya(pipe, path):
    """kohya-ss/sd-scripts, networks/lora.py."""
    tensors, prefixes = {}, {"unet": "lora_unet", "text_encoder": "lora_te"}
    for (network, module), (down, up, _, alpha) in by_key(pipe).items():
        name = f"{prefixes[network]}_{module.replace('.', '_')}"
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    path.mkdir()
    save_file({key: value.contiguous() for key, value in tensors.items()}, path / "x.safetensors")
    return path / "x.safetensors"


@pytest.mark.parametrize(
    "save",
    [save_diffusers, save_without_settings, save_old, save_old_without_prefix, save_kohya],
)
def test_a_file_gives_what_its_adapters_gave_in_torch(
    save, adapted, folder, backbone, our_outputs, tmp_path
):
    path = save(adapted, tmp_path / "lora")
    adapters = load_lora(path, backbone.params)
    names = {"unet"} if save is save_old_without_prefix else {"unet", "text_encoder"}
    assert set(adapters) == names
    assert len(adapters["unet"]) == len(factors(adapted.unet))
    assert adapters["unet"]["down_blocks.0.resnets.0.conv1"]["A"].shape == (3, 3, 16, 5)
    assert {each["B"].dtype for part in adapters.values() for each in part.values()} == {
        np.dtype(np.float32)
    }
    assert_equal_outputs(our_outputs(adapters), their_outputs(adapted), names)
    assert not np.allclose(our_outputs({})["unet"], our_outputs(adapters)["unet"], atol=0.1)
    if save in (save_diffusers, save_without_settings):
        # diffusers' own reader, which takes alphas of kohya's files that differ for others
        pipe = open_pipe(folder)
        pipe.load_lora_weights(path)
        assert_equal_outputs(our_outputs(adapters), their_outputs(pipe))
        if save is save_diffusers:
            part = {"unet": adapters["unet"]}
            ours, theirs = our_outputs(part, 0.3), their_outputs(pipe, scale=0.3)
            assert_equal_outputs(ours, theirs, ("unet",))
            pipe.fuse_lora(lora_scale=0.3)
            assert_equal_outputs(our_outputs(adapters, 0.3), their_outputs(pipe))


@pytest.mark.parametrize("kind", [{"use_rslora": True}, {"alpha_pattern": {"^conv_in": 9}}])
def test_a_folder_of_peft(kind, folder, backbone, our_outputs, tmp_path):
    network = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    settings = {**UNET, **kind} if "alpha_pattern" in kind else {"r": 4, "lora_alpha": 3, **kind}
    model = get_peft_model(network, LoraConfig(target_modules=[*LCM, "conv_in"], **settings))
    randomize(model)
    model.save_pretrained(tmp_path)
    adapters = load_lora(tmp_path, backbone.params)
    sample, timesteps, text, _ = (torch.from_numpy(value) for value in INPUTS.values())
    with torch.no_grad():
        theirs = model(sample.permute(0, 3, 1, 2), timesteps, text).sample.permute(0, 2, 3, 1)
    assert list(adapters) == ["unet"]
    assert_equal_outputs(our_outputs(adapters), {"unet": theirs.numpy()}, ("unet",))


def test_a_file_like_lcm_lora(folder, backbone, our_outputs, tmp_path):
    """kohya's keys in float16, rank 8 and alpha 1 everywhere; diffusers reads it alike."""
    pipe = open_pipe(folder)
    add_adapters(pipe, {"r": 8, "lora_alpha": 1}, {"r": 8, "lora_alpha": 1})
    tensors = {}
    for (network, module), (down, up, _, alpha) in by_key(pipe).items():
        if network == "unet":
            name = f"lora_unet_{module.replace('.', '_')}"
            tensors[f"{name}.lora_down.weight"] = down.half().contiguous()
            tensors[f"{name}.lora_up.weight"] = up.half().contiguous()
            tensors[f"{name}.alpha"] = torch.tensor(alpha).half()
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    adapters = load_lora(tmp_path, backbone.params)
    pipe = open_pipe(folder)
    pipe.load_lora_weights(tmp_path)
    pipe.unet.float()
    assert_equal_outputs(our_outputs(adapters), their_outputs(pipe))


def made_here(params, ranks=(2, 2)):
    """Adapters as training starts them, with B random, as after some steps."""
    targets = {
        "unet": r"(to_[qkv]|to_out\.0|conv1|conv_shortcut|proj_in|ff\.net\.2)\.kernel$",
        "text_encoder": r"((q|k|v|out)_proj|fc1)\.kernel$",
    }
    adapters = {}
    for index, (name, rank) in enumerate(zip(targets, ranks, strict=True)):
        key = jax.random.key(index)
        adapters[name] = lora.init_adapters(key, params[name], rank=rank, targets=targets[name])
        for place, (module, each) in enumerate(sorted(adapters[name].items())):
            noise = jax.random.normal(jax.random.fold_in(key, 1000 + place), each["B"].shape)
            adapters[name][module] = {"A": each["A"], "B": 0.2 * noise}
    return adapters


@pytest.fixture(scope="module")
def draw(backbone):
    """(params, noise) -> images, as diffusers draws with 6 steps and guidance 3."""

    @jax.jit
    def program(params, tokens, negative, noise):
        conditioning, none = (backbone.encode_prompt(params, ids) for ids in (tokens, negative))
        denoise = guide(lambda *args: backbone.denoise(params, *args), conditioning, none, 3.0)
        latents = ddim.SAMPLER(denoise, backbone.schedule, noise, 6)
        return backbone.decode_latents(params, latents)

    tokens, negative = (backbone.tokenize([text]) for text in ("red circle", ""))
    return lambda params, noise: np.asarray(program(params, tokens, negative, noise))


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_adapters_made_here_draw_the_same_images_in_diffusers(
    layout, folder, backbone, our_outputs, draw, tmp_path
):
    adapters = made_here(backbone.params)
    path = write_lora(tmp_path / "lora.safetensors", adapters, layout=layout)
    pipe = open_pipe(folder)
    pipe.load_lora_weights(path)
    assert_equal_outputs(our_outputs(adapters), their_outputs(pipe))
    noise = INPUTS["sample"][:1]
    kwargs = {"num_inference_steps": 6, "guidance_scale": 3.0, "height": 32, "width": 32}
    theirs = pipe(
        "red circle",
        latents=torch.from_numpy(noise).permute(0, 3, 1, 2),
        output_type="np",
        **kwargs,
    ).images
    fused = dict(backbone.params)
    fused |= {name: lora.merge(fused[name], each) for name, each in adapters.items()}
    ours, plain = (draw(params, noise) for params in (fused, backbone.params))
    assert np.abs(ours / 255 - theirs).max() <= 2 / 255
    assert np.abs(ours.astype(float) - plain).max() > 20


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_other_ranks_and_half_precision_go_to_diffusers(
    layout, folder, backbone, our_outputs, tmp_path
):
    adapters = made_here(backbone.params, ranks=(4, 3))
    few = made_here(backbone.params, ranks=(2, 2))
    for network, text in (("unet", "attn2.to_k"), ("unet", "conv1"), ("text_encoder", "k_proj")):
        for name in adapters[network]:
            if name.endswith(text):
                adapters[network][name] = few[network][name]
    pipe = open_pipe(folder)
    pipe.load_lora_weights(write_lora(tmp_path / "a.safetensors", adapters, layout=layout))
    assert_equal_outputs(our_outputs(adapters), their_outputs(pipe))
    path = write_lora(tmp_path, adapters, layout=layout, dtype=np.float16)
    dtypes = {key.split(".")[-1]: value.dtype for key, value in load_file(path).items()}
    assert dtypes.pop("alpha", np.float32) == np.float32  # exact, also where ranks are large
    assert dtypes == {"weight": np.float16}
    again = load_lora(path, backbone.params)
    assert relative_error(our_outputs(again)["unet"], our_outputs(adapters)["unet"]) < 1e-2


def test_peft_loads_what_was_written(folder, backbone, our_outputs, tmp_path):
    adapters = {"unet": made_here(backbone.params)["unet"]}
    adapters["unet"]["conv_in"] = {"A": np.ones((3, 3, 4, 1)), "B": np.full((1, 16), 0.1)}
    path = write_lora(tmp_path / "peft", adapters, layout="peft")
    assert path == tmp_path / "peft/adapter_model.safetensors"
    network = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    model = PeftModel.from_pretrained(network, str(tmp_path / "peft"))
    sample, timesteps, text, _ = (torch.from_numpy(value) for value in INPUTS.values())
    with torch.no_grad():
        theirs = model(sample.permute(0, 3, 1, 2), timesteps, text).sample.permute(0, 2, 3, 1)
    assert_equal_outputs(our_outputs(adapters), {"unet": theirs.numpy()}, ("unet",))


def test_diffusers_files_are_as_diffusers_writes_them(adapted, backbone, tmp_path):
    from safetensors import safe_open

    save_diffusers(adapted, tmp_path / "theirs")
    adapters = load_lora(tmp_path / "theirs", backbone.params)
    path = write_lora(tmp_path / "ours", adapters)
    assert path == tmp_path / "ours/pytorch_lora_weights.safetensors"
    ours, theirs = load_file(path), load_file(tmp_path / "theirs" / path.name)
    # transformers 5 drops text_model. from its names; earlier ones need it, and both read it
    theirs = {k.replace("text_encoder.", "text_encoder.text_model."): v for k, v in theirs.items()}
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    with safe_open(path, "np") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("layout", ["diffusers", "kohya", "peft"])
def test_round_trip(layout, backbone, tmp_path):
    adapters = made_here(backbone.params, ranks=(4, 2))
    few = made_here(backbone.params, ranks=(2, 1))
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    adapters["unet"][name] = few["unet"][name]
    if layout == "peft":
        adapters.pop("text_encoder")
    again = load_lora(write_lora(tmp_path, adapters, layout=layout), backbone.params)
    assert jax.tree.structure(again) == jax.tree.structure(adapters)
    jax.tree.map(np.testing.assert_array_equal, again, adapters)


# Stable Diffusion 1.5 and XL in full size, by name and shape alone.

SIZES = {
    "sd15": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sdxl": {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}


@pytest.fixture(scope="module", params=SIZES)
def full_size(request):
    """(name, torch's UNet on no device, ours)."""
    with torch.device("meta"):
        network = UNet2DConditionModel(**SIZES[request.param])
    config = unet.UNet2DConditionConfig.from_dict(dict(SIZES[request.param]))
    return request.param, network, abstract_model(unet.UNet2DConditionModel, config)[1]


def nothing(key, *shape):
    """A tensor that may be looked at, and whose elements take no memory."""
    value = np.broadcast_to(np.float16(0), shape)
    return Tensor(key, shape, value.dtype, lambda index: value[index])


def lcm_like(network, name_of, rank=64):
    """The tensors of LCM-LoRA under kohya's keys, and the modules that they are of."""
    tensors, modules = {}, []
    for module, layer in network.named_modules():
        if not any(module.endswith(f".{target}") for target in LCM):
            continue
        modules.append(module)
        name = f"lora_unet_{name_of(module).replace('.', '_')}"
        outputs, inputs, *size = layer.weight.shape
        for end, shape in (
            ("lora_down.weight", (rank, inputs, *size)),
            ("lora_up.weight", (outputs, rank, *(1 for _ in size))),
            ("alpha", ()),
        ):
            tensors[f"{name}.{end}"] = nothing(f"{name}.{end}", *shape)
    return tensors, modules


def test_every_module_of_lcm_lora_has_its_place(full_size, monkeypatch):
    name, network, params = full_size
    tensors, modules = lcm_like(network, lambda module: module)
    assert len(modules) == {"sd15": 278, "sdxl": 788}[name]
    assert len(tensors) == 3 * len(modules)
    monkeypatch.setattr("agfsync_jax.weights.lora_files._read", lambda pair, *_: pair)
    found = read_lora(tensors, {"unet": params})["unet"]
    assert sorted(found) == sorted(modules)
    for module, pair in found.items():
        assert pair["down"].tensor.key == f"lora_unet_{module.replace('.', '_')}.lora_down.weight"


def sgm_name(module):
    """The name of a module of SDXL in the original code; sd-scripts, library/sdxl_model_util.py."""
    for i in range(3):
        for j in range(2):
            number = 3 * i + j + 1
            for kind, place in (("resnets", 0), ("attentions", 1)):
                old = f"down_blocks.{i}.{kind}.{j}."
                module = module.replace(old, f"input_blocks.{number}.{place}.")
        for j in range(3):
            for kind, place in (("resnets", 0), ("attentions", 1)):
                old = f"up_blocks.{i}.{kind}.{j}."
                module = module.replace(old, f"output_blocks.{3 * i + j}.{place}.")
        old = f"down_blocks.{i}.downsamplers.0.conv"
        module = module.replace(old, f"input_blocks.{3 * (i + 1)}.0.op")
        old = f"up_blocks.{i}.upsamplers.0."
        module = module.replace(old, f"output_blocks.{3 * i + 2}.{2 if i < 2 else 1}.")
    module = module.replace("mid_block.attentions.0.", "middle_block.1.")
    for j in range(2):
        module = module.replace(f"mid_block.resnets.{j}.", f"middle_block.{2 * j}.")
    if re.match(r".*_blocks?\.\d+\.", module) and "transformer_blocks" not in module:
        for new, old in {
            "conv1": "in_layers.2",
            "conv2": "out_layers.3",
            "time_emb_proj": "emb_layers.1",
            "conv_shortcut": "skip_connection",
        }.items():
            module = module.replace(new, old)
    return module


@pytest.mark.parametrize("full_size", ["sdxl"], indirect=True)
def test_modules_of_kohyas_sdxl_have_the_names_of_the_original_code(full_size, monkeypatch):
    _, network, params = full_size
    tensors, modules = lcm_like(network, sgm_name)
    keys = {key.split(".")[0] for key in tensors}
    assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q" in keys
    assert "lora_unet_output_blocks_2_2_conv" in keys
    assert not any("down_blocks" in key or "up_blocks" in key for key in keys)
    monkeypatch.setattr("agfsync_jax.weights.lora_files._read", lambda pair, *_: pair)
    found = read_lora(tensors, {"unet": params})["unet"]
    assert sorted(found) == sorted(modules)
    for module, pair in found.items():
        name = sgm_name(module).replace(".", "_")
        assert pair["down"].tensor.key == f"lora_unet_{name}.lora_down.weight"


@pytest.mark.parametrize("name_of", [sgm_name, str])
def test_a_file_of_sdxl_gives_what_diffusers_makes_of_it(name_of, tmp_path):
    """kohya's keys with the original code's block names, and with diffusers' as LCM-LoRA's."""
    torch.manual_seed(0)
    small = {"block_out_channels": (8, 8, 16), "attention_head_dim": 2, "norm_num_groups": 4}
    small |= {"cross_attention_dim": 12, "transformer_layers_per_block": (1, 1, 2)}
    small |= {"addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 34}
    network = UNet2DConditionModel(**{**SIZES["sdxl"], **small, "sample_size": 8})
    network.save_pretrained(tmp_path / "unet")
    tensors, modules = lcm_like(network, name_of, rank=4)
    rng = np.random.default_rng(0)
    for key, tensor in tensors.items():
        gain = max(1, np.prod(tensor.shape[1:])) ** -0.5
        tensors[key] = np.asarray(rng.normal(size=tensor.shape) * gain, np.float32)
        if key.endswith("alpha"):
            tensors[key] = np.asarray(3.0, np.float32)
    write_tensors(
        tmp_path / "lora.safetensors", {key: from_array(key, x) for key, x in tensors.items()}
    )
    state, alphas = StableDiffusionXLPipeline.lora_state_dict(
        tmp_path / "lora.safetensors", unet_config=network.config
    )
    network.load_lora_adapter(state, prefix="unet", network_alphas=alphas)
    graph, params = load_model(unet.UNet2DConditionModel, tmp_path / "unet")
    adapters = load_lora(tmp_path / "lora.safetensors", {"unet": params})["unet"]
    assert len(adapters) == len(modules)
    sample, text, pooled = (
        rng.normal(size=shape).astype(np.float32) for shape in ((1, 8, 8, 4), (1, 5, 12), (1, 10))
    )
    sizes = np.array([[64, 64, 0, 8, 64, 64]], np.float32)
    with torch.no_grad():
        theirs = network(
            torch.from_numpy(sample).permute(0, 3, 1, 2),
            torch.tensor([301]),
            torch.from_numpy(text),
            added_cond_kwargs={
                "text_embeds": torch.from_numpy(pooled),
                "time_ids": torch.from_numpy(sizes),
            },
        ).sample.permute(0, 2, 3, 1)
    ours = jax.jit(lambda params, *args: nnx.merge(graph, params)(*args))(
        lora.merge(params, adapters), sample, np.array([301]), text, pooled, sizes
    )
    assert relative_error(ours, theirs) <= 1e-5


def test_two_text_encoders(tmp_path):
    """kohya's lora_te1_ and lora_te2_, and diffusers' names; the second has a projection."""
    widths = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    widths |= {"num_attention_heads": 2, "vocab_size": 60, "max_position_embeddings": 12}
    params = {
        name: abstract_model(cls, clip.CLIPTextConfig(**{**widths, "projection_dim": 8}))[1]
        for name, cls in (
            ("text_encoder", clip.CLIPTextModel),
            ("text_encoder_2", clip.CLIPTextModelWithProjection),
        )
    }
    rng = np.random.default_rng(0)
    q = "text_model.encoder.layers.1.self_attn.q_proj"
    adapters = {
        name: {q: {"A": rng.normal(size=(16, 2)), "B": rng.normal(size=(2, 16))}} for name in params
    }
    adapters["text_encoder_2"]["text_projection"] = {
        "A": rng.normal(size=(16, 2)),
        "B": rng.normal(size=(2, 8)),
    }
    adapters = jax.tree.map(np.float32, adapters)
    for layout, keys in {
        "kohya": ("lora_te1_text_model_encoder", "lora_te2_text_model", "lora_te2_text_projection"),
        "diffusers": ("text_encoder.text_model.", "text_encoder_2.text_projection."),
    }.items():
        path = write_lora(tmp_path / f"{layout}.safetensors", adapters, layout=layout)
        for start in keys:
            assert any(key.startswith(start) for key in load_file(path))
        again = load_lora(path, params)
        jax.tree.map(np.testing.assert_array_equal, again, adapters)
    path = write_lora(tmp_path, {"text_encoder": adapters["text_encoder"]}, layout="peft")
    with pytest.raises(ValueError, match="which of text_encoder, text_encoder_2 they are"):
        load_lora(path, params)
    assert load_lora(path, {"text_encoder": params["text_encoder"]})


def test_matrices_and_1x1_convolutions_stand_for_each_other(backbone):
    """Trained on proj_in as a convolution (SD 1.x), or as a matrix, as some files have them."""
    rng = np.random.default_rng(0)
    tensors = {}
    for key, shape in {
        "unet.mid_block.attentions.0.proj_in.lora_A.weight": (2, 32),  # a 1x1 convolution
        "unet.mid_block.attentions.0.proj_in.lora_B.weight": (32, 2),
        "unet.time_embedding.linear_1.lora_A.weight": (1, 16, 1, 1),  # a matrix, rank 1
        "unet.time_embedding.linear_1.lora_B.weight": (64, 1, 1, 1),
    }.items():
        tensors[key] = from_array(key, rng.normal(size=shape).astype(np.float16))
    found = read_lora(tensors, backbone.params)["unet"]
    for module, size in (
        ("mid_block.attentions.0.proj_in", (1, 1)),
        ("time_embedding.linear_1", ()),
    ):
        down, up = (tensors[f"unet.{module}.lora_{name}.weight"].read() for name in "AB")
        a, b = found[module]["A"], found[module]["B"]
        assert a.shape == (*size, down.shape[1], down.shape[0])
        np.testing.assert_array_equal(a.reshape(a.shape[-2:]), down.reshape(down.shape[:2]).T)
        np.testing.assert_array_equal(b, up.reshape(up.shape[:2]).T)


def test_everything_that_is_wrong_is_told_at_once(backbone):
    q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"

    def tensor(key, *shape):
        return {key: nothing(key, *shape)}

    tensors = (
        tensor(f"unet.{q}.lora_A.weight", 4, 32)
        | tensor(f"unet.{q}.lora_B.weight", 16, 4)
        | tensor("unet.mid_block.resnets.0.conv1.lora_A.weight", 4, 32, 1, 1)
        | tensor("unet.mid_block.resnets.0.conv1.lora_B.weight", 32, 3, 1, 1)
        | tensor("unet.conv_in.lora_A.weight", 4, 4, 3, 3)
        | tensor("unet.conv_out.alpha")
        | tensor("unet.conv_middle.lora_A.weight", 4, 4)
        | tensor("text_encoder_2.text_projection.lora_A.weight", 4, 4)
        | tensor("unet.norm.weight", 4)
        | tensor("lora_unet_conv_in.lora_mid.weight", 4, 4, 3, 3)
        | tensor("lora_unet_conv_in.dora_scale", 16, 1, 1, 1)
        | tensor("lora_unet_conv_in.hada_w1_a", 4, 4)
        | tensor("lora_unet_conv_in.lokr_w1", 4, 4)
        | tensor(f"lora_unet_{q.replace('.', '_')}.lora_down.weight", 4, 32)
    )
    with pytest.raises(ValueError) as error:
        read_lora(tensors, backbone.params, {"unet": {"use_dora": True}})
    text = str(error.value)
    for line in (
        f"unet.{q}.lora_B.weight: [16, 4], expected [32, 4]",
        "conv1.lora_A.weight: [4, 32, 1, 1], expected [4, 32, 3, 3]",
        "conv1.lora_B.weight: [32, 3, 1, 1], expected [32, 4, 1, 1]",
        "unet.conv_in.lora_A.weight: unet conv_in has no up",
        "unet.conv_out.alpha: unet conv_out has no down and no up",
        "unet.conv_middle.lora_A.weight: unet has no module conv_middle",
        "text_encoder_2 is not among the networks to adapt (unet, text_encoder)",
        "unet.norm.weight [4]: no known layout of LoRA",
        "lora_unet_conv_in.lora_mid.weight [4, 4, 3, 3]: LoCon with a third factor",
        "lora_unet_conv_in.dora_scale [16, 1, 1, 1]: DoRA",
        "hada_w1_a [4, 4]: LoHa",
        "lokr_w1 [4, 4]: LoKr",
        f"lora_down.weight: the same as unet.{q}.lora_A.weight",
        "unet has adapters of the kind DoRA",
    ):
        assert line in text, line
    assert " 14 problems:" in text and text.count("\n") == 14
    with pytest.raises(ValueError, match="no tensor"):
        read_lora({}, backbone.params)


def test_a_file_of_another_model_is_named(full_size, backbone):
    name, network, _ = full_size
    tensors, _ = lcm_like(network, lambda module: module)
    other = {"sd15": r"768 \(SD 1.x\)", "sdxl": r"2048 \(SDXL\)"}[name]
    pattern = rf"for another one: it reads a text of width {other}, this model 16"
    with pytest.raises(ValueError, match=pattern) as error:
        read_lora(tensors, backbone.params)
    assert 10 < str(error.value).count("\n") < 13  # not all of its modules
    flux = {"transformer.single.0.attn.to_q.lora_A.weight": nothing("x", 4, 32)}
    with pytest.raises(ValueError, match="another one: most of its modules"):
        read_lora(flux, backbone.params)


def test_what_is_not_written(backbone, tmp_path):
    adapters = made_here(backbone.params)
    with pytest.raises(ValueError, match="layouts diffusers, kohya, peft.*'other'"):
        write_lora(tmp_path, adapters, layout="other")
    with pytest.raises(ValueError, match="of none"):
        write_lora(tmp_path, {})
    with pytest.raises(ValueError, match="folder of one network's.*unet, text_encoder"):
        write_lora(tmp_path, adapters, layout="peft")
    with pytest.raises(FileNotFoundError, match="no files of LoRA"):
        load_lora(tmp_path, backbone.params)
    write_lora(tmp_path / "a.safetensors", adapters)
    write_lora(tmp_path / "b.safetensors", adapters)
    with pytest.raises(FileNotFoundError, match="2 files of LoRA"):
        load_lora(tmp_path, backbone.params)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LOHA"}))
    key = "conv_in.lora_A.weight"
    with pytest.raises(ValueError, match="unet has adapters of the kind LOHA"):
        read_lora(
            {key: from_array(key, np.zeros((1, 4, 3, 3)))},
            backbone.params,
            {"": {"peft_type": "LOHA"}},
        )
