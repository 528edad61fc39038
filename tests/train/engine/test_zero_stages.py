"""Losses in every ZeRO stage: a short form of tests/campaigns/zero_stages.py."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
from campaigns.zero_stages import STAGES, compare


@pytest.mark.long
def test_losses_are_equal_in_every_stage_and_frozen_weights_stay(cached_folder: Path) -> None:
    losses, wrong = compare(cached_folder / "tiny.yaml", (2,), 3, ["train.global_batch_size=2"])
    assert losses.keys() == set(product((2,), STAGES)) and wrong == []
    assert len({*losses[2, 0]}) == 3
    for stage in STAGES[1:]:
        np.testing.assert_allclose(losses[2, stage], losses[2, 0], rtol=0, atol=1e-5, err_msg=f"ZeRO-{stage}")
