"""Makes the tiny SDXL's two CLIP tokenizers: byte-level BPE in CLIP's file format with a few hundred tokens.

The words of the demo set's captions are one token each; any other text falls apart into bytes, so every prompt works.
`python -m sdxl_trainer.train.tiny.tokenizer --out DIR` rewrites the files that ship in configs/tiny.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from sdxl_trainer.data.images.demo_set import BACKGROUNDS, COLOURS, SHAPES

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
END_OF_WORD = "</w>"
MAX_LENGTH = 77
OTHER_WORDS = "a an the on in of and with background picture photo drawing small large black white grey orange purple"
# Encoder 1 (OpenAI) pads with EOS, encoder 2 (OpenCLIP) with id 0, which in CLIP's byte order is "!".
PADS = {"tokenizer": EOS, "tokenizer_2": "!"}


def byte_symbols() -> list[str]:
    """Return the 256 printable characters that stand for the 256 bytes, in CLIP's (GPT-2's) order: "!" is first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    num_others = 256 - len(printable)
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(num_others)]


def learn_merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Return byte-pair merges, most frequent pair first, that make each (ASCII) word a single token."""
    spellings = [[*word[:-1], word[-1] + END_OF_WORD] for word in sorted(set(words))]
    merges: list[tuple[str, str]] = []
    while any(len(spelling) > 1 for spelling in spellings):
        pairs = Counter(pair for spelling in spellings for pair in zip(spelling, spelling[1:], strict=False))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spellings = [_merge(spelling, best) for spelling in spellings]
    return merges


def _merge(spelling: list[str], pair: tuple[str, str]) -> list[str]:
    """Return spelling with each occurrence of pair, from the left, joined to one symbol."""
    merged: list[str] = []
    for symbol in spelling:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


def build_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return (token → id, merges) in CLIP's order: bytes, bytes that end a word, merges, BOS, EOS."""
    merges = learn_merges([*COLOURS, *SHAPES, *BACKGROUNDS, *OTHER_WORDS.split()])
    symbols = byte_symbols()
    tokens = [*symbols, *(symbol + END_OF_WORD for symbol in symbols), *("".join(pair) for pair in merges), BOS, EOS]
    assert len(set(tokens)) == len(tokens), "two merges make the same token"
    return {token: index for index, token in enumerate(tokens)}, merges


def write_tokenizers(folder: Path) -> None:
    """Write `tokenizer/` and `tokenizer_2/` into folder, as transformers' CLIPTokenizer reads them."""
    vocabulary, merges = build_vocabulary()
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
        _write_json(target / "vocab.json", vocabulary)
        _write_json(target / "tokenizer_config.json", config)
        _write_json(target / "special_tokens_map.json", special_tokens)
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
        (target / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=True) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: write both tokenizers into a folder."""
    parser = argparse.ArgumentParser(prog="python -m sdxl_trainer.train.tiny.tokenizer", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write into")
    options = parser.parse_args(arguments)
    write_tokenizers(options.out)
    sys.stdout.write(f"{len(build_vocabulary()[0])} tokens, written to {options.out}\n")


if __name__ == "__main__":
    main()
