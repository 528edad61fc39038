"""A pseudo-terminal that runs a program for the tests, and a small terminal emulator that knows the codes rich may use.

Started as a program, it shows a display with log lines above it and ends as its second argument says.
"""

import fcntl
import os
import pty
import re
import signal
import struct
import sys
import termios
import time
from multiprocessing import connection
from pathlib import Path

from forked_ranks import start_forked

CODE = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])|([\r\n])|([^\x1b\r\n]+)")
# Variables that launchers or pytest set.
SET_BY_LAUNCHERS = ("RANK", "WORLD_SIZE", "MASTER_PORT", "SLURM_JOB_ID", "NO_COLOR", "COLUMNS", "LINES")


def run_in_terminal(
    *words: object,
    columns: int = 80,
    then: tuple[str, int] | None = None,
    nohup: bool = True,
    environment: dict[str, str] | None = None,
) -> tuple[int, str]:
    """Run a Python program on a terminal of 24 rows; return its exit status and output.

    Args:
        words: a file and its arguments, which are run in a fork of a process that has the libraries imported, or other
            words for Python.
        then: (text, columns): once the program has written the text, the terminal gets so many columns; 0 closes it.
    """
    kept = {key: value for key, value in os.environ.items() if key not in SET_BY_LAUNCHERS}
    kept |= {"TERM": "xterm", "OMP_NUM_THREADS": "1", **(environment or {})}
    if isinstance(words[0], Path):
        terminal, other_end = pty.openpty()
        set_columns(terminal, columns)
        [process] = start_forked(words[0], words[1:], kept, os.ttyname(other_end))
        written = read_terminal(terminal, then, process.sentinel)
        os.close(other_end)
        process.join()
        return process.exitcode or 0, written
    child, terminal = pty.fork()
    if child == 0:
        signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell ignores it for background jobs
        os.execve(sys.executable, [sys.executable, *(str(word) for word in words)], kept)
    set_columns(terminal, columns)
    written = read_terminal(terminal, then)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), written


def read_terminal(terminal: int, then: tuple[str, int] | None, sentinel: int | None = None) -> str:
    """Return what is written on a terminal, and close it.

    Args:
        then: as for `run_in_terminal`.
        sentinel: becomes readable when the program has ended; without it, the terminal's other end is closed then.
    """
    written, places = bytearray(), [terminal, *([] if sentinel is None else [sentinel])]
    try:
        while then is None or then[1] or then[0].encode() not in written:
            if terminal not in connection.wait(places) or not (read := os.read(terminal, 1 << 16)):
                break
            written += read
            if then and then[0].encode() in read:
                set_columns(terminal, then[1])
    except OSError:  # the other end is closed
        pass
    os.close(terminal)
    return written.decode()


def set_columns(terminal: int, columns: int) -> None:
    """Set the width of a terminal."""
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))


class Terminal:
    """The screen after some output, with an unlimited number of rows.

    Knows carriage return, line feed, colours, erasing a line, moving up and hiding the cursor. Any other code is an
    error: it could leave a terminal in a state that must be repaired.
    """

    def __init__(self, written: str, columns: int = 80):
        self.rows, self.row, self.column, self.cursor_is_visible = [""], 0, 0, True
        self._columns, end = columns, 0
        for match in CODE.finditer(written):
            assert match.start() == end, f"unknown: {written[end : end + 20]!r}"
            end = match.end()
            self._obey(*match.groups())
        assert end == len(written)

    def _obey(self, number: str | None, code: str | None, control: str | None, text: str | None) -> None:
        if text:
            for character in text:
                if self.column == self._columns:
                    self._obey(None, None, "\n", None)
                    self.column = 0
                row = self.rows[self.row].ljust(self.column)
                self.rows[self.row] = row[: self.column] + character + row[self.column + 1 :]
                self.column += 1
        elif control == "\n":
            self.row += 1
            self.rows += [""] * (self.row == len(self.rows))
        elif control == "\r":
            self.column = 0
        elif code == "A":
            self.row -= int(number or 1)
        elif (number, code) == ("2", "K"):
            self.rows[self.row] = ""
        elif number == "?25":
            self.cursor_is_visible = code == "h"
        else:
            assert code == "m", f"unknown: {number}{code}"

    def __str__(self) -> str:
        return "\n".join(self.rows)


def show(rank: int, ending: str) -> None:
    """Show a display with log lines above it, then end in the given way."""
    from loguru import logger
    from rich.table import Table

    from sdxl_trainer.launch.logger import SCREEN, init_logger, log_table
    from sdxl_trainer.train.run.console import Display

    init_logger(rank)
    table = Table(title="a table")
    table.add_row("its cell")
    log_table(table)
    display = Display(
        title="the title",
        subtitle="its end",
        share=0.5,
        left={"first": "1"},
        right={"second": "2"},
        lines={"third": "3"},
    )
    with SCREEN.show_live(display, 6, rank):
        logger.bind(displayed=True).info("what the display shows")
        for number in range(3):
            logger.warning("{} {}", number, "x" * 150)
            print("printed", number, "[/no markup]")
            while (ending == "narrow" and os.get_terminal_size(2).columns > 40) or (ending == "gone" and os.isatty(2)):
                time.sleep(0.01)
        sys.stdout.write("[/half a line] ")
        sys.stdout.flush()
        if ending == "raise":
            raise ValueError("broken")
        if ending == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
        if ending == "kill":
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    show(int(sys.argv[1]), sys.argv[2])
