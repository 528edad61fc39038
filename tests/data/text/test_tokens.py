"""Token ids equal those of transformers' CLIPTokenizer, and are cut into windows as in other SDXL trainers."""

import gzip
import json
import pickle
import shutil
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import TINY
from transformers import CLIPTokenizer

from sdxl_trainer.data.text import tokens
from sdxl_trainer.data.text.tokens import (
    END,
    MERGES_FILE,
    find_installed_vocabulary,
    has_vocabulary,
    load_tokenizer,
    write_vocabulary,
)

FIRST, SECOND = load_tokenizer(TINY / "tokenizer", END), load_tokenizer(TINY / "tokenizer_2", "!")
REFERENCE = CLIPTokenizer.from_pretrained(TINY / "tokenizer")
CAPTIONS = [
    "",
    " ",
    "a red circle on a white background",
    "A RED Circle",
    "1girl, 2024, 100%",
    "(masterpiece:1.2), [best]",
    "don't we'll I'm they've he'd it's you're",
    "DON'T IT'S",
    "'s 'S ' s",
    "  two   spaces\t\n x ",
    "a_b-c/d\\e",
    "!!! ... ?!",
    "café naïve",
    "cafe\u0301",
    "日本語 テスト 女の子",
    "한국어 조합",
    "emoji 😀👍🏽",
    "Straße ẞ İ ı ﬁ",
    "x²½ ⅷ ٣",
    "Ά ΣΑΣ",
    "it’s “quoted” — dash…",
    "&amp; &lt;b&gt;",
    "\u00a0nbsp\u2003em",
    "zero\u200bwidth",
    "\ufeffbom",
    "a\x00b",
    "<|endoftext|>",
    "red<|startoftext|> blue",
    "<|ENDOFTEXT|>",
    "<| endoftext|>",
]


def get_reference(caption: str) -> list[int]:
    return REFERENCE(caption, add_special_tokens=False)["input_ids"]


def get_ids(caption: str) -> list[int]:
    """Return the ids between the marks, of all windows."""
    return FIRST.encode(caption, 225)[:, 1:-1].ravel()[: FIRST.count_tokens(caption)].tolist()


@pytest.mark.parametrize("caption", CAPTIONS)
def test_ids_equal_transformers(caption):
    assert get_ids(caption) == get_reference(caption)
    assert FIRST.count_tokens(caption) == len(get_reference(caption))


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30) | st.text(alphabet="abz'srevml d<|>\n\t09,.!ÉéſḰİ日", max_size=30))
def test_ids_equal_transformers_for_any_caption(caption):
    assert get_ids(caption) == get_reference(caption)


def test_the_cache_of_words_is_bounded_and_gives_the_same_ids(monkeypatch):
    monkeypatch.setattr(tokens, "MAX_WORDS", 3)
    tokenizer = load_tokenizer(TINY / "tokenizer", END)
    for caption in ("a red circle on a white a red circle", "red " * 9, "x" * 100 + " circle", "a red"):
        assert tokenizer.tokenize(caption) == tokenizer.tokenize(caption) == get_reference(caption)
        assert len(tokenizer._words) <= 3 and "x" * 100 not in tokenizer._words


def test_words_of_the_demo_are_single_tokens():
    assert FIRST.count_tokens("a red circle on a white background") == 7
    assert len(set(get_ids("red green blue yellow cyan magenta"))) == 6


def test_a_short_caption_fills_one_window_with_each_encoders_padding():
    ids = get_reference("a red circle")
    start, end = REFERENCE.bos_token_id, REFERENCE.eos_token_id
    assert FIRST.encode("a red circle").tolist() == [[start, *ids, end, *[end] * 72]]
    assert SECOND.encode("a red circle").tolist() == [[start, *ids, end, *[0] * 72]]
    assert (
        FIRST.encode("a red circle")[0].tolist()
        == REFERENCE("a red circle", padding="max_length", max_length=77)["input_ids"]
    )
    assert FIRST.encode("").dtype == np.int64


@pytest.mark.parametrize(
    ("max_tokens", "num_words", "lengths"),
    [
        (75, 75, [75]),
        (75, 300, [75]),
        (150, 75, [75, 0]),
        (150, 76, [75, 1]),
        (150, 150, [75, 75]),
        (150, 300, [75, 75]),
        (225, 0, [0, 0, 0]),
        (225, 100, [75, 25, 0]),
        (225, 300, [75, 75, 75]),
        (375, 230, [75, 75, 75, 5, 0]),
        (1050, 300, [75] * 4 + [0] * 10),
    ],
)
def test_long_captions_are_cut_into_windows_of_75(max_tokens, num_words, lengths):
    words = (["red", "green", "blue"] * 100)[:num_words]
    ids = get_reference(" ".join(words))
    assert len(ids) == num_words
    windows = SECOND.encode(" ".join(words), max_tokens)
    start, end = REFERENCE.bos_token_id, REFERENCE.eos_token_id
    expected = []
    for number, length in enumerate(lengths):  # a full window ends in EOS, an empty one reads BOS EOS 0 0 …
        part = ids[number * 75 : number * 75 + length]
        expected.append([start, *part, end, *[0] * (75 - length)])
    assert windows.tolist() == expected
    assert windows.shape == (max_tokens // 75, 77)


def test_a_pickled_tokenizer_gives_the_same_ids():
    copy = pickle.loads(pickle.dumps(SECOND))
    for caption in CAPTIONS:
        assert np.array_equal(copy.encode(caption, 150), SECOND.encode(caption, 150))


def test_a_vocabulary_that_is_not_clips_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"CLIP's vocabulary is missing"):
        load_tokenizer(tmp_path, END)
    shutil.copy(TINY / "tokenizer" / "vocab.json", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"and merges\.txt"):
        load_tokenizer(tmp_path, END)
    (tmp_path / "vocab.json").write_text('{"a": 0, "a</w>": 1, "!": 2}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(ValueError, match=r"lacks <\|startoftext\|>, <\|endoftext\|>; this is not CLIP's vocabulary"):
        load_tokenizer(tmp_path, "!")


def test_a_list_of_merges_gives_the_same_ids_as_the_vocabulary(tmp_path):
    # CLIP's vocabulary is a function of its merges, and open_clip_torch ships only the merges.
    merges = (TINY / "tokenizer" / "merges.txt").read_text().replace("#version", '"bpe_simple_vocab_16e6.txt#version')
    (tmp_path / MERGES_FILE).write_bytes(gzip.compress(merges.encode()))
    first, second = (load_tokenizer(tmp_path / MERGES_FILE, pad) for pad in (END, "!"))
    assert first.tokenizer.get_vocab() == FIRST.tokenizer.get_vocab() and second.pad_id == 0
    assert all(np.array_equal(first.encode(caption, 150), FIRST.encode(caption, 150)) for caption in CAPTIONS)
    write_vocabulary(tmp_path / MERGES_FILE, tmp_path / "folder")
    written, reference = load_tokenizer(tmp_path / "folder", END), CLIPTokenizer.from_pretrained(tmp_path / "folder")
    assert written.vocabulary == first.vocabulary and reference.get_vocab() == REFERENCE.get_vocab()


@pytest.mark.parametrize("as_pairs", [True, False])
def test_a_tokenizer_file_gives_the_same_ids_as_the_vocabulary(tmp_path, as_pairs):
    """transformers 5 saves a tokenizer as tokenizer.json alone; older releases write merges as text."""
    CLIPTokenizer.from_pretrained(TINY / "tokenizer").save_pretrained(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).unlink(missing_ok=True)
    saved = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in saved["model"]["merges"]]
    saved["model"]["merges"] = merges if as_pairs else [" ".join(merge) for merge in merges]
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved), encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path, END)
    assert has_vocabulary(tmp_path) and tokenizer.vocabulary == FIRST.vocabulary
    assert all(np.array_equal(tokenizer.encode(caption, 150), FIRST.encode(caption, 150)) for caption in CAPTIONS)


@pytest.mark.parametrize("text", ["{}", '{"model": 1}', '{"model": {"vocab": [], "merges": []}}', "not JSON"])
def test_a_damaged_tokenizer_file_is_named(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path, END)


def test_an_installed_vocabulary_is_found_without_importing_its_package(tmp_path, monkeypatch):
    package = tmp_path / "open_clip"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('torchvision is missing')")
    monkeypatch.syspath_prepend(tmp_path)
    assert find_installed_vocabulary() is None
    (package / MERGES_FILE).write_bytes(b"")
    assert find_installed_vocabulary() == package / MERGES_FILE and "open_clip" not in sys.modules
