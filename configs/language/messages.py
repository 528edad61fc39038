"""Extraction of messages from the sources: every text that may reach the user, with its fields."""

import ast
import itertools
import re
import string
from collections.abc import Iterator, Sequence
from pathlib import Path

from sdxl_trainer.configs.language.foreign import FOREIGN
from sdxl_trainer.configs.language.templates import Field, Part, format_template

FOLDERS = ("configs", "launch", "data", "cache", "train")
# Texts of documents, of files that other programs read, and of programs for developers.
ELSEWHERE = (
    *("configs/document.py", "configs/kohya/document.py", "configs/language/", "train/export/card.py"),
    *("train/estimates/gpus.py", "train/sampling/parameters.py", "train/tiny/pretraining.py"),
    *("train/tiny/tokenizer.py", "train/tiny/vae.py"),
)
MAX_FORMS = 24  # of a message with conditions; one with more has fields in place of the conditions
# Calls whose texts are looked up, compared or passed on, and not shown.
UNSHOWN_CALLS = frozenset(
    "compile match fullmatch search sub findall finditer split rsplit partition rpartition startswith endswith strip "
    "lstrip rstrip join replace removeprefix removesuffix index find count getattr setattr hasattr get setdefault pop "
    "environ import_module open encode decode bytes run Popen strftime literal NewType TypeVar ConfigDict "
    "legend filterwarnings getLogger unpack pack calcsize cat frombuffer field_validator model_validator".split()
)
LABEL_CALLS = frozenset(
    "Table TranslatedTable DataTable add_column add_row Finding log_table build_summary_table activity during "
    "translate_label build_figure build_curve_chart draw_noisy_curve Chart".split()
)
LOGGER_CALLS = frozenset("debug info success warning error critical log warn_once warn".split())
LABEL_KEYWORDS = frozenset(["component", "title", "label"])
COUNT_CALL = "format_count"
PLACEHOLDER = re.compile(r"\{\w*(?::[^{}]*)?\}|\{\{.*\}\}")  # of a literal that `format` or loguru fills in
# Texts that are put together at run time from names in the code: states of the cache's images, phases of a step,
# activities, learning rates and speeds on the console.
COMPOSED = (
    *(f"{{count:,}} {state}" for state in ("valid", "new", "stale", "changed", "missing", "bad")),
    *("training, writing a checkpoint", "{network} {lowest:.2e} to {highest:.2e}"),
    *("{seconds:,} s", "{days:,} d {hours:,} h", "text 1 {rate:.2e}", "text 2 {rate:.2e}"),
    *("training ({stage})", "{rank:,} ({activity})"),
    *("peak", "GPU peak", "host peak", "{rate:,} images/s", "{seconds:,} s/image"),
    " (host {host}, process {process}, started {started})",
    # Names in charts and above them.
    *("weights", "validation", "validation, EMA {decay}", "dropped", "empty", "(empty)", "steps", "step"),
    # Headings and verdicts of comparisons.
    *("group", "samples", "baseline", "arm", "difference", "low", "high", "verdict", "better", "worse", "undecided"),
    *("setting", "against", "combinations", "model", "value"),
    # Help of configs/document.py, whose other texts are those of the page.
    *("Print the page of all settings: type, default, meaning.",),
    *("language of the page (default: the one that LANG names, or English)",),
    *("Print the page of all options that the importer knows.", "as `{option}`"),
)


def extract_messages(root: Path) -> dict[str, tuple[str, ...]]:
    """Return the messages of all sources under `root`, each with the files that contain it."""
    sources: dict[str, set[str]] = {text: {"libraries"} for text in (*FOREIGN, *COMPOSED)}
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            name = path.relative_to(root).as_posix()
            if not name.startswith(ELSEWHERE):
                for text in extract_from_source(path.read_text(encoding="utf-8")):
                    sources.setdefault(text, set()).add(name)
    return {text: tuple(sorted(files)) for text, files in sources.items()}


def extract_from_source(source: str) -> Iterator[str]:
    """Yield the messages of a module's source."""
    tree = ast.parse(source)
    visitor = _Visitor(shows_tables="rich" in source, shows_docstring="__doc__" in source)
    visitor.visit(tree)
    yield from dict.fromkeys(visitor.found)


class _Visitor(ast.NodeVisitor):
    """Collects messages. A text inside another one, such as a condition's, is a part of that."""

    def __init__(self, shows_tables: bool, shows_docstring: bool):
        self.found: list[str] = []
        self._shows_tables, self._shows_docstring = shows_tables, shows_docstring

    def visit_Module(self, node: ast.Module) -> None:
        self._visit_body(node, self._shows_docstring)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for decorator in node.decorator_list:
            self.visit(decorator)
        self._visit_body(node, False)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.visit(node.args)
        self._visit_body(node, False)

    def visit_Expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Constant):  # a docstring of an attribute
            self.visit(node.value)

    def visit_Assert(self, node: ast.Assert) -> None:
        """Pass over assertions, whose messages are for programmers."""

    def visit_Compare(self, node: ast.Compare) -> None:
        for part in (node.left, *node.comparators):
            if not is_text(part):
                self.visit(part)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        self.visit(node.value)
        if isinstance(node.ctx, ast.Store) and is_text(node.slice):  # the name of a row
            self._add(node.slice)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if not is_text(node.value):  # a text's own method, such as `", ".join`
            self.visit(node.value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_Dict(self, node: ast.Dict) -> None:
        for key, value in zip(node.keys, node.values, strict=True):
            if key is not None and is_text(key):
                self._add(key, is_label=self._shows_tables)
            self.visit(value)

    def visit_Call(self, node: ast.Call) -> None:
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        self.visit(node.func)
        if name == COUNT_CALL:
            self._add_count(node)
            return
        for place, argument in enumerate(node.args):
            if name in LOGGER_CALLS and place < 2 and isinstance(argument, ast.Constant):
                self._add_logged(argument, node.args[place + 1 :])
            else:
                self._visit_argument(argument, name, is_label=name in LABEL_CALLS)
        for keyword in node.keywords:
            self._visit_argument(keyword.value, name, is_label=keyword.arg in LABEL_KEYWORDS)

    def _visit_argument(self, node: ast.expr, call: str, is_label: bool) -> None:
        if is_label and isinstance(node, ast.Tuple):
            for item in node.elts:
                self._visit_argument(item, call, is_label)
            return
        if not is_text(node):
            self.visit(node)
            return
        if call not in UNSHOWN_CALLS:
            self._add(node, is_label)
        self._visit_fields(node)

    def generic_visit(self, node: ast.AST) -> None:
        if isinstance(node, ast.expr) and is_text(node):
            self._add(node)
            self._visit_fields(node)
        else:
            super().generic_visit(node)

    def _visit_body(self, node: ast.Module | ast.ClassDef | ast.FunctionDef, shows_docstring: bool) -> None:
        first, *rest = node.body or [ast.Pass()]
        if ast.get_docstring(node) is None:
            self.visit(first)
        elif shows_docstring:
            self._keep([ast.get_docstring(node) or ""])
        for statement in rest:
            self.visit(statement)

    def _visit_fields(self, node: ast.AST) -> None:
        """Visit the expressions of a text's fields, whose calls may contain further messages."""
        for expression in (inner for child in ast.walk(node) for inner in list_expressions(child)):
            self.visit(expression)

    def _add(self, node: ast.expr, is_label: bool = False) -> None:
        for parts in expand(node):
            self._keep(parts, is_label)

    def _add_count(self, node: ast.Call) -> None:
        """Add singular and plural of a count (configs/problems.py)."""
        nouns = [parts for argument in node.args[1:2] for parts in expand(argument)]
        plurals = [parts for argument in node.args[2:] for parts in expand(argument)]
        plurals = plurals or [[*noun, "s"] for noun in nouns]
        for parts in (*nouns, *plurals):
            self._keep([Field("count", ","), " ", *parts])

    def _add_logged(self, node: ast.Constant, arguments: Sequence[ast.expr]) -> None:
        if isinstance(node.value, str):
            self._keep(split_logged(node.value, arguments))

    def _keep(self, parts: Sequence[Part], is_label: bool = False) -> None:
        text = format_template(number_fields(merge_parts(parts)))
        literal = "".join(part for part in parts if isinstance(part, str))
        is_label = is_label and re.fullmatch(r"[A-Za-z/-]+", literal) is not None
        has_words = re.search(r"[A-Za-z]{2,}", literal) and (" " in text.strip() or is_label)
        if has_words and not is_code(literal):
            self.found.append(text)


def is_code(literal: str) -> bool:
    """Return whether a text is markup, a pattern or a command and not a message."""
    other = r"\s*<|.*\(\?[:!<=P]|^--\w|^\\|python -[cm] |SELECT |PRAGMA |.*\{extra\[|.*\{task\."
    command = r"%\(prog\)s|(bash launch|python train)/\S+( --\w+)?$|sdxl-trainer \w*$|autoload "
    return re.match(f"{other}|{command}", literal) is not None


def list_expressions(node: ast.AST) -> list[ast.expr]:
    """List what a part of a text takes from elsewhere: the value of a field, the sides of a sum, or a condition's."""
    if isinstance(node, ast.FormattedValue):
        return [] if is_text(node.value) else [node.value]
    if isinstance(node, ast.BinOp):
        return [side for side in (node.left, node.right) if not is_text(side) and not isinstance(side, ast.BinOp)]
    parts = (node.test, node.body, node.orelse) if isinstance(node, ast.IfExp) else ()
    return [part for part in parts if not is_text(part)]


def is_text(node: ast.AST) -> bool:
    """Return whether an expression is a text written in the source: a literal, an f-string, a sum or a condition of
    such."""
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str)
    if isinstance(node, ast.IfExp):
        return is_text(node.body) or is_text(node.orelse)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return is_text(node.left) or is_text(node.right)
    return isinstance(node, ast.JoinedStr)


def expand(node: ast.AST) -> list[list[Part]]:
    """Return all forms of a text: each condition in it doubles them."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [split_placeholders(node.value) if node.value else []]
    if isinstance(node, ast.IfExp) and is_text(node):
        return [*expand(node.body), *expand(node.orelse)]
    if isinstance(node, ast.BinOp) and is_text(node):
        return _combine([expand(node.left), expand(node.right)])
    if isinstance(node, ast.JoinedStr):
        return _combine([expand(part) for part in node.values])
    if isinstance(node, ast.FormattedValue):
        if is_text(node.value) and node.conversion < 0 and node.format_spec is None:
            return expand(node.value)
        spec = node.format_spec.values if isinstance(node.format_spec, ast.JoinedStr) else []
        shown = "".join(str(part.value) for part in spec if isinstance(part, ast.Constant))
        return [[Field(name_field(node.value), shown)]]
    return [[Field(name_field(node))]]


def split_placeholders(text: str) -> list[Part]:
    """Return the parts of a literal. Places such as `{}`, `{:.2f}` and `{path}` are filled in by `format` or loguru."""
    if not PLACEHOLDER.search(text):
        return [text]
    try:
        pieces = list(string.Formatter().parse(text))
    except ValueError:  # braces of its own
        return [text]
    if any("[" in (name or "") for _, name, _, _ in pieces):  # the format of a log line
        return [text]
    parts: list[Part] = []
    for literal, name, spec, _ in pieces:
        parts += [literal] if literal else []
        parts += [Field(name if name.isidentifier() else "value", spec or "")] if name is not None else []
    return parts


def split_logged(text: str, arguments: Sequence[ast.expr]) -> list[Part]:
    """Return the parts of a message of loguru, whose places are filled in by the arguments behind it."""
    names = iter([name_field(argument) for argument in arguments])
    parts = split_placeholders(text)
    return [Field(next(names, part.name), part.spec) if isinstance(part, Field) else part for part in parts]


def _combine(choices: list[list[list[Part]]]) -> list[list[Part]]:
    number = 1
    for forms in choices:
        number *= len(forms)
    if number > MAX_FORMS:
        choices = [forms if len(forms) == 1 else [[Field("value")]] for forms in choices]
    return [list(itertools.chain(*form)) for form in itertools.product(*choices)]


def merge_parts(parts: Sequence[Part]) -> list[Part]:
    """Join literal parts that follow one another, and fields without a text between them."""
    merged: list[Part] = []
    for part in parts:
        last = merged[-1] if merged else None
        if isinstance(part, str) and isinstance(last, str):
            merged[-1] = last + part
        elif isinstance(part, Field) and isinstance(last, Field):
            merged[-1] = Field(f"{last.name}_{part.name}")
        elif part != "":
            merged.append(part)
    return merged


def number_fields(parts: Sequence[Part]) -> list[Part]:
    """Give fields of one name different ones: `size`, `size2`."""
    seen: dict[str, int] = {}
    numbered: list[Part] = []
    for part in parts:
        if isinstance(part, Field):
            seen[part.name] = count = seen.get(part.name, 0) + 1
            part = Field(part.name if count == 1 else f"{part.name}{count}", part.spec)
        numbered.append(part)
    return numbered


def name_field(node: ast.AST) -> str:
    """Return a name for a field by its expression: `folder` for `config.run.folder`, `images` for `len(images)`."""
    if isinstance(node, ast.Name):
        return node.id.strip("_") or "value"
    if isinstance(node, ast.Attribute):
        return node.attr.strip("_")
    if isinstance(node, ast.Call):
        return name_field(node.args[0]) if node.args else name_field(node.func)
    if isinstance(node, (ast.Subscript, ast.Await, ast.Starred)):
        return name_field(node.value)
    if isinstance(node, ast.BinOp):
        return name_field(node.left)
    if isinstance(node, (ast.GeneratorExp, ast.ListComp)):
        return name_field(node.generators[0].iter)
    return "value"
