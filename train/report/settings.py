"""The settings of a run, read from its `config.yaml` as texts. Settings of other versions are read too."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from sdxl_trainer.configs.yaml_file import load_yaml
from sdxl_trainer.data.files import read_regular

MAX_CONFIG_BYTES = 1 << 20


def read_settings(file: Path) -> dict[str, str]:
    """Read all settings of a run, dotted key → value as text; {} if the file is missing or damaged."""
    try:
        content = load_yaml(read_regular(file, MAX_CONFIG_BYTES).content.decode("utf-8"))
    except (OSError, ValueError):
        return {}
    return dict(flatten_settings(content)) if isinstance(content, dict) else {}


def flatten_settings(settings: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted key and the text of each setting. An empty section is a setting with the value `{}`."""
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from flatten_settings(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else _write_value(value)


def _write_value(value: Any) -> str:
    try:
        return orjson.dumps(value).decode()
    except TypeError:  # an integer beyond 64 bits
        return str(value)
