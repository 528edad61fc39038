"""The caption pipeline: each option alone, the order of the steps, and reproducibility from the generator."""

import dataclasses
import sys
from collections import Counter

import ftfy
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdxl_trainer.configs.captions import CaptionConfig
from sdxl_trainer.configs.document import build_page
from sdxl_trainer.configs.load import iterate_keys, load_config
from sdxl_trainer.configs.schema import DataConfig
from sdxl_trainer.data.checks.records import check_data_settings
from sdxl_trainer.data.text.captions import (
    CaptionSettings,
    build_caption,
    build_caption_settings,
    expand_wildcards,
    fix_text,
)
from sdxl_trainer.data.text.tag_rules import TagSources

TAGS = "a, b, c, d, e, f"


def shape(caption, seed=0, step=0, epoch=0, **settings) -> str:
    record = caption if isinstance(caption, dict) else {"caption": caption}
    return build_caption(record, CaptionSettings(**settings), np.random.default_rng(seed), step, epoch)


def draw(caption, num_seeds=400, **settings) -> Counter:
    """Count the captions drawn with many seeds."""
    return Counter(shape(caption, seed, **settings) for seed in range(num_seeds))


@pytest.mark.parametrize(
    "text", ["", "a,b ,, c", "two\nlines", "{a|b} {{x}} ||| y;;;z", " spaces , kept ", "ein Mädchen 🙂"]
)
def test_without_options_a_caption_is_unchanged(text):
    assert draw(text, 20) == {text: 20}


def test_the_settings_are_those_of_the_schema():
    assert build_caption_settings(CaptionConfig()) == CaptionSettings()
    fields = CaptionConfig.model_fields.keys() - set(TagSources._fields)
    assert {field.name for field in dataclasses.fields(CaptionSettings)} == {*fields, "rules"}
    assert build_caption_settings(CaptionConfig(replacements={"a": ["b"]}, shuffle=True)).shuffle


def test_prefix_and_suffix():
    assert shape("a, b", prefix="style,", suffix=", end") == "style, a, b , end"
    assert shape("", prefix="style", suffix="end") == "style end"
    assert shape({"description": "Prose."}, prefix="p", suffix="s") == "p Prose. s"
    both = {"caption": "a", "description": "Prose."}
    assert shape(both, prefix="p", suffix="s", source="join") == "p a, Prose. s"
    # One line is picked later, so every line has both affixes.
    assert set(draw("x\ny", prefix="p", suffix="s", wildcards=True)) == {"p x s", "p y s"}


def test_dropout_gives_the_empty_caption_with_all_other_options():
    everything = dict(prefix="p", suffix="s", replacements={"": "all"}, keep_tokens=2, shuffle=True, source="join")
    assert draw({"caption": TAGS, "description": "Prose"}, 20, dropout_rate=1.0, **everything) == {"": 20}
    dropped = draw(TAGS, dropout_rate=0.25)
    assert 70 <= dropped[""] <= 130 and dropped[TAGS] == 400 - dropped[""]


def test_every_nth_epoch_drops_all_captions():
    assert [shape("a", epoch=epoch, dropout_every_epochs=3) for epoch in range(7)] == ["a", "a", "", "a", "a", "", "a"]
    assert [shape("a", epoch=epoch, dropout_every_epochs=1) for epoch in range(2)] == ["", ""]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{a|b}", {"a", "b"}),
        ("x {a|b} {c|d}", {"x a c", "x a d", "x b c", "x b d"}),
        ("{a|{b|c}}", {"a", "b", "c"}),
        ("{{b|c} d|a}", {"{b|c} d|a}"}),  # `{{` is a literal brace, as kohya reads it
        ("{ {b|c} d|a}", {" b d", " c d", "a"}),
        ("{a|}", {"a", ""}),
        ("{a}", {"a"}),
        ("{{a|b}}", {"{a|b}"}),
        ("{x{{1}}|y}", {"x{1}", "y"}),
        ("}} {{", {"} {"}),
        ("{}", {"{}"}),
        ("a | b", {"a | b"}),
        ("{a|b", {"{a|b"}),
        ("{a|{b|c}", {"{a|b", "{a|c"}),
        ("a} b", {"a} b"}),
        ("{2$$a|b}", {"a, b", "b, a"}),
        ("{1-2$$ and $$a|b}", {"a", "b", "a and b", "b and a"}),
        ("{9$$a|b}", {"a, b", "b, a"}),
        ("{0$$a|b}", {""}),
        ("{2$$$$a|b}", {"ab", "ba"}),
    ],
)
def test_wildcards(text, expected):
    assert {expand_wildcards(text, np.random.default_rng(seed)) for seed in range(100)} == expected


def test_wildcard_options_are_equally_likely():
    assert all(90 <= count <= 180 for count in draw("{a|b|c}", wildcards=True).values())


def test_hostile_captions_do_not_break_the_parser():
    rng = np.random.default_rng(0)
    assert expand_wildcards("{" * 20_001, rng) == "{" * 10_001
    assert expand_wildcards("{ " * 5_000 + "x" + "}" * 5_000, rng).strip() == "x"
    bomb = "y"
    for _ in range(12):  # each level would repeat the one below ten times
        bomb = "{99$$" + bomb + "$$" + "|".join("0123456789") + "}"
    assert len(expand_wildcards(bomb, rng)) < 4 * len(bomb)


def test_a_line_is_picked_only_with_wildcards():
    assert set(draw("one\n\n two \r\n{3|4}", wildcards=True)) == {"one", "two", "3", "4"}
    assert shape("\n\n", wildcards=True) == ""


def test_only_the_first_line_is_used_with_first_line():
    assert shape("x, y\r\nz", first_line=True, prefix="p", suffix="s") == "p x, y s"
    assert shape("\n x \ny", first_line=True) == "x" and shape("x\ny") == "x\ny"
    assert shape({"description": "One.\nTwo.", "tags": "a\nb"}, first_line=True, source="join") == "a, One."


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("“a” ‘b’", "\"a\" 'b'"),
        ("ﬁne ＡＢＣ，", "fine ABC,"),
        ("a &amp; b &lt;3", "a & b <3"),
        ("<b> &amp;", "<b> &amp;"),  # ftfy takes this for HTML
        ("MÃ¶we", "Möwe"),
        ("Mo\u0308we", "Möwe"),
        ("a\u2028b\x07", "a\nb"),
        ("青い髪 🙂", "青い髪 🙂"),
    ],
)
def test_captions_are_cleaned_by_ftfy(text, clean):
    assert shape(text) == clean and shape(text, fix_text=False) == text
    assert shape("x", replacements={"x": text}) == clean  # after all other steps


@given(st.text(st.characters(max_codepoint=127)))
def test_ftfy_is_asked_only_where_it_changes_something(text):
    assert fix_text(text) == ftfy.fix_text(text)


def test_a_missing_ftfy_is_a_problem_before_training(monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    problems = {problem.key: problem.cure for problem in check_data_settings(DataConfig(), None)}
    assert problems["data.caption.fix_text"].startswith("pip install ftfy, or set it to false")
    off = DataConfig(caption=CaptionConfig(fix_text=False))
    assert "data.caption.fix_text" not in {problem.key for problem in check_data_settings(off, None)}
    with pytest.raises(ValueError, match="pip install ftfy"):
        fix_text("é")


def test_shuffle_keeps_the_first_tags_in_front():
    shuffled = draw("a, b, c,d ,, e", shuffle=True, keep_tokens=2)
    assert len(shuffled) == 6 and all(text.startswith("a, b, ") for text in shuffled)
    assert all(sorted(text.split(", ")) == list("abcde") for text in shuffled)
    assert draw(TAGS, 20, shuffle=True, keep_tokens=9) == {TAGS: 20}
    assert len(draw("a, b, c", shuffle=True)) == 6


def test_keep_tokens_separator_marks_the_fixed_tags():
    shuffled = draw("a, b ||| c, d ||| e, f", shuffle=True, keep_tokens_separator="|||", keep_tokens=4)
    assert set(shuffled) == {"a, b, c, d, e, f", "a, b, d, c, e, f"}
    assert shape("a ||| b, c", keep_tokens_separator="|||", tag_dropout_rate=1.0) == "a"
    # The separator never reaches the model, even if no other option works on tags.
    assert shape("a ||| b, c ||| d ||| e", keep_tokens_separator="|||") == "a, b, c, d, e"
    # In a caption without the separator, keep_tokens applies.
    assert set(draw("a, b, c", shuffle=True, keep_tokens_separator="|||", keep_tokens=1)) == {"a, b, c", "a, c, b"}


def test_the_number_of_tags_grows_over_the_warm_up():
    def count(step: int, **settings) -> int:
        return len(shape(TAGS, step=step, token_warmup_steps=10, **settings).split(", "))

    # floor(step · (6 − 1) / 10) + 1
    assert [count(step) for step in range(12)] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]
    assert [count(step, token_warmup_min=4) for step in (0, 4, 5, 9, 10)] == [4, 4, 5, 5, 6]
    assert [count(step, keep_tokens=2) for step in (0, 9, 10)] == [3, 5, 6]
    # A minimum beyond the number of tags keeps all tags.
    assert shape("a", step=9, token_warmup_steps=10, token_warmup_min=5) == "a"
    assert shape(TAGS, step=0, token_warmup_steps=10, token_warmup_min=0) == ""
    assert shape(TAGS, step=3, token_warmup_steps=10) == "a, b"  # the first tags, before the shuffle
    assert {text[0] for text in draw(TAGS, step=3, token_warmup_steps=10, shuffle=True)} == {"a", "b"}


def test_tag_dropout_spares_kept_tags():
    counts = Counter(
        tag for text, n in draw(TAGS, tag_dropout_rate=0.3, keep_tokens=1).items() for tag in text.split(", ") * n
    )
    assert counts["a"] == 400 and all(240 <= counts[tag] <= 320 for tag in "bcdef")
    assert shape(TAGS, tag_dropout_rate=1.0) == ""


def test_other_separators():
    assert shape("a; b; c, d", separator=";", tag_dropout_rate=1.0, keep_tokens=3) == "a, b, c, d"
    assert set(draw("a, b;;;c", shuffle=True, secondary_separator=";;;")) == {"a, b,c", "b,c, a"}
    assert shape("a;;;b", secondary_separator=";;;", separator="|") == "a|b"
    assert shape({"tags": ["x", "y"]}, separator=";") == "x; y"


def test_replacements_come_last():
    assert shape("a cat;;;b", replacements={"cat": "dog", "g,b": "g and b"}, secondary_separator=";;;") == "a dog and b"
    assert set(draw("my X", replacements={"X": ["cat", "dog"]})) == {"my cat", "my dog"}
    assert shape("gone", replacements={"": "new"}) == "new"


@pytest.mark.parametrize("names", [("caption", "description"), ("tags", "nl_caption")])
def test_tags_or_description(names):
    record = {names[0]: TAGS, names[1]: "One, two."}
    half = draw(record)
    assert set(half) == {TAGS, "One, two."} and 160 <= half[TAGS] <= 240
    assert 70 <= draw(record, description_rate=0.25)["One, two."] <= 130
    assert draw(record, 20, source="join") == {TAGS + ", One, two.": 20}
    assert draw(record, 20, source="tags") == {TAGS: 20}
    assert draw(record, 20, source="description") == {"One, two.": 20}
    for name, other in (names, names[::-1]):
        assert draw({name: "only", other: None}, 20) == draw({name: "only"}, 20, source="join") == {"only": 20}
    assert shape({names[0]: "t"}, source="description") == shape({names[1]: "d"}, source="tags") == shape({}) == ""


def test_a_description_is_not_split_into_tags():
    record = {"tags": ["a", "b", "c"], "description": "One, two, three, {4|4}."}
    options = dict(shuffle=True, keep_tokens=1, tag_dropout_rate=0.5, wildcards=True, keep_tokens_separator="|||")
    assert draw(record, 20, source="description", **options) == {"One, two, three, 4.": 20}
    joined = draw(record, source="join", **options)
    assert len(joined) > 3 and all(text.startswith("a, ") and text.endswith("One, two, three, 4.") for text in joined)


def test_the_order_of_the_steps():
    """Check pairs of steps whose reversed order would give another caption."""
    # The prefix comes before wildcards and before kept tags.
    assert shape("a, b", prefix="{x|x},", wildcards=True, keep_tokens=1, tag_dropout_rate=1.0) == "x"
    # Wildcards come before tags are counted, because one group may hold several tags.
    assert shape("{a, b|a, b}, c", wildcards=True, keep_tokens=2, tag_dropout_rate=1.0) == "a, b"
    # Kept tags come before the warm-up, and the warm-up before the shuffle.
    assert set(draw("a, b, c, d", keep_tokens=1, token_warmup_steps=9, token_warmup_min=2, shuffle=True)) == {
        "a, b, c",
        "a, c, b",
    }
    # The secondary separator comes after the shuffle, and replacements come last.
    assert shape("a;;;b, c", secondary_separator=";;;", tag_dropout_rate=1.0, keep_tokens=1) == "a,b"
    assert shape("a;;;b", secondary_separator=";;;", replacements={";;;": "!", ",": "?"}) == "a?b"


def test_equal_seeds_give_equal_captions():
    options = dict(shuffle=True, tag_dropout_rate=0.2, dropout_rate=0.2, wildcards=True)
    text = ", ".join(f"tag{number} {{x|y}}" for number in range(20))
    assert draw(text, 50, **options) == draw(text, 50, **options)
    assert len(draw(text, 50, **options)) > 30
    # Turning dropout on changes no caption that is not dropped.
    with_dropout, without = (
        [shape(text, seed, **{**options, "dropout_rate": rate}) for seed in range(50)] for rate in (0.5, 0.0)
    )
    changed = {dropped for dropped, kept in zip(with_dropout, without, strict=True) if dropped != kept}
    assert changed == {""}


@pytest.mark.parametrize(
    "wrong",
    [
        {"dropout_rate": 1.1},
        {"tag_dropout_rate": -0.1},
        {"keep_tokens": -1},
        {"separator": ""},
        {"source": "x"},
        {"replacements": {"a": []}},
        {"replacements": {"a": 3}},
        {"caption_prefix": "x"},
        {"token_warmup_steps": 0.5},
    ],
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        CaptionConfig(**wrong)


def test_nested_caption_settings_are_loaded_and_documented(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("data:\n  caption:\n    shuffle: true\n")
    config, problems = load_config(file, ["data.caption.keep_tokens=2", "data.caption.replacements={a: [b, c]}"])
    assert problems == [] and build_caption_settings(config.data.caption) == CaptionSettings(
        shuffle=True, keep_tokens=2, replacements={"a": ["b", "c"]}
    )
    file.write_text("data:\n  caption:\n    # shuffle: true\n")
    assert load_config(file)[1] == []
    file.write_text("data: {caption_dropout_rate: 0.1, caption: {shufle: true, keep_tokens: -1}}")
    problems = load_config(file)[1]
    assert sorted((problem.key, problem.cure) for problem in problems) == [
        ("data.caption.keep_tokens", "change it; docs/CONFIG.md describes it"),
        ("data.caption.shufle", "did you mean data.caption.shuffle?"),
        ("data.caption_dropout_rate", "did you mean data.caption.dropout_rate?"),
    ]
    assert {"data.caption", "data.caption.dropout_rate"} <= set(iterate_keys())
    page = build_page()
    assert "\n## data.caption\n" in page and "[data.caption](#datacaption)" in page
    assert r"`{a\|b}`" in page, "a bar within a cell would end it"
