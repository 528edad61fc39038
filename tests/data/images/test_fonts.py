"""Text in images: characters beyond ASCII are drawn, not boxes, and lines fit a width."""

import numpy as np
import pytest
from loguru import logger
from PIL import Image

from sdxl_trainer.data.images import fonts
from sdxl_trainer.data.images.fonts import Lettering, find_face

CAPTIONS = {"Chinese": "一只坐在垫子上的猫", "Japanese": "赤い丸とネコ", "Korean": "고양이"}


def draw(text: str) -> np.ndarray:
    """Return the pixels of a drawn text, [H, W] uint8."""
    image = Image.new("L", (200, 40), 255)
    Lettering(24).draw(image, (0, 0), text)
    return np.asarray(image)


@pytest.mark.parametrize("language", CAPTIONS)
def test_each_character_is_drawn_with_its_own_shape(language):
    text = CAPTIONS[language]
    if any(find_face(character) is None for character in text):
        pytest.skip(f"this machine has no font for {language}; fonts-noto-cjk is one")
    shapes = {draw(character).tobytes() for character in text}
    boxes = {draw(chr(code)).tobytes() for code in (0x3F, 0xFFFF, 0xE000)}  # a question mark, and no characters
    assert len(shapes) == len(set(text)) and not shapes & boxes
    assert all((draw(character) < 128).sum() > 20 for character in text)


def test_letters_of_other_scripts_need_no_font_of_the_system(monkeypatch):
    monkeypatch.setattr("matplotlib.font_manager.findSystemFonts", list)
    fonts.list_font_files.cache_clear()
    find_face.cache_clear()
    assert len({draw(letter).tobytes() for letter in "éжΩ?"}) == 4
    fonts.list_font_files.cache_clear()
    find_face.cache_clear()


def test_without_a_font_one_hint_names_the_package(monkeypatch):
    messages = []
    sink = logger.add(lambda message: messages.append(str(message)), format="{message}")
    monkeypatch.setattr(fonts, "find_face", lambda character: None)
    monkeypatch.setattr(fonts, "_hinted_at", set())
    assert np.array_equal(draw("猫 a"), draw("? a"))
    draw("猫 고")
    logger.remove(sink)
    assert (
        len(messages) == 1 and "has the characters 猫;" in messages[0] and "apt install fonts-noto-cjk" in messages[0]
    )


def test_lines_fit_their_width_in_every_script():
    lettering = Lettering(12)
    for text in ("a red circle on a white background " * 5, CAPTIONS["Chinese"] * 9, "x" * 300):
        lines = lettering.wrap(text, 150, 99)
        assert len(lines) > 3 and max(map(lettering.measure, lines)) <= 150
        assert "".join(lines).replace(" ", "") == text.replace(" ", "")  # nothing is lost
        cut = lettering.wrap(text, 150, 2)
        assert len(cut) == 2 and cut[0] == lines[0] and cut[1].endswith(" ...") and lettering.measure(cut[1]) <= 150
    assert lettering.wrap("", 150, 2) == [""] and lettering.wrap("cat,\n dog", 150, 2) == ["cat, dog"]
