"""Run by tests: what would be several starts of the programs, in one process, so that imports are paid for once.

    python tests/support/several_runs.py cache SETTINGS [WORD...] + train SETTINGS [--dry-run] [WORD...] + train ...

The process group stays as it is from one training to the next, because DeepSpeed remembers it; so caching comes first.
"""

import sys
from pathlib import Path

from cache_samples import run_job

from sdxl_trainer.configs.load import load_config
from sdxl_trainer.launch.distributed import close_ranks
from sdxl_trainer.launch.program import end_program, run_program
from sdxl_trainer.train.run.build import build_run
from sdxl_trainer.train.run.job import build_emergency_saver, finish, set_up, write_settings
from sdxl_trainer.train.run.loop import fit
from sdxl_trainer.train.run.summary import show_start


def train(settings: Path, words: list[str]) -> None:
    """What train/main.py does with these words, up to where it leaves the process group."""
    config, problems = load_config(settings, [word for word in words if word != "--dry-run"])
    config, index, ranks = set_up(config, problems)
    run, batches = build_run(config, index, ranks)
    show_start(run)
    if "--dry-run" not in words:
        write_settings(config, ranks)
        with build_emergency_saver(run):
            fit(run, batches)
            finish(run)


def start(program: str, settings: Path, words: list[str]) -> int:
    """The exit status of one of the programs."""
    return run_job(settings, *words) if program == "cache" else run_program(lambda: train(settings, words))


def main() -> int:
    """Do one after the other; the first status that is not 0."""
    for part in "\n".join(sys.argv[1:]).split("\n+\n"):
        program, settings, *words = part.split("\n")
        status = start(program, Path(settings), words)
        if status:
            return status
    close_ranks()
    return 0


if __name__ == "__main__":
    end_program(main())
