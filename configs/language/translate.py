"""Translation of finished texts, at the places where they reach the user.

Messages are written in English, without a mark. A catalogue lists them as templates (messages.py extracts them from the
sources), and `translate` looks for the template that a finished text was made from. Under English it returns the text
at once and reads nothing. Log files, exit statuses and files that programs read stay English in every language.
"""

import os
import re
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from sdxl_trainer.configs.language.commands import adapt_commands
from sdxl_trainer.configs.language.templates import is_wide

if TYPE_CHECKING:
    from sdxl_trainer.configs.language.translator import Translator

CATALOGUES = {"zh": Path(__file__).parent / "zh_CN.po"}
VARIABLES = ("LANGUAGE", "LC_ALL", "LC_MESSAGES", "LANG")  # in gettext's order
MAX_LENGTH = 20_000  # of a text to translate: tables and lists of thousands of names are left alone

_chosen = ""


def choose_language(setting: str | None = None) -> str:
    """Choose the language of this process by a setting, or by the environment, and return it: `en` or `zh`."""
    global _chosen
    _chosen = setting or _read_environment()
    return _chosen


def get_language() -> str:
    """Return the language of this process: `en` or `zh`."""
    return _chosen or choose_language()


def translate(text: str) -> str:
    """Return a finished English text in the language of this process; unchanged if it is not in the catalogue.

    Commands in it are named as the user starts them (commands.py).
    """
    language = get_language()
    if language in CATALOGUES and len(text) <= MAX_LENGTH:
        text = load_translator(language).translate(text)
    return adapt_commands(text)


def translate_label(text: str) -> str:
    """Like `translate`, for headings and names of rows, which may be single words."""
    language = get_language()
    return load_translator(language).translate_label(text) if language in CATALOGUES else text


def join_label(label: str, text: str) -> str:
    """Return a text behind its label, both translated, with the colon that suits the language of the two."""
    return f"{label}{'：' if any(map(is_wide, label)) or is_wide(text[:1]) else ': '}{text}"


@lru_cache
def load_translator(language: str) -> "Translator":
    """Load the catalogue of a language, once."""
    # Imported here because an English start needs neither.
    from sdxl_trainer.configs.language.catalogue import read_catalogue
    from sdxl_trainer.configs.language.translator import Translator

    return Translator(read_catalogue(CATALOGUES[language]))


def _read_environment() -> str:
    """Return the language that the environment asks for, `en` unless there is a catalogue of it."""
    for variable in VARIABLES:
        if value := os.environ.get(variable):
            language = re.split(r"[_.@:-]", value)[0].lower()
            return language if language in CATALOGUES else "en"
    return "en"
