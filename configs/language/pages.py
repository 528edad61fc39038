"""Texts of pages: their extraction from HTML, JavaScript and Jinja templates, and their translations for a page.

A text that a page loads with stands in its HTML; every other one is the literal argument of a call of `t`.
"""

import html
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

from sdxl_trainer.configs.language.catalogue import read_catalogue
from sdxl_trainer.configs.language.translate import CATALOGUES, get_language, translate_label

PAGES = (
    *("train/watch/page/*.html", "train/watch/page/*.js"),
    *("train/report/*.html", "train/evidence/*.html", "cache/preview/page.html"),
)
CALL = re.compile(r"""\bt\(\s*("(?:[^"\\]|\\.)*")""")
WORDS = re.compile(r"[A-Za-z]{2,}")
ATTRIBUTES = ("placeholder", "aria-label")
UNSHOWN = ("script", "style")


def extract_from_pages(root: Path) -> Iterator[tuple[str, str]]:
    """Yield each text of the pages below `root`, with the file that contains it."""
    for pattern in PAGES:
        for path in sorted(root.glob(pattern)):
            source = path.read_text(encoding="utf-8")
            is_static = path.suffix == ".html" and "{{" not in source
            for text in _StaticTexts(source).found if is_static else map(json.loads, CALL.findall(source)):
                yield text, path.relative_to(root).as_posix()


def write_page_texts(folder: str) -> str:
    """Return the texts of the pages in a folder and their translations as JSON, escaped for an attribute in HTML."""
    texts = {}
    if (path := CATALOGUES.get(get_language())) is not None:
        entries = [entry for entry in read_catalogue(path) if entry.translation and not entry.is_fuzzy]
        texts = {e.text: e.translation for e in entries if any(source.startswith(folder) for source in e.sources)}
    return html.escape(json.dumps(texts, ensure_ascii=False))


def fill_text(text: str, **values: object) -> str:
    """Return a text of a page in the language of this process, with its fields filled in: `t` of templates."""
    return translate_label(text).format(**values)


class _StaticTexts(HTMLParser):
    """Collects the texts that a page shows as soon as it is loaded."""

    def __init__(self, source: str):
        super().__init__()
        self.found: list[str] = []
        self._tag = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._tag = tag
        for name, value in attrs:
            if name in ATTRIBUTES:
                self._add(value or "")

    def handle_endtag(self, tag: str) -> None:
        self._tag = ""

    def handle_data(self, data: str) -> None:
        if self._tag not in UNSHOWN:
            self._add(data.strip())

    def _add(self, text: str) -> None:
        if WORDS.search(text) and text not in self.found:
            self.found.append(text)
