"""The whole of AGFSync on a laptop: a small Stable Diffusion that ships with the package.

    agfsync run --config=configs/micro.py --workdir=runs/micro

Draws scenes of colored shapes at 64x64, asks a small BLIP-2 about them, trains on the pairs and
lets an independent referee judge base and tuned model on prompts that training never saw.
Minutes on 2 CPU cores. `configs/micro.py:tiny` runs every verb once in about a minute: it proves
that the machinery works, and is too short to show a gain.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str | None = None) -> ConfigDict:
    arg = common.parse_arg(arg, tiny=False)
    c = common.get_config()

    c.backbone.path = "micro:stable-diffusion"

    c.prompts.num_prompts = 384

    c.sample.height = 64
    c.sample.width = 64
    c.sample.num_inference_steps = 16
    c.sample.guidance_scale = 3.0
    c.sample.device_batch_size = 64

    # This BLIP-2 was trained on bare questions.
    c.scorers.vqa = ConfigDict(
        dict(name="vqa", path="micro:blip2", prompt="{question}", score="probability")
    )
    c.scorers.clip = ConfigDict(dict(name="clip", path="micro:clip"))
    c.scorers.aesthetic = ConfigDict(
        dict(name="aesthetic", path="micro:clip", head="micro:aesthetic.safetensors")
    )

    # Faithfulness decides. Looks weigh a fifth of it (the deviations within a prompt are 0.14 and
    # 0.56), which keeps a training from losing in them, and CLIP breaks ties. A margin of 0.15 is
    # one or two questions in ten: below it lies the noise of the answers.
    c.pair.normalize = "none"
    c.pair.weights = ConfigDict(dict(vqa=1.0, clip=0.002, aesthetic=0.05))
    c.pair.strategy = "all_above_margin"
    c.pair.min_margin = 0.15
    c.pair.max_pairs = 4

    # What is where is settled while there is much noise, and looks later: learning from the former
    # alone, the policy gains more and keeps its looks (docs/micro_suite.md).
    c.train.learning_rate = 2e-5
    c.train.timesteps = "600:1000"

    c.evaluate.evaluators = ("referee",)

    if arg.tiny:
        shrink(c)
    return c


def shrink(c: ConfigDict) -> None:
    """Every verb at its smallest."""
    c.prompts.num_prompts = 8
    c.sample.num_inference_steps = 4
    c.sample.num_candidates = 3
    c.sample.device_batch_size = 8
    c.sample.prompts_per_shard = 4
    c.score.device_batch_size = 8
    c.train.batch_size = 8
    c.train.num_steps = 4
    c.train.warmup_steps = 1
    c.train.save_every = 2
    c.evaluate.num_prompts = 8
    c.evaluate.num_seeds = 1
    c.report.num_examples = 4


sweep = common.training_seeds  # the figures in the README come from these
