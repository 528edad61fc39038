"""Log lines: the console on rank 0 (warnings of the others too), one file per rank in the run's log folder."""

import atexit
import io
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, TextIO, cast

from loguru import logger
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

if TYPE_CHECKING:
    from loguru import Message, Record

CONSOLE_FORMAT = "<dim>{time:HH:mm:ss}</dim> <level>{level: <7}</level> {message}"
RANK_FORMAT = "<dim>{time:HH:mm:ss}</dim> <level>{level: <7}</level> [rank {extra[rank]}] {message}"
FILE_FORMAT = "{time:YYYY-MM-DD HH:mm:ss.SSS} {level: <7} [rank {extra[rank]}] {name}: {message}"
TEXT_WIDTH = 100  # of tables where there is no terminal
REFRESHES_PER_SECOND = 1.0  # a drawing takes about a millisecond of the interpreter, which training wants too


class Terminal:
    """A terminal as rich writes to it. One that is no longer there takes the display with it, but never the run."""

    def __init__(self, file: TextIO):
        self._file = file
        self.encoding = file.encoding

    def write(self, text: str) -> int:
        """Write, or lose it."""
        with suppress(OSError):
            self._file.write(text)
        return len(text)

    def flush(self) -> None:
        """As a file does."""
        with suppress(OSError):
            self._file.flush()


class TextBuffer(io.StringIO):
    """Text that standard error will take: rich draws frames in ASCII for an encoding that has no others."""

    @property
    def encoding(self) -> str:
        """Of standard error."""
        return sys.stderr.encoding


class Screen:
    """Standard error of this process, as log lines, tables and the live display share it."""

    def __init__(self) -> None:
        self._live: Console | None = None  # what the live display is drawn on, while there is one
        self._covered_rows = 0  # of the same terminal, drawn anew again and again by rank 0

    def write(self, message: "Message") -> None:
        """A sink for loguru: lines come above the live display. A record with `table` is shown as such."""
        table = message.record["extra"].get("table")
        if self._live is not None:
            self._live.print(Text.from_ansi(message.rstrip("\n")) if table is None else table, soft_wrap=table is None)
        elif table is not None and is_terminal():
            open_console().print(table)
        else:
            below = "\n" * (self._covered_rows - 1)
            sys.stderr.write(f"\n{message}{below}" if self._covered_rows else message)
            sys.stderr.flush()

    def is_wanted(self, record: "Record") -> bool:
        """Whether the console gets a record: not what the live display shows anyway."""
        return self._live is None or "displayed" not in record["extra"]

    @contextmanager
    def show_live(self, display: RenderableType, num_rows: int, rank: int) -> Iterator[None]:
        """Draw `display` again every second, on rank 0 and below its log lines, if there is a terminal for it.

        Nothing has to be put right if the process dies meanwhile: the cursor stays visible, on a row of its own.

        Args:
            num_rows: of the display. Ranks on the same terminal write their warnings clear above so many.
        """
        if not is_terminal():
            yield
        elif rank > 0:
            self._covered_rows = num_rows
            try:
                yield
            except BaseException:  # rank 0 may still draw when this one has ended and Python has told why
                atexit.register(sys.stderr.write, "\n" * num_rows)
                raise
            self._covered_rows = 0
        else:
            console = open_console()
            rows = Group(display, "")  # the last one is the cursor's
            to_terminal = sys.stdout.isatty()
            live = Live(rows, console=console, refresh_per_second=REFRESHES_PER_SECOND, redirect_stdout=to_terminal)
            try:
                with live:
                    console.show_cursor(True)
                    self._live = console
                    yield
            finally:
                self._live = None


SCREEN = Screen()


def init_logger(rank: int, level: str = "INFO", log_folder: Path | None = None, name: str = "train") -> None:
    """Send log lines of this process to the console and, if a folder is given, to `<name>.log` there.

    Rank 0 writes `<name>.log`, rank r `<name>-rank<r>.log`. Files get every level.
    """
    _quiet_libraries()
    logger.remove()
    logger.configure(extra={"rank": rank})
    logger.add(
        SCREEN.write,
        format=CONSOLE_FORMAT if rank == 0 else RANK_FORMAT,
        level=level if rank == 0 else "WARNING",
        filter=SCREEN.is_wanted,
        colorize=is_terminal() and not os.environ.get("NO_COLOR"),
    )
    if log_folder is not None:
        log_folder.mkdir(parents=True, exist_ok=True)
        file = log_folder / (f"{name}.log" if rank == 0 else f"{name}-rank{rank}.log")
        logger.add(file, format=FILE_FORMAT, level="DEBUG")


def is_terminal() -> bool:
    """Whether standard error is a terminal that a person looks at: not under Slurm, which keeps it as a file."""
    terminal = os.environ.get("TERM", "dumb")
    return sys.stderr.isatty() and "SLURM_JOB_ID" not in os.environ and terminal not in ("dumb", "unknown")


def open_console() -> Console:
    """Standard error, a terminal, as rich's console. What others print there is no markup."""
    file = cast(IO[str], Terminal(sys.stderr))
    return Console(file=file, force_terminal=True, markup=False, emoji=False, highlight=False)


def warn_once(message: str, *values: object) -> None:
    """A warning that each rank would give: the console gets rank 0's alone, the log files each rank's own."""
    is_first = int(os.environ.get("RANK", 0)) == 0
    logger.opt(depth=1).log("WARNING" if is_first else "DEBUG", message, *values)


def log_table(table: RenderableType) -> None:
    """Show a table of rich's on the console, and write it as text where there is no terminal and into the file."""
    text = TextBuffer()
    Console(file=text, width=TEXT_WIDTH, force_terminal=False, color_system=None).print(table)
    logger.bind(table=table).info("\n{}", text.getvalue().rstrip())


def _quiet_libraries() -> None:
    """Keep progress bars and notes of libraries off the console; their warnings and errors stay.

    Must come before they are imported: they read their environment then.
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    for name in ("DeepSpeed", "torch.distributed", "matplotlib"):
        logging.getLogger(name).setLevel(logging.WARNING)
