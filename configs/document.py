"""Writes docs/CONFIG.md from the schema: `python -m sdxl_trainer.configs.document > docs/CONFIG.md`."""

import sys
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sdxl_trainer.configs.load import iterate_sections
from sdxl_trainer.configs.schema import Config

HEADER = """# Settings

One YAML file holds them all; `key.sub=value` words on the command line override it. Unknown keys are errors.
This page is generated from the files in `configs/` by `python -m sdxl_trainer.configs.document > docs/CONFIG.md`.
"""


def build_page() -> str:
    """The whole page as Markdown."""
    sections = dict(iterate_sections())
    assert sections.keys() == Config.model_fields.keys(), "the file consists of sections"
    return HEADER + "".join(_build_section(name, section) for name, section in sections.items())


def _build_section(name: str, section: type[BaseModel]) -> str:
    """A section's heading and table, and after it those of the sections within."""
    inner = {f"{name}.{key}": model for key, model in iterate_sections(section)}
    rows = [_build_row(f"{name}.{key}", entry) for key, entry in section.model_fields.items()]
    return (
        f"\n## {name}\n\n{' '.join((section.__doc__ or '').split())}\n\n"
        "| key | type | default | meaning |\n|---|---|---|---|\n"
        + "".join(rows)
        + "".join(_build_section(key, model) for key, model in inner.items())
    )


def _build_row(key: str, field: FieldInfo) -> str:
    if isinstance(field.default, BaseModel):
        return f"| `{key}` | section | | {field.description} See [{key}](#{key.replace('.', '')}). |\n"
    default = f"`{_format_default(field.default)}`" if field.default != "" else ""
    description = " ".join((field.description or "").split()).replace("|", "\\|")
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
    if get_origin(annotation) is Annotated:
        inner, *rules = get_args(annotation)
        limits = [limit for rule in rules for limit in (rule.metadata if isinstance(rule, FieldInfo) else [rule])]
        return " ".join([_format_type(inner), " and ".join(map(_format_limit, limits))])
    if get_origin(annotation) is None:
        return {Path: "path", Any: "any"}.get(annotation, getattr(annotation, "__name__", str(annotation)))
    args = [_format_type(arg) if not isinstance(arg, (str, int)) else f"`{arg}`" for arg in get_args(annotation)]
    origin = getattr(get_origin(annotation), "__name__", "")
    if origin in ("list", "tuple", "dict"):
        return f"{origin} of {', '.join(args)}"
    return " | ".join(args)


if __name__ == "__main__":
    sys.stdout.write(build_page())
