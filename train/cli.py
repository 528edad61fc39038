"""The command line `sdxl-trainer`: one name for all programs, which it starts as processes.

It replaces itself by the program, so signals and exit statuses are the program's own. Programs with ranks are started
by the scripts in launch/, which the package contains. Imports no library, so that its help comes at once.
"""

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from sdxl_trainer import __version__
from sdxl_trainer.configs.language.arguments import TranslatedParser
from sdxl_trainer.configs.language.commands import VARIABLE
from sdxl_trainer.configs.language.translate import join_label, translate, translate_label
from sdxl_trainer.configs.problems import suggest_name
from sdxl_trainer.launch.status import STATUS_DONE, STATUS_WRONG_INPUT

ROOT = Path(__file__).resolve().parent.parent  # the checkout, or the installed package


@dataclass(frozen=True)
class Program:
    """A program of the command line.

    Args:
        text: what it does, in one line.
        start: script in launch/, or module.
        words: arguments that come before the user's.
    """

    text: str
    start: str
    words: tuple[str, ...] = ()


# In the order in which a user needs them.
PROGRAMS = {
    "quickstart": Program("fine-tune a tiny SDXL on new shapes: 4 minutes on a CPU", "demo.sh"),
    "import": Program(
        "convert settings of kohya's scripts or the first sdxl-trainer", "sdxl_trainer.configs.import_config"
    ),
    "settings": Program("print the page of all settings", "sdxl_trainer.configs.document"),
    "doctor": Program("examine machine, settings and data before a run", "doctor.sh"),
    "preview": Program("look at your data: duplicates, broken images, crops, captions", "preview.sh"),
    "adopt": Program("list latents that another program has cached", "cache.sh", ("--adopt",)),
    "cache": Program("encode images into latents, once", "cache.sh"),
    "train": Program("train, or resume", "train.sh"),
    "watch": Program("show runs in your browser while they train", "watch.sh"),
    "report": Program("write the report of a run as one page", "sdxl_trainer.train.report"),
    "validate": Program("validate a model file on the validation set of a run", "sdxl_trainer.train.validate"),
    "compare": Program("compare runs: which setting helps, by how much", "sdxl_trainer.train.compare"),
    "ablate": Program("train a grid of settings, and compare them", "ablate.sh"),
    "quality": Program("measure generated images: FID, KID, CMMD", "quality.sh"),
    "sample": Program("generate the images of a prompt file", "sample.sh"),
    "convert": Program("convert a run or a model file for other programs", "sdxl_trainer.train.convert"),
}
COMPLETION_TEXT = "print a script that completes this command line in your shell"


def main(arguments: Sequence[str] | None = None) -> int:
    """Start the program that the command line names, which then has this process.

    Returns:
        The exit status where no program starts: 0 for help and completion, 2 for wrong input.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = build_parser()
    if not words:
        sys.stderr.write(parser.format_help())
        return STATUS_WRONG_INPUT
    name, *rest = words
    if name == "quickstart":
        build_quickstart_parser().parse_intermixed_args(rest)
    if name in PROGRAMS:
        start_program(name, rest)
    if name == "completion":
        build_completion_parser().parse_args(rest)
        sys.stdout.write(build_completion(read_helps()))
        return STATUS_DONE
    if not name.startswith("-"):
        near = suggest_name(name, [*PROGRAMS, "completion"])
        cure = f"did you mean {near}?" if near else "sdxl-trainer --help lists the commands"
        parser.error(f"{name!r} is not a command; {cure}")
    parser.parse_args(words)
    return STATUS_DONE


def build_parser() -> TranslatedParser:
    """Build the parser of the command line itself, whose help lists the programs."""
    parser = TranslatedParser(
        prog="sdxl-trainer",
        usage="%(prog)s COMMAND [...]",
        description="Fine-tune Stable Diffusion XL, whole or by LoRA adapters, on one GPU or hundreds.",
        examples=["%(prog)s quickstart", "%(prog)s train --cfg my.yaml", "%(prog)s train --help"],
    )
    parser.add_argument("--version", action="version", version=__version__, help="print the version")
    listed = {name: program.text for name, program in PROGRAMS.items()} | {"completion": COMPLETION_TEXT}
    lines = [
        join_label(translate_label("commands"), "").rstrip(),
        *(f"  {name:12}{translate(text)}" for name, text in listed.items()),
    ]
    presets = f"Presets to copy: {ROOT / 'configs'}/sdxl_*.yaml. Ranks: one per GPU, or as many as NPROC says."
    parser.epilog = "\n".join([*lines, "", translate(presets)])
    return parser


def build_completion_parser() -> TranslatedParser:
    """Build the parser of the completion's arguments."""
    parser = TranslatedParser(
        prog="sdxl-trainer completion",
        description="Print a script that completes commands, options and settings in bash and zsh. Source it in "
        ".bashrc or .zshrc.",
        examples=["%(prog)s > ~/.sdxl-trainer-completion; echo 'source ~/.sdxl-trainer-completion' >> ~/.bashrc"],
    )
    return parser


def build_quickstart_parser() -> TranslatedParser:
    """Build the parser of the demo's arguments."""
    parser = TranslatedParser(
        prog="sdxl-trainer quickstart",
        description="Draw images of six shapes, cache their latents, and fine-tune a tiny SDXL that knows four of "
        "them. Everything is written to runs/ in the working directory; a GPU is optional.",
        examples=["%(prog)s", "%(prog)s train.max_steps=600"],
    )
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.sub=value", help="settings of the training")
    return parser


def start_program(name: str, words: Sequence[str]) -> NoReturn:
    """Replace this process by a program; exit with status 2 if bash, which starts ranks, is missing."""
    program = PROGRAMS[name]
    path = os.environ.get("PATH", os.defpath)
    environment = os.environ | {
        VARIABLE: f"sdxl-trainer {name}",
        # The scripts call `python` and take an active environment's: the one that this command belongs to.
        "VIRTUAL_ENV": sys.prefix,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{path}",
        "PYTHONUTF8": os.environ.get("PYTHONUTF8", "1"),
    }
    if program.start.endswith(".sh"):
        command = ["bash", str(ROOT / "launch" / program.start), *program.words, *words]
    else:
        command = [sys.executable, "-m", program.start, *program.words, *words]
    try:
        os.execvpe(command[0], command, environment)
    except FileNotFoundError:
        sys.stderr.write(f"{translate(f'{command[0]} is not installed here, and it starts the ranks: install it')}\n")
        sys.exit(STATUS_WRONG_INPUT)


def read_helps() -> dict[str, str]:
    """Return the help of each command, by its name."""
    helps = {}
    for name in PROGRAMS:
        command = [sys.executable, "-m", "sdxl_trainer.train.cli", name, "--help"]
        helps[name] = subprocess.run(command, capture_output=True, encoding="utf-8").stdout
    return helps


def build_completion(helps: Mapping[str, str]) -> str:
    """Return the source of the completion: commands, their options, and names of settings for those that take them."""
    from sdxl_trainer.configs.load import iterate_keys  # takes time that the other commands do not need

    keys = list(iterate_keys())
    settings = [f"{key}=" for key in keys if not any(other.startswith(f"{key}.") for other in keys)]
    words = {"commands": [*helps, "completion"]}
    for name, text in helps.items():
        words[name] = list(dict.fromkeys(re.findall(r"^  (?:-\w, )?(--[\w-]+)", text, re.MULTILINE)))
        words[name] += settings if "key.sub=value" in text else []
    lines = [f"SDXL_TRAINER_WORDS[{name}]='{' '.join(found)}'\n" for name, found in words.items()]
    return (ROOT / "launch" / "completion.sh").read_text(encoding="utf-8") + "".join(lines)


if __name__ == "__main__":
    sys.exit(main())
