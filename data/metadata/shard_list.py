"""Shard lists as webdataset reads them: `::` between entries, `{000..012}`, `{a,b}`, and `${NAME}`."""

import re

from fsspec.registry import known_implementations

from sdxl_trainer.data.stores.streams import PIPE

SEPARATOR = "::"


class ShardListError(ValueError):
    """A shard list that cannot be expanded, or that names nothing; `cure` says what to do."""

    def __init__(self, rule: str, cure: str):
        super().__init__(rule)
        self.cure = cure


def expand_shard_list(pattern: str) -> list[str]:
    """Expand a shard list by webdataset's `expand_urls`. Ranges may count down, have steps, or be letters.

    The settings have replaced `${NAME}` outside commands before. In a command, it is the variable WDS_NAME.
    A URL that chains protocols by `::`, such as `simplecache::s3://bucket/x.tar`, is fsspec's and one entry.

    Raises:
        ShardListError: braces are not closed, a variable is not set, or an entry is empty.
    """
    is_chain = pattern.partition(SEPARATOR)[0] in known_implementations
    if is_chain or not re.search(r"[{}]|::", pattern):
        names = [pattern]  # without webdataset, which imports torch
    else:
        names = _expand(pattern)
    for name in names:
        if not name.removeprefix(PIPE).strip():
            place = "names nothing" if len(names) == 1 else "has an empty entry"
            raise ShardListError(place, "name a file, a URL or `pipe:COMMAND`, with `::` only between two entries")
    return names


def _expand(pattern: str) -> list[str]:
    from webdataset.shardlists import expand_urls

    try:
        return expand_urls(pattern)
    except ValueError:  # UnbalancedBracesError of braceexpand
        raise ShardListError(
            "has a brace without its partner", "close it, or write a brace that belongs to the name as \\{ or \\}"
        ) from None
    except (AssertionError, KeyError) as error:
        name = str(error).rpartition(" ")[2].strip("'").removeprefix("wds_")
        rule = f"names the variable {name}, which the environment lacks (webdataset puts WDS_ before its name)"
        raise ShardListError(rule, f"export {name}=...") from None
