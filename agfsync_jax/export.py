"""Export: a round's tuned model -> a folder that diffusers loads, or a LoRA file.

The folder is a whole pipeline: config.json files, safetensors (with an index above 10 GB),
scheduler and tokenizers. LoRA files of config.backbone.lora are part of its weights, and the
scheduler is that of the sampler which draws where models are judged. `--config.export.lora` with
diffusers, kohya or peft writes the adapters of trainings with config.train.lora_rank alone, in that
layout: those of all rounds, whose ranks add up. With --verify, what was written is compared with
the checkpoint, and diffusers and this package each draw one image from it, from the same noise;
both are kept beside it in verify.png, and an image that differs by more than 2 of 255 gray levels
on average is an error.
"""

import importlib.util
import itertools
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from agfsync_jax import backbones, samplers
from agfsync_jax.data import records
from agfsync_jax.data.images import encode_png
from agfsync_jax.diffusion.denoising import guide
from agfsync_jax.models import lora
from agfsync_jax.parallel import multihost
from agfsync_jax.parallel.mesh import create_mesh
from agfsync_jax.training import program
from agfsync_jax.training.checkpoints import restore_adapters, restore_trained, trained_rounds
from agfsync_jax.utils.clock import Stage
from agfsync_jax.utils.files import copy_tree, local_folder, to_path
from agfsync_jax.weights.lora_files import LAYOUTS, write_lora
from agfsync_jax.weights.tensor_files import FLOATING

Trained = Sequence[tuple[Path, int]]  # see `trained_rounds`

_PROMPT = "a photograph of an astronaut riding a horse"
_DRAWING = ("height", "width", "num_inference_steps", "guidance_scale")
_TOLERANCE = 2.0  # gray levels of 255, mean


def main(
    config: Any,
    workdir: Path,
    *,
    round_index: int = 0,
    repair: bool = False,
    verify: bool = False,
    step: str = "last",
) -> None:
    """Writes `config.export.output`, or round_NNN/export/.

    For a URL the files are made in a local folder for temporary files and copied from there.

    Raises:
        FileNotFoundError: the round has no checkpoint.
        FileExistsError: the output is there already.
        ValueError: settings that cannot be; with `verify`, weights or images that differ.
        OSError: no space left.
    """
    config = backbones.as_judged(config)
    spec = config.export
    round_dir = to_path(workdir) / f"round_{round_index:03d}"
    output = to_path(spec.output).expanduser() if spec.output else round_dir / "export"
    if spec.dtype not in FLOATING:
        raise ValueError(f"config.export.dtype={spec.dtype}: expected one of {', '.join(FLOATING)}")
    if spec.lora not in ("", *LAYOUTS):
        raise ValueError(f"config.export.lora={spec.lora}: expected one of {', '.join(LAYOUTS)}")
    if spec.lora and not config.train.lora_rank:
        raise ValueError(
            "config.export.lora is set, but config.train.lora_rank is 0: all of the denoiser was "
            "trained. Export the whole pipeline: leave config.export.lora empty."
        )
    if verify:
        if not all(map(importlib.util.find_spec, ("torch", "diffusers"))):
            raise ValueError(
                "--verify draws with diffusers: pip install 'agfsync_jax[torch]', or leave it out"
            )
    if output.exists() and any(output.iterdir()):
        raise FileExistsError(f"{output} is not empty: set config.export.output to a new folder.")
    trained = trained_rounds(workdir, round_index, config, step)
    multihost.barrier("export plan")  # every process has looked before the main one writes
    with Stage(round_dir, "export", unit="files") as stage, local_folder(output) as folder:
        write = _write_lora if spec.lora else _write_pipeline
        write(config, trained, folder)
        files = [path for path in folder.rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        copy_tree(folder, output, last="model_index.json")
        stage.print(f"wrote {tqdm.format_sizeof(size, 'B')} to {output}")
        if verify:
            prompts = round_dir / "prompts.jsonl"
            prompt = records.read_jsonl(prompts)[0]["prompt"] if prompts.exists() else _PROMPT
            found = _verify(config, prompt, folder, trained)
        if verify and multihost.is_main():
            difference, picture = found
            records.write_file(output / "verify.png", [picture])
            told = f"{difference:.3f} of 255 gray levels between diffusers' image and ours"
            place = f"see {output}/verify.png"
            if difference > _TOLERANCE:
                raise ValueError(f"{told} (at most {_TOLERANCE:g} expected); {place}")
            stage.print(f"verified: {told}, {place}")
    multihost.barrier("export")


def _write_pipeline(config: Any, trained: Trained, output: Path) -> None:
    backbone = backbones.load(config, create_mesh(config.mesh))
    params = restore_trained(trained, backbone.params, backbone.denoiser_name)
    dtype = jnp.dtype(config.export.dtype)
    backbone.save(output, params, dtype=dtype, scheduler=_scheduler(config, backbone))


def _scheduler(config: Any, backbone: backbones.Backbone) -> dict[str, Any] | None:
    """The file of the sampler that the config names; None where it names none."""
    name = config.sample.sampler
    return samplers.find(name, backbone.schedule).file(backbone.schedule) if name else None


def _write_lora(config: Any, trained: Trained, output: Path) -> None:
    """The adapters of all rounds, whose products add up."""
    denoiser, *others = _trained_networks(config)
    made = lora.concatenate([restore_adapters(*each) for each in trained])
    if multihost.is_main():
        output.mkdir(parents=True, exist_ok=True)
        spec = config.export
        own = {denoiser: lora.of_network(made)}
        own |= {name: lora.of_network(made, name) for name in others}
        write_lora(output, own, layout=spec.lora, dtype=jnp.dtype(spec.dtype))


def _trained_networks(config: Any) -> list[str]:
    """The denoiser, and the text encoders where they have adapters."""
    cls = backbones.backbone_class(config)
    if not config.train.lora_text_encoder:
        return [cls.denoiser_name]
    return [cls.denoiser_name, *program.text_encoders(backbones.inspect(config))]


def _verify(config: Any, prompt: str, output: Path, trained: Trained) -> tuple[float, bytes] | None:
    """Compares what was written with the checkpoint, then draws one image with each library; their
    mean difference in gray levels, and both side by side.

    Every process calls it, the main one compares; the others get None.
    """
    networks = _trained_networks(config)
    with tempfile.TemporaryDirectory(prefix="agfsync-") as aside:
        folder, file, base = output, None, None
        if config.train.lora_rank:
            whole = backbones.load(config, create_mesh(devices=jax.local_devices()[:1]))
            base = {name: whole.params[name] for name in networks}
            if config.export.lora:  # beside the model that it adapts
                folder, file = Path(aside) / "base", output
                whole.save(folder, whole.params, scheduler=_scheduler(config, whole))
            del whole
        if not multihost.is_main():
            return None
        backbone = backbones.backbone_class(config).load(folder, lora=[(file, 1.0)] if file else ())
        written = {name: backbone.params[name] for name in networks}
        name = backbone.denoiser_name
        tuned = restore_trained(trained, written if base is None else base, name, alone=True)
        start = base if config.export.lora else None
        _check_weights(written, tuned, start, config.export.dtype, output)
        del written, tuned, base, start
        ours, noise = _draw(config, prompt, backbone)
        theirs = _draw_diffusers(config, prompt, noise, folder, file)
    difference = float(np.abs(ours.astype(np.float64) - theirs).mean())
    return difference, encode_png(np.concatenate([ours, theirs], axis=1))


def _check_weights(written: Any, tuned: Any, base: Any, dtype: str, output: Path) -> None:
    """Raises ValueError where what was written is not what the checkpoint holds.

    A whole model must be the checkpoint's, cast to the files' dtype. Of a LoRA, what is missing of
    the way from `base` to `tuned` may be what roundings leave out of it.
    """

    def host(tree):  # leaf by leaf, and nothing is compiled for their many shapes
        return (np.asarray(leaf) for leaf in jax.tree.leaves(tree))

    if base is None:
        paths = (path for path, _ in jax.tree.leaves_with_path(written))
        wrong = [
            path
            for path, a, b in zip(paths, host(written), host(tuned), strict=True)
            if not np.array_equal(a, b.astype(jnp.dtype(dtype)).astype(a.dtype))
        ]
        if wrong:
            first = jax.tree_util.keystr(wrong[0], simple=True, separator=".")
            raise ValueError(
                f"{output} does not hold the checkpoint's model: {len(wrong)} tensors differ, the"
                f" first is {first}. Remove it, and export once more."
            )
        return
    squares = np.zeros(3)
    for a, b, start in zip(host(written), host(tuned), host(base), strict=True):
        squares += [np.vdot(x, x) for x in (a - b, b - start, b)]
    missing, way, size = np.sqrt(squares)
    rounding = float(jnp.finfo(dtype).eps) * way + float(jnp.finfo(jnp.float32).eps) * size
    if not missing <= 4 * rounding:
        raise ValueError(
            f"{output} lacks {missing / way:.2%} of what was trained (the norm of what is missing"
            f" is {missing:.3g}, of all that was trained {way:.3g}). Remove it, and export once"
            " more; if it stays so, export the whole pipeline: leave config.export.lora empty."
        )


def _draw(config: Any, prompt: str, backbone: Any) -> tuple[np.ndarray, np.ndarray]:
    """Our image, uint8 [H, W, 3], and the noise it is from."""
    sample = config.sample
    sampler = backbones.sampler(config)
    shape = (1, *backbone.latent_shape(sample.height, sample.width))
    noise = np.random.default_rng(config.seed).standard_normal(shape, np.float32)

    @jax.jit
    def program(params, tokens, negative, noise):
        given, unguided = (backbone.encode_prompt(params, ids) for ids in (tokens, negative))
        denoise = guide(
            lambda *args: backbone.denoise(params, *args), given, unguided, sample.guidance_scale
        )
        latents = sampler(
            denoise, backbone.schedule, noise, sample.num_inference_steps, keys=_keys(config)
        )
        return backbone.decode_latents(params, latents)

    tokens, negative = (backbone.tokenize([text]) for text in (prompt, sample.negative_prompt))
    with jax.default_matmul_precision("highest"):
        return np.asarray(program(backbone.params, tokens, negative, noise))[0], noise


def _keys(config: Any) -> jax.Array:
    """Of the one image, for samplers that draw noise."""
    return jax.random.key(config.seed)[None]


def _draw_diffusers(
    config: Any, prompt: str, noise: np.ndarray, folder: Path, file: Path | None
) -> np.ndarray:
    import diffusers
    import torch
    import transformers

    fresh = itertools.count()

    def step_noise(shape: Any, **kwargs: Any) -> Any:
        """What our sampler draws in this step."""
        b, c, h, w = shape
        drawn = jax.random.normal(jax.random.fold_in(_keys(config)[0], next(fresh)), (h, w, c))
        return torch.from_numpy(np.array(drawn)).permute(2, 0, 1)[None].to(kwargs["dtype"])

    for library in (diffusers, transformers):  # what they say is not of this check
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    sample = config.sample
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    if file and config.export.lora == "peft":
        from peft import PeftModel

        pipeline.unet = PeftModel.from_pretrained(pipeline.unet, file).merge_and_unload()
    elif file:
        pipeline.load_lora_weights(file)
    pipeline.set_progress_bar_config(disable=True)
    module = sys.modules[type(pipeline.scheduler).__module__]
    with mock.patch.object(module, "randn_tensor", step_noise, create=True):
        images = pipeline(
            prompt,
            negative_prompt=sample.negative_prompt or None,
            latents=torch.from_numpy(noise).permute(0, 3, 1, 2),
            output_type="np",
            **{key: sample[key] for key in _DRAWING},
        ).images
    return np.round(images[0] * 255).astype(np.uint8)
