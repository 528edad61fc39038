"""Sharing of a model: its card beside it, and the upload of both."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from loguru import logger

from sdxl_trainer.configs.problems import FailedError, Problem, raise_if_any
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.launch.logger import init_logger
from sdxl_trainer.train.export.about import read_about
from sdxl_trainer.train.export.card import CARD, NO_ID, get_card_folder, list_card_files, set_hub_id, write_card
from sdxl_trainer.train.export.hub import check_hub_target, list_model_files, push_files
from sdxl_trainer.train.export.model_run import ModelRun, load_run_config


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """Ways to share a model file or folder, named as the command line's options."""

    push: str | None = None  # hub id to upload to
    private: bool = False
    card: bool = False  # write the card


@dataclass(frozen=True, kw_only=True)
class SharedRun:
    """The run that a shared model comes from, and the command line's changes to its settings."""

    run: ModelRun | None
    cfg: Path | None  # file with settings in place of the run's
    words: Sequence[str]  # `key.sub=value`

    def load_config(self) -> Config | None:
        """Return the settings; None for a model without a run."""
        return load_run_config(self.run, self.cfg, self.words)


def check_sharing(source: Path, target: Path | None, sharing: Sharing) -> Iterator[Problem]:
    """Yield problems of a model to share, before anything is converted or read."""
    if sharing.private and not sharing.push:
        yield Problem("--private", None, "needs --push", "add --push YOUR_NAME/YOUR_MODEL")
    if target is None:
        yield from check_ready_model(source)
    if sharing.push:
        yield from check_hub_target(sharing.push)


def check_ready_model(model: Path) -> Iterator[Problem]:
    """Yield a problem if a model cannot be shared as it is: it must be a safetensors file or a diffusers folder."""
    if not model.exists():
        yield Problem("source", model, "does not exist", "check the path")
    elif model.is_dir() and not (model / "model_index.json").is_file():
        rule = "is no model that can be shared as it is"
        yield Problem("source", model, rule, "give a target, such as my-model.safetensors, that it is converted to")
    elif model.is_file() and model.suffix != ".safetensors":
        yield Problem("source", model, "is no .safetensors file", "convert it first")


def run_sharing(
    source: Path, target: Path | None, origin: SharedRun, sharing: Sharing, convert: Callable[[], None]
) -> None:
    """Check whether a model can be shared, convert it, write its card and upload both; convert alone if none is asked.

    Args:
        target: that `convert` writes; None to share the source as it is.

    Raises:
        UserInputError: the model cannot be shared, or not converted.
        FailedError: the upload failed; the model and its card are ready to be pushed again.
    """
    if sharing.push or sharing.private or sharing.card:
        init_logger(rank=0)
        raise_if_any(check_sharing(source, target, sharing))
    convert()
    if not sharing.push and not sharing.card:
        return
    model = target or source
    folder = get_card_folder(model)
    if target is not None or not (folder / CARD).is_file():
        card = write_card(model, origin.run, origin.load_config(), sharing.push or NO_ID)
        logger.info("model card written to {}", card)
    if sharing.push:
        share_model(model, folder, sharing.push, sharing.private)


def share_model(model: Path, card_folder: Path, hub_id: str, private: bool) -> None:
    """Upload a model with its card.

    Raises:
        FailedError: the upload failed; the message holds the command that continues.
    """
    set_hub_id(card_folder / CARD, hub_id)
    files = {file.relative_to(card_folder).as_posix(): file for file in list_card_files(card_folder)}
    title = read_about(model).get("title", model.stem)
    try:
        address = push_files(hub_id, list_model_files(model) | files, title, private)
    except FailedError as error:
        raise FailedError(
            f"{error}; {model} and its card are ready, so continue with: "
            f"python train/convert.py {model} --push {hub_id}"
        ) from error
    logger.info("shared at {}", address)
