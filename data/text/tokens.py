"""Captions to token ids for SDXL's two text encoders.

A caption of up to 75 tokens fills one window. A longer one is tokenized once, and its ids are cut into windows of 75,
each between a start and an end mark, as in kohya-ss/sd-scripts.
"""

import gzip
import hashlib
import importlib.util
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE

from sdxl_trainer.data.text.weights import parse_weights

# Environment variable that names the vocabularies for the server of loader workers (data/loading/preload.py).
SOURCES_VARIABLE = "SDXL_TRAINER_VOCABULARIES"
WINDOW = 75  # tokens between the marks
START, END = "<|startoftext|>", "<|endoftext|>"
# CLIP's vocabulary: 256 bytes, 256 bytes at the end of a word, 48,894 merges, and the two marks.
NUM_MERGES = 48_894
MAX_WORDS, MAX_LETTERS = 16_384, 64  # limits of the cache of words and their ids; it takes a few MB
TOKENIZER_FILE = "tokenizer.json"  # vocabulary and merges, as transformers 5 saves them
VOCABULARY_FILES = "vocab.json and merges.txt, or tokenizer.json"
MERGES_FILE = "bpe_simple_vocab_16e6.txt.gz"  # published by OpenAI, and shipped with open_clip_torch
# CLIP's pre-tokenization: contractions, runs of letters, single digits, runs of other characters.
SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@dataclass(frozen=True)
class CaptionTokenizer:
    """CLIP's byte-level BPE with one text encoder's padding.

    Made for loader workers: the module imports fast, and a tokenizer pickles as the path of its vocabulary.
    """

    tokenizer: Tokenizer
    start_id: int
    end_id: int
    pad_id: int
    vocabulary: str  # its hash; tokenizers with equal hashes give equal ids
    source: Path  # file or folder of the vocabulary
    _words: dict[str, list[int]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __reduce__(self) -> tuple[Callable[..., "CaptionTokenizer"], tuple[Path, str, int]]:
        """Pickle as source and hash: workers load the vocabulary, or find it preloaded (data/loading/preload.py)."""
        return restore_tokenizer, (self.source, self.vocabulary, self.pad_id)

    def encode(self, caption: str, max_tokens: int = WINDOW) -> np.ndarray:
        """Tokenize a caption into windows, [max_tokens / 75, 77] int64; tokens beyond `max_tokens` are cut off."""
        return self.cut_windows(self.tokenize(caption), max_tokens)

    def tokenize(self, caption: str) -> list[int]:
        """Return the token ids of a caption, without marks and padding.

        No token and no rule of CLIP's BPE spans a space, so a caption's ids are those of its words, and the ids of
        recurring words are cached.
        """
        ids: list[int] = []
        for word in caption.split(" "):
            cached = self._words.get(word)
            ids += self._tokenize_word(word) if cached is None else cached
        return ids

    def _tokenize_word(self, word: str) -> list[int]:
        ids = self.tokenizer.encode(word, add_special_tokens=False).ids
        if len(self._words) >= MAX_WORDS:
            self._words.clear()
        if len(word) <= MAX_LETTERS:
            self._words[word] = ids
        return ids

    def cut_windows(self, ids: list[int], max_tokens: int = WINDOW) -> np.ndarray:
        """Cut token ids into windows with marks and padding, [max_tokens / 75, 77] int64."""
        ids = ids[:max_tokens]
        windows = np.full((max_tokens // WINDOW, WINDOW + 2), self.pad_id, np.int64)
        windows[:, 0] = self.start_id
        for number, window in enumerate(windows):
            part = ids[number * WINDOW : (number + 1) * WINDOW]
            window[1 : 1 + len(part)] = part
            window[1 + len(part)] = self.end_id
        return windows

    def tokenize_weighted(self, caption: str) -> "WeightedIds":
        """Return the token ids of a caption whose brackets are weights, and the weight of each.

        A word ends where the weight changes, as in kohya-ss/sd-scripts.
        """
        ids: list[int] = []
        weights: list[float] = []
        for text, weight in parse_weights(caption):
            ids += self.tokenize(text)
            weights += [weight] * (len(ids) - len(weights))
        return WeightedIds(ids, weights)

    def count_tokens(self, caption: str, weighted: bool = False) -> int:
        """Return the number of a caption's tokens, without marks and padding."""
        return len(self.tokenize_weighted(caption).ids if weighted else self.tokenize(caption))


class WeightedIds(NamedTuple):
    """Token ids of a caption, without marks and padding, and the weight of each token."""

    ids: list[int]
    weights: list[float]


class Tokenizers(NamedTuple):
    """The tokenizers of SDXL's two text encoders."""

    tokenizer: CaptionTokenizer
    tokenizer_2: CaptionTokenizer


class TokenIds(NamedTuple):
    """Token ids of captions for both text encoders, with start and end marks and padding."""

    input_ids: np.ndarray  # [B, windows, 77] int64, encoder 1
    input_ids_2: np.ndarray  # [B, windows, 77] int64, encoder 2
    # [B, 75·windows + 2] float32, of each state of an encoder; 1 for marks and padding. None: all weights are 1.
    weights: np.ndarray | None = None
    weights_2: np.ndarray | None = None


def load_tokenizer(source: Path, pad_token: str) -> CaptionTokenizer:
    """Build a tokenizer from CLIP's vocabulary.

    Args:
        source: a folder with `vocab.json` and `merges.txt` or with `tokenizer.json`, or a file in the format of
            `bpe_simple_vocab_16e6.txt.gz`.
        pad_token: `<|endoftext|>` for SDXL's text encoder 1, `!` (id 0) for text encoder 2.

    Raises:
        FileNotFoundError: the folder has no vocabulary.
        ValueError: the vocabulary is not CLIP's.
    """
    known, merges = _read_vocabulary(source)
    unknown = [token for token in (START, END, pad_token) if token not in known]
    if unknown:
        raise ValueError(f"{source}: lacks {', '.join(unknown)}; this is not CLIP's vocabulary")
    # CLIP normalizes Unicode and lowers case before it splits text into bytes.
    tokenizer = Tokenizer(BPE(known, merges, continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token=END))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    # CLIP's tokenizer turns a mark spelled out in a caption into the mark's token.
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (START, END)])
    digest = hashlib.sha256(repr((known, merges)).encode()).hexdigest()
    return CaptionTokenizer(
        tokenizer=tokenizer,
        start_id=known[START],
        end_id=known[END],
        pad_id=known[pad_token],
        vocabulary=digest,
        source=source,
    )


@lru_cache(maxsize=2)
def preload_vocabulary(source: Path) -> CaptionTokenizer:
    """Load a tokenizer once for this process and all processes forked from it."""
    return load_tokenizer(source, END)


def restore_tokenizer(source: Path, vocabulary: str, pad_id: int) -> CaptionTokenizer:
    """Unpickle a tokenizer that another process sent.

    Raises:
        ValueError: the vocabulary in `source` has changed since.
    """
    loaded = preload_vocabulary(source)
    if loaded.vocabulary != vocabulary:
        raise ValueError(f"{source}: the vocabulary has changed since the run started")
    return replace(loaded, pad_id=pad_id)


def share_vocabulary(tokenizers: Tokenizers) -> Tokenizers:
    """Let both tokenizers share one vocabulary in memory if their vocabularies are equal; each takes about 14 MB."""
    first, second = tokenizers
    if first.vocabulary != second.vocabulary:
        return tokenizers
    return Tokenizers(first, replace(second, tokenizer=first.tokenizer, source=first.source))


def encode_captions(
    tokenizers: Tokenizers, captions: Sequence[str], max_tokens: int = WINDOW, weighted: bool = False
) -> TokenIds:
    """Tokenize captions for both encoders, into [B, max_tokens / 75, 77] ids each.

    Tokenizing takes most of the time of a sample, so captions are tokenized only once if both vocabularies are equal,
    as SDXL's are.

    Args:
        weighted: read brackets as weights (data/text/weights.py).
    """
    first, second = tokenizers
    parts = [_tokenize(first, caption, weighted) for caption in captions]
    are_equal = first.vocabulary == second.vocabulary
    parts_2 = parts if are_equal else [_tokenize(second, caption, weighted) for caption in captions]
    return TokenIds(
        np.stack([first.cut_windows(ids, max_tokens) for ids, _ in parts]),
        np.stack([second.cut_windows(ids, max_tokens) for ids, _ in parts_2]),
        np.stack([spread_weights(weights, max_tokens) for _, weights in parts]) if weighted else None,
        np.stack([spread_weights(weights, max_tokens) for _, weights in parts_2]) if weighted else None,
    )


def _tokenize(tokenizer: CaptionTokenizer, caption: str, weighted: bool) -> WeightedIds:
    return tokenizer.tokenize_weighted(caption) if weighted else WeightedIds(tokenizer.tokenize(caption), [])


def spread_weights(weights: Sequence[float], max_tokens: int) -> np.ndarray:
    """Return the weights of an encoder's states, [max_tokens + 2] float32, from those of a caption's tokens.

    The windows of a caption are joined without the marks between them, so its tokens follow the first mark.
    """
    spread = np.ones(max_tokens + 2, np.float32)
    spread[1 : 1 + len(weights[:max_tokens])] = weights[:max_tokens]
    return spread


def has_vocabulary(folder: Path) -> bool:
    """Return whether a folder has the files of a tokenizer: those of older or of newer releases of transformers."""
    return (
        all((folder / name).is_file() for name in ("vocab.json", "merges.txt")) or (folder / TOKENIZER_FILE).is_file()
    )


def find_installed_vocabulary() -> Path | None:
    """Return the file of CLIP's merges in an installed open_clip_torch, or None. The package is not imported."""
    package = importlib.util.find_spec("open_clip")
    folders = (package.submodule_search_locations if package else None) or []
    return next((file for folder in folders if (file := Path(folder) / MERGES_FILE).is_file()), None)


def write_vocabulary(source: Path, folder: Path) -> None:
    """Write CLIP's vocabulary into a folder, as the `vocab.json` and `merges.txt` that transformers' tokenizers read.

    Args:
        source: file or folder of the vocabulary, as for `load_tokenizer`.
    """
    known, merges = _read_vocabulary(source)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(known, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _read_vocabulary(source: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Read the ids of all tokens, and the merges in their order."""
    try:
        known, merges = _read_merges(source) if source.suffix == ".gz" else _read_folder(source)
        is_consistent = {*map(type, known)} == {str} and {*map(type, known.values())} == {int}
        is_consistent = is_consistent and all(known.keys() >= {*merge, "".join(merge)} for merge in merges)
    except FileNotFoundError:
        raise
    except (OSError, EOFError, ValueError, TypeError, AttributeError, RecursionError, zlib.error) as error:
        raise ValueError(f"{source}: CLIP's vocabulary cannot be read: {error}") from None
    if not is_consistent or min(known.values()) < 0 or max(known.values()) >= 1 << 32:
        raise ValueError(f"{source}: is damaged: not every token of the merges has an id")
    return known, merges


def _read_folder(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    if not has_vocabulary(folder):
        raise FileNotFoundError(f"{folder}: CLIP's vocabulary is missing ({VOCABULARY_FILES})")
    vocab = folder / "vocab.json"
    if vocab.is_file():
        lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        return json.loads(vocab.read_text(encoding="utf-8")), _split_merges(lines)
    return _read_tokenizer_file(folder / TOKENIZER_FILE)


def _read_tokenizer_file(file: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    try:
        model = json.loads(file.read_text(encoding="utf-8"))["model"]
        # Merges are pairs, or two tokens in one text in files of tokenizers below 0.20.
        pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
        return {str(token): int(number) for token, number in model["vocab"].items()}, [(a, b) for a, b in pairs]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file}: is damaged or not a tokenizer's: {error!r}") from error


def _read_merges(file: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Read a list of merges and derive CLIP's vocabulary from it: bytes, word ends, merges and marks, in this order."""
    with gzip.open(file, "rt", encoding="utf-8") as stream:
        merges = _split_merges(stream.read().splitlines())[:NUM_MERGES]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(merge) for merge in merges), START, END]
    return {token: number for number, token in enumerate(tokens)}, merges


def _split_merges(lines: list[str]) -> list[tuple[str, str]]:
    pairs = (line.split(" ") for line in lines if not line.startswith(("#version", '"bpe_simple_vocab')))
    return [(pair[0], pair[1]) for pair in pairs if len(pair) == 2]
