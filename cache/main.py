"""Fills the latent cache: `bash launch/cache.sh --cfg x.yaml`."""

import sys
from pathlib import Path

try:
    from sdxl_trainer.launch.program import build_parser, end_program, require_checkout, run_program
except ImportError:
    activate = Path(__file__).resolve().parent.parent / ".venv" / "bin" / "activate"
    cure = f"source {activate}" if activate.is_file() else "pip install -e . (in the checkout)"
    sys.exit(f"sdxl_trainer is not installed here; run: {cure}")


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, run the job, return the exit status (0 done, 1 failed, 2 wrong input)."""
    require_checkout(__file__)
    parser = build_parser(main.__doc__ or "")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--verify", action="store_true", help="read every byte back against the manifest")
    modes.add_argument("--repair", action="store_true", help="verify, then encode again just what is bad or stale")
    modes.add_argument("--pack", action="store_true", help="turn npz files into shards, without the VAE")
    modes.add_argument("--unpack", action="store_true", help="turn shards into npz files, without the VAE")
    modes.add_argument("--adopt", action="store_true", help="list latents that other programs wrote in a manifest")
    options = parser.parse_intermixed_args(arguments)

    def work() -> None:
        from sdxl_trainer.cache.job import run_job
        from sdxl_trainer.cache.upkeep.audit import AUDITS
        from sdxl_trainer.configs.load import load_config

        config, problems = load_config(options.cfg, options.overrides)
        audit = next((name for name in AUDITS if getattr(options, name)), None)
        if audit is None:
            run_job(config, problems, dry_run=options.dry_run, repair=options.repair)
        else:
            AUDITS[audit](config, problems)

    return run_program(work)


if __name__ == "__main__":
    end_program(main())
