"""Flags of a training process: TF32 as the settings say, and NCCL does not end it before its state is saved."""

import os
from pathlib import Path

import pytest
from programs import run_program

from sdxl_trainer.train.run.job import NCCL_VARIABLES, keep_processes_of_failed_ranks

PROGRAM = """
import os, sys
from pathlib import Path
import torch
from torch.distributed import init_process_group
from sdxl_trainer.configs.load import load_config
from sdxl_trainer.train.run.job import NCCL_VARIABLES, set_up

def join(*arguments, **named):
    print("errors of NCCL", *(os.environ[name] for name in NCCL_VARIABLES))
    return init_process_group(*arguments, **named)

if __name__ == "__main__":
    torch.distributed.init_process_group = join
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    set_up(*load_config(Path(sys.argv[1]), sys.argv[2:]))
    print("flags", torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
"""


@pytest.mark.parametrize("allowed", [False, True])
def test_training_uses_tf32_only_where_the_settings_allow_it(
    cached_folder: Path, tmp_path: Path, allowed: bool
) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    words = [cached_folder / "tiny.yaml", f"run.dir={tmp_path}", f"engine.tf32={allowed}"]
    printed = run_program(tmp_path / "program.py", *words, restarts=0 if allowed else None)
    assert f"flags {allowed} {allowed}" in printed
    assert "errors of NCCL 0 0\n" in printed, "the process would end when the connection of another rank is closed"


@pytest.mark.parametrize(
    ("given", "by_torchrun", "expected"), [(None, False, "0"), ("1", True, "0"), ("1", False, "1"), ("3", True, "3")]
)
def test_variables_of_the_user_are_kept(
    monkeypatch: pytest.MonkeyPatch, given: str | None, by_torchrun: bool, expected: str
) -> None:
    for name in ("TORCHELASTIC_RUN_ID", *NCCL_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    if by_torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    if given:
        monkeypatch.setenv(NCCL_VARIABLES[0], given)
    keep_processes_of_failed_ranks()
    assert [os.environ[name] for name in NCCL_VARIABLES] == [expected, "0"]
    for name in NCCL_VARIABLES:
        monkeypatch.delenv(name)
