"""CLIP models of open_clip beside transformers': features, keys, configs."""

import numpy as np
import pytest
import torch

from agfsync_jax.models.clip import CLIPConfig, CLIPModel
from agfsync_jax.weights.networks import fit
from agfsync_jax.weights.open_clip import open_clip_config, open_clip_to_transformers
from tests.originals import affine, at, from_arrays, open_clip_text, torch_shapes, unread
from tests.twins import import_open_clip, relative_error, spread

TINY_CLIP = {
    "embed_dim": 24,
    "vision_cfg": {
        "image_size": 32,
        "layers": 3,
        "width": 40,
        "head_width": 20,
        "mlp_ratio": 2.4,
        "patch_size": 8,
    },
    "text_cfg": {"context_length": 9, "vocab_size": 60, "width": 32, "heads": 4, "layers": 2},
}
NAMES = [
    *("ViT-B-32", "ViT-B-32-quickgelu", "ViT-B-16", "ViT-B-16-quickgelu", "ViT-L-14"),
    *("ViT-L-14-quickgelu", "ViT-L-14-336", "ViT-L-14-336-quickgelu", "ViT-H-14"),
    *("ViT-H-14-378-quickgelu", "ViT-g-14", "ViT-bigG-14", "ViT-bigG-14-quickgelu"),
]


@pytest.fixture
def open_clip():
    return import_open_clip()


def transformers_clip(config):
    from transformers import CLIPConfig, CLIPModel

    return CLIPModel(CLIPConfig.from_dict(config))


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("custom", [True, False])
def test_features_equal_those_of_open_clip(open_clip, quick, custom):
    torch.manual_seed(0)
    cls = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    twin = spread(cls(**TINY_CLIP, quick_gelu=quick))
    prefix = "module." if custom else ""
    arrays = {f"{prefix}{key}": value.numpy() for key, value in twin.state_dict().items()}
    tensors = open_clip_to_transformers(from_arrays(arrays))
    model = transformers_clip(open_clip_config(TINY_CLIP | {"quick_gelu": quick})).eval()
    model.load_state_dict(
        {key: torch.from_numpy(np.array(tensor.read())) for key, tensor in tensors.items()}
    )
    images = torch.randn(2, 3, 32, 32)
    # End of text is the largest id; after it come pads.
    texts = torch.tensor([[58, 3, 7, 9, 59, 0, 0, 0, 0], [58, 4, 1, 1, 2, 3, 5, 8, 59]])
    with torch.no_grad():
        expected = twin.encode_image(images), twin.encode_text(texts)
        actual = model.get_image_features(images), model.get_text_features(texts)
    for ours, theirs in zip(actual, expected, strict=True):
        ours = getattr(ours, "pooler_output", ours)
        assert relative_error(ours.numpy(), theirs) < 1e-5
    assert model.logit_scale.item() == twin.logit_scale.item()


@pytest.mark.parametrize("name", NAMES)
def test_config_of_a_name_is_that_of_open_clips_file(open_clip, name):
    theirs = open_clip.get_model_config(name)
    assert theirs is not None
    assert open_clip_config(name) == open_clip_config(theirs)
    assert open_clip_config({"model_cfg": theirs, "preprocess_cfg": {}}) == open_clip_config(name)


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-L-14-336", "ViT-H-14", "ViT-bigG-14"])
def test_full_size_keys_are_those_of_transformers(open_clip, name):
    with torch.device("meta"):
        twin = open_clip.CLIP(**open_clip.get_model_config(name))
        model = transformers_clip(open_clip_config(name))
    tensors = open_clip_to_transformers(
        unread({key: tuple(value.shape) for key, value in twin.state_dict().items()})
    )
    assert {key: tensor.shape for key, tensor in tensors.items()} == torch_shapes(model)
    heads = twin.visual.transformer.resblocks[0].attn.num_heads
    assert model.config.vision_config.num_attention_heads == heads
    heads = twin.transformer.resblocks[0].attn.num_heads
    assert model.config.text_config.num_attention_heads == heads


def test_a_converted_clip_fills_ours():
    config = CLIPConfig.from_dict(open_clip_config(TINY_CLIP))
    text = open_clip_text(32, 2, 60, 9, embed=24)
    vision = open_clip_text(40, 3)
    vision = {key: shape for key, shape in vision.items() if "resblocks" in key}
    for i in range(3):
        vision |= affine(f"transformer.resblocks.{i}.mlp.c_fc", 96, 40)
        vision |= {f"transformer.resblocks.{i}.mlp.c_proj.weight": (40, 96)}
    vision |= affine("ln_pre", 40) | affine("ln_post", 40) | {"proj": (40, 24)}
    vision |= {"class_embedding": (40,), "positional_embedding": (17, 40)}
    vision |= {"conv1.weight": (40, 3, 8, 8)}
    keys = text | at("visual", vision) | {"logit_scale": (1,), "attn_mask": (9, 9)}
    fit(CLIPModel, config, open_clip_to_transformers(unread(keys)))


def test_tensors_without_a_place_are_listed():
    keys = open_clip_text(8, 1, 99, 7) | {
        "visual.trunk.blocks.0.norm1.weight": (8,),
        "transformer.resblocks.0.ls_1.gamma": (8,),
        "logit_bias": (),
    }
    with pytest.raises(ValueError, match="3 tensors have no place") as error:
        open_clip_to_transformers(unread(keys))
    assert "transformer.resblocks.0.ls_1.gamma [8]" in str(error.value)


@pytest.mark.parametrize(
    "change, wrong",
    [
        ({"vision_cfg": {"timm_model_name": "vit"}}, "vision_cfg.timm_model_name='vit'"),
        ({"vision_cfg": {"layers": [3, 4, 6, 3]}}, "vision_cfg.layers=[3, 4, 6, 3]"),
        ({"vision_cfg": {"pool_type": "avg"}}, "vision_cfg.pool_type='avg'"),
        ({"vision_cfg": {"image_size": [224, 448]}}, "vision_cfg.image_size=[224, 448]"),
        ({"vision_cfg": {"attentional_pool": True}}, "vision_cfg.attentional_pool=True"),
        ({"text_cfg": {"hf_model_name": "roberta"}}, "text_cfg.hf_model_name='roberta'"),
        ({"text_cfg": {"pool_type": "eos"}}, "text_cfg.pool_type='eos'"),
        ({"text_cfg": {"hf_tokenizer_name": "xlm"}}, "text_cfg.hf_tokenizer_name='xlm'"),
        ({"multimodal_cfg": {"width": 512}}, "multimodal_cfg={'width': 512}"),
        ({"init_logit_bias": -10}, "init_logit_bias=-10"),
        ({"embed_dim": None, "surprise": 1}, "surprise=1"),
    ],
)
def test_what_a_clip_model_cannot_do_is_refused(change, wrong):
    with pytest.raises(ValueError) as error:
        open_clip_config(TINY_CLIP | change)
    assert wrong in str(error.value)


def test_harmless_fields_change_nothing():
    more = {
        "custom_text": True,
        "quick_gelu": False,
        "init_logit_bias": None,
        "vision_cfg": TINY_CLIP["vision_cfg"]
        | {"patch_dropout": 0.5, "image_size": [32, 32], "pool_type": "tok"},
        "text_cfg": TINY_CLIP["text_cfg"] | {"pad_id": 0, "hf_tokenizer_name": None},
    }
    assert open_clip_config(TINY_CLIP | more) == open_clip_config(TINY_CLIP)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="'RN50': expected one of ViT-B-32"):
        open_clip_config("RN50")
