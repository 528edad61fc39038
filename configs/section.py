"""Base class of all sections of the settings."""

from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Section(BaseModel):
    """A section of the settings. Unknown keys are errors. The string under a field is its description."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _reject_booleans(cls, value: Any, info: ValidationInfo) -> Any:
        """Reject booleans for other types: pydantic would read `max_steps: true` as one step."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        if _holds_boolean(value) and not _accepts_boolean(annotation):
            raise ValueError("must not be true or false")
        return value


def remove_file_scheme(name: Path | str) -> Path | str:
    """Return the path that a `file://` URL names, and any other path or URL unchanged."""
    return name.removeprefix("file://") if isinstance(name, str) else name


def _holds_boolean(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, (list, tuple)) and any(map(_holds_boolean, value)))


def _accepts_boolean(annotation: Any) -> bool:
    """Return whether a type is, or contains, bool, True or Any."""
    return annotation in (bool, Any) or any(part is True or _accepts_boolean(part) for part in get_args(annotation))
