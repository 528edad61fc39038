"""What every section of the settings is: a pydantic model that knows its keys and documents them."""

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Section(BaseModel):
    """A section of the file: unknown keys are errors, and the text under a field is its description."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _booleans_are_no_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic takes true for 1, so that a slip such as `max_steps: true` would train one step."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        if _holds_boolean(value) and not _takes_boolean(annotation):
            raise ValueError("must not be true or false")
        return value


def _holds_boolean(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, (list, tuple)) and any(map(_holds_boolean, value)))


def _takes_boolean(annotation: Any) -> bool:
    """Whether a type is, or has among its parts, bool or anything."""
    return annotation in (bool, Any) or any(part is True or _takes_boolean(part) for part in get_args(annotation))
