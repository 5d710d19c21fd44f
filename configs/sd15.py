"""AGFSync on Stable Diffusion 1.5, candidates as arXiv:2403.13352 draws them.

    agfsync run --config=configs/sd15.py --workdir=runs/sd15 \\
        --config.prompts.path=prompts.jsonl --config.questions.path=questions.jsonl \\
        --config.evaluate.path=heldout.jsonl

Eight candidates a prompt at 512x512, 15 steps of the checkpoint's own sampler, guidance 4.5;
`configs/sd15.py:lcm` takes 5 steps of the latent consistency LoRA without guidance instead.
Training is AGFSync's: 1,000 steps of 64 pairs. `:dpo` trains as Diffusion-DPO does (2,000 steps of
2,048 pairs), `:lora` adapters of rank 8 (10,000 steps of 32 pairs); configs/common.py says where
the numbers come from. At the 116 pairs a second that v5e:2x2 may reach by `agfsync plan`, training
would take 9 minutes; at the 465 of v5e:4x4 `:dpo` would take 2.4 hours.
`:small` is for one GPU of 24 GB: BLIP-2 FLAN-T5-XL answers, Adafactor trains, few images and pairs
are taken at once. Weights and gradients of its training take 11.2 GiB, the weights of scoring 7.3;
`agfsync plan` tells the rest, and `agfsync run --rehearse` measures it. Variants combine:
`:small,lcm`.
Prompts and questions are files of yours; agfsync_jax/prompt_sources/jsonl.py says how they look.
`agfsync plan --config=configs/sd15.py --verb=all --topology=v5e:4x4` says whether it fits, and the
hours.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str | None = None) -> ConfigDict:
    arg = common.parse_arg(
        arg, apart=(("dpo", "lora"),), lcm=False, dpo=False, lora=False, small=False
    )
    c = common.agfsync()
    c.backbone.path = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    c.backbone.kind = "stable-diffusion-v1-5"  # for plan, which needs no weights
    c.sample.device_batch_size = 8
    if arg.lcm:
        common.latent_consistency(c, "latent-consistency/lcm-lora-sdv1-5")
    if arg.dpo:
        common.diffusion_dpo(c, beta=2000.0, optimizer="adamw", warmup_steps=500)
    if arg.lora:
        common.lora(c, batch_size=32, num_steps=10_000)
    if arg.small:
        common.small(c)
    return c


sweep = common.training_seeds
