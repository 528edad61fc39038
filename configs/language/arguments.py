"""Command lines whose help and errors are in the user's language."""

import argparse
from typing import Any, NoReturn

from sdxl_trainer.configs.language.translate import translate, translate_label

HEADINGS = ("usage: ", "positional arguments", "options")  # argparse's own


class TranslatedParser(argparse.ArgumentParser):
    """An argument parser in the user's language. Texts are given in English."""

    def __init__(self, *args: Any, description: str | None = None, **options: Any):
        super().__init__(*args, description=translate(description.strip()) if description else None, **options)

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        """Add an argument, like argparse's."""
        if options.get("help") not in (None, argparse.SUPPRESS):
            options["help"] = translate(options["help"])
        return super().add_argument(*names, **options)

    def format_help(self) -> str:
        """Return the help text."""
        text = super().format_help()
        for heading in HEADINGS:
            text = text.replace(f"\n{heading}:\n", f"\n{translate_label(heading)}:\n")
        return text

    def error(self, message: str) -> NoReturn:
        """Print usage and the mistake, and exit with status 2."""
        super().error(translate(message))
