"""Examination of the machine: versions, GPUs, communication between ranks, and disks."""

import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement
from rich.cells import cell_len

from sdxl_trainer.configs.language.translate import join_label, translate, translate_label
from sdxl_trainer.configs.problems import Problem, escape_controls, format_value

PACKAGE = "sdxl-trainer"
SHOWN = ("torch", "deepspeed", "diffusers", "transformers")
PROBE_SECONDS = 180
MAX_PROBED_ON_CPU = 8  # ranks that are started for a trial; each takes the memory of a process with PyTorch
MARK_COLUMNS = 7  # of `ok`, `WRONG` and so on, and the space behind
WRITTEN_BYTES = 256 << 20
BLOCK_BYTES = 16 << 20
# Files with the limit of this process's memory in bytes, by the version of cgroups.
CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


@dataclass(frozen=True)
class Finding:
    """Result of one examination. It is a fault if it has a cure, unless it is a note or the next step of the work."""

    name: str
    detail: str
    cure: str = ""
    is_next_step: bool = False  # nothing is wrong: the cure is to be done next
    is_note: bool = False  # worth knowing; with a cure, worth a change, but no fault

    def __str__(self) -> str:
        """Return the finding in the user's language."""
        if self.is_note:
            mark = translate_label("WARN" if self.cure else "note")
        else:
            mark = translate_label("TO DO" if self.is_next_step else "WRONG" if self.cure else "ok")
        indent = " " * MARK_COLUMNS
        line = mark + indent[cell_len(mark) :]
        line += join_label(translate_label(self.name), escape_controls(translate(self.detail)))
        cure = translate(f"next: {self.cure}" if self.is_next_step else f"cure: {self.cure}")
        return f"{line}\n{indent}{escape_controls(cure)}" if self.cure else line

    @property
    def is_ok(self) -> bool:
        """True if nothing is wrong."""
        return not self.cure or self.is_next_step or self.is_note


def convert_problem(problem: Problem) -> Finding:
    """Convert a problem with the settings to a finding."""
    shown = str(problem.value) if isinstance(problem.value, (str, Path)) else format_value(problem.value)
    value = "" if problem.value is None else f"{shown:.100} "
    return Finding(
        problem.key, value + translate(problem.rule), problem.cure or "see docs/CONFIG.md", problem.is_next_step
    )


def announce_stage(text: str) -> None:
    """Print a line before an examination that takes long, on the stream of errors: it is no finding."""
    mark = "..."
    sys.stderr.write(f"{mark:{MARK_COLUMNS}}{translate(text)}\n")
    sys.stderr.flush()


def examine_machine(num_ranks: int | None = None) -> Iterator[Finding]:
    """Yield every finding that needs no settings.

    Args:
        num_ranks: ranks that will train; None for one on each GPU.
    """
    yield from examine_versions(list_requirements())
    yield examine_gpus(list_driver_gpus())
    yield examine_ranks(torch.cuda.device_count(), num_ranks)


def list_requirements() -> list[str]:
    """List the packages that this one requires; none in a checkout that is not installed, which lists them nowhere."""
    try:
        return importlib.metadata.requires(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return []


def examine_versions(requirements: Iterable[str]) -> Iterator[Finding]:
    """Yield a fault for each required package that is missing or has the wrong version, then a list of versions."""
    python = ".".join(map(str, sys.version_info[:3]))
    versions = {}
    for text in requirements:
        wanted = Requirement(text)
        if wanted.marker and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            versions[wanted.name] = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(wanted.name, "is not installed", f"pip install '{name_package(wanted)}'")
            continue
        if not wanted.specifier.contains(versions[wanted.name], prereleases=True):
            rule = f"is {versions[wanted.name]}, and must be {wanted.specifier}"
            yield Finding(wanted.name, rule, f"pip install '{name_package(wanted)}'")
    shown = [f"{name} {versions[name]}" for name in SHOWN if name in versions]
    yield Finding("versions", ", ".join([f"Python {python}", *shown]))


def name_package(wanted: Requirement) -> str:
    """Return a requirement as pip takes it, without the marker that says where it is needed."""
    return f"{wanted.name}{wanted.specifier}"


def list_driver_gpus() -> list[str]:
    """List the names of the GPUs that the driver reports."""
    if shutil.which("nvidia-smi") is None:
        return []
    done = subprocess.run(
        ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, encoding="utf-8", check=False
    )
    return done.stdout.splitlines() if done.returncode == 0 else []


def examine_gpus(driver_gpus: list[str]) -> Finding:
    """Compare the GPUs of the driver with those that PyTorch can use."""
    count, built_for = torch.cuda.device_count(), torch.version.cuda
    if driver_gpus and not torch.cuda.is_available():
        detail = f"the driver reports {len(driver_gpus)} x {driver_gpus[0]}, PyTorch finds none"
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        if hidden is not None:
            return Finding("GPUs", f"{detail} (CUDA_VISIBLE_DEVICES={hidden})", "unset CUDA_VISIBLE_DEVICES")
        build = f"for CUDA {built_for}" if built_for else "without CUDA"
        return Finding(
            "GPUs", detail, f"torch is built {build}: install a build that your driver supports (pytorch.org)"
        )
    if not count:
        return Finding("GPUs", "none; training runs on the CPU, which is only good for trials")
    properties = [torch.cuda.get_device_properties(number) for number in range(count)]
    if min(each.major for each in properties) < 8:
        return Finding("GPUs", f"{count} x {properties[0].name}, without bf16", "set engine.precision: fp16")
    memory_gb = min(each.total_memory for each in properties) / 1e9
    return Finding("GPUs", f"{count} x {properties[0].name}, {memory_gb:.0f} GB each, CUDA {built_for}")


def read_host_memory_bytes() -> int | None:
    """Return the memory that processes of this host may use: the machine's, or the limit of a container's cgroup."""
    pages = os.sysconf("SC_PHYS_PAGES") if "SC_PHYS_PAGES" in os.sysconf_names else -1
    limits = [pages * os.sysconf("SC_PAGE_SIZE")] if pages > 0 else []
    for path in CGROUP_LIMITS:
        try:
            text = path.read_text(encoding="utf-8").strip()
        except OSError:
            continue
        limits += [int(text)] if text.isdecimal() else []  # "max" means that there is none
    return min(limits, default=None)


def choose_num_probed(num_gpus: int, wanted: int | None) -> int:
    """Return the number of ranks to start for a trial: as many as will train, but one a GPU, and few on a CPU."""
    if num_gpus > 1:
        return min(wanted or num_gpus, num_gpus)
    return min(wanted or 2, MAX_PROBED_ON_CPU)


def examine_ranks(
    num_gpus: int,
    wanted: int | None = None,
    command: list[str] | None = None,
    timeout_seconds: float = PROBE_SECONDS,
) -> Finding:
    """Start ranks that sum numbers: on GPUs by NCCL, or on the CPU by gloo.

    Args:
        wanted: ranks that will train; None tries all GPUs, or two ranks on the CPU.
        command: started instead of launch/probe.py, for tests.
    """
    num_ranks = choose_num_probed(num_gpus, wanted)
    if num_ranks == 1:
        return Finding("ranks", "1, which needs no communication")
    backend = "NCCL" if num_gpus > 1 else "gloo"
    announce_stage(f"starting {num_ranks} ranks, which sum numbers by {backend}")
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment = {name: value for name, value in environment.items() if name not in ("RANK", "WORLD_SIZE")}
    if num_gpus < 2:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
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
    return interpret_probe(status, printed, backend, num_ranks, wanted)


def interpret_probe(
    status: int | None, printed: str, backend: str, num_ranks: int, wanted: int | None = None
) -> Finding:
    """Interpret the probe's exit status (None: it did not end) and output.

    Args:
        wanted: ranks that will train, if these are known.
    """
    lines = printed.strip().splitlines()
    if status == 0:
        figures = next((json.loads(line) for line in lines if line.startswith("{")), {})
        detail = f"{num_ranks} by {backend}, {describe_sums(figures.get('gb_per_second', {}))}"
        is_part = wanted is not None and wanted > num_ranks
        return Finding("ranks", f"{detail}; {wanted} will train, which are too many to try here" if is_part else detail)
    if status is None:
        return explain_failed_ranks("did not connect", backend, num_ranks)
    message = next(
        (line.strip() for line in reversed(lines) if "Error" in line), lines[-1].strip() if lines else "nothing"
    )
    return explain_failed_ranks(f"failed: {message[:200]}", backend, num_ranks)


def describe_sums(gb_per_second: Mapping[Any, float]) -> str:
    """Describe the speed of sums over ranks, by size in megabytes."""
    return "sums " + ", ".join(f"of {size} MB at {speed:.2f} GB/s" for size, speed in gb_per_second.items())


def explain_failed_ranks(failure: str, backend: str, num_ranks: int) -> Finding:
    """Return the finding about ranks that cannot communicate, with the cure for their backend."""
    if backend == "NCCL":
        cure = "run again with NCCL_DEBUG=INFO; NCCL_P2P_DISABLE=1 or NCCL_SOCKET_IFNAME may help"
    else:
        cure = "make 127.0.0.1 reachable; set GLOO_SOCKET_IFNAME=lo if the host name does not resolve"
    return Finding("ranks", f"{num_ranks} ranks by {backend} {failure}", cure)


def examine_disk(name: str, folder: Path, needed_bytes: int = 0) -> Finding:
    """Examine free space and write speed of a folder, or of its nearest existing parent."""
    place = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    try:
        bytes_per_second = measure_write_speed(place, min(WRITTEN_BYTES, shutil.disk_usage(place).free // 2))
    except OSError as error:
        return Finding(name, f"{place}: {error.strerror}", f"choose another {name}, or allow writing there")
    free = shutil.disk_usage(place).free
    detail = f"{folder}: {free / 1e9:.1f} GB free, writes {bytes_per_second / 1e6:.0f} MB/s"
    if needed_bytes:
        detail += f"; about {needed_bytes / 1e9:.2g} GB needed"
    cure = f"free some space, or choose another {name}" if needed_bytes > free else ""
    return Finding(name, detail, cure)


def measure_write_speed(folder: Path, num_bytes: int = WRITTEN_BYTES) -> float:
    """Measure the speed of writing one file to disk, in bytes per second. The file is deleted.

    Raises:
        OSError: the folder cannot be written to, or is full.
    """
    block = os.urandom(min(BLOCK_BYTES, max(1, num_bytes)))  # random, because a disk may compress repeated bytes
    num_blocks = max(1, num_bytes // len(block))
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-", suffix=".tmp") as file:
        start = time.monotonic()
        for _ in range(num_blocks):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return num_blocks * len(block) / (time.monotonic() - start)
