"""Changes to the behaviour of torch.distributed and DeepSpeed, and uses of their undocumented parts.

Each entry names the versions it was written for, the reason, and why the public functions do not suffice.
tests/launch/test_patches.py fails when the patched code changes its shape.
"""

import sys
import time
from datetime import timedelta
from types import FrameType

import torch.distributed as dist

from sdxl_trainer.launch.signals import REPEAT_SECONDS


def set_default_timeout(timeout: timedelta) -> None:
    """Set the time-out of process groups that are made without one.

    Written for torch 2.13.0 and deepspeed 0.19.8. DeepSpeed makes groups of its own by `new_group` without a time-out,
    so torch's default would apply: 10 minutes with NCCL, whatever `engine.timeout_minutes` says. DeepSpeed's
    `init_distributed(timeout=...)` reaches only the default group.
    """
    dist.distributed_c10d.default_pg_timeout = timeout
    dist.distributed_c10d.default_pg_nccl_timeout = timeout


def destroy_process_groups() -> None:
    """Destroy all process groups, through DeepSpeed if it uses them.

    Written for deepspeed 0.19.8. `deepspeed.comm` caches its groups, and the next engine of this process would use the
    destroyed ones. The module is looked up instead of imported, because importing DeepSpeed takes seconds and the cache
    job does not need it. torch's own function does not clear DeepSpeed's cache.
    """
    comm = sys.modules.get("deepspeed.comm")
    (comm if comm is not None and comm.is_initialized() else dist).destroy_process_group()


def ignore_repeated_signals() -> None:
    """Let torchrun act on a stop signal, and ignore those that follow within REPEAT_SECONDS.

    Written for torch 2.13.0. The launch script forwards a signal that torchrun may have received too. Its handler then
    raises within the shutdown that the first one has begun, and the agent ends the ranks by SIGTERM, which they report
    instead of the user's signal. torchrun's environment variables only choose which signals it handles.
    """
    from torch.distributed.elastic.multiprocessing import api

    handle, acted_on = api._terminate_process_handler, []

    def handle_once(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not acted_on or now - acted_on[0] > REPEAT_SECONDS:
            acted_on.append(now)
            handle(number, frame)

    api._terminate_process_handler = handle_once
