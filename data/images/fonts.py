"""Text in images: fonts that have its characters, also Chinese, Japanese and Korean ones, and lines that fit a width.

ASCII is drawn in Pillow's own font. For other characters the fonts of matplotlib and of the system are searched. If
none has a character, a question mark is drawn, and one message names the package that holds such a font.
"""

import unicodedata
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from loguru import logger
from PIL import Image, ImageDraw, ImageFont

from sdxl_trainer.configs.language.translate import translate_label

# Beginnings of the file names of fonts for Chinese, Japanese and Korean, in lower case, the best ones first: those of
# Linux distributions, macOS and Windows.
CJK_FONTS = (
    *("notosanscjk", "notosanssc", "notosansjp", "notosanskr", "sourcehansans", "wqy-microhei", "wqy-zenhei"),
    *(
        "pingfang",
        "hiragino",
        "stheiti",
        "applesdgothicneo",
        "msyh",
        "simhei",
        "yugoth",
        "meiryo",
        "msgothic",
        "malgun",
    ),
    *("nanumgothic", "droidsansfallback", "unifont"),
)
OTHER_STYLES = ("bold", "black", "light", "thin", "medium", "italic", "oblique", "mono")
HINT = (
    "no font of this machine has the characters {}; question marks are drawn instead. Install one, for Chinese, "
    "Japanese and Korean: apt install fonts-noto-cjk, or dnf install google-noto-sans-cjk-fonts"
)
LINE_HEIGHT = 1.3  # of a font's size
ELLIPSIS = " ..."
MAX_NAMED = 10  # characters that the hint names
_hinted_at: set[str] = set()  # characters of the first text that no font could draw; empty before the hint


class FontFace(NamedTuple):
    """A face of a font file; a collection (.ttc) has several."""

    file: str
    index: int


class Lettering:
    """Draws text of one size.

    Args:
        size_px: size of the letters; a line is `line_px` high.
    """

    def __init__(self, size_px: int):
        self.size_px = size_px
        self.line_px = round(size_px * LINE_HEIGHT)

    def measure(self, text: str) -> float:
        """Return the width of a text in one line, in pixels."""
        return sum(font.getlength(run) for font, run in self._split_by_font(text))

    def wrap(self, text: str, width_px: int, max_lines: int) -> list[str]:
        """Break a text into lines between words and between wide characters; a text that is too long ends with dots."""
        lines = [""]
        for piece in _split_pieces(text):
            lines += self._continue_line(lines.pop(), piece, width_px)
            if len(lines) > max_lines:
                last = lines[max_lines - 1].rstrip()
                while last and self.measure(last + ELLIPSIS) > width_px:
                    last = last[:-1]
                lines = [*lines[: max_lines - 1], last + ELLIPSIS]
                break
        return [line.rstrip() for line in lines]

    def draw(self, image: Image.Image, top_left: tuple[float, float], text: str, fill: str = "black") -> None:
        """Draw a text in one line on an image."""
        draw, (left, top) = ImageDraw.Draw(image), top_left
        hint_at_fonts([char for char in text if not (_is_plain(char) or _is_mark(char) or find_face(char))])
        for font, run in self._split_by_font(text):
            # All fonts share a baseline, a letter's height below the top.
            draw.text((left, top + self.size_px), run, fill=fill, font=font, anchor="ls")
            left += font.getlength(run)

    def _continue_line(self, line: str, piece: str, width_px: int) -> list[str]:
        """Return the lines that a line becomes with a further piece; a piece wider than a line is broken anywhere."""
        if self.measure(line + piece.rstrip()) <= width_px:
            return [line + piece]
        lines = [line, ""] if line else [""]
        for character in piece.lstrip():
            if lines[-1] and self.measure(lines[-1] + character) > width_px:
                lines.append("")
            lines[-1] += character
        return lines

    def _split_by_font(self, text: str) -> Iterator[tuple[ImageFont.FreeTypeFont, str]]:
        """Yield the text in runs of one font. Characters without a font become question marks."""
        for face, characters in groupby(text, find_face):
            run = "".join(characters)
            if face is None:
                run = "".join(char if _is_plain(char) else "" if _is_mark(char) else "?" for char in run)
            yield _load_font(face, self.size_px), run


@cache
def find_face(character: str) -> FontFace | None:
    """Find a font that has a character; None for plain ASCII, and for a character that no font has."""
    if _is_plain(character):
        return None
    for file in list_font_files():
        font = _open_font(file)
        if font is not None and font.get_char_index(ord(character)):
            return FontFace(file, _find_chinese_face(file))
    return None


@cache
def list_font_files() -> tuple[str, ...]:
    """List the font files of matplotlib and of the system, the best first."""
    from matplotlib import font_manager  # takes half a second, which ASCII does not need

    def rank(file: str) -> tuple[int, bool, str]:
        name = Path(file).name.lower()
        place = next((at for at, known in enumerate(CJK_FONTS) if name.startswith(known)), len(CJK_FONTS))
        return place, any(style in name for style in OTHER_STYLES), name

    own = font_manager.findfont("DejaVu Sans")  # comes with matplotlib; Cyrillic, Greek, Arabic and signs
    return (own, *sorted(font_manager.findSystemFonts(), key=rank))


def translate_drawable(text: str) -> str:
    """Return a label in the language of this process, or as it is if no font of this machine can draw that."""
    translated = translate_label(text)
    return translated if all(map(find_face, filter(lambda character: not _is_plain(character), translated))) else text


def hint_at_fonts(missing: Iterable[str]) -> None:
    """Log which characters no font has, and how a font is installed, once in the life of a process."""
    if not _hinted_at and (characters := dict.fromkeys(missing)):
        _hinted_at.update(characters)
        logger.warning(HINT, "".join(list(characters)[:MAX_NAMED]))


@cache
def _open_font(file: str) -> Any:
    """Open a font to look up characters; None if it cannot be used, as a font of bitmaps in one size."""
    from matplotlib.ft2font import FT2Font

    try:
        ImageFont.truetype(file, 12)
        return FT2Font(file)
    except (OSError, RuntimeError, ValueError):
        return None


@cache
def _find_chinese_face(file: str) -> int:
    """Return the number of the face with the simplified Chinese forms of the characters; 0 if a file has none."""
    for index in range(10 if file.lower().endswith(".ttc") else 0):
        try:
            family = ImageFont.truetype(file, 12, index=index).getname()[0] or ""
        except OSError:
            break
        if family.endswith(" SC"):
            return index
    return 0


@cache
def _load_font(face: FontFace | None, size_px: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size_px) if face is None else ImageFont.truetype(face.file, size_px, face.index)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow draws fonts by FreeType"
    return font


def _is_plain(character: str) -> bool:
    return character.isascii() and character.isprintable()


def _is_mark(character: str) -> bool:
    """Return whether a character changes others and is nothing on its own, such as a variation selector."""
    return unicodedata.category(character) in ("Mn", "Me", "Cf", "Cc")


def _split_pieces(text: str) -> Iterator[str]:
    """Yield the pieces of a text between which a line may break, each with the space that follows it."""
    piece = ""
    for character in " ".join(text.split()):
        is_wide = unicodedata.east_asian_width(character) in "WF"
        # A closing mark stays with what it closes.
        may_break = is_wide and unicodedata.category(character) not in ("Po", "Pe", "Pf")
        if piece and (may_break or piece[-1] == " "):
            yield piece
            piece = ""
        piece += character
    if piece:
        yield piece
