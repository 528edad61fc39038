"""Trains: `torchrun --nproc_per_node=4 train/main.py --cfg x.yaml`."""

import os
import sys
from pathlib import Path


def check_checkout() -> None:
    """Stop with the cure if a stale install, not this checkout, is what Python imports as sdxl_trainer."""
    try:
        import sdxl_trainer.train as package
    except ImportError:
        sys.exit("sdxl_trainer is not installed; run: pip install -e . (in the checkout)")
    here = Path(__file__).resolve().parent
    if package.__file__ is None or Path(package.__file__).resolve().parent != here:
        sys.exit(
            f"Python imports sdxl_trainer from {package.__file__}, not from {here};\n"
            f"run: pip uninstall -y sdxl-trainer && pip install -e {here.parent}"
        )


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, train, return the exit status (0 done, 1 failed, 2 wrong input)."""
    check_checkout()
    from sdxl_trainer.launch.program import build_parser, run_program

    options = build_parser(main.__doc__ or "").parse_args(arguments)

    def work() -> None:
        from sdxl_trainer.configs.load import load_config
        from sdxl_trainer.train.job import run_training

        config, problems = load_config(options.cfg, options.overrides)
        run_training(config, problems, dry_run=options.dry_run)

    return run_program(work)


if __name__ == "__main__":
    status = main()
    if status:  # torch's threads may abort an interpreter that ends early, and the status would be lost
        sys.stderr.flush()
        os._exit(status)
