"""Reading, comparing and printing of runs, as the command line asks for it."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from sdxl_trainer.configs.language.translate import translate, translate_label
from sdxl_trainer.configs.problems import Problem, UserInputError, raise_if_any
from sdxl_trainer.data.files import read_regular
from sdxl_trainer.train.evidence.comparison import Comparison, Options, compare_runs
from sdxl_trainer.train.evidence.page import write_page
from sdxl_trainer.train.evidence.runs import check_runs, open_runs
from sdxl_trainer.train.evidence.text import (
    EFFECT_HEADINGS,
    EFFECTS_TITLE,
    HEADINGS,
    describe_frame,
    describe_need,
    describe_setting,
    describe_weights,
    format_effect,
    format_row,
    list_tables,
)

MAX_GROUPS_BYTES = 1 << 28
MAX_DETAILED_ARMS = 3  # whose tables are printed; beyond, they would bury the verdicts


def print_comparison(arguments: argparse.Namespace, page: Path) -> None:
    """Compare runs, print the result, and write its page.

    Raises:
        UserInputError: the runs cannot be compared, or a file of theirs is damaged.
        OSError: the page cannot be written.
    """
    options = Options(
        axis=arguments.at,
        error=arguments.error,
        average=arguments.average,
        groups=read_groups(arguments.groups) if arguments.groups else {},
    )
    comparison = compare_folders(arguments.folders, options, page)
    if arguments.json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(comparison)).decode() + "\n")
        return
    sys.stdout.write("".join(f"{line}\n" for line in write_lines(comparison)) + f"\n{page}\n")


def compare_folders(folders: Sequence[Path], options: Options, page: Path) -> Comparison:
    """Compare the runs of folders, and write the page of the comparison.

    Raises:
        UserInputError: the runs cannot be compared, or a file of theirs is damaged.
        OSError: the page cannot be written.
    """
    raise_if_any(check_runs(folders))
    runs = open_runs(folders)
    try:
        comparison = compare_runs(runs, options)
    except ValueError as error:
        if isinstance(error, UserInputError):
            raise
        raise UserInputError([Problem("RUN_FOLDER", None, str(error), "delete the damaged file")]) from error
    write_page(comparison, runs, page)
    return comparison


def read_groups(file: Path) -> dict[str, str]:
    """Read the caption groups of keys.

    Raises:
        UserInputError: the file cannot be read.
    """
    try:
        return msgspec.json.decode(read_regular(file, MAX_GROUPS_BYTES).content, type=dict[str, str])
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        cure = 'give a JSON file such as {"key": "group"}'
        raise UserInputError([Problem("--groups", file, f"cannot be read: {error}", cure)]) from error


def write_lines(comparison: Comparison) -> Iterator[str]:
    """Yield the lines of a comparison, the verdicts on settings first."""
    for arm in comparison.arms:
        yield f"{arm.arm}: {translate(describe_setting(arm.setting, arm.weights.baseline))}"
        if need := describe_need(arm.setting):
            yield f"  {translate(need)}"
        yield f"  {translate(describe_weights(arm.weights))}"
    yield translate(describe_frame(comparison))
    yield from map(translate, comparison.notes)
    if comparison.effects:
        yield f"\n{translate_label(EFFECTS_TITLE)}"
        yield from align_rows(list_effect_rows(comparison))
    if len(comparison.arms) > MAX_DETAILED_ARMS:
        yield "\n" + translate("the page has the tables of each arm by noise level and bucket")
        return
    for arm in comparison.arms:
        for title, lines in list_tables(arm):
            yield f"\n{arm.arm}, {translate_label(title)}"
            rows = [[translate_label(heading) for heading in HEADINGS]]
            rows += [[line.name, *format_row(line), translate_label(line.verdict)] for line in lines]
            yield from align_rows(rows)


def list_effect_rows(comparison: Comparison) -> list[list[str]]:
    """Return the headings and the line of each effect."""
    rows = [[translate_label(heading) for heading in EFFECT_HEADINGS]]
    return rows + [[*format_effect(effect), translate_label(effect.verdict.verdict)] for effect in comparison.effects]


def align_rows(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield the rows of a table as lines, with their columns aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    yield from ("  ".join(map(str.rjust, row, widths)) for row in rows)
