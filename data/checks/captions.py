"""Warnings of settings for tags that change none of the captions."""

from collections.abc import Sequence

from loguru import logger

from sdxl_trainer.configs.captions import CaptionConfig
from sdxl_trainer.configs.problems import format_count
from sdxl_trainer.configs.schema import DataConfig
from sdxl_trainer.data.index.index import Index
from sdxl_trainer.data.order.even_selection import select_evenly
from sdxl_trainer.data.text.tag_rules import TagRules, load_tag_rules, normalize_spelling, normalize_tag

WIDE_COMMAS = ("，", "、")  # marks between tags that input methods for Chinese and Japanese write
TAG_SETTINGS = ("shuffle", "tag_dropout_rate", "keep_tokens", "token_warmup_steps", "aliases", "implications")
NUM_LOOKED_AT = 1000  # records
MIN_SHARE = 0.05  # of these captions, from which on a wrong separator is no accident
MIN_TAGS = 100  # of a file, from which on it is no accident that a part of the captions has none of them


def warn_about_captions(data: DataConfig, index: Index) -> None:
    """Log settings for tags that seem to change no caption, unless a strategy builds the captions.

    Raises:
        UserInputError: a file of tags cannot be used.
    """
    used = [f"data.caption.{name}" for name in TAG_SETTINGS if getattr(data.caption, name)]
    rules = load_tag_rules(data.caption)
    if data.strategy is not None or not (used or rules):
        return
    records = map(index.record, select_evenly(len(index), NUM_LOOKED_AT).tolist())
    texts = [str(record["caption"]) for record in records if record["caption"]]
    if used and texts:
        warn_of_separator(data.caption, texts, used)
    if rules and texts:
        warn_of_tag_files(data.caption, rules, texts, all_captions=len(index) <= NUM_LOOKED_AT)


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


def warn_of_tag_files(caption: CaptionConfig, rules: TagRules, texts: Sequence[str], all_captions: bool) -> None:
    """Name each list of tags of which no caption has any.

    Args:
        all_captions: whether the texts are all captions. If not, short lists may be of rare tags, and are not named.
    """
    known = list_keys(caption, texts)
    known |= {normalize_spelling(rules.aliases[key]) for key in known & rules.aliases.keys()}
    protected = [name for name in ("protected_tags", "protected_tags_file") if getattr(caption, name)]
    lists = {
        "aliases": rules.aliases.keys(),
        "implications": rules.implied.keys(),
        " and ".join(protected): rules.protected,
    }
    for name, keys in lists.items():
        if keys and not keys & known and (all_captions or len(keys) >= MIN_TAGS):
            logger.warning(
                "data.caption.{}: the {} that were looked at have none of its {}; compare their spelling, and the mark "
                "between tags, data.caption.separator: '{}'",
                name,
                format_count(len(texts), "caption"),
                format_count(len(keys), "tag"),
                caption.separator,
            )


def list_keys(caption: CaptionConfig, texts: Sequence[str]) -> set[str]:
    """List the keys of all tags in captions, with those that the settings add."""
    marks = [mark for mark in (caption.keep_tokens_separator, caption.secondary_separator) if mark]
    keys: set[str] = set()
    for text in (*texts, caption.prefix, caption.suffix):
        for mark in marks:
            text = text.replace(mark, caption.separator)
        keys.update(normalize_tag(tag, caption.weighted) for tag in text.split(caption.separator))
    return keys
