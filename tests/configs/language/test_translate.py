"""Translation: finished texts find the message that they were made from, and what is the user's stays as it is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from programs import ROOT

from sdxl_trainer.configs.language.arguments import TranslatedParser
from sdxl_trainer.configs.language.catalogue import Entry, format_catalogue, read_catalogue
from sdxl_trainer.configs.language.commands import VARIABLE, adapt_commands
from sdxl_trainer.configs.language.messages import extract_from_source
from sdxl_trainer.configs.language.translate import choose_language, join_label, load_translator, translate
from sdxl_trainer.configs.language.translator import Translator
from sdxl_trainer.configs.language.update import list_faults, update_entries
from sdxl_trainer.configs.problems import Problem, UserInputError
from sdxl_trainer.train.doctor.program import DESCRIPTION as DOCTOR_HELP

MESSAGES = {
    "no images in {folder}": "{folder} 中没有图片",
    "{count:,} image": "{count} 张图片",
    "{count:,} images": "{count} 张图片",
    "{bad:,} of {total:,} images are bad, first {name}": "{total} 张图片中有 {bad} 张损坏，第一张是 {name}",
    "skipped: {reason}": "已跳过：{reason}",
    " of {total}": "，共 {total}",
    "{left} of {right}": "{right} 的 {left}",
    "run bash launch/cache.sh": "运行 bash launch/cache.sh",
    "is damaged": "已损坏",
    "; about {needed:.2g} GB needed": "；约需 {needed} GB",
    "needs {{a|b}}": "需要 {{a|b}}",
    "bucket": "桶",
}


@pytest.fixture
def translator() -> Translator:
    return Translator([Entry(text=text, translation=translation) for text, translation in MESSAGES.items()])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no images in /data/a b", "/data/a b 中没有图片"),
        ("1 image", "1 张图片"),
        ("12,000 images", "12,000 张图片"),
        ("7 of 1,000 images are bad, first x of y.png", "1,000 张图片中有 7 张损坏，第一张是 x of y.png"),
        ("skipped: 3 images", "已跳过：3 张图片"),  # a message in a field
        ("skipped: is damaged; run bash launch/cache.sh", "已跳过：已损坏；运行 bash launch/cache.sh"),
        ("/data/x.npz: is damaged", "/data/x.npz：已损坏"),  # put together at run time
        ("bucket: is damaged", "bucket：已损坏"),
        ("3 images, bucket", "3 张图片，桶"),
        ("is damaged; about 3 GB needed", "已损坏；约需 3 GB"),
        ("x.npz; about 3 GB needed; is damaged", "x.npz；约需 3 GB；已损坏"),
        ("is damaged\n  run bash launch/cache.sh\n\nx", "已损坏\n  运行 bash launch/cache.sh\n\nx"),
        ("needs {a|b}", "需要 {a|b}"),
        ("3 of 4", "4 的 3"),
        # Messages of several clauses behind a place, before a hint, and beside each other.
        (
            "/data/x: skipped: no images in /data/a b; run bash launch/cache.sh",
            "/data/x：已跳过：/data/a b 中没有图片；运行 bash launch/cache.sh",
        ),
        (
            "x.txt:2: 7 of 9 images are bad, first a.png; is damaged",
            "x.txt:2：9 张图片中有 7 张损坏，第一张是 a.png；已损坏",
        ),
        ("optim.lr: 0.1; 3 images", "optim.lr: 0.1；3 张图片"),  # a name and its value keep the colon of YAML
        ("no images in is damaged", "已损坏中没有图片"),  # no space between Chinese texts
        ("1.5 GB of 24 GB", "24 GB 的 1.5 GB"),
        # What is no message stays as it is: other sentences, names, single words, other forms of numbers.
        ("a library of the system cannot be read", "a library of the system cannot be read"),
        ("bucket", "bucket"),
        ("many images", "many images"),
        (", images", ", images"),
        ("a name, of 400", "a name, of 400"),
        ("none of them", "none of them"),
        ("many of 3 images", "many of 3 images"),
        ("/data/x.npz is damaged", "/data/x.npz 已损坏"),
        ("", ""),
    ],
)
def test_finished_texts(translator: Translator, text: str, expected: str) -> None:
    assert translator.translate(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("unet: 840 of 1680 names missing (a.b; c.d; …)", "unet：缺少 1680 个名称中的 840 个（a.b; c.d; …）"),
        ("1 group", "1 组"),
        ("fits with 908 MB; largest micro batch 1941", "放得下，需要 908 MB；最大的微批为 1941"),
        ("300 steps; validation loss from 0.4 to 0.3", "300 步；验证损失从 0.4 到 0.3"),
        ("before: step 0", "训练前：第 0 步"),
        ("at step 20, in 12 s", "第 20 步，12 秒后"),
        ("in 3 h 2 min", "3 小时 2 分钟后"),
        (
            "estimated time: 12 s (images 3 s; decoding at the same time 2 d 4 h)",
            "估计时间：12 秒（图片 3 秒；同时解码 2 天 4 小时）",
        ),
        (
            "holds images, such as 0.jpg, and no latents (.npz)",
            "含有图片（如 0.jpg），而没有潜变量（.npz）",
        ),  # after a setting
        ("12.6 MB, forward pass, weight update", "12.6 MB，前向传播，权重更新"),
        ("after forward pass", "在前向传播之后"),
        (
            "p.txt:2: has the flag –n with a word processor's dash; write --n",
            "p.txt:2：选项 –n 使用了文字处理软件的破折号；请写 --n",
        ),
        (
            "is not valid YAML: line 46, column 3: found unexpected end of stream",
            "不是有效的 YAML：第 46 行第 3 列：文件意外结束",
        ),
        (
            "/a b.txt, entry 2: has the unknown key `k`; did you mean x?",
            "/a b.txt，第 2 项：有未知的键 `k`；是否应为 x？",
        ),
    ],
)
def test_messages_that_are_put_together(text: str, expected: str) -> None:
    assert load_translator("zh").translate(text) == expected


def test_texts_of_any_length_and_nesting_are_translated_in_time() -> None:
    """The number of readings does not explode, and no depth of nesting ends the program."""
    translator = load_translator("zh")
    names = ", ".join(f"name{number} of x" for number in range(1000))
    assert translator.translate(names).count("name") == 1000
    reasons = "; ".join(f"/data/{number}.png: cannot be decoded: x" for number in range(100))
    assert translator.translate(reasons).count("无法解码") == 100
    assert translator.translate("the of in x " * 400)


def test_the_doctors_help_and_its_output_use_the_same_marks() -> None:
    translator = load_translator("zh")
    help_text = translator.translate(DOCTOR_HELP)
    for mark in ("ok", "note", "WARN", "WRONG", "TO DO"):
        assert f"「{translator.translate_label(mark)}」" in help_text and mark not in help_text


@pytest.mark.parametrize(
    ("label", "text", "expected"),
    [
        ("页面", "/a.html", "页面：/a.html"),
        ("fp32 的 VAE", "3 MB", "fp32 的 VAE：3 MB"),
        ("GPU", "没有", "GPU：没有"),
        ("engine.zero_stage", "0，选择原因：x", "engine.zero_stage: 0，选择原因：x"),
        ("page", "/a.html", "page: /a.html"),
    ],
)
def test_a_colon_has_the_width_of_what_stands_beside_it(label: str, text: str, expected: str) -> None:
    assert join_label(label, text) == expected


def test_headings_may_be_single_words(translator: Translator) -> None:
    assert translator.translate_label("bucket") == "桶" and translator.translate_label("is damaged") == "已损坏"


def test_every_form_of_a_message_is_extracted() -> None:
    source = '''
"""A docstring of the module."""
def check(config, files, bad):
    """A docstring of the function."""
    assert files, "for programmers only"
    name = "one-word"
    if "a text that is compared" in files:
        raise ValueError(f"cannot open {config.run.folder!s:.100} " "at all" + (": no space" if bad else ""))
    logger.info("read {} of {:,} files, {:.1%} bad", len(files), config.total, bad)
    rule = f"holds {format_count(len(files), 'file')}{f' and {bad:g} more' if bad else ''}"
    links = format_count(files, "link") if files else ""
    yield Problem("data.x", 3, rule, cure or "do so")
    re.compile("a b|c d")
'''
    assert list(extract_from_source(source)) == [
        "cannot open {folder:.100} at all: no space",
        "cannot open {folder:.100} at all",
        "read {files} of {total:,} files, {bad:.1%} bad",
        "holds {files} and {bad:g} more",
        "holds {files}",
        "{count:,} file",
        "{count:,} files",
        "{count:,} link",
        "{count:,} links",
        "do so",
    ]


def test_the_catalogue_survives_editing_and_changes_of_the_sources(tmp_path: Path) -> None:
    entries = [
        Entry(text='a "quoted" \\ text\nof two lines', translation="两行\n「文本」", sources=("a.py", "b.py")),
        Entry(text="{count:,} files were read in {seconds:.1f} s", translation="{seconds} 秒读取了 {count} 个文件"),
        Entry(text="is gone from the sources", translation="没有了"),
    ]
    path = tmp_path / "zh_CN.po"
    path.write_text(format_catalogue("zh_CN", entries), encoding="utf-8")
    assert sorted(read_catalogue(path), key=lambda entry: entry.text) == sorted(entries, key=lambda entry: entry.text)
    messages = {
        entries[0].text: ("c.py",),
        "{count:,} files were read in {minutes:.1f} min": ("a.py",),
        "new one": ("a.py",),
    }
    updated = update_entries(entries, messages)
    assert [(entry.translation, entry.sources, entry.is_fuzzy) for entry in updated] == [
        (entries[0].translation, ("c.py",), False),
        (entries[1].translation, ("a.py",), True),  # a similar message, to be checked
        ("", ("a.py",), False),
    ]
    wrong = Entry(text="{a} and {b}", translation="{a} 和 {c}")
    assert [fault.split(":")[0] for fault in list_faults([*updated, wrong])] == ["check", "translate", "other fields"]
    assert Translator(updated).translate("3 files were read in 2.0 min") == "3 files were read in 2.0 min"


@pytest.mark.parametrize(
    ("variables", "language"),
    [
        ({}, "en"),
        ({"LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "C.UTF-8"}, "en"),
        ({"LANG": "en_US.UTF-8", "LC_MESSAGES": "zh_TW.UTF-8"}, "zh"),
        ({"LANG": "de_DE.UTF-8"}, "en"),
        ({"LANG": "de_DE.UTF-8", "LANGUAGE": "zh:en"}, "zh"),
    ],
)
def test_the_environment_chooses(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], language: str) -> None:
    for name in ("LANGUAGE", "LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    try:
        assert choose_language() == language
        assert choose_language("zh") == "zh" and choose_language("en") == "en"
    finally:
        choose_language("en")


def test_a_setting_chooses_the_language_of_problems_and_english_reads_no_catalogue(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("log: {language: zh}\ntrain: {max_stepz: 3}\n")
    program = """
import sys
from pathlib import Path
from sdxl_trainer.configs.language.translate import load_translator
from sdxl_trainer.configs.load import load_config
from sdxl_trainer.configs.problems import UserInputError, raise_if_any
for overrides in (["log.language=en"], []):
    try:
        raise_if_any(load_config(Path(sys.argv[1]), overrides)[1])
    except UserInputError as error:
        print(error.format())
        print(load_translator.cache_info().currsize)
"""
    command = [sys.executable, "-c", program, str(tmp_path / "x.yaml")]
    environment = {**os.environ, "PYTHONUTF8": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, encoding="utf-8")
    english = "1 problem in the settings:\n  - train.max_stepz = 3\n      is not a known key\n      cure: did you mean "
    assert done.stdout.startswith(f"{english}train.max_steps?\n0\n配置中有 1 个问题：\n"), done.stdout
    assert done.stdout.endswith("解决办法：是否应为 train.max_steps？\n1\n"), done.stdout


def test_help_and_usage_in_chinese(capsys: pytest.CaptureFixture) -> None:
    choose_language("zh")
    try:
        parser = TranslatedParser(prog="main.py")
        parser.add_argument("--cfg", required=True, help="check everything up to the first step, then stop")
        parser.add_argument("words", nargs="*")
        with pytest.raises(SystemExit):
            parser.parse_intermixed_args([])
        shown = parser.format_help()
    finally:
        choose_language("en")
    assert (
        "用法：main.py [-h] --cfg CFG [words ...]\nmain.py：错误：缺少以下必需的参数：--cfg" in capsys.readouterr().err
    )
    assert shown.startswith("用法：main.py") and "选项：" in shown and "检查第一步之前的一切" in shown


def test_the_error_itself_stays_english() -> None:
    error = UserInputError([Problem("data.x", 3, "is damaged", "run bash launch/cache.sh")])
    choose_language("zh")
    try:
        assert str(error).splitlines()[1:] == [
            "  - data.x = 3",
            "      is damaged",
            "      cure: run bash launch/cache.sh",
        ]
        assert translate("data.x") == "data.x"
    finally:
        choose_language("en")


def test_commands_are_named_as_the_user_starts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "run bash launch/cache.sh, then python train/convert.py a b; bash launch/deepspeed.sh has no short name"
    assert adapt_commands(text) == text
    monkeypatch.setenv(VARIABLE, "sdxl-trainer train")
    expected = "run sdxl-trainer cache, then sdxl-trainer convert a b; bash launch/deepspeed.sh has no short name"
    assert adapt_commands(text) == translate(text) == expected
    assert adapt_commands("see docs/CONFIG.md for the known keys") == "see `sdxl-trainer settings` for the known keys"
    help_text = "Every setting: docs/CONFIG.md, which `sdxl-trainer settings` prints."
    assert adapt_commands(help_text) == help_text
    command = 'source launch/language.sh; say "no torchrun: run bash launch/quickstart.sh now" 甲'
    environment = {**os.environ, "LANGUAGE": "", "LC_ALL": "C.UTF-8"}
    said = subprocess.run(["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, encoding="utf-8")
    assert said.stdout == "no torchrun: run sdxl-trainer quickstart now\n"
    assert TranslatedParser(prog="x", examples=["%(prog)s a"]).format_help().startswith("usage: sdxl-trainer train ")
