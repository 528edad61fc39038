"""Short forms of the campaigns of faults, and inputs that once passed the border of a reader."""

import os
from pathlib import Path

import pytest
from campaigns.fuzzed_readers import BORDERS
from campaigns.fuzzing import try_input
from forked_ranks import run_forked
from programs import PLACE, ROOT

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
            assert border.name in ("text outputs 2", "safetensors", "shard"), error


def test_a_part_of_the_campaign_breaks_no_promise(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name not in PLACE}
    words = [*CAMPAIGN, "--state", str(tmp_path / "state.jsonl")]
    for _ in range(2):  # the second call finds all cases finished
        status, printed = run_forked(Path(ROOT / "tests/campaigns/faults.py"), words, 1, environment, 300)
        assert status == 0 and "0 broke a promise" in printed, printed
