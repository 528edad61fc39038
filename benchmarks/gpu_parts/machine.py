"""Part `machine`: versions, the speed of matrix products, and the bandwidth of memory."""

import importlib.metadata
import os
import shutil
import subprocess
from functools import partial
from pathlib import Path

import torch
from harness import ROOT, describe_machine

from gpu_parts.devices import Place
from gpu_parts.report import Case, Cases

PACKAGES = (
    *("torch", "triton", "deepspeed", "diffusers", "transformers", "peft", "safetensors", "numpy", "pyarrow"),
    *("pydantic", "bitsandbytes", "torch-optimi", "prodigyopt", "xformers"),
)
SMI_QUERY = "name,driver_version,memory.total,power.limit,clocks.max.sm"


def list_cases(place: Place) -> Cases:
    """List the cases of this part."""
    return {
        "versions": partial(note_versions, place),
        "matmul": partial(measure_matmul, place),
        "bandwidth": partial(measure_bandwidth, place),
    }


def note_versions(place: Place, case: Case) -> None:
    """Note the versions of packages, driver and libraries, and the tools that compile kernels."""
    case.note(**describe_machine(), commit=run_quietly("git", "rev-parse", "HEAD"))
    case.note(packages={name: read_version(name) for name in PACKAGES})
    case.note(tools={name: shutil.which(name) or "missing" for name in ("cc", "c++", "nvcc", "ninja")})
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    case.note(host_memory_gb=memory / 1e9, temporary_free_gb=shutil.disk_usage(place.work).free / 1e9)
    if place.is_cuda:
        from torch.cuda import nccl

        properties = torch.cuda.get_device_properties(0)
        case.note(
            nvidia_smi=run_quietly("nvidia-smi", f"--query-gpu={SMI_QUERY}", "--format=csv,noheader"),
            memory_bytes=properties.total_memory,
            multiprocessors=properties.multi_processor_count,
            capability=f"{properties.major}.{properties.minor}",
            cuda=torch.version.cuda,
            cudnn=torch.backends.cudnn.version(),
            nccl=".".join(str(number) for number in nccl.version()),
        )


def read_version(package: str) -> str:
    """Return the installed version of a package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def run_quietly(*command: str) -> str:
    """Return what a program prints, or why it printed nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=Path(ROOT))
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}: {error}"
    return (done.stdout or done.stderr).strip()


def measure_matmul(place: Place, case: Case) -> None:
    """Measure the speed of a square matrix product: the practical limit of every step."""
    size = 256 if place.tiny else 8192
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        matrix = torch.randn(size, size, device=place.device, dtype=dtype)
        seconds = place.time_calls(partial(torch.matmul, matrix, matrix), times=20)
        case.note(**{f"{name}_tflops": 2 * size**3 / seconds / 1e12})


def measure_bandwidth(place: Place, case: Case) -> None:
    """Measure copies of 1 GB within the device, and between host and device."""
    num_bytes = 1_000_000 if place.tiny else 1_000_000_000
    first = torch.ones(num_bytes, dtype=torch.uint8, device=place.device)
    second = torch.empty_like(first)
    case.note(device_copy_gb_per_second=2 * num_bytes / 1e9 / place.time_calls(partial(second.copy_, first), 10))
    place.require_cuda("a copy between host and device")
    for name, host in (
        ("pageable", torch.ones(num_bytes, dtype=torch.uint8)),
        ("pinned", torch.ones(num_bytes, dtype=torch.uint8, pin_memory=True)),
    ):
        to_host = place.time_calls(partial(host.copy_, first), 3, warm_up=1)
        to_device = place.time_calls(partial(first.copy_, host), 3, warm_up=1)
        case.note(**{f"{name}_to_host_gb_per_second": num_bytes / 1e9 / to_host})
        case.note(**{f"{name}_to_device_gb_per_second": num_bytes / 1e9 / to_device})
