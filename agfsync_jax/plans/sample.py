"""The trajectory of `agfsync sample`, from conditioning to images."""

import tempfile
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from agfsync_jax import backbones
from agfsync_jax.parallel.mesh import create_mesh
from agfsync_jax.parallel.sharding import infer_shardings
from agfsync_jax.plans import Work, is_here, placed
from agfsync_jax.utils import flops
from agfsync_jax.weights import skeletons
from agfsync_jax.weights.networks import abstract_model
from agfsync_jax.weights.pipeline_files import PipelineFiles

BATCH = "sample.device_batch_size"


def work(config: Any, devices: Sequence[jax.Device], name: str) -> Work:
    """One run of the program draws a batch of images on all devices."""
    del name
    mesh = create_mesh(config.mesh, devices=devices)
    backbone = abstract_backbone(config, mesh, config.backbone.path, config.backbone.kind)
    plain = backbone.plain()
    refiner, params = None, (backbone.params,)
    if path := config.sample.refiner:
        kind = "" if is_here(path) else "stable-diffusion-xl-refiner"
        refiner = abstract_backbone(config, mesh, path, kind)
        params += (refiner.params,)
    generator = backbones.generator(config, mesh, backbone, refiner=refiner)

    dtypes = config.sample.param_dtype, config.backbone.dtype
    wide_params, wide_activations = (jnp.dtype(dtype).itemsize > 2 for dtype in dtypes)
    step_flops, rest_flops = drawing_flops(
        plain, generator.latent_shape, generator.batch_size, generator.guidance_scale != 1
    )
    return Work(
        lowered=generator.lower(backbone.params),
        mesh=mesh,
        params=params,
        images=generator.batch_size,
        num_steps=generator.num_calls,
        step_flops=step_flops,
        rest_flops=rest_flops,
        total=config.prompts.num_prompts * config.sample.num_candidates,
        rate=("images", generator.batch_size),
        help={
            "a smaller --config.sample.device_batch_size (now"
            f" {config.sample.device_batch_size})": True,
            "--config.sample.param_dtype=bfloat16, which halves the parameters": wide_params,
            "--config.backbone.dtype=bfloat16, which halves the activations": wide_activations,
            "--config.backbone.attention=auto, which keeps attention's scores off the memory": (
                config.backbone.attention == "plain"
            ),
            "parameters split by config.sharding over --config.mesh.fsdp or tensor chips": True,
        },
    )


def drawing_flops(
    backbone: Any, latent_shape: tuple[int, int, int], batch_size: int, guided: bool
) -> tuple[int, int]:
    """FLOP of a step of the denoiser for a batch of images, and of decoding them, by formula.

    Args:
        backbone: with plain attention, whose products can be counted; shapes are enough.
    """
    params, tokens = backbone.params, backbone.tokenize([""] * batch_size * (1 + guided))
    conditioning = jax.eval_shape(backbone.encode_prompt, params, tokens)
    timesteps = jax.ShapeDtypeStruct(tokens.shape[:1], jnp.int32)
    latents = jax.ShapeDtypeStruct((len(tokens), *latent_shape), jnp.float32)
    decoded = jax.ShapeDtypeStruct((batch_size, *latent_shape), jnp.float32)
    return (
        flops.count(backbone.denoise, params, latents, timesteps, conditioning),
        flops.count(backbone.decode_latents, params, decoded),
    )


def abstract_backbone(config: Any, mesh: Mesh, path: str, kind: str, param_dtype: str = "") -> Any:
    """A backbone whose parameters are `jax.ShapeDtypeStruct`s with shardings.

    Args:
        param_dtype: that of `config.sample` where it is empty.

    Raises:
        FileNotFoundError: neither files nor a kind.
        ValueError: another backbone's checkpoint, or rules that do not fit.
    """
    cls = backbones.backbone_class(config)
    with tempfile.TemporaryDirectory(prefix="agfsync-") as folder:
        if not is_here(path):
            if not kind:
                raise FileNotFoundError(
                    f"{path!r} is not on this disk, and plan downloads nothing: say its sizes with "
                    f"config.backbone.kind: one of {', '.join(skeletons.KINDS)}."
                )
            skeletons.write_skeleton(kind, folder)
            path = folder
        files = PipelineFiles(path, variant=config.backbone.variant, kind=kind)
        pipeline = files.index.get("_class_name")
        if pipeline not in cls.pipelines:
            raise ValueError(
                f"{config.backbone.path or kind} is a {pipeline}: config.backbone.name="
                f"{config.backbone.name} reads {' or '.join(cls.pipelines)}."
            )
        graphs, params = {}, {}
        for name in filter(files.has, cls.networks):
            network = cls.networks[name]
            sizes = network.config_class.from_dict(files.config(name))
            dtype = cls.dtype_of(name, sizes, jnp.dtype(config.backbone.dtype))
            graphs[name], abstract = abstract_model(network, sizes, dtype=dtype)
            places = infer_shardings(abstract, mesh, config.sharding)
            params[name] = placed(abstract, places, param_dtype or config.sample.param_dtype)
        settings = {key: config.backbone[key] for key in ("dtype", "attention")}
        return cls(files, graphs, params, mesh=mesh, **settings)
