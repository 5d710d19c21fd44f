"""What decides how much AGFSync gains, on the micro suite: one question a sweep.

    agfsync sweep --config=configs/micro_science.py:candidates --workdir=runs/science/candidates

`:candidates` draws 2, 4, 8 or 16 a prompt; `:noise` draws with and without noise on the text
embedding; `:scorers` makes pairs of each score alone, and of all; `:strategies` makes pairs of the
same scores in different ways, `:timesteps` learns them at different noise; `:controls` is what must
not gain, or gain less; `:rounds` goes on for one to five rounds, on the tuned model's own pictures
or for as many steps on the first ones. Three training seeds each, judged by the referee on prompts
that nothing has seen; minutes to hours on 2 CPU cores, and the same command goes on after a stop.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from configs import common, micro

SEEDS = range(3)
# Scores of different scales, each as its distance from the prompt's mean; the best and the worst.
SCALED = {"pair.normalize": "zscore", "pair.strategy": "best_worst", "pair.min_margin": 0.0}
SCORES = ("vqa", "clip", "aesthetic")
TOPICS: dict[str, list[dict]] = {
    "candidates": [{"sample.num_candidates": n} for n in (2, 4, 8, 16)],
    "noise": [{"sample.conditioning_noise": std} for std in (0.0, 0.1, 0.3)],
    "scorers": [
        SCALED | {f"pair.weights.{name}": float(name in chosen) for name in SCORES}
        for chosen in (("vqa",), ("clip",), ("aesthetic",), SCORES)
    ],
    "strategies": [
        {"pair.strategy": "best_worst"},
        {"pair.strategy": "all_above_margin"},
        {"pair.strategy": "top_k_bottom_k", "pair.k": 2},
        {"pair.strategy": "all_above_margin", "pair.normalize": "zscore", "pair.min_margin": 1.0},
    ],
    "timesteps": [
        {"train.timesteps": timesteps} for timesteps in ("", "400:1000", "600:1000", "800:1000")
    ],
    "controls": [{"pair.shuffle_labels": True}, {"loss.name": "sft"}],
    "rounds": [
        *({"rounds": rounds} for rounds in (1, 3, 5)),
        *({"train.num_steps": 200 * rounds} for rounds in (3, 5)),
    ],
}


def get_config(arg: str | None = None) -> ConfigDict:
    common.parse_arg(arg, **dict.fromkeys(TOPICS, False))
    c = micro.get_config()
    c.evaluate.split = "test"
    c.evaluate.num_seeds = 1
    c.pair.images = False
    return c


def sweep(arg: str | None) -> Iterator[dict]:
    topics = common.parse_arg(arg, **dict.fromkeys(TOPICS, False))
    if not any(topics.values()):
        raise ValueError(f"say what to ask, as in micro_science.py:noise: {', '.join(TOPICS)}")
    for topic, settings in TOPICS.items():
        for each in settings if topics[topic] else ():
            for seed in SEEDS:
                yield each | {"train.seed": seed}
