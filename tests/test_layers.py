"""The rules of the layout: who may import whom, what modules may be called, and how long things may get."""

import ast
import os
import re
import sys
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from forked_ranks import run_forked
from programs import ROOT

LEVELS = {"configs": 0, "launch": 1, "data": 1, "cache": 2, "train": 3}
# Rooms of a folder, lowest first: an import inside a folder leads to the same room or to a lower one. Modules at the
# folder's root are programs and what every room may use; no cycle may lead through them either.
ROOMS = {
    "data": ("images", "formats", "stores", "metadata", "index", "order", "text", "checks", "loading"),
    "cache": ("models", "encode", "upkeep", "preview"),
    "train": (
        *("held_out", "objective", "networks", "optim", "engine", "checkpoint", "sampling"),
        *("report", "evidence", "export", "estimates", "tiny", "run", "scoring", "doctor", "watch", "ablation"),
        "quality",
    ),
    "configs": ("language", "kohya"),
    "launch": (),
}
SOURCES = {
    path.relative_to(ROOT).as_posix(): path.read_text() for folder in LEVELS for path in (ROOT / folder).rglob("*.py")
}
MAX_FILE, MAX_FUNCTION, MAX_NESTING, MAX_ARGUMENTS, MAX_ENTRY_POINT = 500, 60, 4, 8, 60
MAX_MODULES, MAX_IMPORTS = 18, 25
TEXT_CALLS = {"read_text": 0, "write_text": 1}  # → arguments before the encoding
LIGHT = (
    "train/cli.py",
    *(
        f"{room}/program.py"
        for room in (
            *("cache/preview", "train/ablation", "train/doctor", "train/evidence", "train/quality", "train/watch"),
        )
    ),
)
ENTRY_POINTS = ("cache/main.py", "train/main.py", "train/sample_main.py")
STARTED = ("ablation", "doctor", "quality", "report", "tiny", "watch")  # rooms of train/ that are programs
# Programs that people start by path or by `python -m`.
PROGRAMS = (
    *(
        *ENTRY_POINTS,
        "train/convert.py",
        "train/cli.py",
        "train/compare.py",
        "train/validate.py",
        "data/demo.py",
        "configs/document.py",
        "configs/import_config.py",
    ),
    *(f"{room}/__main__.py" for room in ("cache/preview", *(f"train/{name}" for name in STARTED))),
)
PURE = (
    *(f"train/objective/{name}.py" for name in ("diffusion", "timesteps", "noise", "losses", "weightings")),
    *(f"train/objective/{name}.py" for name in ("adaptive_timesteps", "learned_weighting")),
    "data/images/bucket.py",
    "data/order/plan.py",
)
BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.Match)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def list_imports(node: ast.AST) -> list[str]:
    """Dotted names of all that is imported or reached as an attribute of an import, functions' own imports included."""
    names, aliases = [], {}
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            names += [alias.name for alias in child.names]
            aliases |= {
                alias.asname or alias.name.split(".")[0]: alias.name if alias.asname else alias.name.split(".")[0]
                for alias in child.names
            }
        elif isinstance(child, ast.ImportFrom):
            base = "." * child.level + (child.module or "")
            names += [f"{base}.{alias.name}" for alias in child.names]
            aliases |= {alias.asname or alias.name: f"{base}.{alias.name}" for alias in child.names}
        elif isinstance(child, ast.Call) and getattr(child.func, "attr", getattr(child.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            names += [arg.value for arg in child.args if isinstance(arg, ast.Constant)]
    for child in ast.walk(node):  # `torch.distributed.x` after a mere `import torch`
        if isinstance(child, ast.Attribute) and isinstance(child.value, ast.Name) and child.value.id in aliases:
            names.append(f"{aliases[child.value.id]}.{child.attr}")
    return names


def list_project_imports(source: str, sources: Mapping[str, str] = SOURCES) -> set[str]:
    """Return the project's files that a source imports, such as `data/index/join.py`."""
    found = set()
    for name in list_imports(ast.parse(source)):
        parts = name.split(".")[1:] if name.startswith("sdxl_trainer.") else []
        while parts and "/".join(parts) + ".py" not in sources and "/".join([*parts, "__init__.py"]) not in sources:
            parts.pop()
        if parts:
            file = "/".join(parts) + ".py"
            found.add(file if file in sources else "/".join([*parts, "__init__.py"]))
    # `from package.module import name` names the module's packages only by the way.
    return {
        file for file in found if not file.endswith("__init__.py") or f"{file[:-12]}/" not in "".join(found - {file})
    }


def get_room(file: str) -> str:
    """Return the room of a file, such as `index` for `data/index/join.py`; "" for the folder's root."""
    parts = file.split("/")
    return parts[1] if len(parts) > 2 else ""


def find_wrong_imports(file: str, source: str) -> list[str]:
    """Find relative imports, imports of the project by another name, and imports of a higher folder or room."""
    own, room, wrong = file.split("/")[0], get_room(file), []
    siblings = {Path(path).stem for path in SOURCES if Path(path).parent == Path(file).parent} - {
        "__init__",
        "__main__",
    }
    for name in list_imports(ast.parse(source)):
        top, *rest = name.split(".")
        if rest == ["__version__"]:  # the package's own, which is below all folders
            continue
        if not top:
            wrong.append(f"{file}: relative import {name}")
        elif top in LEVELS or top in siblings:
            wrong.append(f"{file}: {name} instead of sdxl_trainer.…")
        elif top == "sdxl_trainer" and rest and rest[0] != own and LEVELS.get(rest[0], 99) >= LEVELS[own]:
            wrong.append(f"{file}: imports {name}, which is not below {own}/")
        elif top == "sdxl_trainer" and len(rest) > 2 and rest[0] == own and room and rest[1] in ROOMS[own]:
            if ROOMS[own].index(rest[1]) > ROOMS[own].index(room):
                wrong.append(f"{file}: imports {name}, whose room is above {own}/{room}/")
    return wrong


def count_imports(file: str, source: str) -> list[str]:
    """Find modules that import more of the project's modules than a reader can follow."""
    number = len({name for name in list_project_imports(source) if not name.endswith("__init__.py")})
    return [f"{file}: imports {number} modules of the project"] if number > MAX_IMPORTS else []


def build_room_graph(graph: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Return the imports between rooms; a module at a folder's root is a room of its own."""

    def get_node(file: str) -> str:
        room = get_room(file)
        return f"{file.split('/')[0]}/{room}" if room else file

    rooms: dict[str, set[str]] = {}
    for file, targets in graph.items():
        if not file.endswith(("__init__.py", "__main__.py")):
            nodes = {get_node(target) for target in targets if not target.endswith("__init__.py")}
            rooms.setdefault(get_node(file), set()).update(nodes - {get_node(file)})
    return rooms


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """The modules along one import cycle, or nothing."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for target in sorted(graph.get(module, set()) - {module}):
            if cycle := visit(target, [*path, module]):
                return cycle
        done.add(module)
        return []

    return next((cycle for module in sorted(graph) if (cycle := visit(module, []))), [])


def find_forbidden(file: str, source: str) -> list[str]:
    """Use of process groups, of DeepSpeed, and broad excepts where they have no place."""
    tree, wrong = ast.parse(source), []
    for module, *homes in (
        (
            "torch.distributed",
            "launch/distributed.py",
            "launch/patches.py",
            "launch/launcher.py",
        ),  # the last runs torchrun
        ("deepspeed", "train/engine/"),
    ):
        if not file.startswith(tuple(homes)):
            wrong += [
                f"{file}: {name} belongs in {homes[0]}"
                for name in list_imports(tree)
                if f"{name}.".startswith(f"{module}.")
            ]
    for handler in (node for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler)):
        caught = (
            {node.id for node in ast.walk(handler.type) if isinstance(node, ast.Name)} if handler.type else {"nothing"}
        )
        last = handler.body[-1]
        passed_on = isinstance(last, ast.Raise) and last.exc is None
        renamed = isinstance(last, ast.Raise) and isinstance(last.cause, ast.Name) and last.cause.id == handler.name
        broad = (
            "nothing" in caught
            or ("Exception" in caught and not renamed)
            or ("BaseException" in caught and not passed_on)
        )
        if broad and file != "train/checkpoint/emergency.py":
            wrong.append(f"{file}:{handler.lineno}: catches everything")
    return wrong


def find_contract_breaches(file: str, source: str) -> list[str]:
    """Find functions called `check_*` that do not return an iterator of problems."""
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, FUNCTIONS)]
    checks = [node for node in functions if node.name.startswith("check_")]
    return [
        f"{file}: {node.name} is no generator of problems"
        for node in checks
        if node.returns is None or ast.unparse(node.returns) != "Iterator[Problem]"
    ]


def find_indirect_docstrings(file: str, source: str) -> list[str]:
    """Find docstrings that do not begin with a verb phrase or a noun phrase, and formatter switches."""
    wrong = [f"{file}: fmt: skip"] if re.search(r"#\s*fmt: (skip|off)", source) else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)):
            text = ast.get_docstring(node) or ""
            if re.match(r"(What|Whether|Where|How|Past|The same|Not|From now)\b", text):
                wrong.append(f"{file}: {text.splitlines()[0]}")
    return wrong


def find_unnamed_encodings(file: str, source: str) -> list[str]:
    """Find texts that are read or written in the encoding of the user's locale."""
    wrong = []
    for node in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        words = {keyword.arg: keyword.value for keyword in node.keywords}
        is_open = isinstance(node.func, ast.Name) and name == "open"
        if name in TEXT_CALLS or is_open or name.endswith("TemporaryFile"):
            places = [*node.args[1 if is_open else 0 :][:1], *filter(None, [words.get("mode")])]
            modes = [
                place.value for place in places if isinstance(place, ast.Constant) and isinstance(place.value, str)
            ]
            has_default = name.endswith("TemporaryFile") and not places
            is_binary = has_default or (name not in TEXT_CALLS and any("b" in mode for mode in modes))
            is_named = "encoding" in words or len(node.args) > TEXT_CALLS.get(name, len(node.args))
            wrong += [] if is_binary or is_named else [f"{file}:{node.lineno}: {name} without an encoding"]
        elif "text" in words and name in ("run", "Popen", "check_output") and "encoding" not in words:
            wrong.append(f"{file}:{node.lineno}: {name} with the locale's encoding")
    return wrong


def find_oversized(file: str, source: str) -> list[str]:
    """Files, functions, nesting and argument lists beyond what a reader can hold."""
    num_lines, limit = source.count("\n"), MAX_ENTRY_POINT if file in ENTRY_POINTS else MAX_FILE
    wrong = [f"{file}: {num_lines} lines"] if num_lines > limit else []
    for node in (node for node in ast.walk(ast.parse(source)) if isinstance(node, FUNCTIONS)):
        start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        figures = {
            "lines": (node.end_lineno - start + 1, MAX_FUNCTION),
            "levels": (compute_nesting(node.body), MAX_NESTING),
            "arguments": (sum(argument.arg not in ("self", "cls") for argument in arguments), MAX_ARGUMENTS),
        }
        wrong += [f"{file}: {node.name} has {count} {what}" for what, (count, most) in figures.items() if count > most]
    return wrong


def compute_nesting(body: list[ast.stmt]) -> int:
    """How deep blocks lie in blocks; `elif` is no deeper than its `if`."""
    deepest = 0
    for node in body:
        inner = [compute_nesting(getattr(node, part, [])) for part in ("body", "finalbody")]
        inner += [compute_nesting(branch.body) for part in ("handlers", "cases") for branch in getattr(node, part, [])]
        rest = getattr(node, "orelse", [])
        is_elif = isinstance(node, ast.If) and len(rest) == 1 and isinstance(rest[0], ast.If)
        inner.append(compute_nesting(rest) - is_elif)
        deepest = max(deepest, max(inner) + isinstance(node, BLOCKS))
    return deepest


def find_heavy_imports(source: str) -> list[str]:
    """What a module, and those of the project that it loads, import on being loaded from outside Python's library."""
    loaded = ast.Module([node for node in ast.parse(source).body if not isinstance(node, FUNCTIONS)], [])
    tops = {
        name for name in list_imports(loaded) if name.split(".")[0] not in (*sys.stdlib_module_names, "sdxl_trainer")
    }
    own = list_project_imports(ast.unparse(loaded))
    return sorted(tops.union(*(find_heavy_imports(SOURCES[file]) for file in own)))


def list_reachable(file: str, graph: dict[str, set[str]]) -> set[str]:
    """A module and all that it imports, directly or not."""
    found, waiting = set(), [file]
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            waiting += graph[module]
    return found


GRAPH = {file: list_project_imports(source) for file, source in SOURCES.items()}


@pytest.mark.parametrize(
    "check",
    [
        find_wrong_imports,
        find_forbidden,
        find_oversized,
        count_imports,
        find_contract_breaches,
        find_indirect_docstrings,
        find_unnamed_encodings,
    ],
)
def test_every_source_keeps_the_rules(check):
    assert len(SOURCES) > 30
    assert [line for file, source in sorted(SOURCES.items()) for line in check(file, source)] == []


def test_no_import_cycle_not_even_a_lazy_one():
    assert sum(map(len, GRAPH.values())) > 50
    assert find_cycle(GRAPH) == []
    assert find_cycle(build_room_graph(GRAPH)) == []


def test_no_module_shadows_one_of_python_or_of_a_dependency():
    # `torchrun train/main.py` puts train/ first on the path: train/random.py would be everybody's `import random`.
    taken = set(sys.stdlib_module_names) | set(packages_distributions()) - {"sdxl_trainer"}
    assert {"random", "deepspeed", "torch", "yaml"} <= taken
    assert [file for file in SOURCES if Path(file).stem in taken and not file.endswith("__init__.py")] == []


def test_every_folder_and_room_is_a_package_of_one_docstring():
    found = {get_room(file) and file.rpartition("/")[0] for file in SOURCES} - {""}
    assert found == {f"{folder}/{room}" for folder, rooms in ROOMS.items() for room in rooms}
    for package in (*LEVELS, *found):
        body = ast.parse(SOURCES[f"{package}/__init__.py"]).body
        assert len(body) == 1 and ast.get_docstring(ast.parse(SOURCES[f"{package}/__init__.py"])), package


def test_no_folder_holds_more_modules_than_a_reader_can_survey():
    files = [*map(Path, SOURCES), *(path.relative_to(ROOT) for path in (ROOT / "tests").rglob("*.py"))]
    counts = Counter(file.parent.as_posix() for file in files)
    assert {folder: count for folder, count in counts.items() if count > MAX_MODULES} == {}


@pytest.mark.parametrize("file", PROGRAMS)
def test_every_program_starts(file):
    """`--help` needs no settings and no device."""
    status, printed = run_forked(ROOT / file, ["--help"], 1, dict(os.environ), timeout=100)
    assert status == 0 and printed, printed


@pytest.mark.parametrize("file", (*ENTRY_POINTS, *LIGHT))
def test_entry_points_load_nothing_heavy(file):
    assert find_heavy_imports(SOURCES[file]) == []


@pytest.mark.parametrize("file", PURE)
def test_mathematics_needs_no_settings_and_no_ranks(file):
    reachable = list_reachable(file, GRAPH)
    assert [module for module in reachable if module.startswith(("configs/", "launch/"))] == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("data/index/index.py", "from sdxl_trainer.launch.logger import init_logger"),
        ("launch/logger.py", "def f():\n    import sdxl_trainer.data.index.index"),
        ("data/index/index.py", "from sdxl_trainer.cache import encoders"),
        ("cache/job.py", "import importlib\nimportlib.import_module('sdxl_trainer.train.run.job')"),
        ("configs/load.py", "from sdxl_trainer.data.order.plan import Plan"),
        ("data/index/index.py", "from .plan import Plan"),
        ("data/index/index.py", "from data.plan import Plan"),
        ("train/run/job.py", "import loop"),
        ("data/formats/npz.py", "from sdxl_trainer.data.index.join import Selection"),
        ("train/engine/layout.py", "def f():\n    from sdxl_trainer.train.run import loop"),
    ],
)
def test_a_planted_wrong_import_is_found(file, source):
    assert len(find_wrong_imports(file, source)) == 1
    assert (
        find_wrong_imports("train/run/job.py", "from sdxl_trainer.cache.models.encoders import load_vae\nimport torch")
        == []
    )


@pytest.mark.parametrize(
    "source",
    [
        "import torch.distributed as dist",
        "from torch import distributed",
        "from torch.distributed import barrier",
        "import torch\ntorch.distributed.barrier()",
        "import torch as t\nt.distributed.barrier()",
        "import deepspeed",
        "from deepspeed.utils import x",
        "__import__('deepspeed')",
        "try:\n    f()\nexcept:\n    pass",
        "try:\n    f()\nexcept Exception as error:\n    print(error)",
        "try:\n    f()\nexcept (OSError, Exception):\n    raise",
        "try:\n    f()\nexcept BaseException:\n    print()",
    ],
)
def test_planted_forbidden_code_is_found(source):
    assert find_forbidden("train/run/loop.py", source)
    assert find_forbidden("train/run/loop.py", "try:\n    f()\nexcept BaseException:\n    g()\n    raise") == []
    renamed = "try:\n    f()\nexcept Exception as error:\n    raise ValueError from "
    assert find_forbidden("data/text/strategy.py", renamed + "error") == []
    assert find_forbidden("data/text/strategy.py", renamed + "None")
    assert find_forbidden("launch/distributed.py", "import torch.distributed as dist") == []


def test_planted_locale_encodings_are_found():
    found = [
        "open(p)",
        "open(p, 'w')",
        "p.read_text()",
        "p.write_text(x)",
        "NamedTemporaryFile('w')",
        "run(x, text=True)",
    ]
    named = ["open(p, 'rb')", "open(p, encoding='utf-8')", "p.read_text('utf-8')", "p.write_text(x, encoding='utf-8')"]
    assert [len(find_unnamed_encodings("x.py", source)) for source in found] == [1] * len(found)
    named += ["TemporaryFile()", "open(p, mode='ab')", "os.open(p, 1)"]
    assert [source for source in named if find_unnamed_encodings("x.py", source)] == []


def test_planted_cycles_are_found():
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert find_cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    lazy = "def f():\n    from sdxl_trainer.train.run import loop\n    import sdxl_trainer.data.order.plan"
    assert list_project_imports(lazy) == {"train/run/loop.py", "data/order/plan.py"}
    rooms = build_room_graph({"data/a/x.py": {"data/b/y.py"}, "data/b/z.py": {"data/a/w.py"}, "data/q.py": set()})
    assert find_cycle(rooms) == ["data/a", "data/b", "data/a"]
    many = "\n".join(f"import sdxl_trainer.{file[:-3].replace('/', '.')}" for file in sorted(SOURCES)[:60])
    assert len(count_imports("train/run/job.py", many)) == 1


def test_planted_breaches_of_style_are_found():
    assert find_contract_breaches("x.py", "def check_a(b) -> list[Problem]:\n    return []")
    assert find_contract_breaches("x.py", "def check_a(b):\n    yield b")
    assert find_contract_breaches("x.py", "def check_a(b) -> Iterator[Problem]:\n    yield b") == []
    assert find_indirect_docstrings("x.py", 'def f():\n    """Whether all values are."""')
    assert find_indirect_docstrings("x.py", "a = [1]  # fmt: skip")
    assert find_indirect_docstrings("x.py", 'def f():\n    """Return whether every value is finite."""') == []


def test_planted_size_is_found():
    ladder = "if a:\n    pass\n" + "elif b:\n    pass\n" * 9
    fine = [
        "def f(self, a, b, c, d, e, f, g, *, h):\n    pass",
        f"def f():\n{indent(ladder, 1)}",
        f"def f():\n{indent(nest(4), 1)}",
        "def f():\n" + "    a\n" * 59,
        "a\n" * 500,
    ]
    oversized = [
        "def f(a, b, c, d, e, f, g, *, h, i):\n    pass",
        f"def f():\n{indent(nest(5), 1)}",
        "def f():\n" + "    a\n" * 60,
        "a\n" * 501,
    ]
    assert [find_oversized("train/x.py", source) for source in fine] == [[]] * len(fine)
    assert [len(find_oversized("train/x.py", source)) for source in oversized] == [1] * len(oversized)
    assert find_oversized("train/main.py", "a\n" * 61) == ["train/main.py: 61 lines"]


def test_planted_heavy_import_is_found():
    assert find_heavy_imports("import sys\nfrom pathlib import Path\ndef f():\n    import torch") == []
    assert find_heavy_imports("import sys\nif sys.argv:\n    import torch") == ["torch"]
    assert find_heavy_imports("from sdxl_trainer.launch.signals import StopRequest") == []
    assert "numpy" in find_heavy_imports(
        "try:\n    from sdxl_trainer.data.order.plan import Plan\nexcept ImportError:\n    pass"
    )


def nest(levels: int) -> str:
    """A pass within so many loops and tries."""
    source = "pass\n"
    for level in range(levels):
        head, tail = ("for a in b:\n", "") if level % 2 else ("try:\n", "finally:\n    pass\n")
        source = head + indent(source, 1) + tail
    return source


def indent(source: str, levels: int) -> str:
    """Every line further in."""
    return "".join("    " * levels + line + "\n" for line in source.splitlines())
