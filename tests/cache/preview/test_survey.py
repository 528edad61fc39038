"""The survey of a data set: what it names before anything is cached, on the console, in the list and on the page."""

import json
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from cache_samples import write_settings
from PIL import Image
from rich.console import Console

from sdxl_trainer.cache.preview import program
from sdxl_trainer.cache.preview.page import RecordNames
from sdxl_trainer.cache.preview.survey import Finding, Section, find_folder_captions, place_images
from sdxl_trainer.cache.preview.tables import tabulate_lengths, tabulate_section
from sdxl_trainer.configs.language.translate import choose_language
from sdxl_trainer.configs.schema import DataConfig
from sdxl_trainer.data.images.bucket import BucketRule
from sdxl_trainer.data.images.demo_set import BACKGROUNDS, COLOURS, draw_image
from sdxl_trainer.data.index.index import open_record_index
from sdxl_trainer.data.loading.counts import TokenCounts

HOSTILE = "<script>alert(1)</script>, [bold]x"


def draw(file: Path, colour: str, size: tuple[int, int], caption: str, **options: int) -> Image.Image:
    """Write an image with its caption file."""
    image = draw_image(COLOURS[colour], "star", BACKGROUNDS["grey"], size, random.Random(colour))
    image.save(file, **options)
    if caption:
        file.with_suffix(".txt").write_text(caption)
    return image


@pytest.fixture(scope="module")
def surveyed(tmp_path_factory, tiny_folder) -> Path:
    """Preview a folder with one image of each kind that is worth a look; nothing is cached."""
    folder = tmp_path_factory.mktemp("surveyed")
    images = folder / "images"
    images.mkdir()
    draw(images / "plain.png", "green", (128, 128), "a star, 一颗星")
    draw(images / "silent.png", "yellow", (160, 96), "")
    image = draw(images / "red.png", "red", (256, 256), "a star, red")
    shutil.copy(images / "red.png", images / "red again.png")
    (images / "red again.txt").write_text("a star, another")
    image.resize((150, 150)).save(images / "red near.jpg", quality=60)
    (images / "red near.txt").write_text("a star")
    draw(images / "blue.png", "blue", (256, 256), "a star")  # the shape of the red one in another colour
    draw(images / "tiny <i>.png", "cyan", (32, 32), HOSTILE)
    Image.effect_noise((1600, 100), 90).save(images / "panorama.png")
    (images / "panorama.txt").write_text("wide, " + ", ".join(["word"] * 90))
    (images / "broken.png").write_bytes((images / "red.png").read_bytes()[:300])
    (images / "broken.txt").write_text("a star")
    settings = write_settings(folder, tiny_folder / "model")
    out = ["--out", str(folder / "out" / "look")]
    assert program.main(["--cfg", str(settings), *out, "--images", "2", "data.max_tokens=75"]) == 0
    return folder


def test_every_kind_is_found_and_named(surveyed):
    lines = [json.loads(line) for line in (surveyed / "out" / "look.jsonl").read_text().splitlines()]
    found = {kind: [] for kind in ("uncaptioned", "unusable", "equal", "alike", "enlarged", "cropped", "cut")}
    for line in lines:
        found[line["kind"]].append(Path(line["file"]).name)
    assert found == {
        "uncaptioned": ["silent.png"],
        "unusable": ["broken.png"],
        "equal": ["red again.png", "red.png"],
        "alike": ["red again.png", "red near.jpg"],  # of equal files one counts; blue is not like red
        "enlarged": ["tiny <i>.png"],
        "cropped": ["panorama.png"],
        "cut": ["panorama.png"],
    }
    details = {line["kind"]: line["detail"] for line in lines}
    assert details["enlarged"] == "4.0 times, 32x32 to 128x128"
    assert details["cropped"] == "75% of 1600x100, bucket 256x64" and "truncated" in details["unusable"]


def test_the_page_shows_images_of_every_bucket_and_escapes_texts(surveyed):
    page = (surveyed / "out" / "look.html").read_text()
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page and "tiny &lt;i&gt;.png" in page
    buckets = re.findall(r"<h3>(\d+x\d+)</h3>\s*<div class=\"images\">(.*?)</div>", page, re.DOTALL)
    assert {name for name, _ in buckets} == {"128x128", "160x96", "256x64"}
    assert all("data:image/webp" in figures and "<b>" in figures for _, figures in buckets)
    assert "一颗星" in page and not re.search(r'(src|href)="(?!data:)', page)


def test_counts_of_tags_and_what_was_looked_at_are_printed(surveyed, tiny_folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    words = ["--cfg", str(surveyed / "settings.yaml"), "--out", str(surveyed / "part" / "x"), "--images", "0"]
    (surveyed / "aliases.csv").write_text("red,crimson\n")
    words += [f"data.caption.aliases={surveyed / 'aliases.csv'}", "data.on_missing_caption=error"]
    assert program.main([*words, "--examine", "4", "--cropped", "80"]) == 0
    printed = capsys.readouterr().out
    assert "opening 4 of 9 images (a sample; --examine 0 opens all)" in printed
    assert "more than 80% cropped away" in printed and "4 opened images" in printed
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if "│" in line]
    assert ["a star", "6", "75.0%"] in rows and ["no caption", "1", "", "all 9 records"] in rows
    assert ["crimson", "1", "12.5%"] in rows and not any("red" in row for row in rows)  # as training reads the tags
    assert ["[bold]x", "1", "12.5%"] in rows  # not read as markup


def test_a_table_ends_with_the_number_of_rows_that_it_leaves_out(capsys):
    findings = [Finding(row) for row in range(16)]
    section = Section(name="bad", title="cannot be used", num_found=16, looked_at="all 16 records", findings=findings)
    choose_language("zh")
    try:
        Console(width=60).print(tabulate_section(section, [f"more {row}" for row in range(16)]).draw())
    finally:
        choose_language("en")
    printed = capsys.readouterr().out
    assert "无法使用" in printed and "…… 另有 6 个" in printed and "more 9" in printed and "more 10" not in printed


def test_the_page_follows_the_language(surveyed):
    words = ["--cfg", str(surveyed / "settings.yaml"), "--out", str(surveyed / "zh" / "x"), "--images", "0"]
    try:
        assert program.main([*words, "data.max_tokens=75", "log.language=zh"]) == 0
    finally:
        choose_language("en")
    page = (surveyed / "zh" / "x.html").read_text(encoding="utf-8")
    texts = re.findall(r"<(?:h2|p|th[^>]*|span class=\"none\")>([^<]+)<", page)
    assert "值得一看" in texts and '<html lang="zh">' in page and len(texts) > 20
    shown = [re.sub(r"data\.\w+|x\.jsonl|UTC|token", "", text) for text in texts]
    assert [text for text in shown if re.search("[A-Za-z]{3,}", text)] == []


def test_images_of_one_name_are_told_apart_by_their_folders(tmp_path):
    for name in ("a/1.png", "a/2.png", "b/1.png", "c/x/3.png", "d/x/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    folders = [tmp_path / name for name in ("a", "b", "c/x", "d/x")]
    records = open_record_index(tmp_path / "cache", [], folders)
    names = RecordNames(records, folders, ",")
    found = [names.get_name(row) for row in range(5)]
    assert found == ["a/1.png", "2.png", "b/1.png", str(tmp_path / "c/x/3.png"), str(tmp_path / "d/x/3.png")]


def test_captions_from_folder_names_are_named(tmp_path):
    for name in ("10_sks dog/1.png", "10_sks dog/2.png", "5_/3.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "10_sks dog" / "2.txt").write_text("a dog of its own")
    data = DataConfig(image_dirs=[tmp_path], kohya_folders=True)
    records = open_record_index(tmp_path / "cache", [], [tmp_path], kohya_folders=True)
    [section] = find_folder_captions(records, data)
    assert (section.num_found, section.findings) == (1, [Finding(0, "sks dog")])
    assert list(find_folder_captions(records, DataConfig(image_dirs=[tmp_path]))) == []


def test_dropped_captions_are_counted_apart_from_empty_ones():
    classes = {"0": [3, 3], "1-20": [5, 5]}
    counts = TokenCounts(num_captions=8, max_tokens=75, num_dropped=2, num_cut=[0, 0], classes=classes)
    rows = {row[0]: (row[1], row[3]) for row in tabulate_lengths(counts).rows}
    assert rows == {"dropped": ("2", "2"), "0": ("1", "1"), "1-20": ("5", "5")}


def test_placements_name_the_share_that_a_crop_leaves_out():
    rule = BucketRule(resolution_px=0, min_px=0, max_px=0, step_px=0, fixed=((1024, 1024),))
    placed = place_images(np.array([[8192, 1024], [0, 0], [512, 512], [8192, 1024]]), rule)
    assert placed.cropped.tolist() == [0.875, 0, 0, 0.875] and placed.enlargement.tolist() == [1, 0, 2, 1]
    assert placed.buckets.tolist() == [[1024, 1024], [0, 0], [1024, 1024], [1024, 1024]]
