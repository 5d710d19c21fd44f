"""The trajectory of `agfsync sample`, from conditioning to images."""

import functools
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from agfsync_jax import backbones
from agfsync_jax.parallel.mesh import create_mesh
from agfsync_jax.parallel.sharding import infer_shardings
from agfsync_jax.plans import Plan, Work, is_here, placed
from agfsync_jax.utils import flops
from agfsync_jax.weights import skeletons
from agfsync_jax.weights.networks import abstract_model
from agfsync_jax.weights.pipeline_files import PipelineFiles


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

    def abstract(rows, shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((rows, *shape), dtype)

    rows = generator.batch_size * (1 if generator.guidance_scale == 1 else 2)
    tokens = abstract(rows, plain.tokenize([""]).shape[1:], jnp.int32)
    conditioning = jax.eval_shape(plain.encode_prompt, plain.params, tokens)
    latents, timesteps = abstract(rows, generator.latent_shape), abstract(rows, ())
    decoded = abstract(generator.batch_size, generator.latent_shape)
    return Work(
        lowered=generator.lower(backbone.params),
        mesh=mesh,
        params=params,
        images=generator.batch_size,
        num_steps=generator.num_calls,
        step_flops=flops.count(plain.denoise, plain.params, latents, timesteps, conditioning),
        rest_flops=flops.count(plain.decode_latents, plain.params, decoded),
        total=config.prompts.num_prompts * config.sample.num_candidates,
        rate=("images", generator.batch_size),
        help=[
            f"a smaller --config.sample.batch_size (now {generator.batch_size} on all chips)",
            *(
                ["--config.sample.param_dtype=bfloat16, which halves the parameters"]
                if jnp.dtype(config.sample.param_dtype).itemsize > 2
                else []
            ),
            *(
                ["--config.backbone.dtype=bfloat16, which halves the activations"]
                if jnp.dtype(config.backbone.dtype).itemsize > 2
                else []
            ),
            *(
                ["--config.backbone.attention=auto, which keeps attention's scores off the memory"]
                if config.backbone.attention == "plain"
                else []
            ),
            "parameters split by config.sharding over --config.mesh.fsdp or tensor chips",
        ],
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
            params[name] = jax.tree.map(
                functools.partial(placed, dtype=param_dtype or config.sample.param_dtype),
                abstract,
                places,
            )
        settings = {"dtype": config.backbone.dtype, "attention": config.backbone.attention}
        return cls(files, graphs, params, mesh=mesh, **settings)


PLAN = Plan(batch="sample.batch_size", work=work)
