"""Train: `torchrun --nproc_per_node=4 train/main.py --cfg x.yaml`."""

import sys
from pathlib import Path

try:
    from sdxl_trainer.launch.program import announce, build_parser, end_program, require_checkout, run_program
except ImportError:
    activate = Path(__file__).resolve().parent.parent / ".venv" / "bin" / "activate"
    cure = f"source {activate}" if activate.is_file() else "pip install -e . (in the checkout)"
    sys.exit(f"sdxl_trainer is not installed here; run: {cure}")

DESCRIPTION = (
    "Train SDXL on the latents that the cache job has written. The same command resumes from the newest checkpoint. "
    "Ctrl-C saves and stops. Ranks: one per GPU, or NPROC=4."
)
EXAMPLES = (
    "%(prog)s --cfg my.yaml --dry-run",
    "%(prog)s --cfg my.yaml",
    "%(prog)s --cfg my.yaml train.max_steps=20000",
)


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, train, and return the exit status (0 done, 1 failed, 2 wrong input)."""
    require_checkout(__file__)
    options = build_parser(DESCRIPTION, "bash launch/train.sh", EXAMPLES).parse_intermixed_args(arguments)

    def work() -> None:
        announce("loading PyTorch and the libraries")
        from sdxl_trainer.configs.load import load_config
        from sdxl_trainer.train.run.job import run_training

        config, problems = load_config(options.cfg, options.overrides)
        run_training(config, problems, dry_run=options.dry_run)

    return run_program(work)


if __name__ == "__main__":
    end_program(main())
