"""Launch scripts: the number of ranks that they start by default."""

import os
import subprocess
from pathlib import Path

import pytest
from programs import ROOT


@pytest.fixture
def driver(tmp_path: Path) -> Path:
    """A folder with a stand-in for nvidia-smi that lists four GPUs."""
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\nfor i in 0 1 2 3; do echo "GPU $i: NVIDIA H100 (UUID: GPU-$i)"; done\n')
    program.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize(
    ("visible", "gpus", "ranks"),
    [
        (None, 4, 4),
        ("", 0, 1),
        ("2", 1, 1),
        ("0, 2", 2, 2),
        ("3,1,0", 3, 3),
        ("1,9,0", 1, 1),  # CUDA ignores the list from its first invalid entry on
        ("1,-1,2", 1, 1),
        ("-1", 0, 1),
        ("GPU-0a,GPU-1b", 2, 2),
        ("MIG-0a", 1, 1),
    ],
)
def test_one_rank_starts_per_visible_gpu(driver: Path, visible: str | None, gpus: int, ranks: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    environment["PATH"] = f"{driver}:{environment['PATH']}"
    if visible is not None:
        environment["CUDA_VISIBLE_DEVICES"] = visible
    command = 'source launch/child.sh; echo "$(count_gpus) $(choose_num_ranks)"'
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(gpus), str(ranks)]
