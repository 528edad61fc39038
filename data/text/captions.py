"""The text that a sample is trained with: from its record, through the field's canonical steps, in their order.

prefix/suffix → caption dropout → wildcards → kept tags → token warm-up → shuffle → tag dropout → secondary separator →
replacements, as kohya-ss/sd-scripts orders them. Pure: all that is random comes from the generator that is handed in.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

TAG_FIELDS = ("caption", "tags")
DESCRIPTION_FIELDS = ("description", "nl_caption")
JOINT = ", "  # what tags are joined with, whatever they were separated by
# `{2$$a|b|c}` takes two of the options, `{1-2$$ and $$a|b|c}` one or two and says what stands between them. What stands
# between is short, so that nested groups cannot blow a caption up.
COUNT = re.compile(r"\s*(\d{1,4})(?:-(\d{1,4}))?\$\$(?:(.{0,32}?)\$\$)?", re.DOTALL)


@dataclass(frozen=True)
class CaptionSettings:
    """What is done to captions; as it stands, nothing. configs/captions.py explains each field to users."""

    source: Literal["pick", "join", "tags", "description"] = "pick"
    description_rate: float = 0.5
    prefix: str = ""
    suffix: str = ""
    dropout_rate: float = 0.0
    dropout_every_epochs: int = 0
    wildcards: bool = False
    keep_tokens: int = 0
    keep_tokens_separator: str = ""
    token_warmup_steps: int = 0
    token_warmup_min: int = 1
    shuffle: bool = False
    tag_dropout_rate: float = 0.0
    separator: str = ","
    secondary_separator: str = ""
    replacements: Mapping[str, str | list[str]] = field(default_factory=dict)


def shape_caption(
    record: Mapping[str, Any], settings: CaptionSettings, rng: np.random.Generator, step: int = 0, epoch: int = 0
) -> str:
    """The caption that a record is trained with this time.

    Args:
        rng: keyed to the sample and its epoch, so that the caption depends on nothing else.
        step: optimizer steps done before this one, for the token warm-up.
        epoch: of the sample, from 0.
    """
    tags, description = pick_texts(record, settings, rng)
    return shape_text(tags, description, settings, rng, step, epoch)


def pick_texts(record: Mapping[str, Any], settings: CaptionSettings, rng: np.random.Generator) -> tuple[str, str]:
    """(tags, description) that a record is trained with this time; one of them, or both, may be empty."""
    tags = read_caption_fields(record, TAG_FIELDS, settings.separator)
    description = read_caption_fields(record, DESCRIPTION_FIELDS, settings.separator)
    if settings.source == "tags":
        description = ""
    elif settings.source == "description":
        tags = ""
    elif settings.source == "pick" and tags and description:
        tags, description = ("", description) if rng.random() < settings.description_rate else (tags, "")
    return tags, description


def shape_text(
    tags: str, description: str, settings: CaptionSettings, rng: np.random.Generator, step: int = 0, epoch: int = 0
) -> str:
    """The steps of `shape_caption` after its text was chosen; with both texts, the description follows the tags.

    A description is prose: its commas separate no tags, so the steps that take tags apart leave it alone.
    """
    tags, description = _add_affixes(tags, description, settings)
    if draw_dropout(settings, rng, epoch):
        return ""
    if settings.wildcards:
        tags, description = (expand_wildcards(_pick_line(text, rng), rng) for text in (tags, description))
    tags = _shape_tags(tags, settings, rng, step)
    text = JOINT.join(part for part in (tags, description) if part)
    if settings.secondary_separator:
        text = text.replace(settings.secondary_separator, settings.separator)
    for old, new in settings.replacements.items():
        chosen = new if isinstance(new, str) else new[int(rng.integers(len(new)))]
        text = text.replace(old, chosen) if old else chosen
    return text


def draw_dropout(settings: CaptionSettings, rng: np.random.Generator, epoch: int) -> bool:
    """Whether a caption is replaced by the empty one this time."""
    # Drawn even if the rate is 0, so that turning dropout on leaves what is drawn for the other captions as it was.
    dropped = rng.random() < settings.dropout_rate
    return dropped or bool(settings.dropout_every_epochs and (epoch + 1) % settings.dropout_every_epochs == 0)


def read_caption_fields(record: Mapping[str, Any], fields: tuple[str, ...], separator: str = ",") -> str:
    """The first of a record's `fields` that holds anything; a list of tags becomes one string."""
    value = next((record[name] for name in fields if record.get(name)), "")
    if isinstance(value, (list, tuple)):
        return f"{separator} ".join(str(tag) for tag in value)
    return str(value)


def expand_wildcards(text: str, rng: np.random.Generator) -> str:
    """Replace each `{a|b}` by one of its options; options may hold groups in turn.

    `{{` and `}}` stand for literal braces, so a group that begins with a group is written `{ {a|b}|c}`. A brace without
    its partner, and `{}`, stay as they are. One pass over the text and no recursion: captions come from anywhere.
    """
    if "{" not in text and "}" not in text:
        return text
    groups = [_Group("")]
    position = 0
    while position < len(text):
        token, top = text[position], groups[-1]
        if token in "{}" and text[position + 1 : position + 2] == token:
            # `}}` closes two groups unless a literal brace is open, or nothing is.
            token += token if token == "{" or top.opener != "{" else ""
        if token in ("{", "{{"):
            groups.append(_Group(token))
        elif len(groups) > 1 and len(token) == len(top.opener) and token[0] == "}":
            groups.pop()
            groups[-1].add("{" + top.text + "}" if token == "}}" else top.choose(rng))
        elif token == "|" and top.opener == "{":
            top.options.append("")
        else:
            top.add("}" if token == "}}" else token)
        position += len(token)
    while len(groups) > 1:
        unclosed = groups.pop()
        groups[-1].add("{" + unclosed.text)
    return groups[0].text


class _Group:
    """What was read since an opening brace: the options of `{`, or the one text after `{{` or at the beginning."""

    def __init__(self, opener: str):
        self.opener = opener
        self.options = [""]

    @property
    def text(self) -> str:
        return "|".join(self.options)

    def add(self, text: str) -> None:
        self.options[-1] += text

    def choose(self, rng: np.random.Generator) -> str:
        if self.options == [""]:
            return "{}"
        count = COUNT.match(self.options[0])
        if count is None:
            return self.options[int(rng.integers(len(self.options)))]
        options = [self.options[0][count.end() :], *self.options[1:]]
        low, high = sorted((int(count[1]), int(count[2] or count[1])))
        number = int(rng.integers(low, high + 1))  # more than there are options takes all
        chosen = rng.permutation(len(options))[:number]
        return (JOINT if count[3] is None else count[3]).join(options[i] for i in chosen)


def _add_affixes(tags: str, description: str, settings: CaptionSettings) -> tuple[str, str]:
    """Prefix before the first text and suffix after the last; on each line where one line will be picked."""
    if not (settings.prefix or settings.suffix):
        return tags, description

    def affix(text: str, prefix: str, suffix: str) -> str:
        lines = text.split("\n") if settings.wildcards else [text]
        lines = [line.strip() for line in lines if line.strip()] or [""]
        return "\n".join(" ".join(part for part in (prefix, line, suffix) if part) for line in lines)

    if tags and description:
        return affix(tags, settings.prefix, ""), affix(description, "", settings.suffix)
    if description:
        return "", affix(description, settings.prefix, settings.suffix)
    return affix(tags, settings.prefix, settings.suffix), ""


def _pick_line(text: str, rng: np.random.Generator) -> str:
    if "\n" not in text:
        return text
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    return lines[int(rng.integers(len(lines)))] if lines else ""


def _shape_tags(text: str, settings: CaptionSettings, rng: np.random.Generator, step: int) -> str:
    """Everything that takes a text apart into tags: kept ones, warm-up, shuffle, dropout. Else the text untouched."""
    mark, warmup_steps = settings.keep_tokens_separator, settings.token_warmup_steps
    marked = bool(mark) and mark in text
    if not (marked or settings.shuffle or warmup_steps or settings.tag_dropout_rate):
        return text
    fixed, ending = [], []
    if marked:
        head, middle, *tail = text.split(mark)
        fixed, flexible = _split(head, settings), _split(middle, settings)
        ending = [tag for part in tail for tag in _split(part, settings)]
    else:
        flexible = _split(text, settings)
        fixed, flexible = flexible[: settings.keep_tokens], flexible[settings.keep_tokens :]
    if step < warmup_steps:
        least = settings.token_warmup_min
        # kohya's formula in whole numbers: a float's error must not cost a tag.
        flexible = flexible[: step * (len(flexible) - least) // warmup_steps + least]
    if settings.shuffle:
        flexible = [flexible[i] for i in rng.permutation(len(flexible))]
    if settings.tag_dropout_rate:
        kept = rng.random(len(flexible)) >= settings.tag_dropout_rate
        flexible = [tag for tag, keep in zip(flexible, kept, strict=True) if keep]
    return JOINT.join(fixed + flexible + ending)


def _split(text: str, settings: CaptionSettings) -> list[str]:
    return [tag for part in text.split(settings.separator) if (tag := part.strip())]
