"""Runs with gradient release: equal on any engine and number of ranks, also after a rank died in an update."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
from programs import read_losses, run_program

STEPS = 6
OWN_OPTIMIZER = '''
import os, signal
import torch

class Dying(torch.optim.AdamW):
    """AdamW that kills its process in the given number of updates of single weights."""

    def step(self, closure=None):
        Dying.calls = getattr(Dying, "calls", 0) + 1
        if os.environ.get("RANK") == "1" and Dying.calls == int(os.environ.get("DIE_AT", 0)):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(closure)
'''


@pytest.fixture
def train(cached_folder: Path, tmp_path: Path):
    own = tmp_path / "own.py"
    own.write_text(OWN_OPTIMIZER)
    settings = {
        "run.dir": tmp_path,
        "optim.name": f"{own}:Dying",
        "optim.max_grad_norm": 0,
        "engine.precision": "fp32",
        "train.max_steps": STEPS,
        "checkpoint.every_steps": 2,
        "sample.prompts": [],
    }

    def run(name: str, ranks: int = 1, expect: int = 0, **changes: object) -> str:
        changed = settings | {"run.name": name} | {key.replace("__", "."): value for key, value in changes.items()}
        words = [f"{key}={value}" for key, value in changed.items()]
        return run_program("train/main.py", "--cfg", cached_folder / "tiny.yaml", *words, ranks=ranks, expect=expect)

    return run


def test_a_run_is_the_same_on_any_engine_and_ranks_and_survives_a_death(
    train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train("plain", train__micro_batch_size=4)
    release = {"engine__gradient_release": "true"}
    printed = train("released", train__micro_batch_size=4, **release)
    assert "engine.zero_stage: 0, chosen because engine.gradient_release shards nothing" in printed
    plain = read_losses(tmp_path / "plain")
    assert read_losses(tmp_path / "released") == plain and len(plain) == STEPS
    num_weights = 618  # of the tiny U-Net, each updated on its own
    monkeypatch.setenv("DIE_AT", str(2 * num_weights + 300))
    printed = train("died", ranks=2, expect=-signal.SIGKILL, train__micro_batch_size=2, **release)
    monkeypatch.delenv("DIE_AT")
    printed = train("died", ranks=2, train__micro_batch_size=2, **release)
    assert "resumed at step 2" in printed
    np.testing.assert_allclose(read_losses(tmp_path / "died"), plain, rtol=0, atol=1e-5)
    offload = {"engine__offload_blocks": 30}
    printed = train("offloaded", ranks=2, train__micro_batch_size=2, **release, **offload)
    assert "full, which engine.offload_blocks needs" in printed
    assert read_losses(tmp_path / "offloaded") == read_losses(tmp_path / "died")
    # The ordinary engine continues a released run, and the other way round.
    (checkpoint,) = (tmp_path / "released" / "checkpoints").glob("step-*4")
    assert checkpoint.is_dir() and os.listdir(checkpoint / "state")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"optim__max_grad_norm": 1, "train__micro_batch_size": 4}, "optim.clipping: parameter, which limits"),
        ({"train__micro_batch_size": 4, "engine__offload_blocks": 999}, "set it to at most"),
        ({"train__micro_batch_size": 2}, "leads to 2 micro steps a step, which engine.gradient_release cannot add up"),
    ],
)
def test_contradictions_are_named_before_anything_is_read(train, changes: dict, expected: str) -> None:
    printed = train("refused", expect=2, engine__gradient_release="true", **changes)
    assert expected in printed and "loading the networks" not in printed
