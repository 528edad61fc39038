"""The report of an import: what became of every key of the files."""

import textwrap
from dataclasses import dataclass, field
from typing import Any

from sdxl_trainer.configs.kohya.contents import FileContents, FileKey, is_unset
from sdxl_trainer.configs.kohya.fit import Fitted
from sdxl_trainer.configs.kohya.importer import Imported
from sdxl_trainer.configs.kohya.subsets import Remark
from sdxl_trainer.configs.kohya.values import TRAINER
from sdxl_trainer.configs.language.translate import join_label, translate
from sdxl_trainer.configs.problems import format_count, format_value

SECRETS = ("wandb_api_key", "wandb_token", "huggingface_token")
LINE_WIDTH = 116


@dataclass
class Report:
    """Every key of the files in one of these lists, and the remarks that explain them."""

    exact: list[FileKey] = field(default_factory=list)
    changed: list[FileKey] = field(default_factory=list)
    unsupported: list[FileKey] = field(default_factory=list)
    unknown: list[FileKey] = field(default_factory=list)
    rejected: list[FileKey] = field(default_factory=list)
    built_in: list[FileKey] = field(default_factory=list)
    without_effect: list[FileKey] = field(default_factory=list)
    unset: list[FileKey] = field(default_factory=list)

    @property
    def num_keys(self) -> int:
        """The number of keys of the files."""
        return sum(map(len, vars(self).values()))


def sort_keys(contents: FileContents, imported: Imported, fitted: Fitted) -> Report:
    """Return what became of each key of the files."""
    report = Report()
    lists = (
        (report.rejected, fitted.rejected),
        (report.unsupported, [*imported.other_training, *imported.unsupported]),
        (report.unknown, imported.unknown),
        (report.changed, [*imported.changed, *fitted.changed]),
        (report.built_in, imported.built_in),
        (report.without_effect, imported.without_effect),
    )
    by_option: dict[str, list[FileKey]] = {}
    for keys, remarks in reversed(lists):
        by_option |= {remark.option: keys for remark in remarks}
    for key in contents.keys:
        entry = key.name.partition(".")[2]
        found = [name for name in (f"{key.option}.{entry}" if entry else "", key.name, key.option) if name in by_option]
        part = by_option[found[0]] if found else report.exact
        if key.note:
            part = report.without_effect
        elif part is report.changed and entry and found[0] == key.option:
            part = report.exact  # the difference is not this entry's
        elif is_unset(key.value) and not (key.value is False and key.option in imported.values):
            part = report.unset
        part.append(key)
    return report


def format_report(contents: FileContents, imported: Imported, fitted: Fitted) -> str:
    """Return the report as lines of text: remarks to read before the YAML is used, then the other keys by name."""
    report = sort_keys(contents, imported, fitted)
    names = contents.names
    values = {key.name: key.value for key in contents.keys if key.option and not key.note}

    def show(remark: Remark) -> str:
        option, dot, entry = remark.option.partition(".")
        name = f"{names.get(option, option)}{dot}{entry}"
        # The value that the file has, such as 10 percent, if the option has another in kohya's scripts.
        value = values.get(name, remark.value) if name != remark.option else remark.value
        value = "..." if remark.option in SECRETS else "" if value is None else _shorten(value)
        # Each line of a reason is a message of its own.
        reason = "".join(map(translate, remark.reason.replace(TRAINER, contents.trainer).split("\n")))
        return join_label(f"  {name} = {value}" if value else f"  {name}", reason)

    ignored = [Remark(key.name, key.value, key.note) for key in report.without_effect if key.note]
    changed, rejected = [*imported.changed, *fitted.changed], {remark.option for remark in fitted.rejected}
    lines = [translate(_count_keys(report))]
    for title, remarks in {
        "another training than in your files": imported.other_training,
        "not set in your files, so the defaults of that program are written": imported.defaults,
        "imported, but not exactly the same": [remark for remark in changed if remark.option not in rejected],
        "not imported (docs/FROM_KOHYA.md describes further differences)": imported.unsupported,
        "unknown keys": imported.unknown,
        "rejected by the rules of the settings here": fitted.rejected,
        "always on here, without a setting": imported.built_in,
        "without effect in that program either": imported.without_effect,
    }.items():
        lines += [join_label(translate(title), "").rstrip(), *dict.fromkeys(map(show, remarks))] if remarks else []
    by_note: dict[str, list[str]] = {}
    for remark in ignored:
        by_note.setdefault(remark.reason, []).append(remark.option)
    for reason, options in by_note.items():
        lines += _list_names(translate(f"without effect, because each {reason}"), options)
    explained = {remark.option for remark in imported.unsupported}
    held = [
        key.name
        for key in (*report.unsupported, *report.unknown, *report.rejected, *report.built_in, *report.without_effect)
        if "." in key.name and not key.note and key.name not in names.get(key.option, "")
    ]
    held = [name for name in held if name not in explained]
    lines += _list_names(translate("in the same part as the key before the dot"), held)
    lines += _list_names(translate("imported as they are"), [key.name for key in report.exact])
    lines += _list_names(translate("empty or off in your files"), [key.name for key in report.unset])
    return "\n".join(lines)


def _count_keys(report: Report) -> str:
    """Return the number of keys in each part of the report; the numbers add up to that of all keys."""
    return (
        f"{format_count(report.num_keys, 'key')} in your files: {len(report.exact):,} imported as they are, "
        f"{len(report.changed):,} imported with a difference, {len(report.unsupported):,} not imported, "
        f"{len(report.unknown):,} unknown, {len(report.rejected):,} rejected, {len(report.built_in):,} always on here, "
        f"{len(report.without_effect):,} without effect there, {len(report.unset):,} empty or off"
    )


def _list_names(title: str, names: list[str]) -> list[str]:
    if not names:
        return []
    text = ", ".join(dict.fromkeys(names))
    indent = "  "
    return [
        join_label(title, "").rstrip(),
        *textwrap.wrap(text, LINE_WIDTH, initial_indent=indent, subsequent_indent=indent),
    ]


def _shorten(value: Any, limit: int = 60) -> str:
    text = format_value(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
