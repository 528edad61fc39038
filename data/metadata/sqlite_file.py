"""Reader of SQLite databases with a row for each image, such as waifuset's.

A database is read without locking it and without writing beside it. If changes wait in a second file (`-wal` or
`-journal`), because a program has it open or was killed, SQLite reads those too.
"""

import os
import re
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from sdxl_trainer.configs.problems import format_count
from sdxl_trainer.data.files import open_regular

DATABASE_SUFFIXES = (".sqlite3", ".sqlite", ".db")
# A table of several is named behind the file: `meta.sqlite3:images`.
TABLE_SUFFIX = re.compile(rf"(.+(?:{'|'.join(map(re.escape, DATABASE_SUFFIXES))})):([^/:]+)", re.IGNORECASE | re.DOTALL)
CHANGE_SUFFIXES = ("-wal", "-journal")
KEY_COLUMN = "image_key"  # waifuset's primary key
PATH_COLUMNS = ("image_path", "file_name", "key")  # one of them gives the key of a record otherwise
NULL_TEXT = "NULL"  # waifuset stores a missing value as this text, too
MAX_SHOWN = 20  # tables and columns that an error lists
MAX_VALUE_BYTES = 1 << 28  # SQLite refuses longer ones; a damaged file may ask for gigabytes
# sqlite3 raises these on damaged files: its own errors, names that are not UTF-8, and huge values.
SQLITE_ERRORS = (sqlite3.Error, sqlite3.Warning, OverflowError, UnicodeError, MemoryError)


class DatabaseTable(NamedTuple):
    """A database, and the table that is named behind it; "" if the database has only one."""

    file: Path
    table: str


class DatabaseRows(NamedTuple):
    """Some rows of a table."""

    key_column: str | None  # that holds the keys of the records; None: they follow from the other fields
    first: int  # number of the first row, from 1 on
    rows: list[dict[str, Any]]


def split_table(path: Path | str) -> DatabaseTable:
    """Split `meta.sqlite3:images` into the database and its table. A file of that very name is no database's table."""
    match = None if os.path.exists(path) else TABLE_SUFFIX.fullmatch(str(path))
    return DatabaseTable(Path(match[1]), match[2]) if match else DatabaseTable(Path(path), "")


def list_changing_files(path: Path | str) -> list[Path]:
    """List the files that change when metadata change: the file itself, and those with changes of a database."""
    file = split_table(path).file
    if file.suffix.lower() not in DATABASE_SUFFIXES:
        return [file]
    return [file, *(found for suffix in CHANGE_SUFFIXES if (found := Path(f"{file}{suffix}")).exists())]


def read_rows(path: Path, rows_at_once: int) -> Iterator[DatabaseRows]:
    """Yield the rows of a table, in the order of the database. Missing values are left out.

    Args:
        path: the database, with `:table` behind it if it holds several.

    Raises:
        ValueError: the database cannot be read, its table is not clear, or it has no column that gives a key.
        OSError: the file is missing, or not a regular one.
    """
    file, wanted = split_table(path)
    try:
        with closing(_open(file)) as database:
            table = _choose_table(database, file, wanted)
            # Quoted, because a table may have any name.
            cursor = database.execute('SELECT * FROM "{}"'.format(table.replace('"', '""')))
            names = [column[0] for column in cursor.description]
            key_column = _choose_key(database, file, table, names)
            first = 1
            while chunk := cursor.fetchmany(rows_at_once):
                rows = [
                    {name: value for name, value in zip(names, row, strict=True) if _is_given(value)} for row in chunk
                ]
                yield DatabaseRows(key_column, first, rows)
                first += len(rows)
    except SQLITE_ERRORS as error:
        raise ValueError(f"{file}: not a readable SQLite database: {error}{_explain_changes(file)}") from None


def _open(file: Path) -> sqlite3.Connection:
    os.close(open_regular(file))
    # `immutable` takes no locks and writes no files, but does not read changes that wait in a second file.
    mode = "mode=ro" if _list_changes(file) else "mode=ro&immutable=1"
    database = sqlite3.connect(f"file:{quote(os.path.abspath(file))}?{mode}", uri=True)
    try:
        database.execute("PRAGMA trusted_schema = OFF")  # functions and virtual tables of the file are not run
        if hasattr(database, "setlimit"):  # from Python 3.11 on
            database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE_BYTES)  # pyright: ignore
    except BaseException:
        database.close()
        raise
    return database


def _list_changes(file: Path) -> list[str]:
    names = (f"{file}{suffix}" for suffix in CHANGE_SUFFIXES)
    return [name for name in names if os.path.exists(name) and os.path.getsize(name)]


def _explain_changes(file: Path) -> str:
    changes = _list_changes(file)
    if not changes:
        return ""
    return f"; changes wait in {changes[0]}: close the program that writes them, or open the database once with it"


def _choose_table(database: sqlite3.Connection, file: Path, wanted: str) -> str:
    query = "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\'"
    tables = [str(name) for (name,) in database.execute(query) if "\0" not in str(name)]
    shown = _join(tables)
    if wanted in tables:
        return wanted
    if wanted:
        raise ValueError(f"{file}: holds no table '{wanted}', but {shown or 'none at all'}")
    if not tables:
        raise ValueError(f"{file}: holds no table")
    if len(tables) > 1:
        count = format_count(len(tables), "table")
        raise ValueError(f"{file}: holds {count}: {shown}; name the one with the images, as in {file}:{tables[0]}")
    return tables[0]


def _choose_key(database: sqlite3.Connection, file: Path, table: str, names: Sequence[str]) -> str | None:
    """Choose the column of the records' keys; None if a path or `key` gives them."""
    if KEY_COLUMN in names:
        return KEY_COLUMN
    if set(PATH_COLUMNS) & set(names):
        return None
    columns = database.execute("SELECT name, type FROM pragma_table_info(?) WHERE pk = 1", (table,))
    for name, kind in columns:
        if str(kind).upper() == "TEXT":
            return str(name)
    needed = ", ".join(PATH_COLUMNS)
    raise ValueError(
        f"{file}: the table '{table}' has none of the columns {KEY_COLUMN}, {needed}, and no text as its primary key; "
        f"it has {_join(names)}"
    )


def _join(names: Sequence[str]) -> str:
    return ", ".join(names[:MAX_SHOWN]) + (", ..." if len(names) > MAX_SHOWN else "")


def _is_given(value: Any) -> bool:
    return value is not None and value != NULL_TEXT
