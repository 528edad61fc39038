"""Base class of all sections of the settings."""

from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Discriminator, Tag, ValidationInfo, field_validator

from sdxl_trainer.configs.paths import IS_PATH, expand_path

NULL_WORDS = ("", "none", "null", "~")


def is_own_code(name: str | None) -> bool:
    """Return whether a name leads to the user's own code: `path/to/file.py:Name` or `module:Name`."""
    return name is not None and ":" in name


# A setting that takes a known name or the user's own code is `Annotated[Annotated[Literal["name"], KNOWN_NAME] |
# OwnCodeName, NAME_OR_CODE, IS_PATH]`. An error then names one type, not both.
KNOWN_NAME = Tag("name")
OwnCodeName = Annotated[str, Tag("code")]
NAME_OR_CODE = Discriminator(lambda value: "code" if isinstance(value, str) and is_own_code(value) else "name")


class Section(BaseModel):
    """A section of the settings. Unknown keys are errors. The string under a field is its description."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _prepare(cls, value: Any, info: ValidationInfo) -> Any:
        """Read words for null, replace variables in paths, and reject booleans for other types.

        pydantic would read `none` as the name of a file, and `max_steps: true` as one step.
        """
        field = cls.model_fields[info.field_name or ""]
        if isinstance(value, str) and value.strip().lower() in NULL_WORDS and holds_type(field.annotation, type(None)):
            return None
        if (IS_PATH in field.metadata or holds_type(field.annotation, Path)) and value != field.default:
            value = _prepare_paths(value, get_origin(field.annotation) is list)
        if _holds_boolean(value) and not holds_type(field.annotation, bool, True, Any):
            raise ValueError("must not be true or false")
        return value


def holds_type(annotation: Any, *types: Any) -> bool:
    """Return whether an annotation is, or contains, one of some types or literal values."""
    return any(annotation is kind for kind in types) or any(holds_type(part, *types) for part in get_args(annotation))


def _prepare_paths(value: Any, is_list: bool) -> Any:
    """Expand the paths of a setting. A single path becomes a list where the setting is a list of paths."""
    if isinstance(value, list):
        return [expand_path(str(item)) if isinstance(item, (str, Path)) else item for item in value]
    if isinstance(value, (str, Path)):
        path = expand_path(str(value))
        return [path] if is_list else path
    return value


def _holds_boolean(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, (list, tuple)) and any(map(_holds_boolean, value)))
