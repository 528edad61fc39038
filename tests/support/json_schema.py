"""The part of JSON Schema that the excerpts in tests/fixtures/clusters use."""

import re
from collections.abc import Iterator
from typing import Any

TYPES = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool}
KEYWORDS = {"$schema", "$ref", "definitions", "type", "properties", "patternProperties", "additionalProperties"}
KEYWORDS |= {"required", "items", "anyOf", "pattern", "case_insensitive_enum"}


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
