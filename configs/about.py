"""What model files and model cards say about the model, `about`."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator

from sdxl_trainer.configs.section import Section

Text = Annotated[str, Field(min_length=1)]


class AboutConfig(Section):
    """What model files (modelspec 1.0.1) and the model card say about the model. Everything here becomes public with
    the model."""

    title: Text | None = None
    """Title of the model. The default is `run.name`."""
    author: Text | None = None
    """Who made the model: a name, or the address of a profile."""
    description: Text | None = None
    """What the model is for, in plain text or Markdown."""
    license: Text | None = None
    """Licence of the model: its identifier, such as `openrail++` or `cc-by-4.0`, or the address of its text."""
    trigger_phrase: Text | None = None
    """Words that a prompt needs for the model to have its effect, above all for adapters. Interfaces may add them to
    the prompt."""
    usage_hint: Text | None = None
    """Short hint for those who use the model, such as a guidance scale."""
    tags: list[Text] = []
    """Tags by which interfaces and the hub find the model, such as `[style, watercolour]`."""
    merged_from: list[Text] = []
    """Titles of the models that the model to train was merged from. `train/convert.py --adapter` fills it with the
    names of the files that it merges."""
    thumbnail: Path | None = None
    """Image that interfaces show for the model. It is stored in the model file as a JPEG of at most 256 px."""
    base_model: Text | None = Field(None, pattern=r"^[\w\-.]+/[\w\-.]+$")
    """Hub id of the model that training started from, for the model card. The default is `model.path` if that is a
    hub id; the path of a file is never published."""

    @field_validator("tags", "merged_from")
    @classmethod
    def _refuse_commas(cls, names: list[str]) -> list[str]:
        # The standard separates them by commas.
        wrong = [name for name in names if "," in name]
        if wrong:
            raise ValueError(f"must have one name an entry, but {wrong[0]!r} contains a comma; make it two entries")
        return names
