"""Rules for tags: protected tags, aliases and implications, their files, and their errors."""

import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from programs import ROOT

from sdxl_trainer.configs.captions import CaptionConfig
from sdxl_trainer.configs.problems import UserInputError
from sdxl_trainer.configs.schema import DataConfig
from sdxl_trainer.data.checks.records import check_data_settings
from sdxl_trainer.data.text.captions import build_caption, build_caption_settings, list_tags
from sdxl_trainer.data.text.tag_rules import check_tag_rules, load_tag_rules, parse_aliases
from sdxl_trainer.data.text.variants import CaptionVariants, hash_captions

ALIASES = "kitty,cat\npussycat,kitty\nfate,fate_(series)\nkaoface,^_^\n"
IMPLICATIONS = (
    "id,antecedent_name,consequent_name,created_at,status\n"
    "1,cat,animal,2020,active\n"
    "2,tabby_cat,kitty,2020,active\n"
    "3,animal,living_being,2020,active\n"
    "4,cat,fish,2020,deleted\n"
    "5,cat,cat_ears,2020,active\n"
)


def test_the_example_of_the_data_page_is_read() -> None:
    example = (ROOT / "docs" / "CAPTIONS.md").read_text().split("```text tag_aliases.csv\n")[1].split("```")[0]
    assert parse_aliases(example.encode()) == {"kitty": "cat", "fate": "fate_(series)"}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "aliases.csv").write_text(ALIASES)
    (tmp_path / "implications.csv").write_text("\ufeff" + IMPLICATIONS, encoding="utf-8")
    return {"aliases": str(tmp_path / "aliases.csv"), "implications": str(tmp_path / "implications.csv")}


def shape(caption: str, seed: int = 0, step: int = 0, **config) -> str:
    settings = build_caption_settings(CaptionConfig(**config))
    return build_caption({"caption": caption}, settings, np.random.default_rng(seed), step)


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("1girl, smile", "1girl, smile"),
        ("Kitty, smile", "cat, smile"),
        ("pussycat", "cat"),  # an alias of an alias
        ("kitty, cat, pussycat, smile", "cat, smile"),
        ("fate, long hair", "fate (series), long hair"),
        ("fate, long_hair", "fate_(series), long_hair"),
        (r"fate, x \(y\)", r"fate \(series\), x \(y\)"),
        ("kaoface, smile", "^_^, smile"),
        ("", ""),
    ],
)
def test_aliases_replace_tags_in_the_captions_spelling(files, caption, expected):
    assert shape(caption, aliases=files["aliases"]) == expected


def test_implications_add_what_is_missing_transitively(files):
    both = dict(files)
    # `tabby cat` implies `kitty`, which is an alias of `cat`; `cat` implies two tags, and `animal` a third.
    assert shape("tabby cat, smile", **both) == "tabby cat, smile, cat, animal, cat ears, living being"
    assert shape("tabby_cat, Animal", **both) == "tabby_cat, Animal, cat, living_being, cat_ears"
    assert shape("x, pussycat ||| y ||| z", keep_tokens_separator="|||", **both) == (
        "x, cat, y, animal, cat ears, living being, z"
    )
    # Added tags are shuffled and dropped like others, and tags are kept by their places after aliases.
    assert shape("kitty, cat, smile, solo", keep_tokens=2, tag_dropout_rate=1.0, **both) == "cat, smile"
    assert shape("cat, smile, solo", keep_tokens=2, tag_dropout_rate=1.0, **both) == "cat, smile"
    drawn = Counter(shape("cat, solo", seed, shuffle=True, **both) for seed in range(60))
    assert len(drawn) > 30
    assert {tuple(sorted(text.split(", "))) for text in drawn} == {
        ("animal", "cat", "cat ears", "living being", "solo")
    }
    # A description is prose, and a dropped caption stays empty.
    record = {"caption": "kitty", "description": "A kitty, asleep."}
    settings = build_caption_settings(CaptionConfig(source="join", aliases=files["aliases"]))
    assert build_caption(record, settings, np.random.default_rng(0)) == "cat, A kitty, asleep."
    assert shape("kitty", dropout_rate=1.0, **both) == ""
    assert list_tags("kitty , x", settings) == ["cat", "x"]


def test_weights_pass_to_the_alias_and_brackets_are_escaped(files):
    assert shape("(kitty:1.3), [fate]", weighted=True, aliases=files["aliases"]) == (
        r"(cat:1.3), (fate \(series\):0.9090909090909091)"
    )
    assert shape("(kitty, fate:1.3)", weighted=True, aliases=files["aliases"]) == r"(cat:1.3), (fate \(series\):1.3)"
    assert shape("(kitty:1.3)", aliases=files["aliases"]) == "(kitty:1.3)"  # ordinary text without `weighted`


def test_protected_tags_stay_in_their_place(files, tmp_path):
    (tmp_path / "protected.txt").write_text("Blue_Eyes\n\n#tag\n")
    protected = dict(protected_tags=["solo"], protected_tags_file=str(tmp_path / "protected.txt"))
    caption = "a, solo, b, c, blue eyes, d, #tag"
    drawn = [shape(caption, seed, shuffle=True, **protected).split(", ") for seed in range(300)]
    assert all((tags[1], tags[4], tags[6]) == ("solo", "blue eyes", "#tag") for tags in drawn)
    places = Counter((tags.index("a"), "".join(sorted(set("abcd") & set(tags)))) for tags in drawn)
    assert {place for place, _ in places} == {0, 2, 3, 5} and {letters for _, letters in places} == {"abcd"}
    assert min(places.values()) > 45  # each free place is as likely: 75 expected
    assert shape(caption, tag_dropout_rate=1.0, shuffle=True, **protected) == "solo, blue eyes, #tag"
    warm = dict(token_warmup_steps=4, token_warmup_min=1)
    assert shape(caption, step=0, **warm, **protected) == "a, solo, blue eyes, #tag"
    assert shape(caption, step=2, **warm, **protected) == "a, solo, b, blue eyes, #tag"
    # Of a protected alias and of what replaces it, both are protected.
    assert shape("a, kitty", tag_dropout_rate=1.0, protected_tags=["kitty"], **files) == "cat"
    assert shape("a, (solo:1.2)", tag_dropout_rate=1.0, weighted=True, protected_tags=["solo"]) == "(solo:1.2)"
    assert shape(caption, dropout_rate=1.0, **protected) == ""


def test_without_rules_the_draws_are_as_before():
    """The captions of seeds 0 to 2 before tags could be protected."""
    config = dict(shuffle=True, tag_dropout_rate=0.3)
    drawn = [shape("a, b, c, d, e, f", seed, **config) for seed in range(3)]
    assert drawn == ["d, c, f, e, a, b", "f, a, b, e, d", "a, f, e"]


@pytest.mark.parametrize(
    ("name", "content", "rule"),
    [
        ("aliases", b"a,b\nb,c\nc,A\n", "line 1: a → b → c → a leads back to its start"),
        ("implications", b"x,y\n\nb,c\nc,d\nd,b\n", "line 3: b → c → d → b leads back to its start"),
        ("aliases", b"a,b\nA,c\n", "line 2: A is an alias of c, but of b in line 1"),
        ("aliases", b"a,b\nc\n", "line 2: has 1 columns, not 2; write antecedent,consequent"),
        ("implications", b"a,b\nc,d,active\n", "line 2: has 3 columns, not 2"),
        ("aliases", b"status,antecedent,consequent\nactive,a\n", "line 2: has 2 columns, not 3"),
        ("aliases", b"a,b\n c , \n", "line 2: has an empty tag"),
        ("aliases", b"a,b\n\xff,c\n", "line 2: is not UTF-8"),
        ("implications", b'a,b\n"c"d,e\n', "line 2: ',' expected after '\"'"),
        ("protected_tags_file", b"a\nb\n\xe9\n", "line 3: is not UTF-8"),
        ("protected_tags_file", None, "cannot be read: No such file or directory"),
    ],
)
def test_errors_name_the_file_and_the_line(tmp_path, name, content, rule):
    if content is not None:
        (tmp_path / "tags").write_bytes(content)
    config = CaptionConfig(**{name: str(tmp_path / "tags")})
    [problem] = check_tag_rules(config)
    assert problem.key == f"data.caption.{name}" and problem.value == str(tmp_path / "tags") and rule in problem.rule
    assert problem in list(check_data_settings(DataConfig(image_dirs=[tmp_path], caption=config), None))
    with pytest.raises(UserInputError):
        build_caption_settings(config)


def test_all_files_are_checked_and_harmless_rows_accepted(tmp_path):
    (tmp_path / "a").write_text("a,b,c\n")
    (tmp_path / "b").write_text("a,b\nb,a\n")
    found = check_tag_rules(CaptionConfig(aliases=str(tmp_path / "a"), implications=str(tmp_path / "b")))
    assert [problem.key for problem in found] == ["data.caption.aliases", "data.caption.implications"]
    (tmp_path / "a").write_text("a_b,A b\nc,d\nC,d\nkitty,cat\n")
    (tmp_path / "b").write_text("kitty,cat\nx,x\n")  # a tag implies itself, with the alias
    rules = load_tag_rules(CaptionConfig(aliases=str(tmp_path / "a"), implications=str(tmp_path / "b")))
    assert rules is not None and rules.aliases == {"c": "d", "kitty": "cat"} and rules.implied == {}
    assert load_tag_rules(CaptionConfig()) is None


def test_large_files_are_parsed_once_and_shared(tmp_path):
    """Thousands of rows, and chains far deeper than Python's recursion."""
    (tmp_path / "a.csv").write_text("".join(f"old {n},new_{n}\n" for n in range(15_000)) + chain("old", 5000))
    (tmp_path / "i.csv").write_text("".join(f"new {n},kind {n % 97}\n" for n in range(15_000)) + chain("up", 5000))
    config = CaptionConfig(aliases=str(tmp_path / "a.csv"), implications=str(tmp_path / "i.csv"))
    settings = build_caption_settings(config)
    assert settings.rules is not None and len(settings.rules.aliases) == 20_000
    assert build_caption_settings(config).rules is settings.rules  # parsed once
    content = pickle.dumps(settings)
    assert len(content) < 2000 and pickle.loads(content).rules is settings.rules
    rng = np.random.default_rng(0)
    assert build_caption({"caption": "old 7, old_x0"}, settings, rng) == "new_7, old_x5000, kind_7"
    assert len(list_tags("up x0", settings)) == 5001
    variants = CaptionVariants(settings)
    before = hash_captions(variants.build({"key": "k", "caption": "old 7"}))
    (tmp_path / "a.csv").write_text("old 7,other\n")
    changed = build_caption_settings(config)
    assert hash_captions(CaptionVariants(changed).build({"key": "k", "caption": "old 7"})) != before
    with pytest.raises(ValueError, match="files of tags have changed since the run started"):
        pickle.loads(content)


def chain(name: str, length: int) -> str:
    return "".join(f"{name} x{n},{name} x{n + 1}\n" for n in range(length))
