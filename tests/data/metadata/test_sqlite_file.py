"""SQLite databases as metadata: waifuset's form, tables, changes in a second file, and damage."""

import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from sdxl_trainer.data.index.index import open_record_index
from sdxl_trainer.data.metadata.records import check_sources, parse_record
from sdxl_trainer.data.metadata.sources import read_metadata_file
from sdxl_trainer.data.metadata.sqlite_file import list_changing_files, read_rows, split_table

COLUMNS = "image_key TEXT PRIMARY KEY, image_path TEXT, caption TEXT, artist TEXT, original_size TEXT, score REAL"


def write_database(path: Path, *statements: str) -> Path:
    with closing(sqlite3.connect(path)) as database:
        for statement in statements:
            database.execute(statement)
        database.commit()
    return path


def write_set(path: Path, num_rows: int = 3, table: str = "metadata") -> Path:
    """Write a table as waifuset does: keys of its own, lists as texts, and NULL as a text, too."""
    database = sqlite3.connect(path)
    database.execute(f"CREATE TABLE {table} ({COLUMNS})")
    rows = [(f"k{n}", f"images/{n}.png", f"['tag {n}', 'b']", "NULL", "(1500, 1000)", None) for n in range(num_rows)]
    database.executemany(f"INSERT INTO {table} VALUES (?, ?, ?, ?, ?, ?)", rows)
    database.commit()
    database.close()
    return path


def read_all(path: Path) -> list:
    return [record for records in read_metadata_file(path) for record in records]


def test_a_row_is_a_record(tmp_path: Path) -> None:
    file = write_set(tmp_path / "m.sqlite3")
    before = sorted(os.listdir(tmp_path))
    index = open_record_index(tmp_path / "cache", [file], [])
    row = index.row(1)
    assert (len(index), row["key"], row["image_path"]) == (3, "k1", str(tmp_path / "images" / "1.png"))
    assert (row["width"], row["height"], row["captioned"]) == (1500, 1000, True)
    record = parse_record(row)
    assert record["caption"] == "tag 1, b" and "artist" not in record and "score" not in record
    assert sorted(os.listdir(tmp_path)) == sorted([*before, "cache"]), "nothing is written beside the database"


def test_many_rows_come_in_blocks(tmp_path: Path) -> None:
    blocks = list(read_rows(write_set(tmp_path / "m.db", 10), rows_at_once=4))
    assert [(block.first, len(block.rows)) for block in blocks] == [(1, 4), (5, 4), (9, 2)]
    assert blocks[2].rows[1]["image_key"] == "k9" and blocks[0].key_column == "image_key"


@pytest.mark.parametrize(
    ("table", "key", "path"),
    [
        ("(image_path TEXT, tags TEXT)", "cat", "images/cat.png"),  # as in a CSV file
        ("(id INTEGER PRIMARY KEY, file_name TEXT)", "cat", "images/cat.png"),
        ("(name TEXT PRIMARY KEY, tags TEXT)", "cat", None),  # the key is the path
        ("(image_key TEXT PRIMARY KEY, tags TEXT)", "cat", None),
    ],
)
def test_keys_come_from_the_key_or_the_path(tmp_path: Path, table: str, key: str, path: str | None) -> None:
    values = "(1, 'images/cat.png')" if "id INTEGER" in table else "('images/cat.png', 'a')"
    file = write_database(tmp_path / "m.sqlite", f"CREATE TABLE t {table}", f"INSERT INTO t VALUES {values}")
    (record,) = read_all(file)
    assert (record.key, record.fields.get("image_path")) == (key, path)
    assert record.keyed_path == (None if path else "images/cat.png") and record.base_folder == str(tmp_path)


def test_a_table_of_several_is_named_behind_the_file(tmp_path: Path) -> None:
    file = write_set(tmp_path / "m.sqlite3", table="images")
    write_database(file, "CREATE TABLE notes (a)")
    with pytest.raises(ValueError, match=f"m.sqlite3: holds 2 tables: images, notes; name .*{file}:images"):
        read_all(file)
    named = Path(f"{file}:images")
    assert split_table(named) == (file, "images") and len(read_all(named)) == 3
    assert list(check_sources([named], [])) == []
    with pytest.raises(ValueError, match="holds no table 'other', but images, notes"):
        read_all(Path(f"{file}:other"))
    with pytest.raises(ValueError, match="the table 'notes' has none of the columns image_key, image_path"):
        read_all(Path(f"{file}:notes"))
    problems = list(check_sources([f"{tmp_path}/absent.sqlite3:images"], []))
    assert [problem.rule for problem in problems] == ["is not a file"]
    first = open_record_index(tmp_path / "cache", [named], []).path
    write_database(file, "INSERT INTO images (image_key) VALUES ('new')")
    assert open_record_index(tmp_path / "cache", [named], []).path != first


def test_changes_of_an_open_database_are_read(tmp_path: Path) -> None:
    """They wait in a second file, which a read that takes no lock would miss."""
    file = write_set(tmp_path / "m.sqlite3")
    writer = sqlite3.connect(file)
    writer.execute("PRAGMA journal_mode = WAL")
    writer.execute("INSERT INTO metadata (image_key) VALUES ('new')")
    writer.commit()
    assert [record.key for record in read_all(file)][-1] == "new"
    assert [path.name for path in list_changing_files(file)] == ["m.sqlite3", "m.sqlite3-wal"]
    writer.close()
    assert [path.name for path in list_changing_files(file)] == ["m.sqlite3"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no table"),
        (b"SQLite format 3\0" + bytes(4000), "not a readable SQLite database"),
        (b"plain text", "not a readable SQLite database: file is not a database"),
    ],
)
def test_what_is_no_database_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "m.db").write_bytes(content)
    with pytest.raises(ValueError, match=f"m.db: {message}"):
        read_all(tmp_path / "m.db")


def test_damage_in_the_middle_is_named(tmp_path: Path) -> None:
    file = write_set(tmp_path / "m.sqlite3", 2000)
    content = bytearray(file.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 8192] = b"\xff" * 8192
    file.write_bytes(content)
    with pytest.raises(ValueError, match="m.sqlite3: not a readable SQLite database: database disk image is malformed"):
        read_all(file)


def test_wrong_values_are_named(tmp_path: Path) -> None:
    file = write_database(
        tmp_path / "m.db", "CREATE TABLE t (image_key, caption)", "INSERT INTO t VALUES ('a', 'b'), (NULL, 'c')"
    )
    with pytest.raises(ValueError, match="m.db, row 2: the record has no `image_key`"):
        read_all(file)
    file = write_database(
        tmp_path / "n.db", "CREATE TABLE t (image_key, caption)", "INSERT INTO t VALUES ('a', x'ff'), ('b', 'c')"
    )
    with pytest.raises(ValueError, match="n.db: the record 'a' has `caption`"):
        read_all(file)
    file = write_database(tmp_path / "o.db", "CREATE TABLE t (image_key)", "INSERT INTO t VALUES (CAST(x'ff' AS TEXT))")
    with pytest.raises(ValueError, match="o.db: not a readable SQLite database: Could not decode to UTF-8"):
        read_all(file)
