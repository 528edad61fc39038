"""Blocks of records: the fast reader of a JSON object agrees with the plain reader, on records and on errors."""

import json
from pathlib import Path

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdxl_trainer.data.metadata import json_stream
from sdxl_trainer.data.metadata.blocks import FIELDS, RecordBlock, build_block, read_blocks
from sdxl_trainer.data.metadata.sources import read_metadata_file

# A backslash before letters and quotes, halves of surrogate pairs, numbers at the edges of what JSON allows.
TEXTS = st.text(alphabet='ab"\\/{}[],:é\u2028\U0001f600\n u0d8', max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | TEXTS,
    lambda values: st.lists(values, max_size=3) | st.dictionaries(TEXTS, values, max_size=3),
    max_leaves=6,
)
RECORDS = st.dictionaries(st.sampled_from(FIELDS) | TEXTS, VALUES, max_size=5)
OBJECTS = st.dictionaries(TEXTS | st.sampled_from(["a.png", "b/c.jpg", "d.e"]), RECORDS | VALUES, max_size=5)


def describe(blocks: list[RecordBlock]) -> list[tuple]:
    """Return all columns of blocks, record by record."""
    records: list[tuple] = []
    for block in blocks:
        columns = [block.keys, block.base_folders, block.keyed_paths, block.spans, map(orjson.loads, block.contents)]
        records += zip(*columns, *map(block.column, FIELDS), strict=True)
    return records


def read_both(file: Path) -> tuple[list[tuple] | str, list[tuple] | str]:
    """Read a file by the fast and the plain reader. Return the records of each, or the error's message."""
    answers = []
    for read in (lambda: read_blocks(file), lambda: map(build_block, read_metadata_file(file))):
        try:
            answers.append(describe(list(read())))
        except ValueError as error:
            answers.append(str(error))
    return answers[0], answers[1]


@settings(max_examples=300, deadline=None)
@given(OBJECTS, st.booleans(), st.sampled_from([None, 1]), st.integers(8, 200), st.data())
def test_the_fast_reader_agrees_with_the_plain_one(tmp_path_factory, content, ascii_only, indent, block_bytes, data):
    text = json.dumps(content, ensure_ascii=ascii_only, indent=indent).encode("utf-8", "surrogatepass")
    damage = data.draw(st.none() | st.tuples(st.integers(0, len(text)), st.sampled_from(b'"{}[],:\\ 0.-eu\xff\xed')))
    if damage is not None:
        at, byte = damage
        text = text[:at] + bytes([byte]) + text[at + data.draw(st.integers(0, 1)) :]
    file = tmp_path_factory.mktemp("m") / "m.json"
    file.write_bytes(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "BLOCK_BYTES", block_bytes)
        fast, plain = read_both(file)
    assert fast == plain


def test_ordinary_records_are_read_by_the_fast_reader(tmp_path):
    """The plain reader, which builds a dict for each record, takes five times as long."""
    file = tmp_path / "m.json"
    file.write_text(json.dumps({"a": {"image_path": "a.png", "tags": ["é"], "x": {"y": [1]}}, "b": {"caption": "c"}}))
    [block] = read_blocks(file)
    assert not any(isinstance(fields, dict) for fields in block.fields)
    assert block.column("tags") == [["é"], None] and block.column("caption") == [None, "c"]
    assert block.contents == [b'{"image_path": "a.png", "tags": ["\\u00e9"], "x": {"y": [1]}}', b'{"caption": "c"}']


@pytest.mark.parametrize("number", ["1e309", "-2E+400", "17e0308", "1e100", "-1E+200"])
def test_numbers_that_no_float_can_hold_are_named(tmp_path, number):
    file = tmp_path / "m.json"
    file.write_text(f'{{"a": {{"image_path": "a.png", "score": {number}}}}}')
    fast, plain = read_both(file)
    assert fast == plain
    assert isinstance(fast, list) if "100" in number or "200" in number else f"{file}:1:" in fast


def test_a_key_that_is_only_a_folder_is_an_error(tmp_path):
    file = tmp_path / "m.json"
    file.write_text('{"/": {}}')
    fast, plain = read_both(file)
    assert fast == plain and "empty key" in fast
