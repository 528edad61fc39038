"""The catalogue is complete: every message of the sources has its translation, with the same fields, and is found."""

import re

import pytest

from sdxl_trainer.configs.language.__main__ import list_messages
from sdxl_trainer.configs.language.catalogue import Entry, format_catalogue, read_catalogue
from sdxl_trainer.configs.language.templates import Template
from sdxl_trainer.configs.language.translate import CATALOGUES
from sdxl_trainer.configs.language.translator import Translator
from sdxl_trainer.configs.language.update import list_faults, update_entries

# What messages are put behind, into and before at run time.
WRAPPINGS = (
    *("cure: {}", "prompts.txt:2: {}", "/data/a b.txt, entry 3: {}", "skipped bad image: /data/a.png: {}"),
    "{}; did you mean a.b?",
)
HAN = r"[\u3400-\u9fff]"
MARKS = re.compile(rf"(?:{HAN}|[，。；：）]) (?:{HAN}|[，。；：（])|(?:{HAN}|）)[:,;?!]")
CODE = re.compile(r"\[[^\]]*\]")
COMMAND = "python -m sdxl_trainer.configs.language"


def is_shown(entry: Entry) -> bool:
    """Return whether a program prints a message, and not only a document or a page."""
    return not entry.is_of_page and not any(source.startswith("docs/") for source in entry.sources)


@pytest.mark.parametrize("language", CATALOGUES)
def test_every_message_has_its_translation(language: str) -> None:
    path = CATALOGUES[language]
    entries = update_entries(read_catalogue(path), list_messages())
    assert len(entries) > 1000
    assert path.read_text(encoding="utf-8") == format_catalogue(path.stem, entries), f"messages have changed: {COMMAND}"
    assert list_faults(entries) == [], f"translate them in {path}; {COMMAND} lists them"


@pytest.mark.parametrize("language", CATALOGUES)
def test_every_message_is_found_by_its_finished_text(language: str) -> None:
    """With values of the kinds that a message is printed with: numbers, and names without spaces."""
    entries = read_catalogue(CATALOGUES[language])
    translator, wrong = Translator(entries), []
    for entry in entries:
        template = Template(entry.text, entry.translation)
        fields = [part for part in template.parts if not isinstance(part, str)]
        values = [str(100 + place) if field.is_number else f"x{place}.y" for place, field in enumerate(fields)]
        english = Template(entry.text, entry.text).fill(values)
        is_message = entry.translation and is_shown(entry)
        if is_message and translator.translate_label(english) != template.fill(values):
            wrong.append((english, translator.translate_label(english)))
    assert wrong == []


@pytest.mark.parametrize("language", CATALOGUES)
def test_a_message_inside_another_text_is_translated_as_a_whole(language: str) -> None:
    entries = read_catalogue(CATALOGUES[language])
    translator, mixed = Translator(entries), []
    for entry in [entry for entry in entries if is_shown(entry) and entry.translation]:
        template = Template(entry.text, entry.translation)
        fields = [part for part in template.parts if not isinstance(part, str)]
        values = [str(100 + place) if field.is_number else f"x{place}.y" for place, field in enumerate(fields)]
        english = Template(entry.text, entry.text).fill(values)
        # Not single words, connecting words, and parts of messages.
        if " " in english and english == english.strip() and english[0] not in ";,(" and not template.is_weak:
            wrappings = WRAPPINGS[:-1] if "\n" in english else WRAPPINGS  # nothing follows a message of several lines
            shown = {wrapping: translator.translate(wrapping.format(english)) for wrapping in wrappings}
            mixed += [(wrapping, text) for wrapping, text in shown.items() if template.fill(values) not in text]
    assert mixed == []


def test_translations_use_the_marks_of_chinese() -> None:
    """No space between Chinese texts, and no half-width mark behind one, except in YAML and formulas."""
    wrong = [
        entry.translation
        for entry in read_catalogue(CATALOGUES["zh"])
        if is_shown(entry) and MARKS.search(CODE.sub("x", entry.translation))
    ]
    assert wrong == []
