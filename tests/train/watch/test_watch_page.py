"""The page in a real browser: it opens, moves, asks the run, and shows names and prompts as text."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from browser import NO_BROWSER, TIMEOUT_MS, look, open_browser, open_page
from programs import ROOT

from sdxl_trainer.configs.language.translate import choose_language

pytestmark = pytest.mark.skipif(bool(NO_BROWSER), reason=NO_BROWSER)
MARKUP = "<img src=x onerror=alert(1)><script>alert(2)</script>"
USERS_TEXT = r"\br[12]\b|/runs|run\.name|optim\.lr|model\.path|SIGTERM|EMA|rank 1|cannot be read"
VISIBLE = """() => {
    const found = [document.title], nodes = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (nodes.nextNode()) found.push(nodes.currentNode.data.trim());
    for (const name of ["placeholder", "aria-label", "title", "alt"])
        for (const element of document.querySelectorAll(`[${name}]`)) found.push(element.getAttribute(name));
    return found;
}"""
CLICK = "[data-request={}]"


def test_the_page_shows_runs_that_move(tmp_path: Path, write_run, serve, append) -> None:
    from playwright.sync_api import expect  # waits; the page's policy forbids conditions in JavaScript

    run = write_run(tmp_path / "runs" / "first<b>run")
    write_run(tmp_path / "runs" / "second", 20, "stopped", reason="stopped by SIGTERM")
    (tmp_path / "runs" / "second" / "config.yaml").write_text("run:\n  name: second\noptim:\n  lr: 0.2\n")
    with serve(tmp_path / "runs") as address, open_browser() as browser:
        page, seen = open_page(browser, address)
        dialogs: list[str] = []
        page.on("dialog", lambda dialog: dialogs.append(dialog.message))
        loss = page.locator(".chart", has_text="Loss").first.locator(".value")
        expect(page.locator(".chart")).to_have_count(6)
        assert page.locator("#name").text_content() == "first<b>run" and loss.text_content() == "0.03333"
        assert page.locator("#text").text_content() == f"training {MARKUP}"
        append(run, 31, 50)  # the run goes on: the page follows without a reload
        expect(loss).to_have_text("0.02", timeout=TIMEOUT_MS)
        page.locator("#run-list input[type=checkbox]").nth(1).check()
        expect(page.locator("#legend li")).to_have_count(2)
        for place, is_covered in ((120, True), (300, False)):  # the second run ended at step 20 of 50
            page.locator(".chart canvas").first.hover(position={"x": place, "y": 60})
            assert ("second: " in (page.locator(".tip:visible").text_content() or "")) == is_covered

        page.click(CLICK.format("save"))
        page.click(CLICK.format("sample"))
        page.click(CLICK.format("stop"))
        page.click("#confirm-yes")
        expect(page.locator("[data-request]:disabled")).to_have_count(3)
        assert all((run / name).is_file() for name in ("save", "sample", "stop"))

        page.click("[data-tab=images]")
        page.wait_for_selector(".image-grid img")
        assert page.locator(".image-grid th[scope=row]").text_content() == MARKUP
        page.locator(".image-grid button").last.click()
        expect(page.locator("#viewer-image")).to_have_js_property("naturalWidth", 96)
        page.keyboard.press("ArrowLeft")
        assert page.locator("#viewer-step").text_content() == "step 10"
        page.keyboard.press("Escape")
        page.click("[data-tab=settings]")
        page.wait_for_selector(".setting-grid")
        page.select_option("#compare", "second")
        expect(page.locator(".setting-grid .differs")).to_have_count(3)
        assert MARKUP in (page.locator(".setting-grid").text_content() or "")
        page.click("[data-tab=messages]")
        page.wait_for_selector("#warnings .WARNING")
        assert MARKUP in (page.locator("#warnings").text_content() or "")
        assert MARKUP in (page.locator("#bad-samples").text_content() or "")

        seen = look(page, seen)
        assert seen.complaints == [] and dialogs == [] and not seen.overflow and seen.ground == "rgb(255, 255, 255)"
        assert (
            all(request.startswith(address) for request in seen.requests) and page.locator("main script").count() == 0
        )
        narrow, seen = open_page(browser, address, "dark", 400)
        expect(narrow.locator(".chart")).to_have_count(6)
        for tab in ("charts", "images", "settings", "messages"):
            narrow.click(f"[data-tab={tab}]")
            narrow.wait_for_selector(f"#{tab}:visible")
            assert not look(narrow, seen).overflow, tab
        assert seen.ground == "rgb(18, 22, 28)" and seen.complaints == []


def test_the_page_in_chinese_has_no_english_label(tmp_path: Path, write_run, serve) -> None:
    from playwright.sync_api import expect

    runs = tmp_path / "runs"
    write_run(runs / "r1", now="training", slow_ranks="")
    write_run(runs / "r2", 20, "stopped", reason="stopped by SIGTERM")
    choose_language("zh")
    try:
        with serve(runs) as address, open_browser() as browser:
            page, seen = open_page(browser, address)
            expect(page.locator(".chart")).to_have_count(6)
            texts = page.evaluate(VISIBLE)
            for tab in ("images", "settings", "messages"):
                page.click(f"[data-tab={tab}]")
                page.wait_for_selector(
                    {"images": ".image-grid", "settings": ".setting-grid"}.get(tab, "#warnings .when")
                )
                texts += page.evaluate(VISIBLE)
            page.goto(f"{address}/#run=r3")
            expect(page.locator("#empty")).to_have_text("训练 r3 已不存在。")
            assert seen.complaints == []
    finally:
        choose_language("en")
    assert {"训练", "进行中", "已停止", "保存检查点", "验证损失", "不对比"} <= set(texts)
    shown = [re.sub(USERS_TEXT, "", text.replace(MARKUP, "").replace(str(tmp_path), "")) for text in texts]
    assert [text for text in shown if re.search("[A-Za-z]{3,}", text)] == []


@pytest.mark.long
def test_the_page_beside_a_real_run(cached_folder: Path, serve) -> None:
    """The buttons reach a training run: it saves, generates images, and stops with its state saved."""
    from playwright.sync_api import expect

    runs = cached_folder / "watched-runs"
    run = runs / "real"
    words = ["run.name=real", f"run.dir={runs}", "train.max_steps=100000", "checkpoint.every_steps=0"]
    command = ["bash", str(ROOT / "launch/train.sh"), "--cfg", str(cached_folder / "tiny.yaml"), *words]
    runs.mkdir()
    job = subprocess.Popen(command, env={**os.environ, "NPROC": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        with serve(runs) as address, open_browser() as browser:
            page, seen = open_page(browser, address)
            page.set_default_timeout(180_000)
            loss = page.locator(".chart .value").first
            expect(loss).not_to_have_text(loss.text_content() or "", timeout=TIMEOUT_MS)
            page.click(CLICK.format("save"))
            wait_for(lambda: any((run / "checkpoints").glob("step-*/manifest.json")))
            page.click(CLICK.format("sample"))
            page.click("[data-tab=images]")
            page.wait_for_selector(".image-grid img")
            page.click(CLICK.format("stop"))
            page.click("#confirm-yes")
            page.wait_for_selector("#state.stopped")
            assert page.locator("#text").text_content() == "stopped by the file stop" and seen.complaints == []
        assert job.wait(60) == 128 + signal.SIGTERM
    finally:
        job.kill()
        job.wait()


def wait_for(condition, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
