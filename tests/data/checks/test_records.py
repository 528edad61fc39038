"""Checks of records before any network is loaded."""

import inspect
import json
import os
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from sdxl_trainer.configs.captions import CaptionConfig
from sdxl_trainer.configs.load import load_config
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.data.checks import captions, records, training_set, validation_set
from sdxl_trainer.data.checks.records import open_checked_records
from sdxl_trainer.data.index.selection import get_cache_folder
from sdxl_trainer.data.text.captions import build_caption_settings


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    """Write settings for a folder of three images without captions."""
    (tmp_path / "images").mkdir()
    for name in "abc":
        Image.new("RGB", (64, 64)).save(tmp_path / "images" / f"{name}.png")
    file = tmp_path / "x.yaml"
    file.write_text(f"data: {{image_dirs: [{tmp_path / 'images'}]}}\ncache: {{dir: {tmp_path / 'cache'}}}\n")
    return file


def test_images_without_one_caption_are_cached_but_not_trained(settings: Path) -> None:
    config, _ = load_config(settings)
    index, problems = open_checked_records(config)
    assert [problem.key for problem in problems] == ["data.image_dirs"] and "not one caption" in problems[0].rule
    index, problems = open_checked_records(config, need_captions=False)
    assert index is not None and len(index) == 3 and problems == []


@pytest.mark.parametrize(
    ("folders", "of_regularisation", "expected"),
    [
        (["images", "images/inner"], [], ("data.image_dirs.1", "images/inner", "lies in images", "remove this entry")),
        (["images/inner", "images"], [], ("data.image_dirs.0", "images/inner", "lies in images", "out of images")),
        (["images", "./images/"], [], ("data.image_dirs.1", "images", "is named twice", "remove this entry")),
        (["images"], ["images/inner"], ("data.regularisation_dirs.0", "images/inner", "lies in images", "out of")),
    ],
)
def test_an_image_folder_inside_another_one_is_to_be_removed(
    settings: Path,
    monkeypatch: pytest.MonkeyPatch,
    folders: list[str],
    of_regularisation: list[str],
    expected: tuple[str, str, str, str],
) -> None:
    monkeypatch.chdir(settings.parent)
    Path("images/inner").mkdir()
    Path("images/a.png").rename("images/inner/a.png")
    words = [f"data.image_dirs={json.dumps(folders)}", f"data.regularisation_dirs={json.dumps(of_regularisation)}"]
    [problem] = open_checked_records(load_config(settings, words)[0]).problems
    key, value, rule, cure = expected
    assert (problem.key, str(problem.value)) == (key, value) and rule in problem.rule and cure in problem.cure
    assert "rename" not in problem.cure


@pytest.mark.parametrize("name", ["images/a.png", "images/a.png/cache"])
@pytest.mark.parametrize("section", ["data", "validation"])
def test_a_cache_folder_that_is_a_file_is_refused_before_the_index_is_opened(
    settings: Path, messages: list[str], section: str, name: str
) -> None:
    folder, image = settings.parent / name, settings.parent / "images" / "a.png"
    words = {
        "data": [f"cache.dir={folder}"],
        "validation": [f"validation.image_dirs={settings.parent / 'images'}", f"validation.cache_dir={folder}"],
    }
    config, _ = load_config(settings, words[section])
    opened = open_checked_records(config) if section == "data" else validation_set.open_validation_set(config)
    [problem] = opened.problems
    assert problem.key == {"data": "cache.dir", "validation": "validation.cache_dir"}[section]
    assert problem.rule == f"cannot be a folder: {image} is a file" and problem.cure == "choose another folder"
    assert opened.index is None and messages == []


@pytest.mark.parametrize(("missing", "keys"), [("empty", []), ("skip", []), ("error", ["data.on_missing_caption"])])
def test_missing_captions_are_a_problem_if_the_settings_say_so(settings: Path, missing: str, keys: list) -> None:
    (settings.parent / "images" / "b.txt").write_text("a black square")
    config, _ = load_config(settings, [f"data.on_missing_caption={missing}"])
    problems = open_checked_records(config)[1]
    assert [problem.key for problem in problems] == keys
    if keys:
        assert "2 records have no caption: a, c" in problems[0].rule


@pytest.mark.parametrize(
    ("text", "words", "mark"),
    [
        ("一只猫，坐着，垫子", ["data.caption.shuffle=true"], "，"),
        ("一只猫、坐着、垫子", ["data.caption.shuffle=true", "data.caption.keep_tokens=1"], "、"),
        ("一只猫，坐着", ["data.caption.shuffle=true", "data.caption.separator='，'"], ""),
        ("一只猫，坐着", [], ""),  # no setting works on tags
        ("1girl, 长发，坐着", ["data.caption.shuffle=true"], ""),
    ],
)
def test_tags_behind_another_mark_than_the_separator_are_named(
    settings: Path, messages: list[str], text: str, words: list[str], mark: str
) -> None:
    for name in "abc":
        (settings.parent / "images" / f"{name}.txt").write_text(text if name != "c" else "a cat, a mat")
    open_checked_records(load_config(settings, words)[0])
    found = [message for message in messages if "data.caption.separator" in message]
    names = ", ".join(word.partition("=")[0] for word in words)
    rule = f"2 of 3 captions have '{mark}' between their tags and not ',', so {names} leaves them as they are"
    assert found == ([f"{rule}; set data.caption.separator: '{mark}'"] if mark else [])


def test_the_rarer_of_two_separators_is_to_be_replaced(settings: Path, messages: list[str]) -> None:
    for name, text in zip("abc", ("一只猫，坐着", "a cat, a mat", "a dog, a mat"), strict=True):
        (settings.parent / "images" / f"{name}.txt").write_text(text)
    open_checked_records(load_config(settings, ["data.caption.shuffle=true"])[0])
    (found,) = (message for message in messages if "between their tags" in message)
    assert found.startswith("1 of 3 captions have '，'") and found.endswith("; write ',' in them")


@pytest.mark.parametrize(
    ("aliases", "words", "named"),
    [
        ("kitty,cat", "", "data.caption.aliases: the 3 captions that were looked at have none of its 1 tag; "),
        ("Red_Hat,cap", "", ""),  # spelled in another way
        ("kitty,red hat", "data.caption.prefix=kitty,", ""),
        ("kitty,cat", "data.strategy=docs/examples/strategy.py:Strategy", ""),  # builds other captions
        ("red hat,cap", "data.caption.protected_tags=[capp]", "data.caption.protected_tags: "),
        ("red hat,cap", "data.caption.protected_tags=[cap]", ""),  # by the alias
        ("a_cat,cap", "data.caption.first_line=true", ""),
        ("second,cap", "data.caption.first_line=true", "data.caption.aliases: "),
        ("bow,cap", "data.caption.weighted=true", ""),
        ("kitty,cap", "data.caption.wildcards=true", ""),  # other texts at each draw
        ("big a cat,cap", "data.caption.first_line=true data.caption.prefix=big", ""),
    ],
)
def test_tags_of_settings_that_no_caption_has_are_named(
    settings: Path, messages: list[str], aliases: str, words: str, named: str
) -> None:
    text = "a cat\nsecond" if "first_line" in words else "a cat on a mat, red hat, (shoe, bow:1.2)"
    for name in "abc":
        (settings.parent / "images" / f"{name}.txt").write_text(text)
    file = settings.parent / "aliases.csv"
    file.write_text(aliases)
    config, problems = load_config(
        settings, ["data.caption.shuffle=true", f"data.caption.aliases={file}", *words.split()]
    )
    open_checked_records(config)
    found = [message for message in messages if "looked at" in message]
    assert problems == [] and len(found) == bool(named) and all(message.startswith(named) for message in found)


def test_a_protected_tag_that_is_implied_is_not_named(messages: list[str], tmp_path: Path) -> None:
    (tmp_path / "implied.csv").write_text("dog,animal")
    config = CaptionConfig(implications=str(tmp_path / "implied.csv"), protected_tags=["animal"])
    caption = build_caption_settings(config)
    assert caption.rules is not None
    captions.warn_of_tag_files(caption, caption.rules, ["a mat, dog"], all_captions=True)
    assert messages == []


def test_a_validation_set_may_lack_tags_of_the_training_set(settings: Path, messages: list[str]) -> None:
    for name in "abc":
        (settings.parent / "images" / f"{name}.txt").write_text("a cat")
    words = [f"validation.image_dirs=[{settings.parent / 'images'}]", "data.caption.protected_tags=[dog]"]
    config, problems = load_config(settings, [*words, "data.caption.shuffle=true"])
    validation_set.open_validation_set(config)
    assert problems == [] and not any("looked at" in message for message in messages)
    open_checked_records(config)
    assert any("looked at" in message for message in messages)


def test_rare_tags_are_not_named_if_only_some_captions_were_looked_at(messages: list[str], tmp_path: Path) -> None:
    (tmp_path / "few.csv").write_text("kitty,cat")
    (tmp_path / "many.csv").write_text("".join(f"tag {number},cat\n" for number in range(captions.MIN_TAGS)))
    for name in ("few", "many"):
        caption = build_caption_settings(CaptionConfig(aliases=str(tmp_path / f"{name}.csv")))
        assert caption.rules is not None
        captions.warn_of_tag_files(caption, caption.rules, ["a dog", "a mat"], all_captions=False)
    assert [message.split(";")[0] for message in messages] == [
        f"data.caption.aliases: the 2 captions that were looked at have none of its {captions.MIN_TAGS} tags"
    ]


@pytest.mark.parametrize(
    ("place", "code", "is_named"), [("index", 30, True), ("index", 28, False), ("data", 13, False)]
)
def test_an_index_that_cannot_be_written_is_named(
    settings: Path, monkeypatch: pytest.MonkeyPatch, place: str, code: int, is_named: bool
) -> None:
    config, _ = load_config(settings)
    folder = get_cache_folder(config) if place == "index" else settings.parent

    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code), str(folder / "file"))

    monkeypatch.setattr(records, "open_record_index", fail)
    with nullcontext() if is_named else pytest.raises(OSError):
        index, (problem,) = open_checked_records(config)
        assert index is None and problem.key == "cache.dir" and "Read-only" in problem.rule


def test_a_clash_of_keys_and_missing_captions_are_reported_together(tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text('{"a": {"image_path": "a.png"}, "64px/a": {"image_path": "b.png"}}')
    data = {"metadata": [tmp_path / "m.json"], "min_bucket_px": 32, "resolution_px": [64, 128]}
    index, problems = open_checked_records(Config.model_validate({"data": data}))
    assert index is not None
    assert [problem.key for problem in problems] == ["data.resolution_px", "data.metadata"]


@pytest.mark.parametrize("module", [records, training_set, validation_set])
def test_every_check_only_yields_problems(module: ModuleType) -> None:
    checks = {name: value for name, value in vars(module).items() if name.startswith("check_")}
    assert checks and all(map(inspect.isgeneratorfunction, checks.values()))
