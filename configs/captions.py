"""Settings of the caption pipeline, `data.caption`; the same fields as CaptionSettings in data/text/captions.py."""

from typing import Literal

from pydantic import Field, field_validator

from sdxl_trainer.configs.section import Section


class CaptionConfig(Section):
    """What is done to captions, in this order; every option is off by default. What is random is drawn anew for each
    sample and epoch. Tags are the record's `caption` or `tags`, a description its `description` or `nl_caption`;
    a description is prose and is never taken apart at its commas."""

    source: Literal["pick", "join", "tags", "description"] = "pick"
    """Which text is used of records that have both: one of the two at random, both (`join`: tags first), or always the
    `tags` or the `description`. `pick` and `join` take what there is; with `tags` or `description` a record that has
    only the other one gets the empty caption."""
    description_rate: float = Field(0.5, ge=0, le=1)
    """How often `pick` picks the description."""
    prefix: str = ""
    """Text put before every caption, with a space between (`"my style,"` makes it a tag of its own)."""
    suffix: str = ""
    """Text put after every caption, with a space between."""
    dropout_rate: float = Field(0.0, ge=0, le=1)
    """Share of captions replaced by the empty one, so that the model also learns to go without (classifier-free
    guidance)."""
    dropout_every_epochs: int = Field(0, ge=0)
    """Every n-th epoch goes without captions; 0 for none."""
    wildcards: bool = False
    """Use one random line of a caption that has several, and replace `{a|b}` by one of its options: `{2$$a|b|c}` takes
    two different ones, `{1-2$$ and $$a|b|c}` one or two with ` and ` between them. Options may hold groups, and `{{`
    and `}}` are literal braces. Off, lines and braces reach the tokenizer as they are."""
    keep_tokens: int = Field(0, ge=0)
    """The first n tags stay in front: no warm-up, shuffle or tag dropout. Those of the prefix count."""
    keep_tokens_separator: str = ""
    """A mark in captions, such as `|||`: tags before the first one stay in front, tags after the second one at the end,
    and `keep_tokens` is not used. Captions without the mark are treated as without this option."""
    token_warmup_steps: int = Field(0, ge=0)
    """Optimizer steps over which the number of (not kept) tags grows to all of them."""
    token_warmup_min: int = Field(1, ge=0)
    """Number of tags at the beginning of the warm-up."""
    shuffle: bool = False
    """Put tags into a random order."""
    tag_dropout_rate: float = Field(0.0, ge=0, le=1)
    """Probability with which each tag is left out."""
    separator: str = Field(",", min_length=1)
    """What separates tags in captions. Tags that were taken apart are joined with `, `."""
    secondary_separator: str = ""
    """A mark, such as `;;;`, that holds several tags together through shuffle and dropout; it then becomes the
    separator."""
    replacements: dict[str, str | list[str]] = {}
    """Words to replace, and by what: a text, or a list of which one is drawn each time. The key `""` replaces the whole
    caption. Dropped captions stay empty."""

    @field_validator("replacements")
    @classmethod
    def _lists_hold_something(cls, replacements: dict[str, str | list[str]]) -> dict[str, str | list[str]]:
        empty = [word for word, new in replacements.items() if new == []]
        if empty:
            raise ValueError(f'the list of {empty[0]!r} is empty; give at least one text, or "" to delete the word')
        return replacements
