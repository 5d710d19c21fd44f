"""AGFSync on Stable Diffusion 2.1, candidates as arXiv:2403.13352 draws them.

    agfsync run --config=configs/sd21.py --workdir=runs/sd21 \\
        --config.prompts.path=prompts.jsonl --config.questions.path=questions.jsonl \\
        --config.evaluate.path=heldout.jsonl

Eight candidates a prompt at 768x768, 15 steps of the checkpoint's own sampler, guidance 4.5.
Training is AGFSync's: 1,000 steps of 64 pairs. `:dpo` trains with the settings that Diffusion-DPO
has for Stable Diffusion 1.5 (2,000 steps of 2,048 pairs), `:lora` adapters of rank 8 (10,000 steps
of 32 pairs); configs/common.py says where the numbers come from.
`:small` is for one GPU of 24 GB: BLIP-2 FLAN-T5-XL answers, Adafactor trains, few images and pairs
are taken at once. Weights and gradients of its training take 11.3 GiB, the weights of scoring 7.3;
`agfsync plan` tells the rest, and `agfsync run --rehearse` measures it.
Prompts and questions are files of yours; agfsync_jax/prompt_sources/jsonl.py says how they look.
`agfsync plan --config=configs/sd21.py --verb=all --topology=v5e:4x4` says whether it fits, and the
hours.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str | None = None) -> ConfigDict:
    apart = (("dpo", "lora"),)
    arg = common.parse_arg(arg, apart=apart, dpo=False, lora=False, small=False)
    c = common.agfsync()
    c.backbone.path = "stabilityai/stable-diffusion-2-1"
    c.backbone.kind = "stable-diffusion-2"  # for plan, which needs no weights
    c.sample.height = 768
    c.sample.width = 768
    c.sample.device_batch_size = 4
    if arg.dpo:
        common.diffusion_dpo(c, beta=2000.0, optimizer="adamw", warmup_steps=500)
    if arg.lora:
        common.lora(c, batch_size=32, num_steps=10_000)
    if arg.small:
        common.small(c)
    return c


sweep = common.training_seeds
