"""Shards that a command writes (`pipe:`) give the batches of local files, and a command that fails is named."""

import gzip
from pathlib import Path

import numpy as np
import orjson
import pytest
import torch
from fsspec.registry import known_implementations
from tiny_tokenizers import load_tiny_tokenizers
from webdataset import utils
from webdataset.gopen import gopen_schemes

from sdxl_trainer.configs.schema import Config
from sdxl_trainer.data.checks.records import check_data_settings
from sdxl_trainer.data.checks.training_set import open_training_set
from sdxl_trainer.data.formats.latents import LatentSample, pack_latents
from sdxl_trainer.data.formats.shards import ShardWriter
from sdxl_trainer.data.loading.loader import build_dataset, build_plan, iterate_specs
from sdxl_trainer.data.loading.micro_batch import MicroBatch
from sdxl_trainer.data.metadata.shard_list import expand_shard_list
from sdxl_trainer.data.metadata.sources import list_source_files
from sdxl_trainer.data.order.plan import Position
from sdxl_trainer.data.stores import remote
from sdxl_trainer.data.stores.streams import STREAMED_PROTOCOLS

SHARDS, PER_SHARD = 3, 6


@pytest.fixture(autouse=True)
def no_long_waits(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.001)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Shards s-<n>.tar, plain and as s-<n>.tar.gz."""
    rng = np.random.default_rng(0)
    for shard in range(SHARDS):
        writer = ShardWriter(tmp_path / f"s-{shard}.tar")
        for item in range(PER_SHARD):
            latents = rng.standard_normal((4, 8, 8)).astype(np.float32)
            sample = LatentSample(latents=latents, original_size=(64, 64), crop_ltrb=(0, 0, 64, 64))
            writer.append(f"k{shard}-{item}", orjson.dumps({"caption": f"{shard} {item}"}), pack_latents(sample))
        writer.close()
        (tmp_path / f"s-{shard}.tar.gz").write_bytes(gzip.compress(writer.path.read_bytes()))
    return tmp_path


def build_config(folder: Path, *metadata: str, cache: str = "cache", **data) -> Config:
    sections = {"run": {"name": "run", "dir": folder}, "cache": {"dir": folder / cache}}
    return Config.model_validate({**sections, "data": {"metadata": list(metadata), **data}})


def read_epoch(config: Config, shuffle_shards: int) -> list[MicroBatch]:
    index, problems = open_training_set(config)
    assert problems == [] and index is not None
    plan = build_plan(index, 2, 1, None, shuffle_shards)
    dataset = build_dataset(config, index, load_tiny_tokenizers(), None)
    specs = iterate_specs(plan, Position(0, 0), 0, 1, 2)
    return [dataset[next(specs)] for _ in range(plan.num_batches(0))]


def get_problem(config: Config) -> tuple[str, str, str]:
    index, [problem] = open_training_set(config)
    assert index is None
    return problem.key, problem.rule, problem.cure


def test_streamed_protocols_are_those_that_only_webdataset_opens():
    assert STREAMED_PROTOCOLS == set(gopen_schemes) - set(known_implementations) - {"__default__"}


@pytest.mark.parametrize("shuffle_shards", [0, 2])
def test_commands_give_the_batches_of_local_shards(folder, shuffle_shards):
    """Three commands from braces, which count their own starts: one for the index, and one for the local copy."""
    command = f"pipe:echo >> {folder}/starts-{{0..2}}; gzip -dc {folder}/s-{{0..2}}.tar.gz"
    command = "::".join(command.replace("{0..2}", str(shard)) for shard in range(SHARDS))
    streams = {"shuffle_shards": shuffle_shards, "copies_dir": folder / "copies"}
    piped = read_epoch(build_config(folder, command, remote_shards=streams), shuffle_shards)
    local = read_epoch(build_config(folder, f"{folder}/s-{{0..2}}.tar", cache="local"), shuffle_shards)
    assert len(piped) == len(local) == SHARDS * PER_SHARD // 2
    for left, right in zip(piped, local, strict=True):
        assert left.bad == [] and torch.equal(left.rows, right.rows)
        assert torch.equal(left.latents, right.latents)
    assert [len((folder / f"starts-{shard}").read_text()) for shard in range(SHARDS)] == [2] * SHARDS
    assert {path.read_bytes() for path in (folder / "copies").glob("*.tar")} == {
        (folder / f"s-{shard}.tar").read_bytes() for shard in range(SHARDS)
    }


@pytest.mark.parametrize(
    ("command", "reason", "starts"),
    [
        ("exit 3", "the command ended with status 3", 3),  # may be the network's fault, so it is tried again
        ("absent-program", "the command ended with status 127", 1),
        ("head -c 4000 {tar}", "is cut short", 1),
        ("head -c 4000 {tar}; exit 1", "the command ended with status 1", 3),
        ("cat {tar}.gz", "is compressed; samples are read by position, so decompress it (gzip -d)", 1),
        ("true", "is not a readable tar", 1),
    ],
)
def test_a_command_that_fails_is_named(folder, command, reason, starts):
    command = f"pipe:echo >> {folder}/starts; {command.format(tar=folder / 's-0.tar')}"
    config = build_config(folder, command, remote_shards={"shuffle_shards": 1})
    key, rule, _ = get_problem(config)
    assert key == "data.metadata" and reason.removeprefix("is ") in rule
    assert len((folder / "starts").read_text()) == starts


def test_streams_need_local_copies(folder):
    command = f"pipe:echo >> {folder}/starts; cat {folder}/s-0.tar"
    key, rule, cure = get_problem(build_config(folder, command))
    assert key == "data.remote_shards.copies_dir" and "is a stream" in rule and "shuffle_shards" in cure
    streams = {"copies_dir": folder / "copies"}
    key, rule, cure = get_problem(build_config(folder, command, remote_shards=streams, verify_latents="full"))
    assert key == "data.verify_latents" and "header" in cure
    assert not (folder / "starts").exists()


def test_only_settings_start_commands(folder):
    """Metadata come from elsewhere: a command in them is a path like any other."""
    command = f"pipe:touch {folder}/started"
    fields = [
        {"image_path": command},
        {"file_name": command},
        {"key": command},
        {"image_path": command, "mask": command},
    ]
    (folder / "m.jsonl").write_bytes(b"\n".join(orjson.dumps({**record, "caption": "c"}) for record in fields))
    (folder / "keyed.json").write_bytes(orjson.dumps({command: {"caption": "c"}}))
    for name in ("m.jsonl", "keyed.json"):
        open_training_set(build_config(folder, str(folder / name), cache=f"of-{name}", max_bad_fraction=1.0))
    assert not (folder / "started").exists()


def test_webdatasets_switch_against_commands_holds(folder, monkeypatch):
    monkeypatch.setattr(utils, "enforce_security", True)  # WDS_SECURE=1
    config = build_config(folder, f"pipe:touch {folder}/started", remote_shards={"shuffle_shards": 1})
    key, rule, _ = get_problem(config)
    assert key == "data.metadata" and "cannot open pipe URLs" in rule and not (folder / "started").exists()


@pytest.mark.parametrize(
    ("pattern", "rule", "cure"),
    [
        ("{folder}/none-*.tar", "matches no file", "check the path"),
        ("{folder}/s-{{3..5}}.tar", "names 3 missing files, the first is", "check the path"),
        ("{folder}/s-0.tar::", "has an empty entry", "with `::` only between two entries"),
        ("::", "has an empty entry", "name a file, a URL or"),
        ("{{,}}", "has an empty entry", "name a file, a URL or"),
        ("pipe:", "names nothing", "`pipe:COMMAND`"),
        ("pipe: ::{folder}/s-0.tar", "has an empty entry", "`pipe:COMMAND`"),
        ("{folder}/s-{{0..2.tar", "has a brace without its partner", "close it"),
        ("pipe:cat ${{SET}}-0.tar", "names the variable WDS_SET, which the environment lacks", "export WDS_SET="),
    ],
)
def test_a_list_that_names_no_shard_is_refused(folder, pattern, rule, cure):
    [problem] = check_data_settings(build_config(folder, pattern.format(folder=folder)).data, folder)
    assert problem.key == "data.metadata.0" and rule in problem.rule and cure in problem.cure


def test_lists_are_expanded_as_webdataset_does(folder, monkeypatch):
    monkeypatch.setenv("WDS_SET", f"{folder}/s")
    assert expand_shard_list("pipe:cat ${SET}-{0..2..2}.tar | awk '\\{print $1\\}'::b{c,a}") == [
        f"pipe:cat {folder}/s-0.tar | awk '{{print $1}}'",
        f"pipe:cat {folder}/s-2.tar | awk '{{print $1}}'",
        "bc",
        "ba",
    ]
    listed = build_config(folder, f"{folder}/s-0.tar::{folder}/s-{{1,2}}.tar").data
    assert list(check_data_settings(listed, folder)) == [] and len(list_source_files(listed.metadata)) == SHARDS
    chained = f"simplecache::file://{folder}/s-0.tar"  # fsspec's, and one entry
    assert list_source_files([chained]) == [chained]
    assert build_config(folder, "pipe:awk '{print $1}' ~/x").data.metadata == ["pipe:awk '{print $1}' ~/x"]
