"""before_after.png: cards of any size, and scripts that the default font lacks."""

import io
import warnings

import numpy as np
import pytest
from PIL import Image

from agfsync_jax.reports import sheet

ARABIC, JAPANESE = "قطة حمراء على خلفية بيضاء", "白い背景に赤い猫がいる" * 4


def png(size, color="red") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, color).save(stream, "PNG")
    return stream.getvalue()


def card(prompt: str) -> tuple:
    return prompt, (png((64, 64)), "base"), (png((300, 200)), "tuned")


def lettering(picture: Image.Image, left: int = 0) -> tuple[int, int]:
    """Where the ink of the first caption begins and ends, of the first card."""
    ink = np.asarray(picture.convert("L"))[sheet.PAD + sheet.HEADING :][: sheet.TOP - 2]
    (columns,) = np.nonzero((ink[:, : sheet.PAD + sheet.CARD + 8] < 128).any(0))
    return columns.min(), columns.max()


def test_cards_of_any_number():
    words = card("a prompt of very many words " * 9)
    picture = sheet.draw({"one": [words] * 5, "none": []})
    assert np.asarray(picture).std() > 10
    rows = 2 * (sheet.TOP + sheet.TILE + sheet.FOOT)
    assert picture.height == 2 * sheet.PAD + sheet.HEADING + rows
    tile = np.asarray(picture)[sheet.PAD + sheet.HEADING + sheet.TOP :, sheet.PAD :]
    assert (tile[:64, :64] == (255, 0, 0)).all()
    end = sheet.PAD + sheet.CARD
    assert end - 60 < lettering(picture)[1] <= end
    assert lettering(sheet.draw({"one": [card("x" * 400)]}))[1] <= end


@pytest.mark.timeout(300)
def test_long_prompts_come_to_an_end():
    sheet.draw({"one": [card("a long prompt " * 1000) for _ in range(8)]})


def test_words_run_from_the_right():
    (left, right), end = lettering(sheet.draw({"one": [card(ARABIC)]})), sheet.PAD + sheet.CARD
    assert right > end - 8 and left > sheet.PAD + 20
    assert lettering(sheet.draw({"one": [card("a cat")]}))[0] < sheet.PAD + 4


@pytest.mark.parametrize("text", [ARABIC, JAPANESE])
def test_letters_are_no_boxes(text, monkeypatch):
    letters = {letter for letter in text if not letter.isspace()}
    known = frozenset().union(*map(sheet._letters, sheet._fonts()))
    if missing := {letter for letter in letters if ord(letter) not in known}:
        pytest.skip(f"no font of this machine has {missing}")
    found = frozenset().union(*map(sheet._letters, sheet.families(text)))
    assert {ord(letter) for letter in letters} <= found
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setattr(warnings, "filterwarnings", lambda *args, **kwargs: None)
        picture = sheet.draw({"one": [card(text)]})
    assert lettering(picture)[1] <= sheet.PAD + sheet.CARD + 4


def test_a_letter_that_no_font_has():
    assert sheet.families("a cat") == [sheet.DEFAULT]
    assert sheet.families("\ue123") == [sheet.DEFAULT]  # of private use
    assert sheet.draw({"one": [card("\ue123")]}).width > 900
