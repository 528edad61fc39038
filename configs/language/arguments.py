"""Command lines whose help and errors are in the user's language."""

import argparse
import copy
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from sdxl_trainer.configs.language.commands import name_program
from sdxl_trainer.configs.language.translate import CATALOGUES, get_language, join_label, translate, translate_label

USAGE = "usage: "
LANGUAGE_HELP = "language of the page (default: the one that LANG names, or English)"
HEADING = re.compile(r"^([\u3400-\u9fff]+):$", re.MULTILINE)


def add_language(parser: argparse.ArgumentParser) -> None:
    """Add `--language`, the language of a generated page."""
    parser.add_argument("--language", choices=("en", *CATALOGUES), default=get_language(), help=LANGUAGE_HELP)


class TranslatedParser(argparse.ArgumentParser):
    """An argument parser in the user's language. Its texts are given in English.

    Args:
        prog: command that users start the program by, unless they have started it by `sdxl-trainer`.
        description: what the program does for the user, in a few sentences.
        examples: command lines, with `%(prog)s` for the command.
        epilog: where to read on.
    """

    def __init__(
        self,
        *args: Any,
        prog: str | None = None,
        description: str = "",
        examples: Sequence[str] = (),
        epilog: str = "",
        **options: Any,
    ):
        super().__init__(*args, prog=name_program(prog), formatter_class=_TranslatedHelp, **options)
        lines = [translate(description)]
        if examples:
            lines += ["", translate_label("examples:"), *(f"  {line}" for line in examples)]
        self.description = "\n".join(lines).replace("%(prog)s", self.prog)
        self.epilog = translate(epilog)

    def format_usage(self) -> str:
        """Return the usage with the English prefix, whose length argparse counts on for intermixed arguments."""
        return USAGE + super().format_usage().removeprefix(translate_label(USAGE))

    def format_help(self) -> str:
        """Return the help; Chinese headings end with the colon of Chinese."""
        return HEADING.sub(r"\1：", super().format_help())

    def print_usage(self, file: Any = None) -> None:
        """Print the usage."""
        (file or sys.stdout).write(translate_label(USAGE) + self.format_usage().removeprefix(USAGE))

    def error(self, message: str) -> NoReturn:
        """Print usage and the mistake, and exit with status 2."""
        self.print_usage(sys.stderr)
        self.exit(2, join_label(self.prog, f"{translate_label('error: ')}{translate(message)}\n"))


class _TranslatedHelp(argparse.HelpFormatter):
    """Translates what argparse is about to lay out."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Wrap each line as a paragraph of its own; commands, which are indented, stay in one line."""
        lines = []
        for line in text.splitlines():
            lines.append(line if line.startswith("  ") else super()._fill_text(line, width, indent))
        return "\n".join(lines)

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
