"""Names of commands in texts, for a user who has started a program by the command line `sdxl-trainer`.

Texts name the scripts in launch/, which a package that was installed from a wheel does not show its users.
"""

import os
import re

# Set by train/cli.py for the programs that it starts, such as `sdxl-trainer cache`.
VARIABLE = "SDXL_TRAINER_COMMAND"
SCRIPT = re.compile(r"bash (?:\S*/)?launch/(cache|train|doctor|preview|sample|watch|quickstart)\.sh\b")
# A wheel does not hold the documents, but prints this one. A text that names the command already stays as it is.
SETTINGS_PAGE = re.compile(r"docs/(?:zh/)?CONFIG\.md(?!.*`sdxl-trainer settings)")
MODULES = {
    "python train/convert.py": "sdxl-trainer convert",
    "python -m sdxl_trainer.configs.import_config": "sdxl-trainer import",
    "python -m sdxl_trainer.configs.document": "sdxl-trainer settings",
    "python -m sdxl_trainer.train.report": "sdxl-trainer report",
}


def name_program(default: str | None) -> str | None:
    """Return the command that this program was started by, or `default` if it was not `sdxl-trainer`."""
    return os.environ.get(VARIABLE, default)


def adapt_commands(text: str) -> str:
    """Return a text with `sdxl-trainer NAME` in place of the scripts, if the user has started the program so."""
    if VARIABLE not in os.environ:
        return text
    text = SCRIPT.sub(r"sdxl-trainer \1", text)
    text = SETTINGS_PAGE.sub("`sdxl-trainer settings`", text)
    for command, short in MODULES.items():
        text = text.replace(command, short)
    return text
