"""Command lines whose help and errors are in the user's language."""

import argparse
import copy
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

from sdxl_trainer.configs.language.translate import translate, translate_label

USAGE = "usage: "


class TranslatedParser(argparse.ArgumentParser):
    """An argument parser in the user's language. Its texts are given in English."""

    def __init__(
        self,
        *args: Any,
        description: str | None = None,
        formatter_class: type[argparse.HelpFormatter] = argparse.HelpFormatter,
        **options: Any,
    ):
        formatter = type("TranslatedFormatter", (_TranslatedHelp, formatter_class), {})
        shown = translate(description.strip()) if description else None
        super().__init__(*args, description=shown, formatter_class=formatter, **options)

    def format_usage(self) -> str:
        """Return the usage with the English prefix, whose length argparse counts on for intermixed arguments."""
        return USAGE + super().format_usage().removeprefix(translate_label(USAGE))

    def print_usage(self, file: Any = None) -> None:
        """Print the usage."""
        (file or sys.stdout).write(translate_label(USAGE) + self.format_usage().removeprefix(USAGE))

    def error(self, message: str) -> NoReturn:
        """Print usage and the mistake, and exit with status 2."""
        self.print_usage(sys.stderr)
        self.exit(2, f"{self.prog}: {translate_label('error')}: {translate(message)}\n")


class _TranslatedHelp(argparse.HelpFormatter):
    """Translates what argparse is about to lay out."""

    def add_usage(self, usage: str | None, actions: Any, groups: Any, prefix: str | None = None) -> None:
        super().add_usage(usage, actions, groups, translate_label(USAGE) if prefix is None else prefix)

    def start_section(self, heading: str | None) -> None:
        super().start_section(translate_label(heading) if heading else heading)

    def add_argument(self, action: argparse.Action) -> None:
        shown = copy.copy(action)
        if action.help not in (None, argparse.SUPPRESS):
            shown.help = translate(action.help)
        super().add_argument(shown)

    def add_arguments(self, actions: Iterable[argparse.Action]) -> None:
        for action in actions:
            self.add_argument(action)
