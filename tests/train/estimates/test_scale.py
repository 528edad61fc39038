"""Computed tables in the documents are those that their programs compute."""

import subprocess
import sys

import pytest
from programs import ROOT

SCRIPT = ROOT / "benchmarks" / "scale.py"


def test_the_tables_of_the_document_are_the_ones_computed() -> None:
    assert subprocess.run([sys.executable, str(SCRIPT), "--check"]).returncode == 0
    printed = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=True).stdout
    assert "| 8 | 64 | 175 | 365 ms |" in printed  # 0.45 x 989.5 / 20.3 = 21.9 images a second of each GPU
    # GB of a step: gradients reduced 1, 4 or 16 times in the given type, and bf16 weights gathered once.
    assert "| 2 | bf16 | 4 | 10.3 | 25.7 | 87.3 |" in printed
    assert "| 2 | fp32 | 6 | 15.4 | 46.2 | 169.5 |" in printed


@pytest.mark.long  # counts the activations of five presets, 20 s
def test_the_table_of_presets_and_gpus_is_the_one_computed() -> None:
    script = ROOT / "benchmarks" / "presets.py"
    assert subprocess.run([sys.executable, str(script), "--check"]).returncode == 0
