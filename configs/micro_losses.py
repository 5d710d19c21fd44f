"""Which loss learns most from the same candidates: all of them, at an equal number of passes of the
denoiser. First two learning rates of each are tried on validation prompts:

    agfsync sweep --config=configs/micro_losses.py:rates --workdir=runs/losses/rates

The best belong into CHOSEN below. Then three seeds of each loss are judged on test prompts, which
neither a network nor that choice has seen:

    agfsync sweep --config=configs/micro_losses.py --workdir=runs/losses/judged

Hours on 2 CPU cores each; both go on where they were stopped.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from configs import common, micro

# Passes of an image: the policy's, its gradient's (two), and the reference's.
PAIRS = "diffusion_dpo ipo hinge cdpo kto smpo dspo agfsync_norm".split()  # 2 images of 4 passes
WITHOUT_REFERENCE = "mapo sft".split()  # 2 images of 3 passes
RANKINGS = "rankdpo dgpo diffusion_nft".split()  # 8 images of 4 passes
PASSES = dict.fromkeys(PAIRS, 8) | dict.fromkeys(WITHOUT_REFERENCE, 6) | dict.fromkeys(RANKINGS, 32)
EXAMPLES = {8: 32, 6: 32, 32: 8}  # in a batch

RATES = (2e-5, 4e-5)
# Loss -> the rate that the first sweep found best by referee_strict; others: 2e-5.
CHOSEN: dict[str, float] = {
    "diffusion_dpo": 4e-5,
    "ipo": 2e-5,
    "hinge": 4e-5,
    "cdpo": 4e-5,
    "kto": 4e-5,
    "smpo": 2e-5,
    "dspo": 4e-5,
    "agfsync_norm": 2e-5,
    "mapo": 2e-5,
    "sft": 4e-5,
    "rankdpo": 4e-5,
    "dgpo": 2e-5,
    "diffusion_nft": 4e-5,
}


def get_config(arg: str | None = None) -> ConfigDict:
    arg = common.parse_arg(arg, rates=False)
    c = micro.get_config()
    c.evaluate.split = "test"
    c.evaluate.num_seeds = 1
    c.pair.images = False
    if arg.rates:
        c.evaluate.split = "validation"
        c.evaluate.num_prompts = 150
    return c


def of_loss(name: str) -> dict:
    """A loss, at as many passes as Diffusion-DPO has in 100 steps of 32 pairs."""
    size = EXAMPLES[PASSES[name]]
    steps = 100 * 32 * PASSES["diffusion_dpo"] // (size * PASSES[name])
    ranked = {"pair.strategy": "ranked"} if name in RANKINGS else {}
    return {"loss.name": name, "train.batch_size": size, "train.num_steps": steps} | ranked


def sweep(arg: str | None) -> Iterator[dict]:
    if common.parse_arg(arg, rates=False).rates:
        for name in PASSES:
            for rate in RATES:
                yield of_loss(name) | {"train.learning_rate": rate}
        return
    for seed in range(3):
        for name in PASSES:
            yield of_loss(name) | {
                "train.learning_rate": CHOSEN.get(name, 2e-5),
                "train.seed": seed,
            }
