"""The layout of the live display: a bar, pairs of numbers in two columns, and lines that wrap. Nothing is cut off.

Drawn by hand as one text, which takes a third of the time that rich's tables take; training wants the interpreter too.
"""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderableType
from rich.panel import Panel
from rich.text import Text

FRAME_COLUMNS = 4  # a line and a blank on either side
FEWEST_COLUMNS = 70  # for numbers in two columns
FEWEST_TO_WRAP = 12  # narrower than that, lines are cut after all
GAP = 2
BARS = {True: "━─", False: "=-"}  # done and to do, that can be told apart without colours; where UTF-8 is known, or not


@dataclass(frozen=True)
class Display:
    """What the display shows at a moment, and how it is drawn.

    Args:
        title, subtitle: at the upper and the lower edge.
        share: of the bar that is full, 0 to 1.
        pairs: of (name, value), a row each; short enough for half a terminal of 80 columns.
        lines: name → value of any length.
    """

    title: str
    subtitle: str
    share: float
    pairs: Sequence[tuple[tuple[str, str], tuple[str, str]]]
    lines: Mapping[str, str]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        width = options.max_width - FRAME_COLUMNS
        text = Text(no_wrap=True, overflow="ellipsis")
        self._add_bar(text, width, BARS[not options.ascii_only])
        labels = max(len(name) for name in [*(name for pair in self.pairs for name, _ in pair), *self.lines]) + GAP
        other_labels = max(len(name) for _, (name, _) in self.pairs) + GAP
        for (name, value), (other_name, other_value) in self.pairs:
            if width < FEWEST_COLUMNS:
                _add(text, name, labels, value)
                _add(text, other_name, labels, other_value)
            else:
                _add(text, name, labels, value.ljust(width // 2 - labels))
                text.append(other_name.ljust(other_labels), "dim").append(other_value, "bold")
        for name, value in self.lines.items():
            for number, part in enumerate(
                textwrap.wrap(value, max(width - labels, FEWEST_TO_WRAP), break_on_hyphens=False)
            ):
                _add(text, "" if number else name, labels, part)
        title, subtitle = Text(self.title, "bold"), Text(self.subtitle)
        yield Panel(
            text, title=title, subtitle=subtitle, title_align="left", subtitle_align="right", border_style="cyan"
        )

    def _add_bar(self, text: Text, width: int, characters: str) -> None:
        percent = f"{GAP * ' '}{self.share:.0%}"
        length = max(0, width - len(percent))
        full = int(length * self.share)
        text.append(characters[0] * full, "cyan").append(characters[1] * (length - full), "dim").append(percent)


def _add(text: Text, name: str, label_columns: int, value: str) -> None:
    """A line of its own."""
    text.append("\n" + name.ljust(label_columns), "dim").append(value, "bold")
