"""Values of metadata: every reader gives the same text, path, size and switch, or refuses with file and key."""

import csv
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdxl_trainer.data.index.index import open_record_index
from sdxl_trainer.data.text.captions import read_caption_fields
from sdxl_trainer.data.text.strategy import count_attributes

FORMATS = ["m.json", "m.jsonl", "m.csv", "m.parquet", "m.tar"]
# Values of a text field, and the texts that they are trained as; None is no caption.
TEXTS: list[tuple[Any, str | None]] = [
    ("a cat", "a cat"),
    (7, "7"),
    (0.5, "0.5"),
    (2024.0, "2024"),
    (["a", "b c"], "a, b c"),
    (["a", None, "", " \n", "b"], "a, b"),
    ([2024, 1.5], "2024, 1.5"),
    ({"1girl": 0.99, "solo": 1, " ": 0.5}, "1girl, solo"),
    ({"1girl": 0.99, "solo": None}, "1girl"),
    ("", None),
    (" \t\n", None),
    ([], None),
    ([None, "", "  "], None),
    ({"a": None}, None),
    (None, None),
]
REFUSED_TEXTS = [True, [True], ["a", False], [["a"]], {"en": "a"}, {"a": True}, [{"name": "a"}], {"a": {"b": 1}}]


def write_record(file: Path, fields: dict[str, Any], key: str = "x") -> Path:
    """Write a record in the format of the file's suffix."""
    content = fields if file.suffix == ".json" else {"image_path": f"{key}.png", **fields}
    if file.suffix == ".json":
        file.write_text(json.dumps({key: content}))
    elif file.suffix == ".jsonl":
        file.write_text(json.dumps(content) + "\n")
    elif file.suffix == ".csv":
        cells = {name: value if isinstance(value, str) else json.dumps(value) for name, value in content.items()}
        with file.open("w", newline="") as stream:
            csv.writer(stream).writerows([cells.keys(), ["" if cell == "null" else cell for cell in cells.values()]])
    elif file.suffix == ".parquet":
        pq.write_table(pa.table({name: [value] for name, value in content.items()}), file)
    else:
        with tarfile.open(file, "w") as tar:
            text = json.dumps(fields).encode()
            member = tarfile.TarInfo(f"{key}.json")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text))
    return file


def open_one(folder: Path, *files: Path):
    return open_record_index(folder / "cache", list(files), [])


@pytest.mark.parametrize("name", FORMATS)
def test_every_reader_gives_the_same_text_of_any_shape(tmp_path, name):
    for number, (value, text) in enumerate(TEXTS):
        if name == "m.csv" and value == 2024.0:
            continue  # a cell is a text, and has its digits
        for field in ("caption", "tags", "description"):
            file = write_record(tmp_path / f"{number}{field}{Path(name).suffix}", {field: value})
            index = open_one(tmp_path, file)
            record = index.record(0)
            assert index.row(0)["captioned"] == (text is not None), (field, value)
            assert read_caption_fields(record, (field,)) == (text or ""), (field, value)
            assert record["caption"] == (text if field != "description" else None), (field, value)


@pytest.mark.parametrize("name", FORMATS)
def test_every_reader_refuses_other_shapes_with_file_and_key(tmp_path, name):
    for number, value in enumerate(REFUSED_TEXTS):
        if name == "m.csv" and value is True or name == "m.parquet" and value == ["a", False]:
            continue  # a cell is a text; a column of a table has one type
        file = write_record(tmp_path / f"{number}{name}", {"tags": value}, key="the key")
        with pytest.raises(ValueError) as caught:
            open_one(tmp_path, file)
        message = str(caught.value)
        assert message.startswith(f"{file}: the record 'the key' has `tags` = "), value
        assert "must be a text, a number, a list of these" in message and "True" not in message


def test_all_refused_values_of_a_file_are_named_at_once(tmp_path):
    records = {f"k{number}": {"image_path": "a.png", "tags": [["a"]], "width": "wide"} for number in range(70)}
    (tmp_path / "m.json").write_text(json.dumps({"fine": {"caption": "a"}, **records}))
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records.values()))
    for file in (tmp_path / "m.json", tmp_path / "m.jsonl"):
        with pytest.raises(ValueError) as caught:
            open_one(tmp_path, file)
        lines = str(caught.value).split("\n")
        assert lines[0] == f"{file}: 140 values cannot be read:" and len(lines) == 102 and "..." in lines[-1]
        assert '`width` = "wide", which must be whole numbers of pixels' in lines[2]


@pytest.mark.parametrize("name", FORMATS)
def test_sizes_of_any_shape(tmp_path, name):
    for number, (fields, size) in enumerate(
        [
            ({"original_size": [1500, 1000]}, (1500, 1000)),
            ({"original_size": "1500x1000"}, (1500, 1000)),
            ({"original_size": "(1500.0, 1000.0)"}, (1500, 1000)),
            ({"image_size": [1500.0, 1000.0]}, (1500, 1000)),
            ({"width": "1500", "height": 1000.0}, (1500, 1000)),
            ({"original_size": None, "width": 1500, "height": 1000}, (1500, 1000)),
            ({"width": 512, "height": 341, "original_width": 1500, "original_height": 1000}, (1500, 1000)),
            ({"width": 512, "height": 341, "original_width": None, "original_height": 1000}, (512, 341)),
            ({"original_size": " ", "width": 1500, "height": None}, (0, 0)),
            ({"original_size": [0, 0]}, (0, 0)),
            ({"original_size": [-1, -1]}, (0, 0)),
            ({"original_size": [2**40, 5]}, (0, 0)),
        ]
    ):
        row = open_one(tmp_path, write_record(tmp_path / f"{number}{name}", fields)).row(0)
        assert (row["width"], row["height"]) == size, fields
    for number, (field, value) in enumerate(
        [("original_size", "large"), ("original_size", [1, 2, 3]), ("original_size", [1.5, 2.0]), ("width", "wide"),
         ("original_size", True), ("height", [5]), ("train_resolution", {"w": 1, "h": 2})]
    ):  # fmt: skip
        file = write_record(tmp_path / f"bad{number}{name}", {field: value})
        with pytest.raises(ValueError, match=f"the record 'x' has `{field}` = .*, which must be"):
            open_one(tmp_path, file)


@pytest.mark.parametrize("name", ["m.json", "m.jsonl", "m.parquet"])
def test_paths_of_any_shape(tmp_path, name):
    for number, value in enumerate([True, ["a.png"], {"path": "a.png"}, 1.5]):
        file = write_record(tmp_path / f"{number}{name}", {"image_path": value})
        with pytest.raises(ValueError) as caught:
            open_one(tmp_path, file)
        assert str(caught.value).startswith(str(file)) and "`image_path` = " in str(caught.value)
        assert "must be a path as a text" in str(caught.value)
    row = open_one(tmp_path, write_record(tmp_path / name, {"image_path": 123})).row(0)
    assert row["image_path"] == str(tmp_path / "123") and row["key"] == ("x" if name == "m.json" else "123")


def test_a_path_that_is_missing_leaves_the_key(tmp_path):
    for value in (None, "", "  "):
        (tmp_path / "m.json").write_text(json.dumps({"sub/x.png": {"image_path": value, "caption": "a"}}))
        row = open_one(tmp_path, tmp_path / "m.json").row(0)
        assert (row["key"], row["image_path"]) == ("x", str(tmp_path / "sub" / "x.png"))
    (tmp_path / "m.csv").write_text("image_path,file_name,caption\n ,y.png,a\n")
    assert open_one(tmp_path, tmp_path / "m.csv").row(0)["key"] == "y"


@pytest.mark.parametrize("name", FORMATS)
def test_marks_of_regularisation_of_any_shape(tmp_path, name):
    for number, (value, mark) in enumerate([(True, True), ("True", True), (1, True), ("false", False), (0.0, False)]):
        index = open_one(tmp_path, write_record(tmp_path / f"{number}{name}", {"is_reg": value}))
        assert index.record(0)["is_reg"] is mark
    assert open_one(tmp_path, write_record(tmp_path / name, {"is_reg": " "})).record(0).get("is_reg") is None
    with pytest.raises(ValueError, match='`is_reg` = "maybe", which must be true or false'):
        open_one(tmp_path, write_record(tmp_path / f"bad{name}", {"is_reg": "maybe"}))


def test_lists_that_programs_write_into_cells(tmp_path):
    """pandas writes Python's lists. Other brackets are text, such as wildcards and weights."""
    cells = {"['cat', 'on a mat']": "cat, on a mat", "{'a': 0.5}": "a", "[cat|dog]": "[cat|dog]", "{a|b}": "{a|b}"}
    for number, (cell, text) in enumerate(cells.items()):
        file = tmp_path / f"{number}.csv"
        with file.open("w", newline="") as stream:
            csv.writer(stream).writerows([["image_path", "tags"], ["x.png", cell]])
        assert open_one(tmp_path, file).record(0)["caption"] == text


def test_columns_of_other_types_in_tables(tmp_path):
    """Arrow's maps are tags with numbers, and a text may be written as bytes."""
    tags = pa.array([[("1girl", 0.99), ("solo", None)]], pa.map_(pa.string(), pa.float32()))
    image, text = pa.array([b"\xff\xd8"]), pa.array([b"M\xc3\xb6we"])
    pq.write_table(
        pa.table({"image_path": ["x.png"], "tags": tags, "jpg": image, "note": text}), tmp_path / "m.parquet"
    )
    record = open_one(tmp_path, tmp_path / "m.parquet").record(0)
    assert (record["caption"], record["jpg"], record["note"]) == ("1girl", None, "Möwe")


def test_a_missing_value_of_a_later_source_updates_nothing(tmp_path):
    first = write_record(tmp_path / "1.json", {"caption": "a", "is_reg": True, "note": "b", "original_size": [3, 2]})
    for value in (None, "", " ", []):
        later = write_record(tmp_path / "2.json", {"caption": value, "is_reg": None, "note": None, "tags": "c"})
        index = open_one(tmp_path, first, later)
        record = index.record(0)
        assert (record["is_reg"], record["note"], record["original_size"]) == (True, None, [3, 2])
        assert record["caption"] == "a,c"  # keyed by its path, as kohya's are


def test_tags_are_joined_by_the_separator_that_splits_them(tmp_path):
    file = write_record(tmp_path / "m.jsonl", {"tags": ["a, b", "c"]})
    record = open_record_index(tmp_path / "cache", [file], [], separator=";").record(0)
    assert record["caption"] == "a, b; c" and record["tags"] == ["a, b", "c"]


def test_attributes_of_any_shape_are_counted(tmp_path):
    values = [["x", None], {"x": 0.9, "y": 0.5}, "x, z", 7, True, {"name": "x"}, None]
    lines = [json.dumps({"image_path": f"{at}.png", "artist": value}) for at, value in enumerate(values)]
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    assert count_attributes(open_one(tmp_path, tmp_path / "m.jsonl"))["artist"] == {"x": 3, "y": 1, "z": 1, "7": 1}


@pytest.mark.parametrize("depth", [300, 1000, 1100, 100_000])
def test_values_that_are_nested_deeply_are_kept_or_refused(tmp_path, depth):
    nested = "[" * depth + "]" * depth
    for name, text in (
        ("a.json", f'{{"x": {{"image_path": "x.png", "z": {nested}}}}}'),
        ("b.jsonl", f'{{"image_path": "x.png", "z": {nested}}}'),
    ):
        (tmp_path / name).write_text(text)
        if depth == 300:
            assert open_one(tmp_path, tmp_path / name).row(0)["key"] == "x"
        else:
            with pytest.raises(ValueError, match="depth limit exceeded|nested too deeply"):
                open_one(tmp_path, tmp_path / name, tmp_path / name)
    (tmp_path / "c.csv").write_text(f"image_path,tags\nx.png,{nested}\n")
    if depth == 1000:
        with pytest.raises(ValueError, match="c.csv: the record 'x' has `tags` = "):
            open_one(tmp_path, tmp_path / "c.csv")


def test_numbers_and_keys_beyond_json_are_kept(tmp_path):
    number = "9" * 30
    (tmp_path / "m.csv").write_text(f'image_path,tags\nx.png,"[\'a\', {number}]"\ny.png,"{{1: 0.5}}"\n')
    index = open_one(tmp_path, tmp_path / "m.csv")
    assert [index.record(row)["caption"] for row in range(2)] == ["a, 1e+30", "1"]


def test_the_text_of_a_shard_is_used_where_its_record_has_none(tmp_path):
    for number, (caption, text) in enumerate([(None, "b"), (" ", "b"), ([None, ""], "b"), ("a", "a"), (["a"], "a")]):
        file = tmp_path / f"{number}.tar"
        with tarfile.open(file, "w") as tar:
            for name, content in (("x.json", json.dumps({"caption": caption})), ("x.txt", " b\n")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content.encode()))
        assert open_one(tmp_path, file).record(0)["caption"] == text
