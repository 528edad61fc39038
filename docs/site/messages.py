"""Generate docs/MESSAGES.md and its translations from the sources: problems of settings and data, failures, warnings.

python docs/site/messages.py --language en > docs/MESSAGES.md
python docs/site/messages.py --language zh > docs/zh/MESSAGES.md
"""

import argparse
import ast
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from sdxl_trainer.configs.language.catalogue import read_catalogue
from sdxl_trainer.configs.language.messages import FOLDERS, expand, is_text, merge_parts, number_fields, split_logged
from sdxl_trainer.configs.language.templates import Field, format_template, parse_template
from sdxl_trainer.configs.language.translate import CATALOGUES
from sdxl_trainer.configs.load import iterate_sections
from sdxl_trainer.configs.schema import Config

ROOT = Path(__file__).resolve().parents[2]
GAP = "…"  # in place of a value that is known only at run time
PARAMETERS = ("key", "value", "rule", "cure")
INTRODUCTION = {
    "en": """# Messages

Search this page for a few words of your message that hold no value of yours: `…` stands for a value. It lists

- problems of settings, files and data, with their cures. Each ends a program with status 2 before a network is loaded.
- [failures](#failures-of-a-running-program) of a running program, which ends with status 1.
- [warnings and errors](#warnings-and-errors-in-the-log) in the log, after which a program continues.

[TROUBLESHOOTING.md](TROUBLESHOOTING.md) begins with symptoms, and says more about the most frequent ones.

The page is generated from the sources: `python docs/site/messages.py --language en > docs/MESSAGES.md`.
""",
    "zh": """# 消息

请用您所见消息中不含具体值的几个词在本页搜索：`…` 代表具体的值。本页列出

- 配置、文件和数据的每一个问题及其解决办法。出现其中任何一个时，程序都在加载网络之前以状态 2 结束。
- 运行中程序的[失败](#运行中程序的失败)，程序以状态 1 结束。
- 日志中的[警告和错误](#日志中的警告和错误)，程序随后继续。

[TROUBLESHOOTING.md](TROUBLESHOOTING.md) 从症状出发，详述最常见的消息。

本页由源代码生成：`python docs/site/messages.py --language zh > docs/zh/MESSAGES.md`。
""",
}
HEADINGS = {
    "en": ("Arguments, memory and other keys", "key", "rule", "cure"),
    "zh": ("参数、内存与其他", "键", "规则", "解决办法"),
}
FAILURES = ("FailedError", "StuckRanksError", "TooManyBadError", "StoreError")
LEVELS = ("warning", "error")  # functions of the logger
MESSAGE_HEADINGS = {
    "en": ("Failures of a running program", "Warnings and errors in the log", "program", "message"),
    "zh": ("运行中程序的失败", "日志中的警告和错误", "程序", "消息"),
}
# First folder of a source → the programs that run it; "" for all others.
PROGRAMS = {
    "en": {"cache": "cache job", "train": "training and its tools", "": "all"},
    "zh": {"cache": "缓存任务", "train": "训练及其工具", "": "全部"},
}


def _list_sections(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the class and the dotted name of each section."""
    for name, section in iterate_sections(model):
        yield section.__name__, prefix + name
        yield from _list_sections(section, f"{prefix}{name}.")


SECTIONS = dict(_list_sections())


@dataclass(frozen=True, order=True)
class Row:
    """A problem as the sources have it: templates of its key, its rule and its cure."""

    key: str
    rule: str
    cure: str

    @property
    def section(self) -> str:
        """The section of the YAML, or an empty text."""
        section = self.key.partition(".")[0]
        return section if section in Config.model_fields else ""


def list_rows(root: Path) -> list[Row]:
    """Return the problems of all sources, by key."""
    rows: set[Row] = set()
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            rows.update(_extract_rows(ast.parse(path.read_text(encoding="utf-8"))))
    return sorted(rows)


def _extract_rows(tree: ast.Module) -> Iterator[Row]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            texts = _collect_texts(node)
            for call in _list_own_calls(node, "Problem"):
                yield from _build_rows(call, texts)
        if isinstance(node, ast.ClassDef) and node.name in SECTIONS:
            for rule in (part for part in node.body if isinstance(part, ast.FunctionDef)):
                yield from _build_validator_rows(rule, SECTIONS[node.name])


@dataclass(frozen=True, order=True)
class Message:
    """A message of a running program: first folder of its source, and template."""

    folder: str
    text: str


def list_messages(root: Path, failures: bool) -> list[Message]:
    """Return the failures, or the warnings and errors of the log, of all sources."""
    found: set[Message] = set()
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and node.args:
                    texts = _list_failures(node) if failures else _list_logged(node)
                    found.update(Message(folder, text) for text in texts if text)
    return sorted(found)


def _list_failures(call: ast.Call) -> list[str]:
    is_failure = isinstance(call.func, ast.Name) and call.func.id in FAILURES
    return _list_templates(call.args[0]) if is_failure else []


def _list_logged(call: ast.Call) -> list[str]:
    function, text = call.func, call.args[0]
    is_of_logger = isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name)
    if not (is_of_logger and function.value.id == "logger" and function.attr in LEVELS):
        return []
    if isinstance(text, ast.Constant) and isinstance(text.value, str):
        return [format_template(number_fields(merge_parts(split_logged(text.value, call.args[1:]))))]
    return _list_templates(text)


def _build_validator_rows(function: ast.FunctionDef, section: str) -> Iterator[Row]:
    """Yield what a validator of a section raises. Its decorator names the settings; the whole section otherwise.

    Such texts hold rule and cure, as the catalogue of translations does.
    """
    decorators = [one for one in function.decorator_list if isinstance(one, ast.Call)]
    names = [word.value for one in decorators for word in one.args if isinstance(word, ast.Constant)]
    for call in _list_own_calls(function, "ValueError"):
        for text in _list_templates(call.args[0] if call.args else None):
            keys = [f"{section}.{name}" for name in names] or [section]
            yield from (Row(key, text, "") for key in keys if text)


def _list_own_calls(function: ast.FunctionDef, name: str) -> Iterator[ast.Call]:
    """Yield the calls of something in a function, without those of functions inside it."""
    pending: list[ast.AST] = list(ast.iter_child_nodes(function))
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name:
            yield node
        if not isinstance(node, ast.FunctionDef):
            pending += ast.iter_child_nodes(node)


def _collect_texts(function: ast.FunctionDef) -> dict[str, list[tuple[int, ast.expr]]]:
    """Return the texts that variables of a function get, each with its line."""
    texts: dict[str, list[tuple[int, ast.expr]]] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and is_text(node.value):
            for name in (target.id for target in node.targets if isinstance(target, ast.Name)):
                texts.setdefault(name, []).append((node.lineno, node.value))
    return texts


def _build_rows(call: ast.Call, texts: dict[str, list[tuple[int, ast.expr]]]) -> Iterator[Row]:
    given = dict(zip(PARAMETERS, call.args, strict=False))
    given |= {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}

    def list_forms(name: str) -> list[str]:
        node = given.get(name)
        if isinstance(node, ast.Name):  # the text that the variable got last
            before = [pair for pair in texts.get(node.id, ()) if pair[0] <= call.lineno]
            node = max(before, key=lambda pair: pair[0])[1] if before else None
        return _list_templates(node)

    for key in list_forms("key"):
        for rule in list_forms("rule"):
            if rule and key:
                yield from (Row(key, rule, cure) for cure in list_forms("cure"))


def _list_templates(node: ast.AST | None) -> list[str]:
    """Return the templates of all forms of a text, or an empty one."""
    if node is None or not is_text(node):
        return [""]
    return [format_template(number_fields(merge_parts(parts))) for parts in expand(node)]


def build_page(language: str = "en") -> str:
    """Return the page, in Markdown."""
    known = {}
    if language != "en":
        known = {entry.text: entry.translation for entry in read_catalogue(CATALOGUES[language])}
    other, *columns = HEADINGS[language]
    rows = list_rows(ROOT)
    lines = [INTRODUCTION[language].format(gap=GAP).rstrip()]
    for section in [*dict.fromkeys(row.section for row in rows if row.section), ""]:
        lines.append(f"\n## {section or other}\n")
        lines += [_format_cells(columns), _format_cells(["---"] * 3)]
        for row in (row for row in rows if row.section == section):
            rule, cure = (_fill_gaps(known.get(text) or text) for text in (row.rule, row.cure))
            if not cure:
                rule, _, cure = rule.replace("；", "; ").partition("; ")
            key = _fill_gaps(row.key)
            lines.append(_format_cells([key if GAP in key else f"`{key}`", rule, cure]))
    *titles, program, message = MESSAGE_HEADINGS[language]
    for title, failures in zip(titles, (True, False), strict=True):
        lines += [f"\n## {title}\n", _format_cells([program, message]), _format_cells(["---"] * 2)]
        names = PROGRAMS[language]
        for row in list_messages(ROOT, failures):
            text = _fill_gaps(known.get(row.text) or row.text)
            if text.strip(f"{GAP} :;,."):
                lines.append(_format_cells([names.get(row.folder, names[""]), text]))
    return "\n".join(lines).rstrip("\n") + "\n"


def _fill_gaps(template: str) -> str:
    parts = (GAP if isinstance(part, Field) else part for part in parse_template(template))
    return " ".join("".join(parts).split()).replace("|", "\\|")


def _format_cells(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--language", choices=INTRODUCTION, default="en")
    sys.stdout.write(build_page(parser.parse_args().language))
    return 0


if __name__ == "__main__":
    sys.exit(main())
