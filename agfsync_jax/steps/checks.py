"""What a config names, looked up before any work."""

from ml_collections import ConfigDict

from agfsync_jax.utils import modules
from agfsync_jax.weights.places import resolve_path


def check(config: ConfigDict, verb: str) -> None:
    """Looks up every name in the config, and the weights that `verb` will read.

    Raises:
        ValueError: a name that is no file of its room.
        FileNotFoundError: weights that are not there.
    """
    modules.check("backbones", config.backbone.name)
    modules.check("losses", config.loss.name)
    for source in (config.prompts.source, config.questions.source, config.evaluate.source):
        modules.check("prompt_sources", source)
    for scorer in config.scorers.values():
        modules.check("scorers", scorer.name)
    for name in config.evaluate.evaluators:
        modules.check("evaluators", name)
    wanted = []
    if verb in ("run", "sample", "pair", "train", "evaluate", "export"):
        wanted.append((config.backbone.path, config.backbone.variant))
        known = [str, float], [str, int]
        for entry in config.backbone.lora:
            if isinstance(entry, str | int | float) or [type(x) for x in entry] not in known:
                raise ValueError(
                    f"config.backbone.lora has {entry!r}: expected (path, scale), as in "
                    "(('lora.safetensors', 1.0),)"
                )
            wanted.append((entry[0], ""))
    if verb in ("run", "sample", "evaluate") and config.sample.refiner:
        wanted.append((config.sample.refiner, config.backbone.variant))
    if verb in ("run", "score", "evaluate"):
        for scorer in config.scorers.values():
            wanted += [(scorer[key], "") for key in ("path", "head") if scorer.get(key)]
    for path, variant in wanted:
        resolve_path(path, variant=variant)
