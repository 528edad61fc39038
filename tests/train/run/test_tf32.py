"""TF32 is off unless the settings allow it, whatever PyTorch's defaults are."""

from pathlib import Path

import pytest
from programs import run_program

PROGRAM = """
import sys
from pathlib import Path
import torch
from sdxl_trainer.configs.load import load_config
from sdxl_trainer.train.run.job import set_up

if __name__ == "__main__":
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
    printed = run_program(tmp_path / "program.py", *words)
    assert f"flags {allowed} {allowed}" in printed
