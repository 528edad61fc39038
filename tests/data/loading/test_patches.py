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


# A thread for pinned memory on a CPU, and a worker that ends in the middle of its third batch.
PINNED_PROGRAM = """
import os, signal, sys, time
from multiprocessing.connection import Connection
import torch
from sdxl_trainer.data.loading import patches

def send_half(self, content, write=os.write):
    write(self._handle, content[: len(content) // 2])
    os.kill(os.getpid(), signal.SIGKILL)

class Torn(torch.utils.data.Dataset):
    def __len__(self):
        return 1000

    def __getitem__(self, number):
        if number == 2:
            time.sleep(0.5)  # the batch before is on its way
            Connection._send = send_half
        return bytes(300_000)

if __name__ == "__main__":
    torch.accelerator.is_available = lambda: True
    torch.accelerator.current_accelerator = lambda: torch.device("cpu")
    torch.accelerator.current_device_index = lambda: 0
    torch.accelerator.set_device_index = lambda index: None
    torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.5
    patches.PINNING_SECONDS = 1
    loader = torch.utils.data.DataLoader(
        Torn(), batch_size=None, num_workers=1, pin_memory=True, multiprocessing_context="forkserver"
    )
    batches = iter(loader)
    patches.leave_pinning_thread(batches)
    thread = batches._pin_memory_thread
    try:
        for batch in batches:
            assert len(batch) == 300_000
    except RuntimeError as error:
        print(error)
    del batches
    print("the thread waits" if thread.is_alive() else "the thread has ended", flush=True)
    os._exit(0)
"""


def test_an_iterator_with_pinned_memory_ends_after_a_torn_batch(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PINNED_PROGRAM)
    done = subprocess.run([sys.executable, str(tmp_path / "program.py")], capture_output=True, text=True, timeout=60)
    first, last = done.stdout.splitlines()
    assert first.startswith("DataLoader worker (pid") and "unexpectedly" in first, done.stderr
    assert last == "the thread waits", "the batch was not torn"


def test_a_worker_that_is_killed_while_it_sends_a_batch_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    done = subprocess.run([sys.executable, str(tmp_path / "program.py")], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("DataLoader worker (pid") and "unexpectedly" in done.stdout, done.stderr
