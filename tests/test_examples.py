"""Examples of clusters fit their schemas, and run the commands of the quick start by scripts that exist."""

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from programs import ROOT

EXAMPLES, SCHEMAS = ROOT / "docs" / "examples", ROOT / "tests" / "fixtures" / "clusters"
QUICKSTART = (ROOT / "docs" / "QUICKSTART.md").read_text(encoding="utf-8")
# The part of JSON Schema that the excerpts use.
TYPES = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool}
KEYWORDS = {"$schema", "$ref", "definitions", "type", "properties", "patternProperties", "additionalProperties"}
KEYWORDS |= {"required", "items", "anyOf", "pattern", "case_insensitive_enum"}
PAIRS = {"pytorch_job": "pytorch_job", "skypilot": "skypilot_task"}


def load(example: str) -> tuple[Any, dict[str, Any]]:
    schema = json.loads((SCHEMAS / f"{PAIRS[example]}.json").read_text())
    return yaml.safe_load((EXAMPLES / f"{example}.yaml").read_text()), schema


@pytest.mark.parametrize("example", PAIRS)
def test_an_example_fits_its_schema(example):
    content, schema = load(example)
    assert list(iterate_errors(content, schema, schema)) == []


@pytest.mark.parametrize(
    ("example", "path", "value", "message"),
    [
        ("skypilot", ["num_node"], 2, "num_node: is unknown"),
        ("skypilot", ["num_nodes"], "two", "num_nodes: is not of the type"),
        ("skypilot", ["resources", "disk_size"], "500 GB", "disk_size: fits none"),
        ("skypilot", ["resources", "cloud"], "nowhere", "cloud: is none of the values"),
        ("skypilot", ["envs"], {"1A": "x"}, "envs.1A: is unknown"),
        ("pytorch_job", ["spec", "runPolicy"], None, "runPolicy: is not of the type"),
        ("pytorch_job", ["spec", "pytorchReplicaSpecs", "Master", "replica"], 1, "Master.replica: is unknown"),
        (
            "pytorch_job",
            ["spec", "pytorchReplicaSpecs", "Worker", "template", "spec", "containers"],
            [{}],
            "lacks name",
        ),
    ],
)
def test_a_mistake_is_found(example, path, value, message):
    content, schema = load(example)
    content = part = copy.deepcopy(content)
    for name in path[:-1]:
        part = part[name]
    part[path[-1]] = value
    assert any(message in error for error in iterate_errors(content, schema, schema))


def list_instructions() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile, each with its arguments on one line."""
    text = re.sub(r"\\\n\s*", "", (EXAMPLES / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(line.partition(" ")[0], line.partition(" ")[2]) for line in lines]


def test_the_dockerfile_runs_the_commands_of_the_quick_start():
    instructions = list_instructions()
    assert {name for name, _ in instructions} == {"FROM", "SHELL", "RUN", "WORKDIR", "COPY", "ENV", "CMD"}
    assert instructions[0][0] == "FROM" and ":" in instructions[0][1]  # a version, not `latest`
    commands = [
        command for name, command in instructions if name == "RUN" and not command.startswith("apt-get update ")
    ]
    [start] = [" ".join(json.loads(command)) for name, command in instructions if name == "CMD"]
    documented = [line.partition("#")[0].strip() for line in QUICKSTART.splitlines()]
    assert commands and all(command in documented for command in [*commands, start])
    copied = [source for name, words in instructions if name == "COPY" for source in words.split()[:-1]]
    assert copied and all((ROOT / source).exists() for source in copied)
    order = [name for name, _ in instructions]
    assert order.index("COPY") < instructions.index(("RUN", "pip install -c constraints.txt -e ."))


@pytest.mark.parametrize("name", ["pytorch_job.yaml", "skypilot.yaml", "Dockerfile"])
def test_an_example_names_scripts_that_exist_and_says_what_was_not_tried(name):
    text = (EXAMPLES / name).read_text()
    scripts = re.findall(r"\blaunch/\w+\.sh", text)
    assert scripts and all((ROOT / script).is_file() for script in scripts)
    head = text.partition("\nFROM")[0].partition("\nname:")[0]
    assert "Checked: " in head and re.search("Not (run|built): ", head)


def test_the_setup_of_skypilot_is_that_of_the_quick_start():
    setup = load("skypilot")[0]["setup"].splitlines()
    assert Path(ROOT / "constraints.txt").is_file()
    assert all(any(line.partition("#")[0].strip() == command for line in QUICKSTART.splitlines()) for command in setup)


def iterate_errors(value: Any, schema: dict[str, Any], root: dict[str, Any], place: str = "") -> Iterator[str]:
    """Yield a message for each place in `value` that does not fit a schema."""
    assert schema.keys() <= KEYWORDS, schema.keys() - KEYWORDS
    if "$ref" in schema:
        yield from iterate_errors(value, root["definitions"][schema["$ref"].rpartition("/")[2]], root, place)
        return
    if "anyOf" in schema and all(list(iterate_errors(value, option, root, place)) for option in schema["anyOf"]):
        yield f"{place}: fits none of the forms"
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(has_type(value, kind) for kind in kinds):
        yield f"{place}: is not of the type {kinds}"
    if isinstance(value, str):
        if "pattern" in schema and not re.search(schema["pattern"], value):
            yield f"{place}: does not match {schema['pattern']}"
        if value.lower() not in schema.get("case_insensitive_enum", [value.lower()]):
            yield f"{place}: is none of the values"
    if isinstance(value, list) and "items" in schema:
        for number, item in enumerate(value):
            yield from iterate_errors(item, schema["items"], root, f"{place}[{number}]")
    if isinstance(value, dict):
        yield from iterate_field_errors(value, schema, root, place)


def iterate_field_errors(value: dict, schema: dict[str, Any], root: dict[str, Any], place: str) -> Iterator[str]:
    yield from (f"{place}: lacks {name}" for name in schema.get("required", []) if name not in value)
    for name, item in value.items():
        patterns = [part for pattern, part in schema.get("patternProperties", {}).items() if re.search(pattern, name)]
        found = [*([schema["properties"][name]] if name in schema.get("properties", {}) else []), *patterns]
        if not found:
            rest = schema.get("additionalProperties", True)
            if rest is False:
                yield f"{place}.{name}: is unknown"
            found = [rest] if isinstance(rest, dict) else []
        for part in found:
            yield from iterate_errors(item, part, root, f"{place}.{name}")


def has_type(value: Any, kind: str) -> bool:
    if kind == "null" or isinstance(value, bool):
        return value is None if kind == "null" else kind == "boolean"
    return isinstance(value, TYPES[kind])
