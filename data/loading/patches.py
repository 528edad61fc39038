"""Uses of undocumented parts of torch's DataLoader.

The entry names the version it was written for, the reason, and why the public functions do not suffice.
tests/data/loading/test_patches.py fails when the parts change their shape.
"""

import threading
from functools import partial
from multiprocessing.connection import wait
from typing import Any

# The thread looks for the iterator's end every 5 seconds.
PINNING_SECONDS = 10


def fail_with_workers(batches: Any) -> None:
    """Let an iterator of a DataLoader raise when one of its workers is killed, instead of waiting for ever.

    Written for torch 2.13.0. A worker that is killed while it sends a batch leaves a part of it in the pipe. The reader
    waits for the rest. It holds the other end of the pipe too, and so do the other workers, so the pipe never ends.
    `timeout` of DataLoader does not apply while a batch is received. With pinned memory another thread reads, and the
    iterator notices dead workers by itself; `leave_pinning_thread` is for what follows.
    """
    batches._worker_result_queue._writer.close()
    threading.Thread(target=_end_together, args=(list(batches._workers),), name="worker-watch", daemon=True).start()


def leave_pinning_thread(batches: Any) -> None:
    """Let an iterator of a DataLoader end although its thread for pinned memory does not.

    Written for torch 2.13.0. After a worker was killed while it sent a batch, this thread waits for the rest for ever.
    When the iterator is freed, it waits for the thread without a limit, and the process would neither end nor free its
    GPU. The thread is a daemon, so it may be left behind.
    """
    thread = batches._pin_memory_thread
    thread.join = partial(thread.join, PINNING_SECONDS)


def _end_together(workers: list[Any]) -> None:
    """Wait until one of the workers has ended, and end the others, which may hold its end of the pipe or its lock."""
    wait([worker.sentinel for worker in workers])
    for worker in workers:
        worker.kill()
