"""Captions that are longer than the text encoders' input."""

from collections.abc import Iterator

from sdxl_trainer.cache.models.encoders import load_tokenizers
from sdxl_trainer.cache.models.model_pair import resolve_pair
from sdxl_trainer.cache.models.source import is_local
from sdxl_trainer.configs.problems import Problem, format_count
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.data.index.index import Index
from sdxl_trainer.data.loading.counts import measure_captions
from sdxl_trainer.data.loading.loader import build_dataset
from sdxl_trainer.data.order.even_selection import select_evenly
from sdxl_trainer.data.text.strategy import load_strategy

NUM_CAPTIONS = 500  # to measure, which takes a few tenths of a second
MIN_SHARE = 0.05  # of them, from which on it is no accident that they are too long
TOKENS_AT_ONCE = 75  # of which `data.max_tokens` is a multiple


def check_caption_lengths(config: Config, index: Index) -> Iterator[Problem]:
    """Yield a problem if captions are longer than `data.max_tokens`, so that their ends are never read.

    Nothing is known about a model on a hub before its tokenizers are downloaded.

    Args:
        index: of records or samples.
    """
    if not is_local(config.model):
        return
    textless = config.model_copy(update={"cache": config.cache.model_copy(update={"text": False})})
    strategy = load_strategy(config.data.strategy) if config.data.strategy else None
    dataset = build_dataset(textless, index, load_tokenizers(resolve_pair(config), config.model), strategy)
    lengths = measure_captions(dataset, select_evenly(len(index), NUM_CAPTIONS)).lengths.max(1)
    num_cut, limit = int((lengths > config.data.max_tokens).sum()), config.data.max_tokens
    if num_cut and num_cut >= MIN_SHARE * len(lengths):
        looked_at = format_count(len(lengths), "caption")
        needed = -(-int(lengths.max()) // TOKENS_AT_ONCE) * TOKENS_AT_ONCE
        rule = f"cuts off the end of {num_cut} of the {looked_at} that were looked at"
        cure = f"raise it ({needed} for the longest), or shorten the captions"
        yield Problem("data.max_tokens", limit, rule, cure)
