"""A vision tower's input, made on the device, equals what each model's own code makes of an image.

transformers' image processors have a PIL and a torchvision backend: ours are the former's pixels to
the last bit. Tests of open_clip's and torchvision's own code are skipped where those are not
installed (or do not load beside this torch); PIL and torch, which they call, always are.
"""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from agfsync_jax.data import images
from agfsync_jax.data.images import OPENAI_MEAN as MEAN
from agfsync_jax.data.images import OPENAI_STD as STD
from tests.twins import spread

DATA = Path(__file__).parents[2].parent / "shared" / "data"
SIZE = 224
# 224 x 227 leaves 3 columns to cut off: transformers cuts 1 at the left, torchvision 2.
SIZES = [(512, 512), (1024, 1024), (480, 640), (640, 480), (100, 37), (64, 64), (224, 227)]
PHOTOS = ["tifa_coco_301091.jpg", "tifa_drawbench_52.jpg", "tifa_drawbench_8.jpg"]
pytestmark = pytest.mark.parametrize("picture", [*SIZES, *PHOTOS], indirect=True)
EXACT = 1e-6  # float32's rounding in [0, 1]


@pytest.fixture
def picture(request):
    """uint8 [h, w, 3]: a photograph, or shapes with hard edges, flats and noise."""
    if isinstance(request.param, str):
        if not (DATA / request.param).is_file():
            pytest.skip(f"the photograph {DATA / request.param} is not here")
        return np.asarray(Image.open(DATA / request.param).convert("RGB"))
    h, w = request.param
    rng = np.random.default_rng(h * w)
    y, x = np.mgrid[:h, :w]
    picture = np.empty((h, w, 3))
    picture[:] = rng.integers(0, 256, 3)
    for _ in range(5):
        disk = (y - h * rng.uniform()) ** 2 + (x - w * rng.uniform()) ** 2 < (min(h, w) / 4) ** 2
        picture[disk] = rng.integers(0, 256, 3)
    picture[: h // 3] += rng.normal(0, 40, (h // 3, w, 3))
    picture[h // 2 :, : w // 4] = 255 * ((x + y) % 2)[h // 2 :, : w // 4, None]
    return np.clip(picture, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def open_clip():
    """open_clip and torchvision, whose compiled part must fit the torch that is installed."""
    try:
        import open_clip
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"open_clip and torchvision cannot be imported: {error}")
    return open_clip


@pytest.fixture(scope="module")
def embed():
    """float [h, w, 3] -> the embedding of a random CLIP vision tower."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=16,
        projection_dim=32,
    )
    tower = spread(CLIPVisionModelWithProjection(config)).eval()

    def embed(pixels):
        with torch.no_grad():
            pixels = torch.tensor(np.asarray(pixels)).permute(2, 0, 1)[None]
            return tower(pixels).image_embeds[0].numpy()

    return embed


def check(ours, wanted, embed, *, mean=EXACT, largest=EXACT):
    """Mean and largest difference of pixels in [0, 1], and the embeddings' cosine."""
    ours, wanted = np.asarray(ours), np.asarray(wanted)
    assert ours.shape == wanted.shape == (SIZE, SIZE, 3) and ours.dtype == np.float32
    difference = np.abs(ours - wanted) * np.array(STD)
    assert difference.mean() <= mean and difference.max() <= largest
    assert cosine(embed(ours), embed(wanted)) >= 0.9999


def cosine(a, b):
    return a @ b / np.sqrt((a @ a) * (b @ b))


def resize(picture, **spec):
    return jax.jit(lambda x: images.resize_and_normalize(x, **spec))(picture[None])[0]


def pad(picture, **options):
    spec = {"size": SIZE, "mean": MEAN, "std": STD} | options
    return jax.jit(lambda x: images.pad_and_normalize(x, **spec))(picture[None])[0]


def processed(processor, picture):
    pixels = processor(Image.fromarray(picture), return_tensors="np")["pixel_values"]
    return np.asarray(pixels[0]).transpose(1, 2, 0)


def normalized(pixels):
    return ((pixels - np.array(MEAN)) / np.array(STD)).astype(np.float32)


def test_clip_equals_transformers(picture, embed, tmp_path):
    from transformers import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil()
    processor.save_pretrained(tmp_path)
    ours = resize(picture, **images.preprocessing(tmp_path))
    check(ours, processed(processor, picture), embed)


def test_blip2_equals_transformers(picture, embed, tmp_path):
    from transformers import BlipImageProcessorPil

    processor = BlipImageProcessorPil(size={"height": SIZE, "width": SIZE})
    processor.save_pretrained(tmp_path)
    ours = resize(picture, **images.preprocessing(tmp_path))
    check(ours, processed(processor, picture), embed)


@pytest.mark.parametrize("name", ["CLIPImageProcessor", "BlipImageProcessor"])
def test_transformers_torchvision_backend_is_near(picture, embed, open_clip, tmp_path, name):
    """It resizes uint8 tensors, whose weights have fewer digits than PIL's."""
    import transformers

    size = {"size": {"height": SIZE, "width": SIZE}} if name.startswith("Blip") else {}
    processor = getattr(transformers, name)(**size)
    assert "Torchvision" in str(type(processor).__mro__)
    processor.save_pretrained(tmp_path)
    ours = resize(picture, **images.preprocessing(tmp_path))
    check(ours, processed(processor, picture), embed, mean=0.1 / 255, largest=3 / 255)


def by_pil(picture, resize_mode):
    """What open_clip's `image_transform` asks PIL for, written out."""
    h, w = picture.shape[:2]
    height, width = {
        "shortest": (int(SIZE * max(h / w, 1)), int(SIZE * max(w / h, 1))),
        "longest": (round(h / (max(h, w) / SIZE)), round(w / (max(h, w) / SIZE))),
    }[resize_mode]
    made = Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC)
    # PIL's crop fills what lies outside with black
    left = round((width - SIZE) / 2) if width > SIZE else -((SIZE - width) // 2)
    top = round((height - SIZE) / 2) if height > SIZE else -((SIZE - height) // 2)
    return normalized(np.asarray(made.crop((left, top, left + SIZE, top + SIZE))) / 255)


def open_clip_config(folder, **preprocess_cfg):
    config = {"model_cfg": {"vision_cfg": {"image_size": SIZE}}, "preprocess_cfg": preprocess_cfg}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return images.preprocessing(folder)


@pytest.mark.parametrize("resize_mode", ["shortest", "longest"])
def test_open_clip_by_pil(picture, embed, tmp_path, resize_mode):
    spec = open_clip_config(tmp_path, resize_mode=resize_mode)
    check(resize(picture, **spec), by_pil(picture, resize_mode), embed)


@pytest.mark.parametrize("resize_mode", images.RESIZE_MODES)
def test_open_clip(picture, embed, open_clip, tmp_path, resize_mode):
    spec = open_clip_config(tmp_path, mean=MEAN, std=STD, resize_mode=resize_mode)
    transform = open_clip.image_transform(SIZE, False, MEAN, STD, resize_mode=resize_mode)
    wanted = transform(Image.fromarray(picture)).numpy().transpose(1, 2, 0)
    check(resize(picture, **spec), wanted, embed)


@pytest.mark.parametrize("antialias", [True, False])
def test_hpsv2(picture, embed, antialias):
    """HPSv2's transform: to [0, 1], longer edge resized, padded with black, normalized."""
    import torch
    from torch.nn import functional as F

    # in float64: in float32 torch misplaces the kernel by some 1e-5 of a pixel
    pixels = torch.tensor(picture).permute(2, 0, 1).double() / 255
    scale = SIZE / float(max(pixels.shape[1:]))
    h, w = (round(side * scale) for side in pixels.shape[1:])
    pixels = F.interpolate(
        pixels[None], (h, w), mode="bicubic", align_corners=False, antialias=antialias
    )[0]
    down, right = SIZE - h, SIZE - w
    pixels = F.pad(pixels, (right // 2, right - right // 2, down // 2, down - down // 2))
    wanted = normalized(pixels.permute(1, 2, 0).numpy())
    check(pad(picture, antialias=antialias), wanted, embed)


@pytest.mark.parametrize("antialias", [True, False])
def test_hpsv2_by_torchvision(picture, embed, open_clip, antialias):
    from torchvision.transforms import InterpolationMode, Normalize
    from torchvision.transforms import functional as F

    pixels = F.to_tensor(Image.fromarray(picture))
    scale = SIZE / float(max(pixels.shape[1:]))
    h, w = (round(side * scale) for side in pixels.shape[1:])
    pixels = F.resize(pixels, [h, w], InterpolationMode.BICUBIC, antialias=antialias)
    down, right = SIZE - h, SIZE - w
    pixels = F.pad(pixels, [right // 2, down // 2, right - right // 2, down - down // 2], fill=0)
    wanted = Normalize(MEAN, STD)(pixels).numpy().transpose(1, 2, 0)
    check(pad(picture, antialias=antialias), wanted, embed, mean=1e-5, largest=2e-4)  # float32


def test_the_cosine_tells_preprocessings_apart(picture, embed):
    """Else the checks above would show little."""
    if picture.shape[0] == picture.shape[1]:
        pytest.skip("a square is neither cut nor padded")
    crop = embed(resize(picture, size=SIZE, mean=MEAN, std=STD))
    assert cosine(crop, embed(pad(picture))) < 0.9999
