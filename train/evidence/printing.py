"""Reading, comparing and printing of runs, as the command line asks for it."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from sdxl_trainer.configs.language.translate import translate, translate_label
from sdxl_trainer.configs.problems import Problem, UserInputError, raise_if_any
from sdxl_trainer.data.checks.folders import check_writable_file
from sdxl_trainer.data.files import open_temporary, read_regular
from sdxl_trainer.train.evidence.comparison import Comparison, Options, RunCurve, compare_runs, draw_curves
from sdxl_trainer.train.evidence.page import write_page
from sdxl_trainer.train.evidence.pairing import choose_steps
from sdxl_trainer.train.evidence.runs import check_runs, form_arms, open_runs
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
    groups, problems = read_groups(arguments.groups) if arguments.groups else ({}, [])
    raise_if_any([*check_runs(arguments.folders), *problems, *check_page(page, arguments.out is not None)])
    create_place(page)
    options = Options(axis=arguments.at, error=arguments.error, average=arguments.average, groups=groups)
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
    with _name_damage():
        comparison = compare_runs(runs, options)
    write_page(comparison, runs, page)
    return comparison


def measure_folders(folders: Sequence[Path], options: Options) -> list[RunCurve]:
    """Return the errors of runs that there is nothing to compare with. Raises UserInputError for damaged files."""
    runs = open_runs(folders)
    with _name_damage():
        return draw_curves(runs, form_arms(runs), choose_steps(runs, options.axis), options)


@contextmanager
def _name_damage() -> Iterator[None]:
    """Turn the error of a damaged file into a problem."""
    try:
        yield
    except ValueError as error:
        if isinstance(error, UserInputError):
            raise
        raise UserInputError([Problem("RUN_FOLDER", None, str(error), "delete the damaged file")]) from error


def read_groups(file: Path) -> tuple[dict[str, str], list[Problem]]:
    """Read the caption groups of keys, or return the problem of a file that cannot be read."""
    try:
        return msgspec.json.decode(read_regular(file, MAX_GROUPS_BYTES).content, type=dict[str, str]), []
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        cure = 'give a JSON file such as {"key": "group"}'
        return {}, [Problem("--groups", file, f"cannot be read: {error}", cure)]


def check_page(page: Path, is_chosen: bool) -> Iterator[Problem]:
    """Yield a problem if the page cannot be written.

    Args:
        is_chosen: by --out, and not the page of the first run's folder.
    """
    if is_chosen or (page.parents[1] / "config.yaml").is_file():  # else the run folder itself is a problem
        yield from check_writable_file("--out", page)


def create_place(page: Path) -> None:
    """Create the folder of the page, and a file that is deleted at once.

    Raises:
        UserInputError: no file can be created there, as in /proc.
    """
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        with open_temporary(page):
            pass
    except OSError as error:
        rule = f"cannot be written: {error.strerror}"
        raise UserInputError([Problem("--out", page, rule, "name a file in another folder")]) from error


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
