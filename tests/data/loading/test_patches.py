"""A killed worker ends the iterator, also if it was sending a batch."""

import subprocess
import sys
from pathlib import Path

# The workers send more than a pipe holds, so that each is in the middle of a batch while nobody reads.
PROGRAM = """
import os, signal, sys, time
import numpy as np
import torch
from sdxl_trainer.data.loading.patches import fail_with_workers

class Large(torch.utils.data.Dataset):
    def __len__(self):
        return 1000

    def __getitem__(self, number):
        return bytes(300_000)

if __name__ == "__main__":
    loader = torch.utils.data.DataLoader(Large(), batch_size=None, num_workers=2, multiprocessing_context="forkserver")
    batches = iter(loader)
    fail_with_workers(batches)
    assert len(next(batches)) == len(next(batches)) == 300_000
    time.sleep(0.5)
    os.kill(batches._workers[0].pid, signal.SIGKILL)
    try:
        for _ in batches:
            pass
    except RuntimeError as error:
        print(error)
    os._exit(0)
"""


def test_a_worker_that_is_killed_while_it_sends_a_batch_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    done = subprocess.run([sys.executable, str(tmp_path / "program.py")], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("DataLoader worker (pid") and "unexpectedly" in done.stdout, done.stderr
