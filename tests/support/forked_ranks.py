"""Start ranks from a process that has imported the heavy libraries already.

Importing torch, diffusers, transformers and DeepSpeed costs a rank 8 s of CPU, and the suite starts dozens of ranks. A
fork server of `multiprocessing` imports them once for each pytest worker. A forked rank has its own arguments,
environment, process group and output, and runs the program's file as `__main__`.
"""

import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import time
from multiprocessing import connection, forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

from rank_port import find_rank_port

PRELOADED = [
    *("torch", "deepspeed", "diffusers", "transformers", "sdxl_trainer.train.run.job", "sdxl_trainer.cache.job"),
    *("diffusers.models.unets.unet_2d_condition", "diffusers.models.autoencoders.autoencoder_kl"),
    *("diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl", "transformers.models.clip.modeling_clip"),
]
GRACE_SECONDS = 30.0  # as torchrun: for the other ranks after one has failed


def call_each(processes: list[BaseProcess], method: str) -> None:
    """Call a method of each process: `kill` or `terminate`."""
    for process in processes:
        getattr(process, method)()


def run_forked(
    program: Path, words: list[str], ranks: int, environment: dict[str, str], timeout: float
) -> tuple[int, str]:
    """Run `program` on `ranks` ranks; return (status of the first rank that failed, else 0; printed text).

    After a failure, and after `timeout` seconds, the remaining ranks get SIGTERM, and SIGKILL `GRACE_SECONDS` later.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_rank_port()), "WORLD_SIZE": str(ranks)}
    with tempfile.NamedTemporaryFile("rb") as printed:
        processes = []
        for rank in range(ranks):
            own = {**place, "RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            words_of_rank = (str(program), words, {**environment, **own}, printed.name)
            processes.append(context.Process(target=run_rank, args=words_of_rank))
            processes[-1].start()
        status, deadline, stopping = 0, time.monotonic() + timeout, False
        while running := [process for process in processes if process.exitcode is None]:
            connection.wait([process.sentinel for process in running], max(deadline - time.monotonic(), 0))
            failed = [process.exitcode for process in processes if process.exitcode]
            late = time.monotonic() >= deadline
            status = status or (failed[0] if failed else -signal.SIGKILL if late else 0)
            if stopping and late:
                call_each(running, "kill")
            elif status and not stopping:
                stopping, deadline = True, time.monotonic() + GRACE_SECONDS
                call_each(running, "terminate")
        return status, printed.read().decode(errors="replace")


def run_rank(program: str, words: list[str], environment: dict[str, str], printed: str) -> None:
    """Run a program's file in this process, as `python program words` would."""
    os.setsid()
    output = os.open(printed, os.O_WRONLY | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    os.environ.clear()
    os.environ.update(environment)
    # Workers of this rank's loader come from a fork server of its own.
    forkserver._forkserver.__init__()  # pyright: ignore
    sys.argv, sys.path[0] = [program, *words], str(Path(program).parent)
    runpy.run_path(program, run_name="__main__")
