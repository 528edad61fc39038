"""Entries of the tables of options: an option of another program, and how its value is converted."""

from dataclasses import dataclass

from sdxl_trainer.configs.kohya.values import WEIGHTINGS, Convert, choose_weighting

WHOLE = "a whole number"
ENCODERS = ("optim.text_encoder_lr", "optim.text_encoder_2_lr")
FROZEN_UNET = {"match": r"^unet\.", "lr": 0}
FREEZES = "a parameter group with learning rate 0 freezes the U-Net"
MODEL_NOTES = (
    "is not written; a model file contains what `about` says, date, resolution, prediction and timesteps, an adapter "
    "file rank and alpha too"
)


@dataclass(frozen=True)
class Option:
    """The settings that an option of kohya's scripts becomes, and how its value is converted."""

    keys: tuple[str, ...] = ()  # dotted keys; if there are none, `note` gives the reason
    note: str = ""  # what differs from kohya's scripts
    convert: Convert | None = None  # without it the value is copied
    is_built_in: bool = False  # the effect is always on, without a setting
    difference: str = ""  # what the import reports to everyone who sets the option
    expects: str = "a number"  # what a value that cannot be read should be


def copied(key: str, note: str = "", difference: str = "") -> Option:
    """Return an option whose value is copied to another key."""
    return Option((key,), note, difference=difference)


def converted(
    convert: Convert, *keys: str, note: str = "", difference: str = "", expects: str = Option.expects
) -> Option:
    """Return an option whose value is converted."""
    return Option(keys, note, convert, difference=difference, expects=expects)


def unsupported(reason: str) -> Option:
    """Return an option that has no setting here."""
    return Option((), reason)


def built_in(note: str = "") -> Option:
    """Return an option whose effect is always on, without a setting."""
    return Option((), note or "needs no setting", is_built_in=True)


def weighting(name: str) -> Option:
    """Return an option that turns on one weighting, with or without a gamma."""
    keys = ("objective.weighting", "objective.weighting_gamma")
    return Option(keys, f"`{WEIGHTINGS[name]}`; only one weighting at a time", choose_weighting(name))
