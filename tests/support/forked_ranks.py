"""Start ranks from a process that has imported the heavy libraries already.

Importing torch, diffusers, transformers and DeepSpeed costs a rank 8 s of CPU, and the suite starts dozens of ranks. A
fork server imports them once for all pytest workers. It serves ranks alone: workers of loaders need one with other
modules, which some tests stop. A forked rank has its own arguments, environment, process group and output, and runs the
program's file as `__main__`.
"""

import atexit
import hashlib
import json
import os
import pickle
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from multiprocessing import connection, forkserver, popen_forkserver, resource_tracker
from multiprocessing.context import ForkServerProcess
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock
from rank_port import find_rank_port

if TYPE_CHECKING:  # the rank server imports it for all
    from sdxl_trainer.cache.models.source import ModelSource
    from sdxl_trainer.configs.schema import Config
    from sdxl_trainer.data.images.bucket import Size
    from sdxl_trainer.train.estimates.networks import NetworkSizes

# What a rank imports sooner or later. The last one keeps garbage collection away from all of it.
PRELOADED = [
    *("torch", "deepspeed", "diffusers", "transformers", "sdxl_trainer.train.run.job", "sdxl_trainer.cache.job"),
    *("diffusers.models.unets.unet_2d_condition", "diffusers.models.autoencoders.autoencoder_kl"),
    *("diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl", "transformers.models.clip.modeling_clip"),
    "sdxl_trainer.data.loading.preload",
]
GRACE_SECONDS = 30.0  # as torchrun: for the other ranks after one has failed
REPORT_VARIABLE = "TEST_WRITES_REPORT"  # set for runs whose report page a test reads
PLACE_VARIABLE = "TEST_RANK_SERVER"  # names a file that leads to the server, which tests/conftest.py chooses

# Settings on which the sizes of a run's networks depend, besides the sizes of generated images.
MEASURED = {
    **{"model": True, "lora": True, "objective": True, "data": {"max_tokens"}},
    "optim": {"text_encoder_lr", "text_encoder_2_lr", "block_lrs", "groups"},
    "engine": {"precision", "channels_last", "attention"},
}


class RankServer(forkserver.ForkServer):
    """Started by the first process of the session that needs it; the others find it by a file.

    It ends with the last of them: each holds the writing end of a pipe open, as multiprocessing arranges it for the
    children of one process.
    """

    def ensure_running(self) -> None:
        """Start the server, or join that of another worker."""
        if self._forkserver_alive_fd is not None:
            if os.path.exists(self._forkserver_address):
                return
            os.close(self._forkserver_alive_fd)  # the worker that started it has ended, and its address with it
            self._forkserver_alive_fd = self._forkserver_pid = None
        place = os.environ.get(PLACE_VARIABLE)
        with FileLock(f"{place}.lock") if place else nullcontext():
            if not (place and self._join(Path(place))):
                super().ensure_running()
                found = {"address": self._forkserver_address, "process": os.getpid(), "pipe": self._forkserver_alive_fd}
                if place:
                    Path(place).write_text(json.dumps(found))

    def _join(self, place: Path) -> bool:
        try:
            found = json.loads(place.read_text())
            pipe = os.open(f"/proc/{found['process']}/fd/{found['pipe']}", os.O_WRONLY)
        except OSError:
            return False
        if not os.path.exists(found["address"]):
            os.close(pipe)
            return False
        resource_tracker.ensure_running()
        self._forkserver_alive_fd, self._forkserver_address = pipe, found["address"]
        return True


SERVER = RankServer()


class RankProcess(ForkServerProcess):
    """A process that `SERVER` forks."""

    @staticmethod
    def _Popen(process_obj: ForkServerProcess) -> popen_forkserver.Popen:
        default = forkserver.connect_to_new_process
        forkserver.connect_to_new_process = SERVER.connect_to_new_process
        try:
            return popen_forkserver.Popen(process_obj)
        finally:
            forkserver.connect_to_new_process = default


def call_each(processes: list[BaseProcess], method: str) -> None:
    """Call a method of each process: `kill` or `terminate`."""
    for process in processes:
        getattr(process, method)()


def start_forked(
    program: Path,
    words: Sequence[object],
    environment: dict[str, str],
    output: str | Path,
    ranks: int = 1,
    errors: str | Path | None = None,
) -> list[BaseProcess]:
    """Start the ranks of a program.

    Args:
        output: what they write to, a file or the name of a terminal.
        errors: what their standard error is written to, if not to `output` too.
    """
    SERVER.set_forkserver_preload(PRELOADED)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_rank_port()), "WORLD_SIZE": str(ranks)}
    processes: list[BaseProcess] = []
    for rank in range(ranks):
        own = {**place, "RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        places = [str(output), str(errors or output)]
        words_of_rank = (str(program), [str(word) for word in words], {**environment, **own}, places)
        processes.append(RankProcess(target=run_rank, args=words_of_rank))
        processes[-1].start()
    return processes


def run_forked(
    program: Path, words: Sequence[object], ranks: int, environment: dict[str, str], timeout: float
) -> tuple[int, str]:
    """Run `program` on `ranks` ranks; return (status of the first rank that failed, else 0; printed text).

    After a failure, and after `timeout` seconds, the remaining ranks get SIGTERM, and SIGKILL `GRACE_SECONDS` later.
    """
    with tempfile.NamedTemporaryFile("rb") as printed:
        processes = start_forked(program, words, environment, printed.name, ranks)
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


def run_rank(program: str, words: list[str], environment: dict[str, str], places: list[str]) -> None:
    """Run a program's file in this process, as `python program words > places[0] 2> places[1]` would."""
    os.setsid()
    for number, place in enumerate(places, 1):
        os.dup2(os.open(place, os.O_RDWR | os.O_APPEND), number)  # a terminal becomes that of the new session
    coding = environment.get("PYTHONIOENCODING", "utf-8")
    sys.stdout = open(1, "w", 1 if os.isatty(1) else -1, coding, closefd=False)
    sys.stderr = open(2, "w", 1, coding, "backslashreplace", closefd=False)
    if os.isatty(1):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    os.environ.clear()
    os.environ.update(environment)
    atexit._clear()  # what libraries of the server have registered
    # Workers of this rank's loader come from a fork server of its own.
    forkserver._forkserver.__init__()  # pyright: ignore
    if REPORT_VARIABLE not in environment:
        leave_out_report()
    if PLACE_VARIABLE in environment:
        share_sizes(Path(environment[PLACE_VARIABLE]).parent)
    sys.argv, sys.path[0] = [program, *words], str(Path(program).parent)
    try:
        runpy.run_path(program, run_name="__main__")
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - what Python does with an error that ends a program
        sys.excepthook(type(error), error, error.__traceback__)
        atexit._run_exitfuncs()
        sys.stderr.flush()
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        os._exit(1)


def leave_out_report() -> None:
    """Let this run start no program that writes its report page: it costs 3 s of CPU, and few tests read it."""
    from sdxl_trainer.train.report.report_process import ReportProcess

    ReportProcess._start = lambda self, *options: None


def share_sizes(folder: Path) -> None:
    """Let all ranks of a session measure networks of equal settings once: it is half of the CPU time of a short run."""
    from sdxl_trainer.train.run import memory_plan
    from sdxl_trainer.train.sampling.prompts import load_prompts

    measure = memory_plan.measure_networks

    def look_up(config: "Config", source: "ModelSource", bucket: "Size") -> "NetworkSizes":
        settings = config.model_dump_json(include=MEASURED)
        prompts = {(prompt.width_px, prompt.height_px) for prompt in load_prompts(config.sample, config.objective)[0]}
        key = hashlib.sha256(repr((settings, sorted(prompts), source, bucket)).encode()).hexdigest()
        file = folder / f"sizes-{key}"
        with FileLock(f"{file}.lock"):
            if not file.exists():
                file.write_bytes(pickle.dumps(measure(config, source, bucket)))
        return pickle.loads(file.read_bytes())

    memory_plan.measure_networks = look_up


def stand_in(program: str, words: list[str]) -> int:
    """Be the rank that a launcher has started: fork the real one, hand signals on to it, and end as it does."""
    output, errors = (f"/proc/{os.getpid()}/fd/{number}" for number in (1, 2))
    [process] = start_forked(Path(program), words, dict(os.environ), output, errors=errors)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda number, _: os.kill(process.pid or 0, number))
    process.join()
    status = process.exitcode or 0
    if status < 0:
        if status != -signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


if __name__ == "__main__":  # forked_ranks.py PROGRAM [WORD...]
    import forked_ranks

    sys.exit(forked_ranks.stand_in(sys.argv[1], sys.argv[2:]))
