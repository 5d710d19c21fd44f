"""Linear probes, thrown away after training, that make a network say where a scene's facts stand.

A loss on whole captions, pictures or answers finds colors and shapes soon, but which thing is
above which only after many thousands of steps, or never. A probe reads one fact of the scene from
one token, and its loss makes the network write the fact there.
"""

from collections.abc import Collection

import jax
import jax.numpy as jnp
import optax

from agfsync_jax.micro.grammar import (
    BACKGROUNDS,
    COLORS,
    COUNTS,
    SHAPES,
    Object,
    Scene,
    in_reading_order,
)

_BACKGROUNDS = list(BACKGROUNDS)
_COLORS = [None, *COLORS]
_SHAPES = [None, *SHAPES, "malformed"]
_ROLES = [None, "small", "large", "above", "below", "left", "right", "group"]
_PLACES = [*_ROLES[:-1], *COUNTS]
_IN_READING_ORDER = {"above": ("above", "below"), "to the left of": ("left", "right")}

Slots = dict[tuple[int, str], int]  # (token, fact) -> how many values the fact has

# What BLIP-2's queries tell of a picture: six of them look for a color each.
IN_QUERIES: Slots = {
    **{(i, f"{color} {fact}"): len(values)
       for i, color in enumerate(COLORS)
       for fact, values in (("shape", _SHAPES), ("role", _ROLES))},
    (6, "background"): len(_BACKGROUNDS),
    (7, "count"): 4,
}  # fmt: skip

_IN_ORDER = {"color": len(_COLORS), "shape": len(_SHAPES), "place": len(_PLACES)}
_OF_CAPTION = {
    (token, f"{which} {fact}"): values
    for token, which in ((-4, "first"), (-3, "second"))
    for fact, values in _IN_ORDER.items()
} | {(-2, "background"): len(_BACKGROUNDS)}
# What the last three tokens of a caption tell, which are padding and see all of it: the object at
# the top or on the left, the other one, the background. The end-of-text token, set behind them,
# tells the same once more.
IN_CAPTION: Slots = _OF_CAPTION | {
    (-1, f"end {fact}"): values for (_, fact), values in _OF_CAPTION.items()
}


def of_picture(scene: Scene, malformed: Collection[Object] = ()) -> list[int]:
    """The values of `IN_QUERIES`."""
    scene = in_reading_order(scene)
    of_scene = _IN_READING_ORDER.get(scene.relation, (scene.size or "group",))
    seen = {
        thing.color: (
            _SHAPES.index("malformed" if thing in malformed else thing.shape),
            _ROLES.index(role),
        )
        for thing, role in zip(scene.objects, of_scene, strict=True)
    }
    values = [value for color in COLORS for value in seen.get(color, (0, 0))]
    return [*values, _BACKGROUNDS.index(scene.background), scene.count - 1]


def of_caption(scene: Scene) -> list[int]:
    """The values of `IN_CAPTION`."""
    scene = in_reading_order(scene)
    of_scene = _IN_READING_ORDER.get(scene.relation, (scene.size or scene.count,))
    values = [0] * 6
    for index, (thing, place) in enumerate(zip(scene.objects, of_scene, strict=True)):
        values[3 * index : 3 * index + 3] = [
            _COLORS.index(thing.color), _SHAPES.index(thing.shape), _PLACES.index(place)
        ]  # fmt: skip
    return 2 * [*values, _BACKGROUNDS.index(scene.background)]


def init(slots: Slots, width: int) -> dict[str, dict[str, jax.Array]]:
    """One linear layer a slot."""
    return {
        name: {"kernel": jnp.zeros((width, values)), "bias": jnp.zeros(values)}
        for (_, name), values in slots.items()
    }


def loss(slots: Slots, probes: dict, tokens: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean cross-entropy of the slots, read from tokens [b, n, d]; targets [b, slots]."""
    losses = []
    for index, (token, name) in enumerate(slots):
        logits = tokens[:, token] @ probes[name]["kernel"] + probes[name]["bias"][None]
        losses.append(
            optax.softmax_cross_entropy_with_integer_labels(logits, targets[:, index]).mean()
        )
    return jnp.stack(losses).mean()
