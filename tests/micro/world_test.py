"""The micro world: its grammar, splits, pictures, questions and referee."""

import collections
import re

import numpy as np
import pytest

from agfsync_jax.micro import world

EVERY_SCENE = [scene for kind in world.KINDS for scene in world.all_scenes(kind)]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def strict_rate(split: str, n: int, seed: int, change=lambda image, generator: image) -> float:
    generator = rng(seed)
    scenes = world.sample_scenes(generator, n, split)
    images = [change(world.render(scene, generator), generator) for scene in scenes]
    passed = [
        world.referee_strict(world.referee(image, scene))
        for image, scene in zip(images, scenes, strict=True)
    ]
    return float(np.mean(passed))


# --- Captions and splits ---


def test_every_caption_reads_back_as_its_scene():
    captions = [scene.caption() for scene in EVERY_SCENE]
    assert len(set(captions)) == len(set(EVERY_SCENE)) == 288 + 14400 + 432
    assert [world.parse_caption(caption) for caption in captions] == EVERY_SCENE


def test_captions_are_worded_as_documented():
    captions = {scene.caption() for scene in EVERY_SCENE}
    assert "a large red circle on a brown background" in captions
    assert "a blue square above a red circle on a gray background" in captions
    assert "a green star to the left of a purple ring on a white background" in captions
    assert "three red crosses on a black background" in captions


@pytest.mark.parametrize(
    ("caption", "complaint"),
    [
        ("a photo of a cat", "grammar"),
        ("a large red circle", "grammar"),
        ("a huge red circle on a brown background", "'huge' is not a size"),
        ("a large pink circle on a brown background", "'pink' is not a color"),
        ("a large red blob on a brown background", "'blob' is not a shape"),
        ("a large red circle on a pink background", "'pink' is not a background"),
        ("five red crosses on a black background", "'five' is not a count"),
        ("three red cross on a black background", "'cross' is not a plural shape"),
        ("a red circle above a red star on a gray background", "differ in color and in shape"),
    ],
)
def test_captions_outside_the_grammar_are_refused(caption, complaint):
    with pytest.raises(ValueError, match=complaint):
        world.parse_caption(caption)


def test_a_fifth_is_held_out_and_the_splits_are_disjoint():
    heldout = {scene.caption() for scene in EVERY_SCENE if world.is_heldout(scene.caption())}
    assert 0.18 < len(heldout) / len(EVERY_SCENE) < 0.22
    train = {s.caption() for s in world.sample_scenes(rng(), 1500, "train")}
    test = {s.caption() for s in world.sample_scenes(rng(), 1500, "heldout")}
    assert not train & heldout
    assert test <= heldout
    with pytest.raises(ValueError, match="split 'test' is unknown"):
        world.sample_scene(rng(), "test")


def test_a_pair_told_from_its_other_object_shares_the_split():
    told = "a blue square above a red circle on a gray background"
    mirrored = "a red circle below a blue square on a gray background"
    assert world.is_heldout(told) == world.is_heldout(mirrored)
    mirrors = {"above": "below", "to the left of": "to the right of"}
    for scene in world.all_scenes("pair"):
        if scene.relation in mirrors:
            mirror = world.Scene(
                "pair", scene.objects[::-1], scene.background, None, mirrors[scene.relation], 2
            )
            assert world.is_heldout(scene.caption()) == world.is_heldout(mirror.caption())


def test_unique_scenes_keep_the_mix_while_a_kind_lasts():
    scenes = world.sample_scenes(rng(), 150, "heldout", unique=True)
    assert len({scene.caption() for scene in scenes}) == 150
    kinds = collections.Counter(scene.kind for scene in scenes)
    assert 20 < kinds["single"] < 55 and 55 < kinds["pair"] < 95 and 20 < kinds["count"] < 55
    # All of the held-out split: the small kinds run out and pairs fill up.
    total = sum(len(world.all_scenes(kind, "heldout")) for kind in world.KINDS)
    scenes = world.sample_scenes(rng(), total, "heldout", unique=True)
    assert len(set(scenes)) == total
    with pytest.raises(ValueError, match=f"has only {total}"):
        world.sample_scenes(rng(), total + 1, "heldout", unique=True)


def test_a_mutant_differs_in_one_attribute_or_in_the_order():
    generator, orders = rng(), 0
    for scene in world.sample_scenes(generator, 500, "all"):
        mutant = world.mutate(scene, generator)
        assert world.parse_caption(mutant.caption()) == mutant
        differences = [
            getattr(scene, field) != getattr(mutant, field)
            for field in ("kind", "background", "size", "relation", "count")
        ]
        if mutant.objects == scene.objects[::-1] != scene.objects:
            assert sum(differences) == 0
            orders += 1
            continue
        for mine, theirs in zip(scene.objects, mutant.objects, strict=True):
            differences += [mine.color != theirs.color, mine.shape != theirs.shape]
        assert sum(differences) == 1
        assert not world.is_heldout(world.mutate(scene, generator, "train").caption())
    assert orders > 20


def test_a_careless_caption_names_everything_and_tells_another_picture():
    generator, changes = rng(), set()
    for scene in world.sample_scenes(generator, 400, "train"):
        told = world.misread(scene, generator, "train")
        assert not world.is_heldout(told.caption())
        if told == scene:
            continue
        assert world.in_reading_order(told) != world.in_reading_order(scene)
        assert told.background == scene.background
        for attribute in ("color", "shape"):
            assert {getattr(thing, attribute) for thing in told.objects} == {
                getattr(thing, attribute) for thing in scene.objects
            }
        changes.add((scene.kind, told.objects == scene.objects[::-1], told.count - scene.count))
    assert changes == {
        ("single", True, 0), ("pair", True, 0), ("pair", False, 0),
        ("count", True, 1), ("count", True, -1),
    }  # fmt: skip


# --- Pictures ---


def test_the_same_seed_gives_the_same_everything():
    def draw(seed):
        generator = rng(seed)
        scenes = world.sample_scenes(generator, 20, "all")
        images = [world.render(scene, generator) for scene in scenes]
        worse = [world.degrade(image, generator) for image in images]
        asked = [world.training_questions(scene, generator, 5) for scene in scenes]
        mutants = [world.mutate(scene, generator) for scene in scenes]
        return scenes, np.stack(images).tobytes(), np.stack(worse).tobytes(), asked, mutants

    assert draw(3) == draw(3)
    assert draw(3)[1] != draw(4)[1]


def test_objects_stay_inside_and_keep_the_color_of_the_palette():
    generator = rng()
    for scene in world.sample_scenes(generator, 200, "all"):
        image = world.render(scene, generator)
        assert image.shape == (64, 64, 3) and image.dtype == np.uint8
        border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
        assert (border == border[0]).all()
        for thing in scene.objects:
            differences = np.abs(
                image.astype(int) - np.array(world.COLORS[thing.color])[None, None]
            )
            assert differences.max(-1).min() <= 8


def test_degradations_change_the_picture_and_refuse_unknown_names():
    generator = rng()
    scene = world.parse_caption("a large red ring on a brown background")
    image = world.render(scene, generator)
    for kind in world.DEGRADATIONS:
        worse = world.degrade(image, generator, kind)
        assert worse.shape == image.shape and worse.dtype == np.uint8
        assert np.abs(worse.astype(int) - image).mean() > 0.5
    with pytest.raises(ValueError, match="'rust' is unknown"):
        world.degrade(image, generator, "rust")


# --- Questions ---


def true_answer(scene: world.Scene, question: str) -> str:
    """Answers from the scene by reading the words of the question, apart from the code above."""
    yes = {True: "yes", False: "no"}
    placed = {(thing.color, thing.shape) for thing in scene.objects}
    number = {"one": 1, "two": 2, "three": 3, "four": 4}
    words = re.sub(r"to the (left|right) of", r"\1", question.rstrip("?")).split()

    def single(noun):
        return {"crosses": "cross"}.get(noun, noun.removesuffix("s") if noun != "cross" else noun)

    def by(**wanted):
        found = [o for o in scene.objects if all(getattr(o, k) == v for k, v in wanted.items())]
        assert len(found) == 1, question
        return found[0]

    def count_of(rest):
        if rest == ["objects"]:
            return scene.count
        there = (rest[0], single(rest[1])) in placed
        return 0 if not there else scene.count if scene.kind == "count" else 1

    match words:
        case ["is", "there", "a", color, shape]:
            return yes[(color, shape) in placed]
        case ["what", "color", "is", "the", "background"]:
            return scene.background
        case ["is", "the", "background", background]:
            return yes[background == scene.background]
        case ["what", "color", _, "the", noun]:
            return by(shape=single(noun)).color
        case ["what", "shape", _, "the", color, _]:
            return by(color=color).shape
        case ["what", "size", "is", "the", color, shape]:
            by(color=color, shape=shape)
            return scene.size
        case ["is", "the", color, shape, ("small" | "large") as size]:
            by(color=color, shape=shape)
            return yes[size == scene.size]
        case ["how", "many", *rest, "are", "there"]:
            return [*number][count_of(rest) - 1]
        case ["are", "there", many, *rest]:
            return yes[count_of(rest) == number[many]]
        case ["are", "the", noun, color]:
            return yes[by(shape=single(noun)).color == color]
        case ["is", "the", shape, color]:
            return yes[by(shape=shape).color == color]
        case ["is", "the", color, "object", "a", shape]:
            return yes[by(color=color).shape == shape]
        case ["are", "the", color, "objects", noun]:
            return yes[by(color=color).shape == single(noun)]
        case ["where", "is", "the", c1, s1, "relative", "to", "the", c2, s2]:
            word = re.search("above|below|left|right", scene.relation)[0]
            told = (by(color=c1, shape=s1), by(color=c2, shape=s2)) == scene.objects
            flip = {"above": "below", "below": "above", "left": "right", "right": "left"}
            return word if told else flip[word]
        case ["where", "is", "the", c1, s1]:
            (other,) = [o for o in scene.objects if (o.color, o.shape) != (c1, s1)]
            return true_answer(scene, f"where is the {c1} {s1} relative to the {other}?")
        case ["is", "the", c1, s1, relation, "the", c2, s2]:
            if not {(c1, s1), (c2, s2)} <= placed:
                return "no"
            where = f"where is the {c1} {s1} relative to the {c2} {s2}?"
            return yes[true_answer(scene, where) == relation]
    raise AssertionError(f"no rule for {question!r}")


def test_every_question_has_the_answer_that_its_words_have():
    for scene in world.sample_scenes(rng(1), 400, "all", unique=True):
        rows = world.questions(scene)
        assert rows == world.questions(scene)
        assert 8 <= len(rows) <= 13
        assert len({row["question"] for row in rows}) == len(rows)
        for row in rows:
            assert row["answer"] == true_answer(scene, row["question"]), (scene, row)
            assert row["answer"] in row["choices"] and len(set(row["choices"])) >= 2
            assert set(row["choices"]) <= set(world.ANSWERS)
            assert row["element_type"] in world.ELEMENT_TYPES and row["element"]
        yes_no = [row["answer"] for row in rows if row["choices"] == ["yes", "no"]]
        assert {"yes", "no"} == set(yes_no)
        assert len(yes_no) < len(rows)


def test_the_questions_cover_every_check_of_the_referee():
    generator = rng(2)
    for scene in world.sample_scenes(generator, 60, "all"):
        checks = world.referee(world.render(scene, generator), scene)
        checked = {key.split(":")[0] for key in checks}
        assert checked == {row["element_type"] for row in world.questions(scene)}
        assert all(type(passed) is bool for passed in checks.values())  # goes into JSON


def test_training_questions_are_true_balanced_and_cover_the_fixed_wording():
    generator = rng(3)
    answers, types, asked = collections.Counter(), collections.Counter(), collections.Counter()
    for scene in world.sample_scenes(generator, 1500, "all"):
        for question, answer, element_type in world.training_questions(scene, generator, 6):
            assert answer == true_answer(scene, question), (scene, question)
            answers[answer] += 1
            types[element_type] += 1
            asked[template(question)] += 1
    assert 0.45 < answers["yes"] / (answers["yes"] + answers["no"]) < 0.55
    assert set(types) == set(world.ELEMENT_TYPES)
    assert min(types["spatial"], types["shape"], types["counting"]) > types["background"]
    fixed = {
        template(row["question"])
        for scene in world.sample_scenes(generator, 200, "all")
        for row in world.questions(scene)
    }
    assert fixed <= set(asked)


def test_malformed_objects_have_no_shape_and_keep_the_rest():
    generator = rng(5)
    steady, spoiled = [], []
    for scene in world.sample_scenes(generator, 200, "all"):
        unsteady = world.render(scene, generator, dict.fromkeys(scene.objects, (0.04, 0.1)))
        steady.append(world.referee_strict(world.referee(unsteady, scene)))
        bent = scene.objects[0]
        checks = world.referee(world.render(scene, generator, {bent: (0.15, 0.3)}), scene)
        spoiled.append([checks[f"{kind}:{bent}"] for kind in ("shape", "object", "color")])
        if scene.kind == "pair":
            assert checks[f"object:{scene.objects[1]}"]
        rows = world.training_questions(scene, generator, 20, [bent])
        for question, answer, element_type in rows:
            if element_type in ("object", "shape") and bent.color in question.split():
                assert answer == "no", question
            else:
                assert answer == true_answer(scene, question), question
    assert np.mean(steady) > 0.95
    shape, thing, color = np.mean(spoiled, axis=0)
    # Of a group one copy that is still a shape is enough to be there.
    assert shape < 0.1 and thing < 0.2 and color > 0.95


def template(question: str) -> str:
    for names, slot in (
        (world.COLORS, "COLOR"),
        ([world.plural(shape) for shape in world.SHAPES], "SHAPES"),
        (world.SHAPES, "SHAPE"),
        (world.BACKGROUNDS, "BACKGROUND"),
    ):
        question = re.sub(rf"\b({'|'.join(names)})\b", slot, question)
    return question


def test_the_vocabulary_is_exactly_the_words_in_use():
    generator = rng(4)
    words = set(world.ANSWERS)
    for scene in world.sample_scenes(generator, 1500, "all"):
        texts = [scene.caption(), *(row["question"] for row in world.questions(scene))]
        texts += [question for question, _, _ in world.training_questions(scene, generator, 4)]
        words |= set(re.findall("[a-z]+", " ".join(texts)))
    assert world.VOCABULARY == tuple(sorted(words))
    assert len(set(world.ANSWERS)) == len(world.ANSWERS)


# --- Referee ---


def test_components_agree_with_a_flood_fill():
    generator = rng(5)
    for density in (0.2, 0.5, 0.6, 0.8):
        mask = generator.random((24, 30)) < density
        labels, number = world.label_components(mask)
        expected = np.zeros(mask.shape, int)
        found = 0
        for start in zip(*np.nonzero(mask), strict=True):
            if expected[start]:
                continue
            found += 1
            stack = [start]
            while stack:
                y, x = stack.pop()
                if 0 <= y < 24 and 0 <= x < 30 and mask[y, x] and not expected[y, x]:
                    expected[y, x] = found
                    stack += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
        assert number == found
        assert ((labels > 0) == mask).all()
        assert len(set(zip(labels[mask], expected[mask], strict=True))) == number


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_the_referee_accepts_fresh_renders(split):
    assert strict_rate(split, 400, seed=6) >= 0.995


def soften(image, generator):
    """What a good generator may still get wrong: soft edges, noise, a color cast, specks."""
    pixels = world._blur(image.astype(np.float32), 0.7)
    pixels = pixels + generator.uniform(-25, 25, 3) + generator.normal(0, 6, pixels.shape)
    image = np.clip(pixels + 0.5, 0, 255).astype(np.uint8)
    y, x = generator.integers(0, 62, 2)
    image[y : y + 2, x : x + 2] = generator.integers(0, 256, 3)
    return image


def test_the_referee_accepts_soft_pictures():
    assert strict_rate("heldout", 400, seed=7, change=soften) >= 0.97


@pytest.mark.parametrize("change", [lambda image, generator: image, soften])
def test_the_referee_rejects_every_other_caption(change):
    generator = rng(8)
    accepted = []
    for scene in world.sample_scenes(generator, 250, "all"):
        image = change(world.render(scene, generator), generator)
        other = world.sample_scene(generator, "all")
        for wrong in (world.mutate(scene, generator), other):
            if wrong != scene:
                accepted.append(world.referee_strict(world.referee(image, wrong)))
    assert np.mean(accepted) < 0.005


def test_each_fault_fails_its_own_check():
    generator = rng(9)
    scene = world.parse_caption("a blue square above a red circle on a gray background")
    image = world.render(scene, generator)
    assert world.referee_mean(world.referee(image, scene)) == 1

    def failed(caption, image=image):
        checks = world.referee(image, world.parse_caption(caption))
        return {key for key, passed in checks.items() if not passed}

    assert failed("a blue square above a red circle on a white background") == {"background"}
    assert failed("a blue square below a red circle on a gray background") == {"spatial"}
    assert failed("a green square above a red circle on a gray background") == {
        "object:green square",
        "color:green square",
    }
    assert failed("a blue square above a red star on a gray background") == {
        "object:red star",
        "shape:red star",
    }
    single = world.parse_caption("a small green ring on a black background")
    small = world.render(single, generator)
    assert failed("a large green ring on a black background", small) == {"size"}
    three = world.parse_caption("three yellow stars on a brown background")
    stars = world.render(three, generator)
    assert failed("four yellow stars on a brown background", stars) == {"counting"}


def test_a_further_object_fails_counting_and_a_speck_does_not():
    scene = world.parse_caption("a small green circle on a white background")
    image = world.render(scene, rng(10))
    speck, extra = image.copy(), image.copy()
    speck[4:6, 4:7] = (225, 35, 35)
    extra[4:10, 4:10] = (225, 35, 35)
    assert world.referee_strict(world.referee(speck, scene))
    assert world.referee(extra, scene)["counting"] is False


def test_a_shapeless_or_two_colored_object_is_not_accepted():
    scene = world.parse_caption("a large red circle on a white background")
    image = world.render(scene, rng(11))
    y, x = np.mgrid[:64, :64] - 31.5
    diamond = np.where((np.abs(x) + np.abs(y) < 26)[..., None], (225, 35, 35), 245)
    assert not any(
        passed
        for key, passed in world.referee(diamond.astype(np.uint8), scene).items()
        if key.startswith(("shape", "object"))
    )
    two = image.copy()
    left = (image.astype(int)[:, :, 1] < 150) & (np.arange(64)[None, :] < 32)
    two[left] = (40, 70, 225)
    assert world.referee(two, scene)["color:red circle"] is False


def test_nothing_at_all_fails_and_wrong_arrays_are_refused():
    empty = np.full((64, 64, 3), 128, np.uint8)
    for scene in world.sample_scenes(rng(12), 20, "all"):
        checks = world.referee(empty, scene)
        assert {key for key, passed in checks.items() if passed} <= {"background"}
        noise = rng(13).integers(0, 256, (64, 64, 3), np.uint8)
        assert not world.referee_strict(world.referee(noise, scene))
    with pytest.raises(ValueError, match="expected a uint8 image"):
        world.referee(np.zeros((32, 32, 3), np.uint8), scene)
