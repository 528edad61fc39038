"""The preset that suits a GPU: the first that fits, with the memory that it needs and the reason."""

import pytest

from sdxl_trainer.train.doctor.memory import examine_presets
from sdxl_trainer.train.estimates.memory_table import MemoryLimits
from sdxl_trainer.train.estimates.preset_choice import choose_preset, compute_usable_bytes


def choose(gigabytes: int, ranks: int = 1):
    limits = MemoryLimits(device=compute_usable_bytes(gigabytes), host=None, ranks_per_host=ranks)
    return choose_preset(limits, ranks)


def test_each_card_gets_the_first_preset_that_fits() -> None:
    expected = {
        12: ("sdxl_24gb", 10.47e9, 4),
        24: ("sdxl_24gb", 10.47e9, 4),
        80: ("sdxl_full", 76.7e9, 4),
    }
    for gigabytes, (name, peak, micro_batch) in expected.items():
        choice = choose(gigabytes)
        assert choice is not None and (choice.name, choice.micro_batch_size) == (name, micro_batch)
        assert choice.peak_bytes == pytest.approx(peak, rel=0.01)
        assert choice.peak_bytes <= 0.92 * compute_usable_bytes(gigabytes)
        if gigabytes == 24:
            assert choice.describe() == "sdxl_24gb, 10.5 GB, micro batch 4, because sdxl_full needs 58 GB"
    assert choose(4) is None
    shared = choose(48, ranks=8)  # ZeRO divides masters and moments among the ranks
    assert shared is not None and shared.name == "sdxl_full" and not shared.too_large


def test_the_doctor_names_the_preset_with_the_reason() -> None:
    """Here, because measuring the presets takes seconds, once a process."""
    [finding] = examine_presets(1, [24 * 10**9])
    assert finding.is_ok and finding.name == "preset"
    assert finding.detail == "this card: sdxl_24gb, 10.5 GB, micro batch 4, because sdxl_full needs 58 GB"
    [finding] = examine_presets(1, [4 * 10**9])
    assert str(finding) == "note   preset: none fits this card of 4 GB"
    assert list(examine_presets(1, [])) == []
