"""The doctor: a line for each finding, and a cure for each fault."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from programs import ROOT

from sdxl_trainer.cache.models import encoders
from sdxl_trainer.cache.models.source import ModelSource
from sdxl_trainer.configs.load import build_config
from sdxl_trainer.configs.problems import Problem
from sdxl_trainer.configs.schema import Config, RunConfig
from sdxl_trainer.data.formats.latents import LatentSample, write_latents
from sdxl_trainer.data.images.bucket import CropBox, Size
from sdxl_trainer.data.stores.remote import StoreError
from sdxl_trainer.launch import machine
from sdxl_trainer.launch.machine import (
    Finding,
    choose_num_probed,
    convert_problem,
    examine_disk,
    examine_gpus,
    examine_ranks,
    examine_versions,
    interpret_probe,
    list_requirements,
    measure_write_speed,
)
from sdxl_trainer.launch.program import FailedError
from sdxl_trainer.train.doctor import memory
from sdxl_trainer.train.doctor.doctor import convert_failure, describe_samples, examine_settings, print_findings
from sdxl_trainer.train.doctor.memory import examine_memory
from sdxl_trainer.train.doctor.model import examine_hub_model
from sdxl_trainer.train.doctor.program import read_num_ranks
from sdxl_trainer.train.doctor.scratch import open_scratch_run
from sdxl_trainer.train.engine.deepspeed_config import resolve_zero_stage
from sdxl_trainer.train.estimates.checkpoint_size import compute_checkpoint_bytes, compute_snapshot_sizes
from sdxl_trainer.train.estimates.memory_table import describe_micro_batch
from sdxl_trainer.train.estimates.networks import NetworkSizes

CONFIGS = ROOT / "configs"


def test_missing_packages_and_wrong_versions() -> None:
    requirements = ["numpy>=1", "torch>=99", "no-such-package", "x>=3; extra == 'y'", "older; python_version < '3'"]
    findings = {finding.name: finding for finding in examine_versions(requirements)}
    assert set(findings) == {"torch", "no-such-package", "versions"}
    assert findings["torch"].detail.endswith("and must be >=99") and "torch>=99" in findings["torch"].cure
    assert findings["no-such-package"].cure == "pip install 'no-such-package'"
    assert findings["versions"].is_ok and f"torch {torch.__version__.split('+')[0]}" in findings["versions"].detail


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine on which PyTorch finds no GPU")
def test_gpus_that_pytorch_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert examine_gpus([]).is_ok
    found = examine_gpus(["NVIDIA H200"] * 2)
    assert "2 x NVIDIA H200" in found.detail and "torch is built" in found.cure
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert examine_gpus(["NVIDIA H200"]).cure == "unset CUDA_VISIBLE_DEVICES"


def test_ranks_that_fail_or_do_not_connect() -> None:
    python = [sys.executable, "-c"]
    connected = examine_ranks(0, command=[*python, 'print(\'note\\n{"gb_per_second": {"64": 1.5, "400": 2}}\')'])
    assert connected == Finding("ranks", "2 by gloo, sums of 64 MB at 1.50 GB/s, of 400 MB at 2.00 GB/s")
    failed = examine_ranks(0, command=[*python, "raise ValueError('no network')"])
    assert "ValueError: no network" in failed.detail and "127.0.0.1" in failed.cure
    start = time.monotonic()
    hanging = "import os, time\nos.fork()\ntime.sleep(60)"  # the child process must end too
    assert "did not connect" in examine_ranks(0, command=[*python, hanging], timeout_seconds=0.5).detail
    assert time.monotonic() - start < 30
    assert "NCCL_DEBUG=INFO" in interpret_probe(1, "", "NCCL", 8).cure


def test_as_many_ranks_are_tried_as_will_train() -> None:
    wanted = {(0, None): 2, (0, 4): 4, (0, 512): 8, (1, 3): 3, (8, None): 8, (8, 4): 4, (8, 16): 8}
    assert {key: choose_num_probed(*key) for key in wanted} == wanted
    assert examine_ranks(0, 1) == Finding("ranks", "1, which needs no communication")
    found = interpret_probe(0, '{"gb_per_second": {}}', "gloo", 8, 512)
    assert found.detail.startswith("8 by gloo, ") and "; 512 will train" in found.detail


def test_a_checkout_without_an_installed_package_lists_no_requirements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PACKAGE", "no-such-package")
    assert list_requirements() == []


def test_free_space_and_write_speed_of_a_disk(tmp_path: Path) -> None:
    found = examine_disk("run.dir", tmp_path / "not" / "yet", 10)
    assert found.is_ok and "GB free, writes" in found.detail and str(tmp_path) in found.detail
    assert list(tmp_path.iterdir()) == []  # nothing was created or left behind
    assert measure_write_speed(tmp_path, 1 << 20) > 0
    assert examine_disk("run.dir", tmp_path, 1 << 62).cure == "free some space, or choose another run.dir"
    (tmp_path / "file").touch()
    assert "Not a directory" in examine_disk("run.dir", tmp_path / "file" / "runs").detail


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", 14),  # bf16: weight, and master with two moments
        ("engine.precision=bf16_stochastic", 8),
        ("engine.precision=fp32", 12),
        ("engine.precision=fp32 engine.zero_stage=2", 16),  # ZeRO keeps separate masters in fp32 too
        ("optim.name=adamw8bit", 8 + 2 * 4 / 256),  # a scale of 256 values each
        ("ema.decays=[0.9] ema.lengths=[0.1]", 22),
        ("lora.rank=4", 14),
    ],
)
def test_bytes_of_a_checkpoint(words: str, expected: int) -> None:
    config, problems = build_config({}, words.split())
    assert problems == []
    shapes = [(64, 128), (1280, 1280)]
    num_bytes = compute_checkpoint_bytes(resolve_zero_stage(config, 1)[0], shapes)
    assert num_bytes == (64 * 128 + 1280 * 1280) * expected


def test_sizes_of_snapshots() -> None:
    words = ["ema.lengths=[0.05,0.1]", "ema.snapshot_every_steps=400", "ema.snapshot_dtype=fp32"]
    config, problems = build_config({}, words)
    assert problems == []
    sizes = compute_snapshot_sizes(config, [(1000, 500), (500_000,)], 1000)  # after steps 400, 800 and 1000
    assert sizes == (6, 4_000_000) and "6 files" in sizes.describe() and "0.024 GB at the end" in sizes.describe()
    assert compute_snapshot_sizes(build_config({})[0], [(1000, 500)], 1000).number == 0


def test_memory_of_sdxl_by_components(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "read_host_memory_bytes", lambda: 500 * 10**9)
    model = {"path": str(CONFIGS / "sdxl")}
    config, _ = resolve_zero_stage(build_config({"model": model}, ["train.global_batch_size=1"])[0], 1)
    sizes = memory.measure_networks(config, memory.resolve_pair(config), Size(1024, 1024))  # takes seconds

    def get_sizes(given: Config, source: ModelSource, bucket: Size) -> NetworkSizes:
        assert (given, bucket) == (config, sizes.bucket)
        return sizes

    monkeypatch.setattr(memory, "measure_networks", get_sizes)
    found = {finding.name: finding for finding in examine_memory(config, 1, [80 * 10**9])}
    assert list(found) == ["engine.gradient_checkpointing", "memory", "text encoders"]
    cost = found["text encoders"]
    assert cost.is_note and "FLOPs and 1.64 GB; cache.text: true saves both" in cost.detail
    assert cost.detail.endswith("stores 0.64 MB an image")
    assert "\n         trained weights: 5.13 GB GPU" in found["memory"].detail
    assert "activations of 1 x 1024x1024: 6.89 GB GPU, forward pass" in found["memory"].detail
    assert "of 80 GB, in the" in found["memory"].detail.splitlines()[0]
    assert all(finding.is_ok for finding in found.values())
    assert [describe_micro_batch(size) for size in (12, 256, 10190)] == ["12", "256", "more than 256"]
    *_, choice = examine_memory(config, 1, [])  # a machine without GPUs: which one to choose
    fits = choice.detail.splitlines()
    assert choice.is_ok and str(choice).startswith("note   GPU to choose: ") and len(fits) == 6
    assert "12 GB: " in fits[1] and "are too much; engine.offload_optimizer: true saves" in fits[1]
    assert "80 GB: fits with" in fits[5] and "largest micro batch" in fits[5]
    wrong = [finding for finding in examine_memory(config, 1, [24 * 10**9]) if not finding.is_ok]
    assert len(wrong) == 1 and "engine.offload_optimizer: true saves" in wrong[0].cure
    assert "or begin with configs/sdxl_24gb.yaml, which takes 10.5 GB with micro batch 4; or" in wrong[0].cure
    absent = build_config({"model": {"path": "stabilityai/absent"}})[0]
    assert [finding.is_ok for finding in examine_memory(absent, 1, [])] == [True]


def test_settings_and_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The doctor runs the checks of training and does not create the run folder."""
    shutil.copytree(CONFIGS / "tiny", tmp_path / "model")
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        (tmp_path / "model" / name / "x.safetensors").touch()
    (tmp_path / "data").mkdir()
    for number in range(4):
        sample = LatentSample(latents=np.zeros((4, 8, 8), np.float32), original_size=(64, 64), crop_ltrb=(0, 0, 64, 64))
        write_latents(tmp_path / "data" / f"{number}.npz", sample)
        (tmp_path / "data" / f"{number}.txt").write_text("a")
    raw = {
        "run": {"dir": str(tmp_path / "runs")},
        "model": {"path": str(tmp_path / "model")},
        "data": {"image_dirs": [str(tmp_path / "data")], "resolution_px": 64, "min_bucket_px": 64},
    }
    config, problems = build_config(yaml.safe_load(yaml.safe_dump(raw)))
    assert problems == []
    found = list(examine_settings(config, world_size=2))
    assert [finding.name for finding in found] == ["settings", "data"] and all(finding.is_ok for finding in found)
    assert [finding.detail for finding in found] == ["no contradictions on 2 ranks", "4 samples to train on"]
    assert next(examine_settings(config, world_size=1)).detail == "no contradictions on 1 rank"
    config, _ = build_config(raw, ["train.global_batch_size=4", "train.micro_batch_size=4"])
    wrong = {finding.name: finding for finding in examine_settings(config, world_size=2) if not finding.is_ok}
    assert set(wrong) == {"train.global_batch_size"}
    micro = "set train.micro_batch_size: 2, which keeps this batch; or set the global batch to a multiple of 8"
    assert wrong["train.global_batch_size"].cure == micro
    config, _ = build_config(raw, [f"cache.dir={tmp_path / 'latents'}", "data.source_weights=[2.5]"])
    assert [*examine_settings(config, world_size=1)][-1].detail == (
        "4 samples to train on; 10 an epoch, with repeats and without those held out"
    )
    for number in range(4):  # as if they were multiplied by 0.13025
        latents = np.random.default_rng(number).standard_normal((4, 8, 8)).astype(np.float32)
        sample = LatentSample(latents=latents, original_size=(64, 64), crop_ltrb=(0, 0, 64, 64))
        write_latents(tmp_path / "data" / f"{number}.npz", sample)
    [scaled] = [finding for finding in examine_settings(config, world_size=1) if finding.name == "latents"]
    assert str(scaled).startswith("WARN   latents: have a standard deviation of 0.99; those that this VAE gives have ")
    assert "about 7.7\n" in str(scaled) and "divide them by 0.13025" in scaled.cure
    left = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*")}
    assert left == {"model", "data"} and not (tmp_path / "data" / "index").exists()  # the doctor writes nothing
    shutil.rmtree(tmp_path / "model" / "tokenizer_2")  # like a single file, which contains no vocabulary
    monkeypatch.setattr(encoders, "find_installed_vocabulary", lambda: None)
    wrong = {finding.name: finding for finding in examine_settings(config, world_size=2) if not finding.is_ok}
    assert "open_clip_torch" in wrong["model.tokenizer"].cure


@pytest.mark.parametrize("has_latents", [False, True])
def test_images_without_latents_are_opened_and_another_prediction_is_named(tmp_path: Path, has_latents: bool) -> None:
    """A run starts without an image that cannot be used, but the cache job would fail: the doctor tells both."""
    shutil.copytree(CONFIGS / "tiny", tmp_path / "model")
    write_file(tmp_path / "model" / "scheduler" / "scheduler_config.json", '{"prediction_type": "v_prediction"}')
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        write_file(tmp_path / "model" / name / "x.safetensors", "")
    data, sample = tmp_path / "data", LatentSample(np.zeros((4, 8, 8), np.float32), Size(64, 64), CropBox(0, 0, 64, 64))
    for number in range(20):
        write_file(data / f"{number}.txt", "a")
        Image.effect_noise((64, 64), 50).save(data / f"{number}.png")
        if has_latents and number != 7:
            write_latents(data / f"{number}.npz", sample)
    broken = data / "7.png"
    broken.write_bytes(broken.read_bytes()[:-900])
    raw = {
        "run": {"dir": tmp_path / "runs"},
        "model": {"path": tmp_path / "model"},
        "data": {"image_dirs": [data], "resolution_px": 64, "min_bucket_px": 64},
    }
    config, _ = build_config(yaml.safe_load(json.dumps(raw, default=str)), ["data.max_bad_fraction=0"])
    found = {finding.name: finding for finding in examine_settings(config, world_size=1)}
    prediction, images = found["objective.prediction"], found["data.image_dirs"]
    assert str(prediction) == (
        "WARN   objective.prediction: epsilon differs from the model, which was trained with v\n"
        "       cure: set objective.prediction: v, unless you want to change what the model predicts"
    )
    assert images.is_ok == has_latents and str(broken) in images.detail
    assert "1 image of 20 cannot be used, more than data.max_bad_fraction = 0 allows" in images.detail
    assert images.cure.endswith("or correct their paths; or raise data.max_bad_fraction to 0.05")
    allowed = config.model_copy(update={"data": config.data.model_copy(update={"max_bad_fraction": 0.01})})
    images = {finding.name: finding for finding in examine_settings(allowed, world_size=1)}["data.image_dirs"]
    assert images.is_ok and "the job will skip such images" in images.detail
    (data / "3.txt").write_bytes("红色的猫".encode("gb18030"))
    found = [finding for finding in examine_settings(config, world_size=1) if finding.name == "data.image_dirs"]
    assert "3.txt: is not UTF-8, but probably gb18030" in found[0].detail
    assert "1 image of 20 cannot be used" in found[1].detail and str(broken) in found[1].detail
    (data / "3.txt").write_text("a")
    if has_latents:  # the cache job has listed it: the checks of training name it, and it is not named twice
        status, reason = broken.stat(), f"{broken}: cannot be decoded"
        line = {"key": "7", "file": str(broken), "reason": reason, "source": [status.st_size, status.st_mtime_ns, ""]}
        write_file(data / "logs" / "bad_samples.jsonl", json.dumps(line))
        details = [str(finding) for finding in examine_settings(allowed, world_size=1)]
        assert [reason in detail for detail in details].count(True) == 1
        assert any("repair or remove 1 image, which the cache job could not use" in detail for detail in details)
        shutil.rmtree(data / "logs")
    broken.unlink()
    Image.new("RGB", (64, 64)).save(broken)
    found = {finding.name: finding for finding in examine_settings(config, world_size=1)}
    total = "1" if has_latents else "20"
    assert found["images"].detail == f"opened {total} of the {total} images to encode: all can be used"


def write_file(path: Path, text: str) -> None:
    """Write a text file, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_missing_cache_is_the_next_step_and_bad_latents_are_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    missing = Problem("cache.dir", tmp_path, "holds no latent cache", "run bash launch/cache.sh", is_next_step=True)
    print_findings([Finding("a", "fine"), convert_problem(missing)])  # is no fault
    assert "credentials" in convert_failure(StoreError("s3://bucket/a.tar: 403")).cure
    assert f"TO DO  cache.dir: {tmp_path} holds no latent cache\n       next: run bash" in capsys.readouterr().out
    run = RunConfig(dir=tmp_path / "runs", name="x")
    with open_scratch_run(run) as scratch:
        assert scratch.folder == tmp_path / "runs" / "x" / "doctor" and scratch.folder.is_dir()
    assert not (tmp_path / "runs").exists()
    with open_scratch_run(run) as scratch:
        (scratch.folder / "logs").mkdir()
        (scratch.folder / "logs" / "bad_samples.jsonl").write_text("{}")
    assert (tmp_path / "runs" / "x" / "doctor" / "logs" / "bad_samples.jsonl").is_file()
    with open_scratch_run(run) as scratch:
        assert list(scratch.folder.iterdir()) == []


def test_the_script_starts_ranks_and_reports_wrong_settings(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(f"run: {{dir: {tmp_path}}}\nmodel: {{path: {tmp_path}/absent}}\n")
    command = ["bash", str(ROOT / "launch" / "doctor.sh"), "--cfg", str(tmp_path / "x.yaml"), "train.globl=3"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}  # two ranks on the CPU
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    assert "ok     ranks: 2 by gloo, sums of 64 MB at " in done.stdout
    assert "WRONG  train.globl: 3 is not a known key\n       cure: did you mean train.global_batch_size?" in done.stdout
    assert "model.path" not in done.stdout and "zero_stage" not in done.stdout  # wrong settings are reported alone
    assert "INFO" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.yaml"]


def test_a_model_that_is_nowhere_is_the_first_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistyped path may look like a hub id; without the hub's answer, it would be found when the cache is filled."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "images" / "a.png")
    (tmp_path / "images" / "a.txt").write_text("a")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    raw = {"model": {"path": "models/sdxl"}, "data": {"image_dirs": ["images"]}, "cache": {"dir": "latents/my"}}
    found = list(examine_settings(build_config(raw)[0], world_size=1))
    assert [finding.name for finding in found[:2]] == ["model.path", "cache.dir"]
    assert "models/sdxl does not exist here, and cannot be downloaded from the hub: " in found[0].detail
    assert found[0].cure == "check the path; or, if the hub has this model, the network" and found[1].is_next_step
    assert [path.name for path in tmp_path.iterdir()] == ["images"]
    raw["model"]["path"] = str(tmp_path / "absent")
    found = list(examine_settings(build_config(raw)[0], world_size=1))
    assert "is neither a file nor a folder" in found[0].detail and found[1].name == "cache.dir"
    raw["model"]["path"] = str(tmp_path / "images")
    assert list(examine_hub_model(build_config(raw)[0].model)) == []


def test_samples_are_described_with_their_repeats() -> None:
    assert describe_samples(1, None) == describe_samples(1, np.ones(1)) == "1 sample to train on"
    assert describe_samples(2, np.array([0, 1])).startswith("2 samples to train on; 1 an epoch, ")


@pytest.mark.parametrize(("nproc", "expected"), [("", None), ("gpu", None), ("2", 2)])
def test_the_number_of_ranks_is_read_from_nproc(monkeypatch, nproc: str, expected: int | None) -> None:
    monkeypatch.setenv("NPROC", nproc)
    assert read_num_ranks() == expected


def test_each_finding_is_a_line(capsys: pytest.CaptureFixture) -> None:
    print_findings([Finding("a", "fine")])
    assert capsys.readouterr().out == "ok     a: fine\n"
    problem = convert_problem(Problem("data.image_dirs.0", Path("/x"), "is not a folder"))
    with pytest.raises(FailedError, match="1 of 2"):
        print_findings([Finding("a", "fine"), problem])
    assert capsys.readouterr().out.endswith(
        f"WRONG  data.image_dirs.0: {os.sep}x is not a folder\n       cure: see docs/CONFIG.md\n"
    )
