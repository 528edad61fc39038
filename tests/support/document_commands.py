"""Run by tests: the commands of the documents, one after the other, in one process, on the tiny SDXL.

    python tests/support/document_commands.py STAGE

STAGE is the folder that they are run in; it holds commands.json, a list of them, and what the documents speak of
(tests/test_commands.py lays it out).
Programs are called by the arguments that the documents show, and what is plain shell is run by bash. Three things are
not as a user has them: settings that a command leaves open are those of the tiny SDXL, training ends before its first
step, and the doctor does not look at the machine.
"""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from cache_samples import LAUNCHER_VARIABLES
from several_runs import start

from sdxl_trainer.configs.load import load_config
from sdxl_trainer.launch.distributed import close_ranks
from sdxl_trainer.launch.program import build_parser, end_program
from sdxl_trainer.train.doctor import doctor

# Programs by the script or module that starts them.
PROGRAMS = {
    "launch/cache.sh": "cache.main",
    "launch/train.sh": "train.main",
    "launch/deepspeed.sh": "train.main",
    "launch/preview.sh": "cache.preview",
    "launch/doctor.sh": "train.doctor",
    "launch/sample.sh": "train.sample_main",
    "cache/main.py": "cache.main",
    "train/main.py": "train.main",
    "train/convert.py": "train.convert",
}
PYTHON = re.compile(r"python -m sdxl_trainer\.(\w+(?:\.\w+)+) ")
SMALL = ["data.resolution_px=128", "data.min_bucket_px=64", "data.max_bucket_px=256", "data.bucket_step_px=32"]
CACHED = {"model": {"path", "vae"}, "data": {"max_tokens", "caption", "strategy"}}  # decide on a cache
FLUX_VAE = "models/flux2-vae"
DRAWN = ["sample.width_px=64", "sample.height_px=64", "sample.num_inference_steps=2", "engine.precision=bf16"]


def list_stand_ins(stage: Path, settings: str) -> list[str]:
    """The tiny SDXL as a single file, and eight images; where a YAML text names Flux 2's VAE, the tiny one of as many
    channels."""
    is_wide = FLUX_VAE in settings
    return [
        *([f"model.vae={stage / FLUX_VAE}"] if is_wide else []),
        f"run.dir={stage / 'runs'}",
        f"model.path={stage / 'models/sd_xl_base_1.0.safetensors'}",
        f"model.config={stage / 'models/sdxl-diffusers'}",
        "data.metadata=[]",
        f"data.image_dirs=[{stage / 'data/images'}]",
        *SMALL,
        "data.num_workers=0",
        f"cache.dir={stage / 'data' / ('latents-flux2' if is_wide else 'latents')}",
    ]


def split_command(command: str) -> tuple[str, list[str]]:
    """The program that a command starts, by the end of its module's name, and its arguments; "" for plain shell."""
    command = re.sub(r"^(\w+=\S+ +)+", "", command)
    if found := PYTHON.match(command + " "):
        return found[1], shlex.split(command)[3:]
    starter, *words = shlex.split(command)
    if starter == "torchrun":
        options = importlib.import_module("torch.distributed.run").get_args_parser().parse_args(words)
        starter, words = "python", [options.training_script, *options.training_script_args]
    elif starter == "deepspeed":
        options = importlib.import_module("deepspeed.launcher.runner").parse_args(words)
        starter, words = "python", [options.user_script, *options.user_args]
    program = PROGRAMS.get(words[0], "") if starter in ("bash", "python") and words else ""
    return program, words[1:]


def stand_in(words: Sequence[str], stand_ins: Sequence[str]) -> list[str]:
    """The words of a command, and those stand-ins whose settings it leaves open."""
    given = {word.partition("=")[0] for word in words}
    return [*words, *(word for word in stand_ins if word.partition("=")[0] not in given)]


def call(program: str, words: list[str]) -> int:
    """The exit status of a program's `main`."""
    if program == "train.doctor":
        doctor.examine_machine = lambda num_ranks: ()
    try:
        module = importlib.import_module(f"sdxl_trainer.{program}")
        if hasattr(module, "__path__"):  # a room is started by its __main__.py
            module = importlib.import_module(f"sdxl_trainer.{program}.__main__")
        return module.main(words) or 0
    finally:
        if program in ("cache.main", "train.sample_main"):
            close_ranks()
            for name in LAUNCHER_VARIABLES:
                os.environ.pop(name, None)


def run_command(command: str, stage: Path, trainings: "Trainings") -> int:
    """The exit status of any command but training. The doctor finds the cache that its settings make."""
    program, words = split_command(command)
    if not program:
        return subprocess.run(["bash", "-euo", "pipefail", "-c", command], cwd=stage).returncode
    if "--cfg" in words:
        settings = Path(words[words.index("--cfg") + 1])
        words = stand_in(words, list_stand_ins(stage, settings.read_text()))
        if program == "train.doctor":
            cache, _ = trainings.fill_cache(settings, [word for word in words if "=" in word])
            words.append(f"cache.dir={cache}")  # of the words for one setting the last counts
    elif program == "train.convert":
        words = [*words, "--overwrite"]  # several pages convert to the same name
    elif program == "train.sample_main":
        words = stand_in(words, [*DRAWN, f"model.config={stage / 'models/sdxl-diffusers'}"])
    return call(program, words)


class Trainings:
    """What training is started with, collected to be run last: DeepSpeed remembers the process group, so that it must
    stay as it is from one training to the next. Each is run once."""

    def __init__(self, stage: Path):
        self.stage, self.commands, self.known = stage, [], set()
        self.caches: dict[str, Path] = {}  # settings that decide on a cache, as JSON → its folder

    def add(self, command: str) -> int:
        """Take up a command with its settings as they are now, and fill its cache. Returns the cache job's status."""
        options = build_parser("").parse_args(split_command(command)[1])
        text = options.cfg.read_text()
        if (text, *options.overrides) not in self.known:
            self.known.add((text, *options.overrides))
            copy = self.stage / f"settings-{len(self.commands)}.yaml"
            copy.write_text(text)
            words = stand_in(options.overrides, list_stand_ins(self.stage, text))
            cache, status = self.fill_cache(copy, words)
            words.append(f"cache.dir={cache}")  # of the words for one setting the last counts
            self.commands.append((command, copy, words))
            return status
        return 0

    def fill_cache(self, copy: Path, words: list[str]) -> tuple[Path, int]:
        """A cache folder that a job with these settings has filled from nothing, and the job's exit status."""
        config, _ = load_config(copy, words)
        kept = {*type(config.cache).model_fields} - {"dir"}
        key = config.model_dump_json(include={**CACHED, "cache": kept})
        if key in self.caches:
            return self.caches[key], 0
        folder = self.caches[key] = self.stage / "data" / f"latents-{len(self.caches)}"
        return folder, call("cache.main", ["--cfg", str(copy), *words, f"cache.dir={folder}"])

    def run(self, copy: Path, words: list[str]) -> int:
        """The exit status of a dry run."""
        config, _ = load_config(copy, words)
        if config.engine.offload_optimizer:
            words.append("optim.name=torch.optim.AdamW")  # DeepSpeed's for the CPU takes a minute to compile
        return start("train", copy, ["--dry-run", *words])


def main() -> int:
    """Run the commands; 1 if one of them fails."""
    stage = Path(sys.argv[1])
    os.chdir(stage)
    trainings, failed = Trainings(stage), []
    words = stand_in(["--cfg", "my.yaml"], list_stand_ins(stage, Path("my.yaml").read_text()))
    assert call("cache.main", words) == 0

    def finish(command: str, run: Callable[..., int], *arguments: object) -> None:
        print("+", command, flush=True)
        if status := run(*arguments):
            failed.append(f"{command}: {status}")

    known = set()  # what is run once: all that changes nothing
    for command in json.loads(Path("commands.json").read_text()):
        program, words = split_command(command)
        key = (program, *words, Path("my.yaml").read_text())
        if program == "train.main":
            finish(command, trainings.add, command)
        elif key not in known:
            finish(command, run_command, command, stage, trainings)
        if program not in ("", "cache.main"):
            known.add(key)
    for command, copy, words in trainings.commands:
        finish(command, trainings.run, copy, words)
    close_ranks()
    print("failed:", *failed, sep="\n")
    return int(bool(failed))


if __name__ == "__main__":
    end_program(main())
