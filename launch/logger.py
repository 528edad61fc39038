"""Logging: the console shows rank 0, and warnings and rescues of all ranks; each rank has a file in the log folder.

The console speaks the user's language (configs/language/). Log files are English, so that their messages can be looked
up, and read by those who help.
"""

import atexit
import io
import logging
import os
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TextIO, cast

from loguru import logger
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sdxl_trainer.configs.language.translate import get_language, translate, translate_label
from sdxl_trainer.configs.problems import escape_controls
from sdxl_trainer.launch.append_file import AppendFile

if TYPE_CHECKING:
    from loguru import Message, Record

CONSOLE_FORMAT = "<dim>{time:HH:mm:ss}</dim> <level>{level: <7}</level> {message}"
RANK_FORMAT = "<dim>{time:HH:mm:ss}</dim> <level>{level: <7}</level> [rank {extra[rank]}] {message}"
FILE_FORMAT = "{time:YYYY-MM-DD HH:mm:ss.SSS} {level: <7} [rank {extra[rank]}] {name}: {message}"
TEXT_WIDTH = 100  # columns of a table in a file
REFRESHES_PER_SECOND = 1.0  # a refresh holds the interpreter, which training needs too, for about a millisecond


class Terminal:
    """A terminal for rich that discards output once the terminal has gone, so that the run continues."""

    def __init__(self, file: TextIO):
        self._file = file
        self.encoding = file.encoding

    def write(self, text: str) -> int:
        """Write `text`, or discard it."""
        with suppress(OSError):
            self._file.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, or discard the error."""
        with suppress(OSError):
            self._file.flush()


class TextBuffer(io.StringIO):
    """A text buffer with the encoding of standard error, by which rich chooses between ASCII and Unicode frames."""

    @property
    def encoding(self) -> str:
        """Encoding of standard error."""
        return sys.stderr.encoding


class Screen:
    """Standard error of this process, shared by log lines, tables and the live display."""

    def __init__(self) -> None:
        self._live: Console | None = None  # console of the live display, while it is shown
        self._covered_rows = 0  # rows of the same terminal that rank 0 redraws

    def write(self, message: "Message") -> None:
        """Write a loguru message above the live display. A record with `table` is printed as that table."""
        table = message.record["extra"].get("table")
        if self._live is not None:
            self._live.print(Text.from_ansi(message.rstrip("\n")) if table is None else table, soft_wrap=table is None)
        elif table is not None and is_terminal():
            open_console().print(table)
        else:
            below = "\n" * (self._covered_rows - 1)
            sys.stderr.write(f"\n{message}{below}" if self._covered_rows else message)
            sys.stderr.flush()

    def print(self, text: str) -> None:
        """Print a line that cannot be logged, such as one about the log file itself."""
        with suppress(OSError):
            if self._live is not None:
                self._live.print(translate(text), soft_wrap=True)
            else:
                sys.stderr.write(f"{translate(text)}\n")

    def is_shown(self, record: "Record") -> bool:
        """Return whether the console prints a record; the live display already shows some of them."""
        return self._live is None or "displayed" not in record["extra"]

    @contextmanager
    def show_live(self, display: RenderableType, num_rows: int, rank: int) -> Iterator[None]:
        """Draw `display` every second below rank 0's log lines, if standard error is a terminal.

        A process that dies leaves the terminal usable: the cursor stays visible, on a row of its own.

        Args:
            num_rows: rows of the display. Other ranks on the same terminal write their warnings above them.
        """
        if not is_terminal():
            yield
        elif rank > 0:
            self._covered_rows = num_rows
            try:
                yield
            except BaseException:  # so that rank 0 does not redraw over this rank's traceback
                atexit.register(sys.stderr.write, "\n" * num_rows)
                raise
            self._covered_rows = 0
        else:
            console = open_console()
            rows = Group(display, "")  # the last row is for the cursor
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


_files: list[AppendFile] = []  # of this process: one or none


def init_logger(rank: int, level: str = "INFO", log_folder: Path | None = None, name: str = "train") -> None:
    """Log to the console and, if a folder is given, to a file in it.

    Rank 0 writes `<name>.log`, rank r writes `<name>-rank<r>.log`. Files get every level. Control characters, which
    names in data may hold, are escaped in both. Lines that the file cannot take, as on a full disk, are dropped.
    """
    quiet_libraries()
    logger.remove()
    logger.configure(extra={"rank": rank}, patcher=_escape_record)
    logger.add(
        SCREEN.write,
        format=_choose_format(CONSOLE_FORMAT if rank == 0 else RANK_FORMAT),
        level=level if rank == 0 else "SUCCESS",
        filter=SCREEN.is_shown,
        colorize=is_terminal() and not os.environ.get("NO_COLOR"),
    )
    if log_folder is not None:
        path = log_folder / (f"{name}.log" if rank == 0 else f"{name}-rank{rank}.log")
        for file in _files:
            file.close()
        _files[:] = [AppendFile(path, SCREEN.print)]
        logger.add(_append_line, format=FILE_FORMAT, level="DEBUG")


def log_traceback() -> None:
    """Write the traceback of the exception that is being handled to the log file, if there is one."""
    if _files:
        logger.debug("the error that ends the program:\n{}", textwrap.indent(traceback.format_exc(), "  "))


def _append_line(line: str) -> None:
    """Append a line to the log file, which has no place for halves of characters."""
    _files[0].append(line.encode(errors="backslashreplace"))


def _escape_record(record: "Record") -> None:
    """Escape control characters in the message of a record."""
    record["message"] = escape_controls(record["message"], keep_lines="table" in record["extra"])


def _choose_format(line: str) -> "str | Callable[[Record], str]":
    """Return the format of console lines: under another language than English one that translates messages."""
    if get_language() == "en":
        return line

    line = line.replace("[rank ", f"[{translate_label('rank')} ")

    def format_translated(record: "Record") -> str:
        record["extra"].setdefault("shown", translate(record["message"]))
        return line.replace("{message}", "{extra[shown]}") + "\n{exception}"

    return format_translated


def is_terminal() -> bool:
    """Return whether standard error is a terminal. Under Slurm it counts as a file, as Slurm stores output in one."""
    terminal = os.environ.get("TERM", "dumb")
    return sys.stderr.isatty() and "SLURM_JOB_ID" not in os.environ and terminal not in ("dumb", "unknown")


def open_console() -> Console:
    """Open standard error as a rich console that prints text as it is, without markup."""
    file = cast(IO[str], Terminal(sys.stderr))
    return Console(file=file, force_terminal=True, markup=False, emoji=False, highlight=False)


def warn_once(message: str, *values: object) -> None:
    """Log a warning that all ranks raise alike: on the console for rank 0 only, in every rank's log file."""
    is_first = int(os.environ.get("RANK", 0)) == 0
    logger.opt(depth=1).log("WARNING" if is_first else "DEBUG", message, *values)


class TranslatedTable(Table):
    """A rich table whose title, headings and first cells are in the user's language. Other cells may be the user's
    texts and stay as they are."""

    def __init__(self, *headers: str, title: str | None = None, **options: Any):
        super().__init__(*map(translate_label, headers), title=translate_label(title) if title else title, **options)

    def add_row(self, *cells: RenderableType | None, **options: Any) -> None:
        """Add a row, like rich's."""
        first, *others = cells or [None]
        super().add_row(translate_label(first) if isinstance(first, str) else first, *others, **options)


def log_table(table: RenderableType, translated: RenderableType | None = None) -> None:
    """Print a rich table on the console, and write it as text to the log file.

    Args:
        translated: the same table in the user's language, which the console shows instead.
    """
    shown = table if translated is None else translated
    logger.bind(table=shown, shown=f"\n{_format_table(shown)}").info("\n{}", _format_table(table))


def _format_table(table: RenderableType) -> str:
    text = TextBuffer()
    Console(file=text, width=TEXT_WIDTH, force_terminal=False, color_system=None).print(table)
    return text.getvalue().rstrip()


def quiet_libraries() -> None:
    """Turn off progress bars and notes of libraries; their warnings and errors stay.

    Call it before the libraries are imported, because they read these variables then.
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    for name in ("DeepSpeed", "torch.distributed", "matplotlib"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of kernels that only other programs use
