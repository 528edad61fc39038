"""Uses of undocumented parts of torch's DataLoader.

The entry names the version it was written for, the reason, and why the public functions do not suffice.
tests/data/loading/test_patches.py fails when the parts change their shape.
"""

import threading
from multiprocessing.connection import wait
from typing import Any


def fail_with_workers(batches: Any) -> None:
    """Let an iterator of a DataLoader raise when one of its workers is killed, instead of waiting for ever.

    Written for torch 2.13.0. A worker that is killed while it sends a batch leaves a part of it in the pipe. The reader
    waits for the rest. It holds the other end of the pipe too, and so do the other workers, so the pipe never ends.
    `timeout` of DataLoader does not apply while a batch is received. With pinned memory another thread reads, and the
    iterator notices dead workers by itself.
    """
    batches._worker_result_queue._writer.close()
    threading.Thread(target=_end_together, args=(list(batches._workers),), name="worker-watch", daemon=True).start()


def _end_together(workers: list[Any]) -> None:
    """Wait until one of the workers has ended, and end the others, which may hold its end of the pipe or its lock."""
    wait([worker.sentinel for worker in workers])
    for worker in workers:
        worker.kill()
