"""Warnings of settings for tags that change none of the captions."""

from collections.abc import Sequence

from loguru import logger

from sdxl_trainer.configs.captions import CaptionConfig
from sdxl_trainer.configs.problems import format_count
from sdxl_trainer.configs.schema import DataConfig
from sdxl_trainer.data.index.index import Index
from sdxl_trainer.data.metadata.values import TAG_FIELDS
from sdxl_trainer.data.order.even_selection import select_evenly
from sdxl_trainer.data.text.captions import (
    CaptionSettings,
    build_caption_settings,
    list_own_tags,
    read_caption_fields,
)
from sdxl_trainer.data.text.tag_rules import TagRules, normalize_tag

WIDE_COMMAS = ("，", "、")  # marks between tags that input methods for Chinese and Japanese write
TAG_SETTINGS = ("shuffle", "tag_dropout_rate", "keep_tokens", "token_warmup_steps", "aliases", "implications")
NUM_LOOKED_AT = 1000  # records
MIN_SHARE = 0.05  # of these captions, from which on a wrong separator is no accident
MIN_TAGS = 100  # of a file, from which on it is no accident that a part of the captions has none of them


def warn_about_captions(data: DataConfig, index: Index, check_lists: bool = True) -> None:
    """Log settings for tags that seem to change no caption, unless a strategy builds the captions.

    Args:
        check_lists: also log lists of tags of which no caption has any.

    Raises:
        UserInputError: a file of tags cannot be used.
    """
    used = [f"data.caption.{name}" for name in TAG_SETTINGS if getattr(data.caption, name)]
    settings = build_caption_settings(data.caption)
    if data.strategy is not None or not (used or settings.rules):
        return
    records = map(index.record, select_evenly(len(index), NUM_LOOKED_AT).tolist())
    captions = (read_caption_fields(record, TAG_FIELDS, data.caption.separator) for record in records)
    texts = list(filter(None, captions))
    if used and texts:
        warn_of_separator(data.caption, texts, used)
    # A caption with wildcards is another text at each draw.
    if check_lists and settings.rules and texts and not settings.wildcards:
        warn_of_tag_files(settings, settings.rules, texts, all_captions=len(index) <= NUM_LOOKED_AT)


def warn_of_separator(caption: CaptionConfig, texts: Sequence[str], used: Sequence[str]) -> None:
    """Name the separator to set if another mark separates the tags.

    Args:
        used: names of settings that leave tags as they are with a wrong separator.
    """
    whole = [text for text in texts if caption.separator not in text]
    counts = {mark: sum(mark in text for text in whole) for mark in WIDE_COMMAS if mark != caption.separator}
    mark = max(counts, key=counts.__getitem__)
    if counts[mark] >= max(1, MIN_SHARE * len(texts)):
        logger.warning(
            "{} of {} captions have '{}' between their tags and not '{}', so {} leaves them as they are; {}",
            counts[mark],
            len(texts),
            mark,
            caption.separator,
            ", ".join(used),
            # The other captions would be single tags with the rarer mark.
            f"set data.caption.separator: '{mark}'"
            if counts[mark] > len(texts) - len(whole)
            else f"write '{caption.separator}' in them",
        )


def warn_of_tag_files(settings: CaptionSettings, rules: TagRules, texts: Sequence[str], all_captions: bool) -> None:
    """Name each list of tags of which no caption has any.

    Args:
        all_captions: whether the texts are all captions. If not, short lists may be of rare tags, and are not named.
    """
    weighted, given, rewritten = settings.weighted, set[str](), set[str]()
    for tags in (list_own_tags(text, settings) for text in texts):
        given.update(normalize_tag(tag, weighted) for tag in tags)
        _, tags = rules.rewrite(([], tags), weighted)
        rewritten.update(normalize_tag(tag, weighted) for tag in tags)
    protected = [name for name in ("protected_tags", "protected_tags_file") if getattr(rules.sources, name)]
    lists = {
        "aliases": (rules.aliases.keys(), given),
        "implications": (rules.implied.keys(), rewritten),
        " and ".join(protected): (rules.protected, rewritten),
    }
    for name, (keys, known) in lists.items():
        if keys and not keys & known and (all_captions or len(keys) >= MIN_TAGS):
            logger.warning(
                "data.caption.{}: the {} that were looked at have none of its {}; compare their spelling, and the mark "
                "between tags, data.caption.separator: '{}'",
                name,
                format_count(len(texts), "caption"),
                format_count(len(keys), "tag"),
                settings.separator,
            )
