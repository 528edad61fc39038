"""Short forms of the campaigns of faults, and inputs that once passed the border of a reader."""

import io
import json
import os
import zipfile
from pathlib import Path

import pytest
from campaigns.fuzzed_readers import BORDERS
from campaigns.fuzzing import try_input
from forked_ranks import run_forked
from programs import PLACE, ROOT


def build_zip(members: dict[str, bytes]) -> bytes:
    """Build a zip file of members that are not compressed."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


def build_npy(fields: str) -> bytes:
    """Build an npy array of four bytes with any text as its header."""
    return b"\x93NUMPY\x01\x00" + len(fields).to_bytes(2, "little") + fields.encode() + b"\0" * 4


def build_checkpoint_manifest(name: str) -> bytes:
    """Build the manifest of a checkpoint with a file of this name."""
    entry = {"bytes": 2, "sha256": "0" * 64}
    return json.dumps({"files": {"trainer_state.json": entry, name: entry}}).encode()


# The name of the reader, and a file that passed its border.
CRASHERS = [
    ("csv", b'a,"b'),
    ("yaml", b"[" * 3000),
    ("yaml", b"run: " + b"9" * 5000),
    ("kohya toml", b"datasets = 3\n"),
    ("kohya toml", b'[[datasets]]\nsubsets = ["a"]\n'),
    ("kohya toml", b'[[datasets]]\n[[datasets.subsets]]\nimage_dir = "x"\nnum_repeats = "2"\n'),
    ("kohya toml", b"a = " + b"9" * 5000),
    ("kohya sh", b"train.py --learning_rate=" + b"(" * 3000),
    ("kohya sh", b"train.py --resolution=1e999"),
    ("kohya py", b"config.a = " + b"-" * 3000 + b"1\n"),
    ("kohya py", b"config.a = " + b"(" * 3000),
    ("kohya py", b"config.a = 1\0\n"),
    ("manifest", b'{"key": {}, "file": "a", "sha256": "", "identity": ""}\n'),
    ("safetensors", b'\x41\0\0\0\0\0\0\0{"a": {"dtype": "F16", "shape": [1e999], "data_offsets": [0, 2]}}'),
    ("model config", b"[" * 100_000),
    ("vocabulary", b'{"a": null}'),
    ("vocabulary", b'{"b": 1}'),
    ("vocabulary", b"null"),
    ("vocabulary", b'{"a": "0"}'),
    ("pt", b"PK\x03\x04"),
    ("pt", b""),
    ("pt", build_zip({"a/data.pkl": b"\x80\x02X\x00", "a/version": b"3\n", "a/byteorder": b"little"})),
    ("latents", build_zip({"latents.npy": build_npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1e999,)}")})),
    ("checkpoint manifest", build_checkpoint_manifest("a" * 300)),
    ("checkpoint manifest", build_checkpoint_manifest("a\0")),
]
CAMPAIGN = ["--seed", "3", "--share", "0.01", "--only", "cache: kill", "cache: power cut", "training: end"]


@pytest.mark.parametrize(("name", "content"), CRASHERS, ids=[f"{n}-{number}" for number, (n, _) in enumerate(CRASHERS)])
def test_an_input_that_once_passed_the_border_of_its_reader_is_refused(name, content, tmp_path):
    border = next(border for border in BORDERS if border.name == name)
    border.seeds(tmp_path)
    assert try_input(border, content, tmp_path) is None


@pytest.mark.parametrize("border", BORDERS, ids=[border.name for border in BORDERS])
def test_readers_take_what_the_fuzzing_begins_with(border, tmp_path):
    path = tmp_path / f"input{border.suffix}"
    for content in border.seeds(tmp_path):
        path.write_bytes(content)
        try:
            border.read(path)
        except border.errors as error:
            assert border.name in ("text outputs 2", "safetensors", "shard", "sqlite"), error


def test_a_part_of_the_campaign_breaks_no_promise(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name not in PLACE}
    words = [*CAMPAIGN, "--state", str(tmp_path / "state.jsonl")]
    for _ in range(2):  # the second call finds all cases finished
        status, printed = run_forked(Path(ROOT / "tests/campaigns/faults.py"), words, 1, environment, 300)
        assert status == 0 and "0 broke a promise" in printed, printed
