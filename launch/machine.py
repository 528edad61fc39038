"""Is this machine fit to train: versions, GPUs, ranks that reach each other, a disk that takes what is written."""

import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from packaging.requirements import Requirement

PACKAGE = "sdxl-trainer"
SHOWN = ("torch", "deepspeed", "diffusers", "transformers")
PROBE_SECONDS = 180
WRITTEN_BYTES = 256 << 20
BLOCK_BYTES = 16 << 20


@dataclass(frozen=True)
class Finding:
    """One thing looked at: in order without a cure, else what is wrong and what to do."""

    name: str
    detail: str
    cure: str = ""

    @property
    def is_ok(self) -> bool:
        """Whether it is in order."""
        return not self.cure


def check_machine() -> Iterator[Finding]:
    """Everything that can be told without settings."""
    yield from check_versions(importlib.metadata.requires(PACKAGE) or [])
    yield check_gpus(list_driver_gpus())
    yield check_ranks(torch.cuda.device_count())


def check_versions(requirements: Iterable[str]) -> Iterator[Finding]:
    """Whether what the package needs is installed, in a version that it takes; optional extras are not looked at."""
    python = ".".join(map(str, sys.version_info[:3]))
    versions = {}
    for text in requirements:
        wanted = Requirement(text)
        if wanted.marker and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            versions[wanted.name] = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(wanted.name, "is not installed", "pip install -e . (in the checkout)")
            continue
        if not wanted.specifier.contains(versions[wanted.name], prereleases=True):
            rule = f"is {versions[wanted.name]}, and must be {wanted.specifier}"
            yield Finding(wanted.name, rule, f"pip install '{wanted}'")
    shown = [f"{name} {versions[name]}" for name in SHOWN if name in versions]
    yield Finding("versions", ", ".join([f"Python {python}", *shown]))


def list_driver_gpus() -> list[str]:
    """Names of the GPUs that the driver knows of."""
    if shutil.which("nvidia-smi") is None:
        return []
    done = subprocess.run(
        ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, check=False
    )
    return done.stdout.splitlines() if done.returncode == 0 else []


def check_gpus(known_to_driver: list[str]) -> Finding:
    """Whether PyTorch can use the GPUs that there are."""
    count, built_for = torch.cuda.device_count(), torch.version.cuda
    if known_to_driver and not torch.cuda.is_available():
        detail = f"the driver has {len(known_to_driver)} x {known_to_driver[0]}, PyTorch sees none"
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        if hidden is not None:
            return Finding("GPUs", f"{detail} (CUDA_VISIBLE_DEVICES={hidden})", "unset CUDA_VISIBLE_DEVICES")
        build = f"for CUDA {built_for}" if built_for else "without CUDA"
        return Finding(
            "GPUs", detail, f"torch is built {build}: install a build that your driver supports (pytorch.org)"
        )
    if not count:
        return Finding("GPUs", "none; the CPU trains, which is for trying things out")
    properties = [torch.cuda.get_device_properties(number) for number in range(count)]
    if min(each.major for each in properties) < 8:
        return Finding("GPUs", f"{count} x {properties[0].name}, without bf16", "set engine.precision: fp16")
    memory_gb = min(each.total_memory for each in properties) / 1e9
    return Finding("GPUs", f"{count} x {properties[0].name}, {memory_gb:.0f} GB each, CUDA {built_for}")


def check_ranks(num_gpus: int, command: list[str] | None = None, timeout_seconds: float = PROBE_SECONDS) -> Finding:
    """Whether ranks find each other and sum right: all GPUs by NCCL, or two ranks on the CPU by gloo.

    Args:
        command: what is started in the place of launch/probe.py, by the tests.
    """
    num_ranks = num_gpus if num_gpus > 1 else 2
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment = {name: value for name, value in environment.items() if name not in ("RANK", "WORLD_SIZE")}
    if num_gpus < 2:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryFile("w+") as output:
        probe = subprocess.Popen(
            command or [*start, "-m", "sdxl_trainer.launch.probe"],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = probe.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            os.killpg(probe.pid, signal.SIGKILL)  # torchrun and its ranks
            probe.wait()
            status = None
        output.seek(0)
        printed = output.read()
    return judge_probe(status, printed, "NCCL" if num_gpus > 1 else "gloo", num_ranks)


def judge_probe(status: int | None, printed: str, backend: str, num_ranks: int) -> Finding:
    """What the ranks' exit status (None: they did not end) and output say."""
    name, lines = "ranks", printed.strip().splitlines()
    if status == 0:
        figures = next((json.loads(line) for line in lines if line.startswith("{")), {})
        speed = figures.get("gb_per_second", 0)
        return Finding(name, f"{num_ranks} by {backend}, sums of 64 MB at {speed:.2f} GB/s")
    said = next(
        (line.strip() for line in reversed(lines) if "Error" in line), lines[-1].strip() if lines else "nothing"
    )
    what = f"{num_ranks} ranks by {backend} " + ("did not meet" if status is None else f"failed: {said[:200]}")
    if backend == "NCCL":
        return Finding(name, what, "run again with NCCL_DEBUG=INFO; NCCL_P2P_DISABLE=1 or NCCL_SOCKET_IFNAME may help")
    return Finding(name, what, "127.0.0.1 must be reachable; set GLOO_SOCKET_IFNAME=lo if the host name is not")


def check_disk(name: str, folder: Path, needed_bytes: int = 0) -> Finding:
    """Whether a folder, or the one that it will be made in, can be written to, how fast, and with how much room."""
    place = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    try:
        bytes_per_second = measure_write_speed(place, min(WRITTEN_BYTES, shutil.disk_usage(place).free // 2))
    except OSError as error:
        return Finding(name, f"{place}: {error.strerror}", f"give another {name}, or the right to write there")
    free = shutil.disk_usage(place).free
    detail = f"{folder}: {free / 1e9:.1f} GB free, writes {bytes_per_second / 1e6:.0f} MB/s"
    if needed_bytes:
        detail += f"; about {needed_bytes / 1e9:.2g} GB needed"
    cure = f"free some space, or give another {name}" if needed_bytes > free else ""
    return Finding(name, detail, cure)


def measure_write_speed(folder: Path, num_bytes: int = WRITTEN_BYTES) -> float:
    """Bytes a second of one file that is written and flushed to the disk, in blocks; the file is deleted.

    Raises:
        OSError: the folder cannot be written to, or is full.
    """
    block = os.urandom(min(BLOCK_BYTES, max(1, num_bytes)))  # a disk may compress what repeats
    num_blocks = max(1, num_bytes // len(block))
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-", suffix=".tmp") as file:
        start = time.monotonic()
        for _ in range(num_blocks):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return num_blocks * len(block) / (time.monotonic() - start)
