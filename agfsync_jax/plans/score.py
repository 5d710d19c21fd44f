"""What `agfsync score` spends its time on: images are read, then their questions asked, in batches.

The programs are those of scorers/_blip2.py. Each process scores on its own devices, so the mesh is
that of one process, and the others do the same beside it. CLIP and aesthetic scores are little
beside it and are left out.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from agfsync_jax.data.images import preprocessing
from agfsync_jax.models.blip2 import Blip2Config, Blip2ForConditionalGeneration
from agfsync_jax.parallel.mesh import create_mesh
from agfsync_jax.parallel.sharding import (
    batch_sharding,
    batch_shards,
    infer_shardings,
    replicated,
    round_up,
)
from agfsync_jax.plans import Work, _chips, is_here, placed
from agfsync_jax.scorers import _blip2
from agfsync_jax.utils import flops
from agfsync_jax.weights import skeletons
from agfsync_jax.weights.networks import abstract_model, read_json
from agfsync_jax.weights.places import local_files, resolve_path

QUESTIONS = 15  # an image; AGFSync's have about as many
TOKENS = 32  # of a question with AGFSync's prompt, padded
BATCH = "score.device_batch_size"


def work(config: Any, devices: Sequence[jax.Device], name: str) -> Work:
    """The scorer named vqa of the config, on the devices of the first process.

    Raises:
        ValueError: no such scorer, or rules that do not fit.
        FileNotFoundError: a model that is neither here nor known.
    """
    scorers = config.scorers.to_dict().values()
    spec = next((each for each in scorers if each["name"] == "vqa"), None)
    if not spec:
        raise ValueError("no scorer named vqa in config.scorers: there is little to plan.")
    mesh = create_mesh(config.score.mesh, devices=_chips.one_process(name, devices))
    graph, params, resize = abstract_blip2(spec, mesh)
    shards = batch_shards(mesh)
    num_images = round_up(spec.get("batch_size") or config.score.device_batch_size * shards, shards)
    size = round_up(spec.get("questions_per_batch") or 2 * num_images, shards)
    num_steps = math.ceil(num_images * QUESTIONS / size)
    read_images, score, _ = _blip2.programs(graph, mesh, resize)

    def rows(count, *shape, dtype=jnp.int32):
        return placed(jax.ShapeDtypeStruct((count, *shape), dtype), batch_sharding(mesh))

    images = rows(num_images, config.sample.height, config.sample.width, 3, dtype=jnp.uint8)
    tokens = placed(jax.eval_shape(read_images, params, images), replicated(mesh))
    batch = {
        "image": rows(size),
        "ids": rows(size, TOKENS),
        "mask": rows(size, TOKENS),
        # yes and no, one token each: choices are padded to four
        "choices": rows(size, 4, 1),
        "choice_mask": rows(size, 4, 1),
    }
    named = ({"vqa": params},)

    def first(program):
        return jax.jit(lambda params, *args: program(params[0]["vqa"], *args))

    return Work(
        lowered=first(score).lower(named, tokens, batch),
        mesh=mesh,
        params=named,
        images=num_images,
        num_steps=num_steps,
        step_flops=flops.count(score, params, tokens, batch),
        rest_flops=flops.count(read_images, params, images),
        total=config.prompts.num_prompts * config.sample.num_candidates,
        help={
            f"a smaller --config.score.device_batch_size (now {num_images} images and {size}"
            f" questions on the {mesh.size} chips of a process)": True,
            "weights split by the scorer's sharding over --config.score.mesh.fsdp or tensor chips"
            f" (now {dict(mesh.shape)})": True,
            "dtype=bfloat16 of the scorer": spec.get("dtype") != "bfloat16",
        },
        rate=("questions", num_images * QUESTIONS),
        notes=(
            f"a step is a batch of {size} questions of {TOKENS} tokens, {num_steps} of them for"
            f" {num_images} images with {QUESTIONS} each, on the {mesh.size} chips of a process.",
        ),
        looped=False,
        beside=(first(read_images).lower(named, images),),
    )


def abstract_blip2(
    spec: Mapping[str, Any], mesh: Mesh
) -> tuple[nnx.GraphDef, nnx.State, dict[str, Any]]:
    """A BLIP-2 without weights, its parameters' shapes with shardings, and how images are made.

    Raises:
        FileNotFoundError: neither files nor a name that is known.
        ValueError: rules that do not fit.
    """
    path, dtype = spec["path"], jnp.dtype(spec.get("dtype", "float32"))
    if is_here(path):
        folder = local_files(resolve_path(path))
        values, resize = read_json(folder / "config.json"), preprocessing(folder)
    elif Path(path).name in skeletons.BLIP2:
        values, resize = skeletons.BLIP2[Path(path).name], skeletons.BLIP2_RESIZE
    else:
        raise FileNotFoundError(
            f"{path!r} is not on this disk, and plan downloads nothing: without files it knows the"
            f" sizes of {', '.join(skeletons.BLIP2)}."
        )
    sizes = Blip2Config.from_dict(values)
    graph, abstract = abstract_model(Blip2ForConditionalGeneration, sizes, dtype=dtype)
    places = infer_shardings(abstract, mesh, spec.get("sharding", ()))
    return graph, placed(abstract, places, dtype), resize
