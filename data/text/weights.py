"""Weights of words in captions: `(word:1.2)`, as in kohya-ss/sd-scripts with `--weighted_captions`.

| written | read as |
|---|---|
| `(word)` | weight × 1.1 |
| `(word:1.2)` | weight × 1.2 |
| `[word]` | weight ÷ 1.1 |
| `\\(`, `\\)`, `\\[`, `\\]`, `\\\\` | the character itself |

Groups may lie in groups, and their weights multiply. A group that is never closed lasts to the end of the caption. A
closing bracket without an opening one is text.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

ROUND_FACTOR, SQUARE_FACTOR = 1.1, 1 / 1.1
MAX_WEIGHT = 100.0  # of a word, with either sign; beyond it, 16-bit states would overflow
PARTS = re.compile(r"\\[\\()\[\]]|\\|[()\[\]]|:([+-]?(?:\d+\.?\d*|\.\d+))\)|[^\\()\[\]:]+|:")
SPECIAL = re.compile(r"[\\()\[\]]")


class WeightedText(NamedTuple):
    """A part of a caption whose words have one weight."""

    text: str
    weight: float = 1.0


def parse_weights(caption: str) -> list[WeightedText]:
    """Split a caption into texts of equal weight, without the marks of the weights. There is at least one text."""
    if SPECIAL.search(caption) is None:
        return [WeightedText(caption)]
    parts = list(PARTS.finditer(caption))
    texts: list[str] = []
    # One array operation for each group, because a hostile caption may hold thousands of groups in each other.
    weights, opened = np.ones(len(parts)), {"(": [], "[": []}
    with np.errstate(over="ignore", invalid="ignore"):
        for part in parts:
            text = part[0]
            closed = "(" if text[-1] == ")" else "[" if text == "]" else ""
            if text[0] == "\\":
                texts.append(text[1:])
            elif text in opened:
                opened[text].append(len(texts))
            elif closed and opened[closed]:
                factor = float(part[1]) if part[1] else ROUND_FACTOR if closed == "(" else SQUARE_FACTOR
                weights[opened[closed].pop() : len(texts)] *= factor
            else:
                texts.append(text)
        for bracket, factor in (("(", ROUND_FACTOR), ("[", SQUARE_FACTOR)):
            for start in opened[bracket]:
                weights[start : len(texts)] *= factor
    limited = np.clip(np.nan_to_num(weights[: len(texts)], nan=0.0), -MAX_WEIGHT, MAX_WEIGHT)
    return _join_equal(texts, limited.tolist())


def _join_equal(texts: Sequence[str], weights: Sequence[float]) -> list[WeightedText]:
    """Join neighbouring texts of equal weight, so that a word is not split at an escaped bracket."""
    groups: list[tuple[list[str], float]] = []
    for text, weight in zip(texts, weights, strict=True):
        if groups and groups[-1][1] == weight:
            groups[-1][0].append(text)
        else:
            groups.append(([text], weight))
    return [WeightedText("".join(group), weight) for group, weight in groups] or [WeightedText("")]


def format_weight(part: WeightedText) -> str:
    """Write a text with its weight so that `parse_weights` reads both again. Spaces at its ends stay outside."""
    body = part.text.strip()
    text = SPECIAL.sub(r"\\\g<0>", body)
    if body and part.weight != 1:
        text = f"({text}:{np.format_float_positional(part.weight, trim='-')})"
    return part.text.replace(body, text, 1) if body else part.text


def divide_groups(caption: str, separator: str) -> str:
    """Give each tag of a bracket group that holds several tags a group of its own, with the weight it has there.

    Shuffling and dropout would tear such a group, as they do in kohya's scripts. A caption whose groups hold one tag
    each is returned unchanged.
    """
    if all(map(_is_closed, caption.split(separator))):
        return caption
    tags: list[list[str]] = [[]]
    for text, weight in parse_weights(caption):
        for number, piece in enumerate(text.split(separator)):
            if number:
                tags.append([])
            tags[-1].append(format_weight(WeightedText(piece, weight)))
    return separator.join(map("".join, tags))


def _is_closed(tag: str) -> bool:
    """Return whether a tag closes every bracket that it opens."""
    depth = {"(": 0, "[": 0}
    for part in PARTS.finditer(tag):
        text = part[0]
        if text in depth:
            depth[text] += 1
        elif text[0] != "\\" and text[-1] in ")]":
            bracket = "(" if text[-1] == ")" else "["
            depth[bracket] = max(0, depth[bracket] - 1)
    return not any(depth.values())
