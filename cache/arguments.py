"""Command line of the cache job. Imports no library."""

import argparse
from collections.abc import Sequence
from typing import Any

from sdxl_trainer.launch.program import build_parser

COPY_OPTIONS = ("where", "rekey", "form", "part")

CACHE = (
    "Encode your images into the latents that training reads. Run it again after you have added images: only what is "
    "missing or has changed is encoded. Ctrl-C loses nothing. Ranks: one per GPU, or NPROC=4."
)
ADOPT = (
    "List the latents that kohya's scripts or another program have cached, so that they need not be encoded again. "
    "Latents that do not fit the settings are named and left out. Run the cache job afterwards for what is missing."
)
EXAMPLES = ("%(prog)s --cfg my.yaml --dry-run", "%(prog)s --cfg my.yaml", "%(prog)s --cfg my.yaml --verify")
DRY_RUN = "check settings and images, print how much is left to encode and how long it takes, then stop"
EVERY_BYTE = "with --verify or --repair of a cache on a store: copy each shard and check its every byte"
MODES = {
    "verify": "check every byte against the manifest",
    "repair": "verify, then encode bad and stale items again",
    "pack": "move the latents of npz files into shards; loads no VAE",
    "unpack": "move the latents of shards into npz files, one for each image; loads no VAE",
    "compact": "store the manifest as columns, which take a fifth of its lines; for millions of images",
    "adopt": "list latents of other programs in the manifest",
}


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    """Parse a command line; `command` is the name of the command for a cache that exists, or None to fill it.

    Exits with status 2 if an argument is wrong.
    """
    adopts = "--adopt" in words
    if adopts:
        parser = build_parser(ADOPT, "bash launch/cache.sh --adopt", EXAMPLES[1:2], dry_run="")
        parser.usage = "%(prog)s --cfg FILE [key.sub=value ...]"
    else:
        parser = build_parser(CACHE, "bash launch/cache.sh", EXAMPLES, DRY_RUN)
    modes = parser.add_mutually_exclusive_group()
    for mode, text in MODES.items():
        modes.add_argument(f"--{mode}", action="store_true", help=argparse.SUPPRESS if adopts else text)
    if not adopts:
        add_copy_options(parser, modes)
        parser.add_argument("--every-byte", action="store_true", help=EVERY_BYTE)
    options = parser.parse_intermixed_args(words)
    if getattr(options, "every_byte", False) and not (options.verify or options.repair):
        parser.error("--every-byte goes with --verify or --repair")
    options.command = next((mode for mode in MODES if mode != "repair" and getattr(options, mode)), None)
    if not adopts:
        choose_copy(parser, options)
    if options.command and options.dry_run:
        parser.error(f"--{options.command} has no --dry-run")
    return options


def add_copy_options(parser: argparse.ArgumentParser, modes: Any) -> None:
    """Add the options that copy a cache."""
    modes.add_argument(
        "--copy-to",
        metavar="TARGET",
        help="copy the cache to a folder or a URL, check it there; continues if interrupted",
    )
    parser.add_argument(
        "--where", metavar="QUERY", help="copy those items alone: `aesthetic_score >= 5 and tags contains cat`"
    )
    parser.add_argument("--part", metavar="I/N", help="copy one of N parts of about equal size, such as 1/4")
    parser.add_argument(
        "--as",
        dest="form",
        choices=("npz", "kohya", "shards"),
        help="form of the copy: npz files, npz files with the names of kohya's scripts, or shards (as it is)",
    )
    parser.add_argument(
        "--rekey",
        nargs=2,
        metavar=("PATTERN", "NEW"),
        help="replace a regular expression in the keys of the copy, such as '^' 'site_a_'",
    )


def choose_copy(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Make the copy the command if it is asked for; exit with status 2 if only its options are."""
    if options.copy_to:
        options.command = "copy-to"
        return
    for name, option in zip(COPY_OPTIONS, ("--where", "--rekey", "--as", "--part"), strict=True):
        if getattr(options, name):
            parser.error(f"{option} needs --copy-to")
