"""Reader of the Python settings of the first sdxl-trainer and its successor. No file is ever executed."""

import ast
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from sdxl_trainer.configs.kohya.readers import read_text
from sdxl_trainer.configs.problems import Problem, UserInputError

ARITHMETIC: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: operator.pow,
}
MAX_POWER = 64
# Names of the functions that build a mapping from their arguments; the last part of a dotted name counts.
MAPPINGS = ("cfg", "dict", "ConfigDict", "FrozenConfigDict", "create")
WHOLE = "initial_dictionary"  # argument of ConfigDict that is the mapping itself
RETURNED = ""  # takes the place of a variable's name for settings that a function returns directly


class NotPlainError(ValueError):
    """A Python expression whose value is unknown without executing it."""


class PythonSettings(NamedTuple):
    """Assigned values by name, and the source code of expressions whose value is unknown, by name."""

    values: dict[str, Any]
    sources: dict[str, str]


@dataclass
class _Variables:
    """The plain values of variables by name, and the unknown entries of mappings, by the name of the variable."""

    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, dict[str, str]] = field(default_factory=dict)

    def set_variable(self, name: str, node: ast.expr) -> None:
        """Assign an expression to a variable."""
        if _is_mapping(node):
            self.values[name] = {}
            for key, value in _list_entries(node, self.values):
                self.set_entry(name, key, value)
            return
        try:
            self.values[name] = _evaluate(node, self.values)
        except ValueError:  # also a number with too many digits to become a text
            self.values.pop(name, None)

    def set_entry(self, name: str, key: str, node: ast.expr) -> None:
        """Assign an expression to an entry of a variable."""
        entries = self.values.get(name)
        if not isinstance(entries, dict):
            entries = self.values[name] = {}
        self.sources.setdefault(name, {}).pop(key, None)
        try:
            entries[key] = _evaluate(node, self.values)
        except ValueError:
            entries.pop(key, None)
            self.sources[name][key] = ast.unparse(node)


def read_python(path: Path) -> PythonSettings:
    """Read the settings that a function of the file, such as `get_config`, returns.

    The file is parsed, not executed: constants, variables, lists, `dict(...)`, `ConfigDict(...)`, `cfg(...)`,
    arithmetic, f-strings and os.path.join are evaluated. Settings may be assigned one by one or returned as a whole.

    Raises:
        UserInputError: the file cannot be read, is not Python, or returns no settings.
    """
    text = read_text(path)
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # the last two for deep nesting
        reason = f"{error.msg} (line {error.lineno})" if isinstance(error, SyntaxError) else "nested too deeply"
        rule = f"is not valid Python: {reason}"
        raise UserInputError([Problem("FILE", path, rule, "correct the line that is named")]) from None
    returned = {"config", RETURNED} | {
        node.value.id for node in _list_returns(tree) if isinstance(node.value, ast.Name)
    }
    try:
        variables = _read_assignments(tree)
    except RecursionError:
        rule = "is not valid Python: nested too deeply"
        raise UserInputError([Problem("FILE", path, rule, "simplify it")]) from None
    settings = PythonSettings({}, {})
    for name in sorted(returned):
        value = variables.values.get(name)
        settings.values.update(value if isinstance(value, dict) else {})
        settings.sources.update(variables.sources.get(name, {}))
    if not settings.values:
        rule = "assigns nothing to config.<name>, and no function of it returns settings"
        raise UserInputError([Problem("FILE", path, rule, "give the file that contains get_config()")])
    return settings


def _list_returns(tree: ast.AST) -> Iterator[ast.Return]:
    """Yield what functions that need no arguments return; `cfg(**kwargs)` builds mappings and returns no settings."""
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        inputs = function.args
        if len(inputs.args) == len(inputs.defaults) and not (inputs.vararg or inputs.kwarg):
            yield from (node for node in ast.walk(function) if isinstance(node, ast.Return))


def _read_assignments(tree: ast.AST) -> _Variables:
    variables = _Variables()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            _assign(variables, node.targets[0], node.value)
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            _assign(variables, node.target, node.value)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            _update(variables, node.value)
    for node in _list_returns(tree):
        if node.value is not None and _is_mapping(node.value):
            variables.set_variable(RETURNED, node.value)
    return variables


def _update(variables: _Variables, call: ast.Call) -> None:
    """Set the entries that `<variable>.update(...)` sets; other calls set none."""
    called = call.func
    if isinstance(called, ast.Attribute) and called.attr == "update" and isinstance(called.value, ast.Name):
        for key, value in _list_entries(call, variables.values):
            variables.set_entry(called.value.id, key, value)


def _assign(variables: _Variables, target: ast.expr, value: ast.expr) -> None:
    if isinstance(target, ast.Name):
        variables.set_variable(target.id, value)
    elif isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):
        variables.set_entry(target.value.id, target.attr, value)
    elif isinstance(target, ast.Subscript) and isinstance(target.value, ast.Name):
        key = target.slice.value if isinstance(target.slice, ast.Constant) else None
        if isinstance(key, str):
            variables.set_entry(target.value.id, key, value)


def _is_mapping(node: ast.expr) -> bool:
    """Return whether an expression builds a mapping: `dict(...)`, `ConfigDict(...)`, `cfg(...)` or `{...}`."""
    if isinstance(node, ast.Dict):
        return True
    return isinstance(node, ast.Call) and ast.unparse(node.func).rsplit(".", 1)[-1] in MAPPINGS


def _list_entries(node: ast.expr, known: dict[str, Any]) -> Iterator[tuple[str, ast.expr]]:
    """Yield the keys and the expressions of a mapping. Entries whose key is unknown are left out."""
    if isinstance(node, ast.Dict):
        for key, value in zip(node.keys, node.values, strict=True):
            if key is None:  # **other
                yield from _list_entries(value, known)
            elif isinstance(key, ast.Constant):
                yield str(key.value), value
    elif isinstance(node, ast.Call):
        for value in node.args:
            yield from _list_entries(value, known)
        for word in node.keywords:
            if word.arg in (None, WHOLE):  # **other, or the mapping itself
                yield from _list_entries(word.value, known)
            else:
                yield str(word.arg), word.value
    elif isinstance(node, ast.Name) and isinstance(known.get(node.id), dict):
        yield from ((key, ast.Constant(value)) for key, value in known[node.id].items())


def _evaluate(node: ast.expr, known: dict[str, Any]) -> Any:
    """Return the value of a plain expression.

    Args:
        known: values of variables.

    Raises:
        NotPlainError: the expression is not plain.
    """
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_evaluate(item, known) for item in node.elts]
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        return _calculate(node, known)
    if isinstance(node, ast.JoinedStr):
        return "".join(_format_part(part, known) for part in node.values)
    if _is_mapping(node):
        return {key: _evaluate(value, known) for key, value in _list_entries(node, known)}
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("os.path.join", "join"):
        return "/".join(str(_evaluate(item, known)) for item in node.args)
    if isinstance(node, ast.Name) and node.id in known:
        return known[node.id]
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        entries = known.get(node.value.id)
        if isinstance(entries, dict) and node.attr in entries:
            return entries[node.attr]
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise NotPlainError(ast.unparse(node)) from None


def _calculate(node: ast.BinOp, known: dict[str, Any]) -> Any:
    """Return the result of arithmetic on numbers, or of joining two texts or lists."""
    left, right = _evaluate(node.left, known), _evaluate(node.right, known)
    is_add = isinstance(node.op, ast.Add)
    if is_add and type(left) is type(right) and isinstance(left, (str, list)):
        return left + right
    divides, raises = isinstance(node.op, (ast.Div, ast.FloorDiv)), isinstance(node.op, ast.Pow)
    if not all(isinstance(side, (int, float)) for side in (left, right)) or (divides and right == 0):
        raise NotPlainError(ast.unparse(node))
    if raises and (abs(right) > MAX_POWER or abs(left) > 10**6 or (left == 0 and right < 0)):
        raise NotPlainError(ast.unparse(node))
    try:
        result = ARITHMETIC[type(node.op)](left, right)
    except ArithmeticError:
        raise NotPlainError(ast.unparse(node)) from None
    if not isinstance(result, (int, float)):  # the root of a negative number
        raise NotPlainError(ast.unparse(node))
    return result


def _format_part(part: ast.expr, known: dict[str, Any]) -> str:
    if isinstance(part, ast.FormattedValue) and part.format_spec is None and part.conversion == -1:
        return str(_evaluate(part.value, known))
    if isinstance(part, ast.Constant):
        return str(part.value)
    raise NotPlainError(ast.unparse(part))
