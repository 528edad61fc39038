"""The caption pipeline: from a record to the text that a sample is trained with.

Its steps, in the order of kohya-ss/sd-scripts: prefix and suffix, caption dropout, wildcards, aliases and implications,
kept tags, token warm-up, shuffle, tag dropout, secondary separator, replacements, ftfy. Every function is pure: its
random choices come from the generator that is passed in.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from sdxl_trainer.configs.captions import CaptionConfig
from sdxl_trainer.data.metadata.values import DESCRIPTION_FIELDS, TAG_FIELDS, join_texts
from sdxl_trainer.data.text.tag_rules import TagRules, TagSources, load_tag_rules
from sdxl_trainer.data.text.weights import divide_groups, parse_weights

TAG_JOINER = ", "  # between the tags of a caption, whatever separator the record uses
# `{2$$a|b|c}` takes two options, `{1-2$$ and $$a|b|c}` one or two, joined by " and ". The joiner has at most 32
# characters, so that nested groups cannot blow up a caption.
COUNT = re.compile(r"\s*(\d{1,4})(?:-(\d{1,4}))?\$\$(?:(.{0,32}?)\$\$)?", re.DOTALL)


@dataclass(frozen=True)
class CaptionSettings:
    """Settings of the caption pipeline, documented in configs/captions.py. The defaults only apply ftfy."""

    source: Literal["pick", "join", "tags", "description"] = "pick"
    description_rate: float = 0.5
    first_line: bool = False
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
    weighted: bool = False
    fix_text: bool = True
    rules: TagRules | None = None  # of the settings `aliases`, `implications`, `protected_tags` and its file


class CaptionTexts(NamedTuple):
    """The texts of a caption: tags, and a description in prose. Either may be empty."""

    tags: str
    description: str = ""


def build_caption_settings(config: CaptionConfig) -> CaptionSettings:
    """Build the settings of the caption pipeline, with the files of tags loaded.

    Raises:
        UserInputError: a file of tags cannot be used.
    """
    return CaptionSettings(**config.model_dump(exclude=set(TagSources._fields)), rules=load_tag_rules(config))


def build_caption(
    record: Mapping[str, Any], settings: CaptionSettings, rng: np.random.Generator, step: int = 0, epoch: int = 0
) -> str:
    """Build the caption of a record for one epoch.

    Args:
        rng: keyed to the sample and the epoch, so that the caption depends on nothing else.
        step: optimizer steps done before this one, for the token warm-up.
        epoch: the sample's epoch, from 0.
    """
    return process_texts(choose_texts(record, settings, rng), settings, rng, step, epoch)


def choose_texts(record: Mapping[str, Any], settings: CaptionSettings, rng: np.random.Generator) -> CaptionTexts:
    """Choose a record's tags, its description, or both, by `data.caption.source`."""
    tags = read_caption_fields(record, TAG_FIELDS, settings.separator)
    description = read_caption_fields(record, DESCRIPTION_FIELDS, settings.separator)
    if settings.source == "tags":
        description = ""
    elif settings.source == "description":
        tags = ""
    elif settings.source == "pick" and tags and description:
        tags, description = ("", description) if rng.random() < settings.description_rate else (tags, "")
    return CaptionTexts(tags, description)


def has_both_texts(record: Mapping[str, Any], separator: str = ",") -> bool:
    """Return whether a record has both tags and a description."""
    return all(read_caption_fields(record, fields, separator) for fields in (TAG_FIELDS, DESCRIPTION_FIELDS))


def process_texts(
    texts: CaptionTexts, settings: CaptionSettings, rng: np.random.Generator, step: int = 0, epoch: int = 0
) -> str:
    """Apply the steps of the caption pipeline to chosen texts. With both texts, the description follows the tags.

    Commas in a description are prose, so the steps that work on tags leave the description as it is.
    """
    texts = _complete_texts(texts, settings)
    if draw_dropout(settings, rng, epoch):
        return ""
    if settings.wildcards:
        texts = CaptionTexts(*(expand_wildcards(_pick_line(text, rng), rng) for text in texts))
    tags = _process_tags(texts.tags, settings, rng, step)
    caption = TAG_JOINER.join(text for text in (tags, texts.description) if text)
    if settings.secondary_separator:
        caption = caption.replace(settings.secondary_separator, settings.separator)
    for old, new in settings.replacements.items():
        chosen = new if isinstance(new, str) else new[int(rng.integers(len(new)))]
        caption = caption.replace(old, chosen) if old else chosen
    return fix_text(caption) if settings.fix_text else caption


def fix_text(text: str) -> str:
    """Clean a text with ftfy, as transformers' CLIPTokenizer does where ftfy is installed.

    Raises:
        ValueError: ftfy is not installed, and the text is not so plain that it would not change it.
    """
    # ftfy changes nothing in printable ASCII but HTML entities, and it takes 18 to 21 microseconds to find that out.
    if text.isascii() and text.isprintable() and "&" not in text:
        return text
    try:
        import ftfy
    except ImportError:
        raise ValueError("needs the package ftfy: pip install ftfy, or set data.caption.fix_text: false") from None
    return ftfy.fix_text(text)


def draw_dropout(settings: CaptionSettings, rng: np.random.Generator, epoch: int) -> bool:
    """Draw whether a caption is replaced by the empty caption."""
    # Drawn even at rate 0, so that switching dropout on does not change the other random choices.
    dropped = rng.random() < settings.dropout_rate
    return dropped or bool(settings.dropout_every_epochs and (epoch + 1) % settings.dropout_every_epochs == 0)


def read_caption_fields(record: Mapping[str, Any], fields: tuple[str, ...], separator: str = ",") -> str:
    """Return the first non-empty of a record's `fields` as text; tags are joined by the separator and a space.

    Raises:
        ValueError: a value is no text, number, list of these, or mapping of tags to numbers.
    """
    texts = (join_texts(record.get(name), f"{separator} ") for name in fields)
    return next(filter(None, texts), "")


def expand_wildcards(text: str, rng: np.random.Generator) -> str:
    """Replace each group `{a|b}` by one of its options, which may hold further groups.

    `{{` and `}}` stand for literal braces, so a group that begins with a group is written `{ {a|b}|c}`. An unmatched
    brace and `{}` stay as they are. The text is read in one pass without recursion, because
    captions may be hostile.
    """
    if "{" not in text and "}" not in text:
        return text
    groups = [_Group("")]
    position = 0
    while position < len(text):
        token, top = text[position], groups[-1]
        if token in "{}" and text[position + 1 : position + 2] == token:
            # `}}` closes two groups, unless a literal brace is open or no group is.
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
    """The text since an opening brace: the options of `{`, or a single text after `{{` or at the start."""

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
        number = int(rng.integers(low, high + 1))  # a number beyond the options takes all of them
        chosen = rng.permutation(len(options))[:number]
        return (TAG_JOINER if count[3] is None else count[3]).join(options[i] for i in chosen)


def _complete_texts(texts: CaptionTexts, settings: CaptionSettings) -> CaptionTexts:
    """Put the prefix before the first text and the suffix after the last, of their first lines with `first_line`.

    With wildcards, every line gets both, because one line is picked later.
    """
    if settings.first_line:
        texts = CaptionTexts(*map(_take_first_line, texts))
    if not (settings.prefix or settings.suffix):
        return texts

    def affix(text: str, prefix: str, suffix: str) -> str:
        lines = text.split("\n") if settings.wildcards else [text]
        lines = [line.strip() for line in lines if line.strip()] or [""]
        return "\n".join(" ".join(part for part in (prefix, line, suffix) if part) for line in lines)

    if texts.tags and texts.description:
        return CaptionTexts(affix(texts.tags, settings.prefix, ""), affix(texts.description, "", settings.suffix))
    if texts.description:
        return CaptionTexts("", affix(texts.description, settings.prefix, settings.suffix))
    return CaptionTexts(affix(texts.tags, settings.prefix, settings.suffix), "")


def _take_first_line(text: str) -> str:
    return text if "\n" not in text else text.strip().split("\n")[0].strip()


def _pick_line(text: str, rng: np.random.Generator) -> str:
    if "\n" not in text:
        return text
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    return lines[int(rng.integers(len(lines)))] if lines else ""


def _process_tags(text: str, settings: CaptionSettings, rng: np.random.Generator, step: int) -> str:
    """Apply the steps that work on single tags: aliases and implications, kept tags, warm-up, shuffle and dropout.

    Without any of them the text is returned unchanged, spacing included.
    """
    mark, rules = settings.keep_tokens_separator, settings.rules
    marked = bool(mark) and mark in text
    is_rewritten = rules is not None and rules.has_changes
    is_arranged = settings.shuffle or settings.token_warmup_steps or settings.tag_dropout_rate
    if not (marked or is_rewritten or is_arranged):
        return text
    if settings.weighted:
        text = divide_groups(text, settings.separator)
    fixed, flexible, ending = [], _split_tags(text, settings), []
    if marked:
        head, middle, *tail = text.split(mark)
        fixed, flexible = _split_tags(head, settings), _split_tags(middle, settings)
        ending = [tag for part in tail for tag in _split_tags(part, settings)]
    if rules is not None and is_rewritten:
        fixed, flexible, ending = rules.rewrite((fixed, flexible, ending), settings.weighted)
    if not marked:
        fixed, flexible = flexible[: settings.keep_tokens], flexible[settings.keep_tokens :]
    return TAG_JOINER.join(fixed + _arrange_tags(flexible, settings, rng, step) + ending)


def _arrange_tags(tags: list[str], settings: CaptionSettings, rng: np.random.Generator, step: int) -> list[str]:
    """Apply warm-up, shuffle and dropout to the tags that are not protected; the others keep their place."""
    rules, warmup_steps = settings.rules, settings.token_warmup_steps
    free = [at for at, tag in enumerate(tags) if rules is None or not rules.is_protected(tag, settings.weighted)]
    moved = [tags[at] for at in free]
    if step < warmup_steps:
        least = settings.token_warmup_min
        # kohya's formula in integers, so that rounding cannot lose a tag.
        moved = moved[: step * (len(moved) - least) // warmup_steps + least]
    if settings.shuffle:
        moved = [moved[i] for i in rng.permutation(len(moved))]
    kept = np.ones(len(moved), bool)
    if settings.tag_dropout_rate:
        kept = rng.random(len(moved)) >= settings.tag_dropout_rate
    if len(free) == len(tags):
        return [tag for tag, keep in zip(moved, kept, strict=True) if keep]
    arranged: list[str | None] = list(tags)
    for place, at in enumerate(free):
        arranged[at] = moved[place] if place < len(moved) and kept[place] else None
    return [tag for tag in arranged if tag is not None]


def list_tags(text: str, settings: CaptionSettings) -> list[str]:
    """List the tags of a text, without weights, and with aliases and implications applied."""
    weighted = settings.weighted
    tags = _split_tags(divide_groups(text, settings.separator) if weighted else text, settings)
    if settings.rules is not None:
        _, tags = settings.rules.rewrite(([], tags), weighted)
    return ["".join(part.text for part in parse_weights(tag)) for tag in tags] if weighted else tags


def list_own_tags(text: str, settings: CaptionSettings) -> list[str]:
    """List the tags of a text, with those of prefix and suffix, as aliases meet them. Wildcards stay unexpanded."""
    text = _complete_texts(CaptionTexts(text), settings).tags
    if settings.keep_tokens_separator:
        text = text.replace(settings.keep_tokens_separator, settings.separator)
    return _split_tags(divide_groups(text, settings.separator) if settings.weighted else text, settings)


def _split_tags(text: str, settings: CaptionSettings) -> list[str]:
    return [tag for part in text.split(settings.separator) if (tag := part.strip())]
