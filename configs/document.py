"""Writes docs/CONFIG.md from the schema: `python -m sdxl_trainer.configs.document > docs/CONFIG.md`."""

import sys
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sdxl_trainer.configs.schema import Config

HEADER = """# Settings

One YAML file holds them all; `key.sub=value` words on the command line override it. Unknown keys are errors.
This page is generated from `configs/schema.py` by `python -m sdxl_trainer.configs.document > docs/CONFIG.md`.
"""


def build_page() -> str:
    """The whole page as Markdown."""
    parts = [HEADER]
    for name, field in Config.model_fields.items():
        section = field.annotation
        assert isinstance(section, type) and issubclass(section, BaseModel), f"{name} is not a section"
        parts.append(
            f"\n## {name}\n\n{(section.__doc__ or '').strip()}\n\n"
            "| key | type | default | meaning |\n|---|---|---|---|\n"
        )
        parts += [_build_row(f"{name}.{key}", entry) for key, entry in section.model_fields.items()]
    return "".join(parts)


def _build_row(key: str, field: FieldInfo) -> str:
    default = f"`{_format_default(field.default)}`" if field.default != "" else ""
    description = " ".join((field.description or "").split())
    limits = ", ".join(_format_limit(limit) for limit in field.metadata)
    kind = _format_type(field.annotation).replace("|", "\\|") + (f" ({limits})" if limits else "")
    return f"| `{key}` | {kind} | {default} | {description} |\n".replace("\n ", " ")


def _format_default(value: Any) -> str:
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _format_limit(limit: Any) -> str:
    names = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "multiple_of": "multiple of", "min_length": "length >="}
    shown = [f"{sign} {getattr(limit, name)}" for name, sign in names.items() if getattr(limit, name, None) is not None]
    if getattr(limit, "pattern", None):
        shown.append(f"`{limit.pattern}`")
    return " ".join(shown)


def _format_type(annotation: Any) -> str:
    if annotation is type(None):
        return "none"
    if get_origin(annotation) is None:
        return {Path: "path", Any: "any"}.get(annotation, getattr(annotation, "__name__", str(annotation)))
    args = [_format_type(arg) if not isinstance(arg, (str, int)) else f"`{arg}`" for arg in get_args(annotation)]
    origin = getattr(get_origin(annotation), "__name__", "")
    if origin in ("list", "tuple", "dict"):
        return f"{origin} of {', '.join(args)}"
    return " | ".join(args)


if __name__ == "__main__":
    sys.stdout.write(build_page())
