"""Fill the latent cache: `bash launch/cache.sh --cfg x.yaml`."""

import sys
from pathlib import Path

try:
    from sdxl_trainer.cache.arguments import parse_arguments
    from sdxl_trainer.launch.program import announce, end_program, require_checkout, run_program
except ImportError:
    activate = Path(__file__).resolve().parent.parent / ".venv" / "bin" / "activate"
    cure = f"source {activate}" if activate.is_file() else "pip install -e . (in the checkout)"
    sys.exit(f"sdxl_trainer is not installed here; run: {cure}")


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, run the job, return the exit status (0 done, 1 failed, 2 wrong input)."""
    require_checkout(__file__)
    options = parse_arguments(sys.argv[1:] if arguments is None else arguments)

    def work() -> None:
        announce("loading PyTorch and the libraries")
        from sdxl_trainer.cache.job import run_job
        from sdxl_trainer.cache.upkeep.commands import COMMANDS
        from sdxl_trainer.cache.upkeep.copy_command import copy_cache
        from sdxl_trainer.cache.upkeep.copy_request import CopyRequest
        from sdxl_trainer.configs.load import load_config

        config, problems = load_config(options.cfg, options.overrides)
        if options.command == "copy-to":
            rekey = tuple(options.rekey) if options.rekey else None
            request = CopyRequest(options.copy_to, options.where, rekey, options.form, options.part)
            copy_cache(config, problems, request)
        elif options.command:
            further = {"every_byte": True} if options.command == "verify" and options.every_byte else {}
            COMMANDS[options.command](config, problems, **further)
        else:
            every_byte = options.repair and options.every_byte
            run_job(config, problems, dry_run=options.dry_run, repair=options.repair, every_byte=every_byte)

    return run_program(work)


if __name__ == "__main__":
    end_program(main())
