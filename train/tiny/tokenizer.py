"""The tiny SDXL's two CLIP tokenizers: byte-level BPE in CLIP's file format, with a few hundred tokens.

Each word of the demo set's captions is one token. Other text is split into bytes, so every prompt can be tokenized.
`python -m sdxl_trainer.train.tiny.tokenizer --out DIR` rewrites the files in configs/tiny.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from sdxl_trainer.configs.paths import parse_path
from sdxl_trainer.data.images.demo_set import BACKGROUNDS, COLOURS, SHAPES

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
END_OF_WORD = "</w>"
MAX_LENGTH = 77
OTHER_WORDS = "a an the on in of and with background picture photo drawing small large black white grey orange purple"
# Encoder 1 (OpenAI) pads with EOS, encoder 2 (OpenCLIP) with id 0, which in CLIP's byte order is "!".
PADS = {"tokenizer": EOS, "tokenizer_2": "!"}

Merge = tuple[str, str]  # two symbols that become one


class Vocabulary(NamedTuple):
    """The contents of vocab.json and merges.txt."""

    ids: dict[str, int]  # token → id
    merges: list[Merge]


def list_byte_symbols() -> list[str]:
    """Return the 256 printable characters that stand for the 256 bytes, in CLIP's (GPT-2's) order: "!" is first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    num_others = 256 - len(printable)
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(num_others)]


def learn_merges(words: Iterable[str]) -> list[Merge]:
    """Return byte-pair merges, most frequent pair first, that turn each (ASCII) word into a single token."""
    spellings = [[*word[:-1], word[-1] + END_OF_WORD] for word in sorted(set(words))]
    merges: list[Merge] = []
    while any(len(spelling) > 1 for spelling in spellings):
        pairs = Counter(pair for spelling in spellings for pair in zip(spelling, spelling[1:], strict=False))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spellings = [_merge(spelling, best) for spelling in spellings]
    return merges


def _merge(spelling: list[str], pair: Merge) -> list[str]:
    """Merge each occurrence of a pair, from the left, into one symbol."""
    merged: list[str] = []
    for symbol in spelling:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


def build_vocabulary() -> Vocabulary:
    """Build the vocabulary in CLIP's order: bytes, bytes that end a word, merges, BOS, EOS."""
    merges = learn_merges([*COLOURS, *SHAPES, *BACKGROUNDS, *OTHER_WORDS.split()])
    symbols = list_byte_symbols()
    tokens = [*symbols, *(symbol + END_OF_WORD for symbol in symbols), *("".join(pair) for pair in merges), BOS, EOS]
    assert len(set(tokens)) == len(tokens), "two merges make the same token"
    return Vocabulary({token: index for index, token in enumerate(tokens)}, merges)


def write_tokenizers(folder: Path) -> None:
    """Write `tokenizer/` and `tokenizer_2/` in the format that transformers' CLIPTokenizer reads."""
    vocabulary = build_vocabulary()
    for name, pad in PADS.items():
        special_tokens = {"bos_token": BOS, "eos_token": EOS, "pad_token": pad, "unk_token": EOS}
        config = {
            "add_prefix_space": False,
            **special_tokens,
            "do_lower_case": True,
            "errors": "replace",
            "model_max_length": MAX_LENGTH,
            "tokenizer_class": "CLIPTokenizer",
        }
        target = folder / name
        target.mkdir(parents=True, exist_ok=True)
        _write_json(target / "vocab.json", vocabulary.ids)
        _write_json(target / "tokenizer_config.json", config)
        _write_json(target / "special_tokens_map.json", special_tokens)
        lines = ["#version: 0.2", *(" ".join(pair) for pair in vocabulary.merges)]
        (target / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=True) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and write both tokenizers."""
    parser = argparse.ArgumentParser(prog="python -m sdxl_trainer.train.tiny.tokenizer", description=__doc__)
    parser.add_argument("--out", type=parse_path, required=True, metavar="DIR", help="folder to write into")
    options = parser.parse_args(arguments)
    write_tokenizers(options.out)
    sys.stdout.write(f"{len(build_vocabulary().ids)} tokens, written to {options.out}\n")


if __name__ == "__main__":
    main()
