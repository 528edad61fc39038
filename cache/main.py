"""Fill the latent cache: `bash launch/cache.sh --cfg x.yaml`."""

import argparse
import sys
from pathlib import Path

try:
    from sdxl_trainer.launch.program import announce, build_parser, end_program, require_checkout, run_program
except ImportError:
    activate = Path(__file__).resolve().parent.parent / ".venv" / "bin" / "activate"
    cure = f"source {activate}" if activate.is_file() else "pip install -e . (in the checkout)"
    sys.exit(f"sdxl_trainer is not installed here; run: {cure}")

CACHE = (
    "Encode your images into the latents that training reads. Run it again after you have added images: only what is "
    "missing or has changed is encoded. Ctrl-C loses nothing. Ranks: one per GPU, or NPROC=4."
)
ADOPT = (
    "List the latents that kohya's scripts or another program have cached, so that they need not be encoded again. "
    "Latents that do not fit the settings are named and left out. Run the cache job afterwards for what is missing."
)
MODES = {
    "verify": "check every byte against the manifest",
    "repair": "verify, then encode bad and stale items again",
    "pack": "move npz files into shards, without the VAE",
    "unpack": "move shards into npz files, without the VAE",
    "adopt": "list latents of other programs in the manifest",
}


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, run the job, return the exit status (0 done, 1 failed, 2 wrong input)."""
    require_checkout(__file__)
    adopts = "--adopt" in (sys.argv if arguments is None else arguments)
    prog = "bash launch/cache.sh --adopt" if adopts else "bash launch/cache.sh"
    examples = [f"%(prog)s --cfg my.yaml{option}" for option in ([""] if adopts else [" --dry-run", "", " --verify"])]
    parser = build_parser(ADOPT if adopts else CACHE, prog, examples)
    modes = parser.add_mutually_exclusive_group()
    for mode, text in MODES.items():
        modes.add_argument(f"--{mode}", action="store_true", help=argparse.SUPPRESS if adopts else text)
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
