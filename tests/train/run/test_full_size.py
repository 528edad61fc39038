"""The short form of tests/campaigns/full_size.py."""

from pathlib import Path

import pytest
from campaigns.full_size import run_campaign
from programs import run_program


def test_adapters_are_trained_resumed_exported_and_loaded_by_diffusers(tmp_path: Path) -> None:
    report = run_campaign(tmp_path, True, lambda program, words: run_program(program, *words))
    assert report["wrong"] == []
    assert list(report["phases"]) == ["model", "cache", "train", "resume", "convert", "diffusers"]
    assert report["checkpoint_bytes"] < report["model_bytes"]


@pytest.mark.long
def test_all_weights_are_trained_with_gradient_release(tmp_path: Path) -> None:
    report = run_campaign(tmp_path, True, lambda program, words: run_program(program, *words), whole=True)
    assert report["wrong"] == []
