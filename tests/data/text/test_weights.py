"""Weights of words: the syntax and numbers of kohya's `--weighted_captions`, tokens, and the steps that move tags."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import load_tiny_tokenizers

from sdxl_trainer.data.text.captions import CaptionSettings, build_caption, list_tags
from sdxl_trainer.data.text.tokens import encode_captions
from sdxl_trainer.data.text.weights import MAX_WEIGHT, divide_groups, parse_weights

TOKENIZERS = load_tiny_tokenizers()
NESTED = "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky)))."


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("", [("", 1)]),
        ("normal text", [("normal text", 1)]),
        ("an (important) word", [("an ", 1), ("important", 1.1), (" word", 1)]),
        ("an [unimportant] word", [("an ", 1), ("unimportant", 1 / 1.1), (" word", 1)]),
        ("(word:1.2)", [("word", 1.2)]),
        ("(word:+.5) (b:-1.)", [("word", 0.5), (" ", 1), ("b", -1)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        ("[unbalanced", [("unbalanced", 1 / 1.1)]),
        ("a) b] c:1.2)", [("a) b] c:1.2)", 1)]),
        (r"\(literal\] a\\b c\d", [(r"(literal] a\b cd", 1)]),
        (r"(fate \(series\):1.3)", [("fate (series)", 1.3)]),
        ("(un)(parens)", [("unparens", 1.1)]),
        ("([a)]", [("a", 1.1 / 1.1)]),
        ("(1:2:1.5)", [("1:2", 1.5)]),
        # Numbers that are none close the group with 1.1 and stay in the text.
        ("(a:1.2.3)(b:nan)(c:1e3)", [("a:1.2.3b:nanc:1e3", 1.1)]),
        ("(a:1e)(b:99999999)(c:-101)", [("a:1e", 1.1), ("b", MAX_WEIGHT), ("c", -MAX_WEIGHT)]),
        (
            NESTED,
            [
                ("a ", 1),
                ("house", 1.3 * 1.1 * 1.1),
                (" ", 1.1),
                ("on", 1.0),
                (" a ", 1.1),
                ("hill", 0.55),
                (", sun, ", 1.1),
                ("sky", 1.1 * 1.1 * 1.1 * 1.1),
                (".", 1.1),
            ],
        ),
    ],
)
def test_brackets_are_read_as_kohyas_scripts_do(caption, expected):
    found = parse_weights(caption)
    assert [part.text for part in found] == [text for text, _ in expected]
    np.testing.assert_allclose([part.weight for part in found], [weight for _, weight in expected], rtol=1e-12)


def test_a_hostile_caption_has_finite_weights():
    for caption in (
        "[" * 20_000 + "x",
        "(" * 3000 + "x" + ":99)" * 3000 + "y",
        "((x:0)" + "(" * 400 + ":9)" * 400 + ":0)",
    ):
        weights = np.array([part.weight for part in parse_weights(caption)])
        assert np.isfinite(weights).all() and abs(weights).max() <= MAX_WEIGHT


def list_letters(caption: str) -> list[tuple[str, float]]:
    """List the letters of a caption with their weights; separators have no weight of their own once tags move."""
    return [
        (letter, round(part.weight, 9)) for part in parse_weights(caption) for letter in part.text if letter not in ", "
    ]


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab,()[]:1.5\\ ", max_size=24))
def test_divided_groups_keep_the_weight_of_every_letter(caption):
    divided = divide_groups(caption, ",")
    assert list_letters(divided) == list_letters(caption)
    assert divided == caption or all(divide_groups(tag, ",") == tag for tag in divided.split(","))


def test_a_group_with_a_comma_keeps_its_weights_when_tags_move():
    assert divide_groups("(a, b:1.2), (c), d", ",") == "(a:1.2), (b:1.2), (c:1.1), d"
    assert divide_groups("(a b:1.2), [c], d", ",") == "(a b:1.2), [c], d"  # no group holds a comma
    expected = {"a": 1.2, "b": 1.2, "c": 1.1, "d": 1.0}
    orders = set()
    for seed in range(20):
        rng = np.random.default_rng(seed)
        text = build_caption({"caption": "(a, b:1.2), (c), d"}, CaptionSettings(shuffle=True, weighted=True), rng)
        assert dict(list_letters(text)) == expected
        orders.add(text)
    assert len(orders) > 10
    kept = CaptionSettings(keep_tokens=1, tag_dropout_rate=1.0, weighted=True)
    assert build_caption({"caption": "(a, b:1.2)"}, kept, np.random.default_rng(0)) == "(a:1.2)"
    assert list_tags(r"(a, b:1.2), \(c\)", CaptionSettings(weighted=True)) == ["a", "b", "(c)"]
    # Brackets are text by default, and nothing moves without a step that works on tags.
    rng = np.random.default_rng(0)
    assert build_caption({"caption": "(a, b:1.2)"}, CaptionSettings(weighted=True), rng) == "(a, b:1.2)"
    plain = {
        build_caption({"caption": "(a, b:1.2)"}, CaptionSettings(shuffle=True), np.random.default_rng(seed))
        for seed in range(9)
    }
    assert plain == {"(a, b:1.2)", "b:1.2), (a"}


def test_tokens_have_the_weights_of_their_words():
    plain = encode_captions(TOKENIZERS, ["a red circle, blue"])
    found = encode_captions(TOKENIZERS, ["a (red circle:1.5), blue", ""], weighted=True)
    assert plain.weights is None and np.array_equal(found.input_ids[0], plain.input_ids[0])
    assert np.array_equal(found.input_ids_2[0], plain.input_ids_2[0])
    expected = np.ones((2, 77), np.float32)
    expected[0, 2:4] = 1.5  # after the start mark and `a`
    assert np.array_equal(found.weights, expected) and np.array_equal(found.weights_2, expected)
    assert found.weights.dtype == np.float32
    # A word ends where the weight changes.
    joined, split = (encode_captions(TOKENIZERS, [text]).input_ids for text in ("redblue", "red blue"))
    assert np.array_equal(encode_captions(TOKENIZERS, ["red(blue)"], weighted=True).input_ids, split)
    assert not np.array_equal(joined, split)
    assert TOKENIZERS[0].count_tokens("a (red circle:1.5)", weighted=True) == 3 < TOKENIZERS[0].count_tokens("(a:1.5)")


def test_weights_run_on_over_windows_and_are_cut_with_the_tokens():
    """Of 160 weighted words, those of window 3 are cut; states of the windows are joined without marks."""
    caption = "blue " * 70 + "(" + "red " * 90 + ":1.25)"
    found = encode_captions(TOKENIZERS, [caption], 150, weighted=True)
    assert np.array_equal(found.input_ids, encode_captions(TOKENIZERS, ["blue " * 70 + "red " * 90], 150).input_ids)
    expected = np.ones(152, np.float32)
    expected[71:151] = 1.25  # tokens 70 to 149; the last state is an end mark
    assert np.array_equal(found.weights[0], expected)
