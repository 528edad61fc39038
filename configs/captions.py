"""Settings of the caption pipeline, `data.caption`; the same fields as CaptionSettings in data/text/captions.py."""

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from sdxl_trainer.configs.paths import IS_PATH
from sdxl_trainer.configs.section import Section


class CaptionConfig(Section):
    """Changes made to each caption before it is tokenized, applied in the order of this table. All are off by default,
    except `fix_text`.
    Random choices are drawn again for each sample in each epoch. Tags are the record's `caption` or `tags`; the
    description is its `description` or `nl_caption`. A description is prose and is never split at its commas."""

    source: Literal["pick", "join", "tags", "description"] = "pick"
    """Text to use for records with both tags and a description: one of the two at random (`pick`), both with the tags
    first (`join`), or always the `tags` or the `description`. `pick` and `join` use the only text of a record that has
    one; with `tags` or `description`, a record that has only the other text gets the empty caption."""
    description_rate: float = Field(0.5, ge=0, le=1)
    """Probability that `pick` chooses the description."""
    first_line: bool = False
    """Use only the first line of captions with several lines, as kohya's scripts do without wildcards. When off, all
    lines are used, or a random one with `wildcards`."""
    prefix: str = ""
    """Text put before every caption, followed by a space. `"my style,"` makes it a tag of its own."""
    suffix: str = ""
    """Text put after every caption, preceded by a space."""
    dropout_rate: float = Field(0.0, ge=0, le=1)
    """Share of captions replaced with the empty caption. The model then also learns to generate without a prompt, which
    classifier-free guidance needs. 0.05 to 0.1 is usual for large training sets."""
    dropout_every_epochs: int = Field(0, ge=0)
    """Use empty captions in every n-th epoch; 0 never does."""
    wildcards: bool = False
    """Choose one line at random from captions with several lines, and replace `{a|b}` with one of its options.
    `{2$$a|b|c}` chooses two different options, and `{1-2$$ and $$a|b|c}` one or two, joined by ` and `. Options may
    contain groups; `{{` and `}}` are literal braces. When off, lines and braces reach the tokenizer unchanged."""
    aliases: Annotated[str | None, IS_PATH] = None
    """CSV file of tags to replace: `antecedent,consequent` in each row, or with a heading, as danbooru and e621 export
    their aliases. Case, and underscores or spaces, make no difference. See docs/CAPTIONS.md."""
    implications: Annotated[str | None, IS_PATH] = None
    """CSV file of tags to add, in the same format: a caption with the antecedent gets the consequent too, at the end of
    its tags, if it lacks it."""
    keep_tokens: int = Field(0, ge=0)
    """Number of tags at the front that warm-up, shuffling and tag dropout do not change. Tags of the prefix count."""
    keep_tokens_separator: str = ""
    """Mark in captions, such as `|||`, that sets the kept tags instead of `keep_tokens`: tags before the first mark
    stay in front, tags after the second mark stay at the end. Captions without the mark are unaffected."""
    protected_tags: list[str] = []
    """Tags that warm-up, shuffling and tag dropout leave in their place, wherever they stand in a caption. Case, and
    underscores or spaces, make no difference. `dropout_rate` still replaces the whole caption."""
    protected_tags_file: Annotated[str | None, IS_PATH] = None
    """Text file of further protected tags, one in each line."""
    token_warmup_steps: int = Field(0, ge=0)
    """Optimizer steps over which the number of tags in use grows from `token_warmup_min` to all. Kept tags are always
    used."""
    token_warmup_min: int = Field(1, ge=0)
    """Number of tags at the start of the warm-up."""
    shuffle: bool = False
    """Shuffle the tags, so that the model does not learn their order."""
    tag_dropout_rate: float = Field(0.0, ge=0, le=1)
    """Probability of leaving out each tag."""
    separator: str = Field(",", min_length=1)
    """Separator between tags in captions. Captions that were split into tags are joined again with `, `. Set `"，"` or
    `"、"` for captions with these marks: with another separator `keep_tokens`, `token_warmup_steps`, `shuffle` and
    `tag_dropout_rate` leave them as they are, and a warning names this."""
    secondary_separator: str = ""
    """Mark, such as `;;;`, between tags that stay together during shuffling and dropout. It becomes the separator
    afterwards."""
    replacements: dict[str, str | list[str]] = {}
    """Words to replace, each with a text or with a random text from a list. The key `""` replaces the whole caption.
    Dropped captions stay empty."""
    weighted: bool = False
    """Read brackets as weights of words, as kohya's `weighted_captions` does: `(word)` is 1.1, `(word:1.3)` is 1.3,
    `[word]` is 1/1.1, and `\\(` is a bracket. The states of both text encoders are multiplied by the weights of their
    tokens; the pooled state is not. Prompts of generated images are read in the same way. When off, brackets are
    ordinary text."""
    fix_text: bool = True
    """Clean captions with ftfy, as the tokenizers of kohya's scripts and of diffusers' example do: straight quotes for
    curly ones, letters for ligatures and full-width letters, characters for HTML entities and for text that was decoded
    wrongly. Such characters are other tokens otherwise. It takes under 1 microsecond for a caption in ASCII, and up to
    160 for others (docs/CAPTIONS.md). Prompts of generated images are cleaned too."""

    @field_validator("wildcards")
    @classmethod
    def _require_all_lines(cls, wildcards: bool, info: ValidationInfo) -> bool:
        if wildcards and info.data.get("first_line"):
            raise ValueError(
                "chooses among the lines of a caption, but data.caption.first_line keeps one; turn one off"
            )
        return wildcards

    @field_validator("replacements")
    @classmethod
    def _require_texts(cls, replacements: dict[str, str | list[str]]) -> dict[str, str | list[str]]:
        empty = [word for word, new in replacements.items() if new == []]
        if empty:
            raise ValueError(f'the list for {empty[0]!r} is empty; give at least one text, or "" to delete the word')
        return replacements
