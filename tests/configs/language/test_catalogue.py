"""The catalogue is complete: every message of the sources has its translation, with the same fields, and is found."""

import pytest

from sdxl_trainer.configs.language.__main__ import list_messages
from sdxl_trainer.configs.language.catalogue import format_catalogue, read_catalogue
from sdxl_trainer.configs.language.templates import Template
from sdxl_trainer.configs.language.translate import CATALOGUES
from sdxl_trainer.configs.language.translator import Translator
from sdxl_trainer.configs.language.update import list_faults, update_entries

COMMAND = "python -m sdxl_trainer.configs.language"


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
        is_message = entry.translation and "docs/CONFIG.md" not in entry.sources and not entry.is_of_page
        if is_message and translator.translate_label(english) != template.fill(values):
            wrong.append((english, translator.translate_label(english)))
    assert wrong == []
