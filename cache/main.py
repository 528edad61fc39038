"""Fill the latent cache: `bash launch/cache.sh --cfg x.yaml`."""

import sys
from pathlib import Path

try:
    from sdxl_trainer.launch.program import announce, build_parser, end_program, require_checkout, run_program
except ImportError:
    activate = Path(__file__).resolve().parent.parent / ".venv" / "bin" / "activate"
    cure = f"source {activate}" if activate.is_file() else "pip install -e . (in the checkout)"
    sys.exit(f"sdxl_trainer is not installed here; run: {cure}")


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, run the job, return the exit status (0 done, 1 failed, 2 wrong input)."""
    require_checkout(__file__)
    parser = build_parser("Fill the latent cache, or examine and change one, with the settings of a YAML file.")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--verify", action="store_true", help="check every byte against the manifest")
    modes.add_argument("--repair", action="store_true", help="verify, then encode bad and stale items again")
    modes.add_argument("--pack", action="store_true", help="move npz files into shards, without the VAE")
    modes.add_argument("--unpack", action="store_true", help="move shards into npz files, without the VAE")
    modes.add_argument("--adopt", action="store_true", help="list latents of other programs in the manifest")
    options = parser.parse_intermixed_args(arguments)

    def work() -> None:
        announce("loading PyTorch and the libraries")
        from sdxl_trainer.cache.job import run_job
        from sdxl_trainer.cache.upkeep.commands import COMMANDS
        from sdxl_trainer.configs.load import load_config

        config, problems = load_config(options.cfg, options.overrides)
        command = next((name for name in COMMANDS if getattr(options, name)), None)
        if command is None:
            run_job(config, problems, dry_run=options.dry_run, repair=options.repair)
        else:
            COMMANDS[command](config, problems)

    return run_program(work)


if __name__ == "__main__":
    end_program(main())
