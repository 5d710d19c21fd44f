"""AGFSync on Stable Diffusion XL, candidates as arXiv:2403.13352 draws them.

    agfsync run --config=configs/sdxl.py --workdir=runs/sdxl \\
        --config.prompts.path=prompts.jsonl --config.questions.path=questions.jsonl \\
        --config.evaluate.path=heldout.jsonl

Eight candidates a prompt at 1024x1024, 15 steps of the checkpoint's own sampler, guidance 4.5;
`configs/sdxl.py:lcm` takes 5 steps of the latent consistency LoRA without guidance instead.
Training is AGFSync's: 1,000 steps of 64 pairs. `:dpo` trains as Diffusion-DPO does (2,000 steps of
2,048 pairs, Adafactor), `:lora` adapters of rank 8 (2,000 steps of 16 pairs); configs/common.py
says where the numbers come from. At best, by `agfsync plan`, training takes 0.44 hours on v5e:4x4,
0.22 on v6e:4x4 and 0.15 on v5p:2x2x4, and `:lora` 0.57 on v5e:2x2. At the 52 pairs a second that
v5e:4x4 may reach, `:dpo` would take 22.
`:small` is for one GPU of 24 GB: it trains adapters, BLIP-2 FLAN-T5-XL answers, few images and
pairs are taken at once. Weights and moments of its training take 9.8 GiB, those of scoring 7.3;
`agfsync plan` tells the rest, and `agfsync run --rehearse` measures it. Variants combine:
`:small,lcm`.
Prompts and questions are files of yours; agfsync_jax/prompt_sources/jsonl.py says how they look.
`agfsync plan --config=configs/sdxl.py --verb=all --topology=v5e:4x4` says whether it fits, and the
hours.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str | None = None) -> ConfigDict:
    apart = (("dpo", "lora"), ("dpo", "small"))  # :small trains adapters
    arg = common.parse_arg(arg, apart=apart, lcm=False, dpo=False, lora=False, small=False)
    c = common.agfsync()
    c.backbone.name = "stable_diffusion_xl"
    c.backbone.path = "stabilityai/stable-diffusion-xl-base-1.0"
    c.backbone.kind = "stable-diffusion-xl-base"  # for plan, which needs no weights
    c.sample.height = 1024
    c.sample.width = 1024
    c.sample.device_batch_size = 4
    common.beta_of_dpo(c, 5000.0)
    c.train.device_batch_size = 1
    if arg.lcm:
        common.latent_consistency(c, "latent-consistency/lcm-lora-sdxl")
    if arg.dpo:
        common.diffusion_dpo(c, beta=5000.0, optimizer="adafactor", warmup_steps=200)
    if arg.lora or arg.small:
        common.lora(c, batch_size=16, num_steps=2000)
    if arg.small:
        common.small(c)
    return c


sweep = common.training_seeds
