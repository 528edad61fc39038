"""Computed tables in the documents are those that their programs compute."""

import subprocess
import sys

import pytest
from programs import ROOT

sys.path.append(str(ROOT / "benchmarks"))
import scale  # noqa: E402  # pyright: ignore[reportMissingImports]


def test_the_tables_of_the_document_are_the_ones_computed() -> None:
    document = scale.DOCUMENT.read_text()
    assert [table for table in scale.list_tables() if table not in document] == []
    assert scale.tabulate_cards() in scale.CARDS_DOCUMENT.read_text()
    # GB of a step: gradients reduced 1, 4 or 16 times in the given type, and bf16 weights gathered once.
    assert "| 2 | bf16 | 4 | 10.3 | 25.7 | 87.3 |" in document
    assert "| 2 | fp32 | 6 | 15.4 | 46.2 | 169.5 |" in document
    # 8 images of 20.28 TFLOP in the time of a step.
    assert scale.compute_mfu(scale.estimate(1), scale.H100, 8) == pytest.approx(
        8 * 20.2837 / 989.5 / scale.estimate(1).seconds, rel=1e-4
    )


@pytest.mark.long  # counts the activations of five presets, 20 s
def test_the_table_of_presets_and_gpus_is_the_one_computed() -> None:
    script = ROOT / "benchmarks" / "presets.py"
    assert subprocess.run([sys.executable, str(script), "--check"]).returncode == 0
