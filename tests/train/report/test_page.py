"""The report of a run: its page in a real browser, its charts for any set of metrics, its process beside training."""

import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from browser import NO_BROWSER, visit
from loguru import logger
from PIL import Image

from sdxl_trainer.configs.language.translate import choose_language
from sdxl_trainer.data.images.fonts import find_face
from sdxl_trainer.train.report.charts import RunNumbers, Series, draw_charts, read_series, smooth, translate_figure
from sdxl_trainer.train.report.noise_levels import NoiseLevelCurves, read_noise_levels, write_noise_levels
from sdxl_trainer.train.report.page import main, read_strips, write_report
from sdxl_trainer.train.report.report_process import ReportProcess
from sdxl_trainer.train.report.run_status import read_status
from sdxl_trainer.train.sampling.image_grid import write_image

BROKEN = """<!DOCTYPE html><title>broken</title><img alt="gone" src="gone.png">
<img alt="torn" src="data:image/png;base64,aa">
<script>console.error("one"); undefinedFunction()</script>"""


def write_run(folder: Path, lines: list[dict | str], samples: int = 0) -> Path:
    """Write a run folder with these lines of metrics, and with images of noise, which cannot be compressed."""
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    text = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    (folder / "logs" / "metrics.jsonl").write_text(text)
    noise = np.random.default_rng(0)
    for number in range(9 if samples else 0):
        image = Image.fromarray(noise.integers(0, 256, (160, 160, 3), np.uint8))
        path = folder / "samples" / "step-00000000" / f"{number:03d}.png"
        write_image(path, image, f"prompt {number} <b>&\nNegative prompt: none\nSteps: 4")
    for step in range(1, samples):
        shutil.copytree(folder / "samples" / "step-00000000", folder / "samples" / f"step-{step:08d}")
    return folder


def write_and_list_charts(folder: Path) -> list[str]:
    write_report(folder)
    return sorted(path.stem for path in (folder / "report").glob("*.png"))


@pytest.mark.parametrize(
    "counts", [b"", b"{", b"[1]", b'{"buckets": 5}', b'{"buckets": {"a": 1}, "tokens": {"classes": {"1": [1]}}}']
)
def test_damaged_lines_and_counts_are_left_out_of_the_report(tmp_path, capsys, counts) -> None:
    damaged = ["\0\0\0\n", '{"step": "x"}\n', "[1]\n", '{"step": 3, "loss": {}}\n', '{"loss": 1.0}\n', '{"step": 3,\n']
    folder = write_run(tmp_path, [{"step": 1, "loss": 1.0}, *damaged, {"step": 2, "loss": None}, '{"step": 4'])
    (folder / "report").mkdir()
    (folder / "report" / "data.json").write_bytes(counts)
    assert write_and_list_charts(folder) == ["loss"]
    assert read_series(folder / "logs" / "metrics.jsonl")["loss"].steps.tolist() == [1, 2]
    assert "data.json is damaged and left out; the next start of the run writes it anew" in capsys.readouterr().err


@pytest.mark.skipif(bool(NO_BROWSER), reason=NO_BROWSER)
def test_a_browser_shows_the_report_of_a_real_run(validated: dict[int, Path], tmp_path: Path) -> None:
    page = shutil.copy(validated[1] / "report" / "report.html", tmp_path)  # alone, because the page needs no other file
    (tmp_path / "broken.html").write_text(BROKEN)
    pages = [(page, "light"), (page, "dark"), (tmp_path / "broken.html", "light")]
    light, dark, broken = visit([(Path(path), scheme) for path, scheme in pages])
    for view in (light, dark):
        assert view.complaints == [] and view.requests == [Path(page).as_uri()] and not view.overflow
        assert all(image["width"] > 50 and len(image["alt"]) > 10 for image in view.images)
    # Ten charts, and the generated images of three prompts at steps 1 and 2.
    assert len(light.images) == 10 + 6 and light.title == "ranks-1: training report"
    assert sum(image["alt"] == "step 2: a red circle on a white background" for image in light.images) == 1
    assert light.ground == "rgb(255, 255, 255)" and dark.ground == "rgb(18, 22, 28)"
    # The browser reports the faults of a broken page.
    assert [image["width"] for image in broken.images] == [0, 0] and len(broken.complaints) >= 2
    assert len(broken.requests) == 2


def test_a_run_writes_its_report(validated: dict[int, Path]) -> None:
    folder = validated[1] / "report"
    assert sorted(path.stem for path in folder.glob("*.png")) == [
        "best_step",
        "buckets",
        "data_wait_share",
        "grad_norm",
        "loss",
        "loss_by_timestep",
        "lr",
        "samples_per_second",
        "tokens",
        "x0_error",
    ]
    counts = json.loads((folder / "data.json").read_text())
    assert sum(counts["buckets"].values()) == counts["tokens"]["num_captions"] == 24
    assert sum(first for first, _ in counts["tokens"]["classes"].values()) == 24
    page = (folder / "report.html").read_text()
    assert "24 samples in" in page and "of 24 captions," in page and "<script" not in page
    assert "<p>finished. Written " in page and "<tr><td>optim.lr</td><td>0.001</td></tr>" in page
    status = read_status(validated[1] / "logs" / "status.json")
    assert status is not None and (status.state, status.step, status.max_steps, status.now) == ("finished", 2, 2, "")
    assert status.images_per_second and status.memory.endswith("GiB") and status.has_prompts


def test_a_report_in_chinese_has_no_english_words(validated: dict[int, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(validated[1], tmp_path / "run")
    choose_language("zh")
    try:
        page = write_report(folder).read_text(encoding="utf-8")
        chart = draw_charts(RunNumbers(read_series(folder / "logs" / "metrics.jsonl"), {}))[0]
        translate_figure(chart.figure)
    finally:
        choose_language("en")
    assert '<html lang="zh">' in page and "run：训练报告" in page and "已完成" in page and "24 个样本" in page
    shown = page.split("<details>")[0]  # then come the settings, by their names
    shown = re.sub(r'<style>.*?</style>|<th scope="row">.*?</th>', "", shown, flags=re.DOTALL)
    texts = [re.sub(r"data\.max_tokens|UTC|EMA|SNR|length", "", text) for text in re.findall(r">([^<>]+)<", shown)]
    assert [text for text in texts if re.search("[A-Za-z]{3,}", text.replace("run", ""))] == []
    if find_face("损") is not None:  # without a font for Chinese, charts stay English
        assert chart.figure.axes[0].get_xlabel() == "步" and chart.figure.axes[0].get_ylabel() == "损失"


def test_learned_weights_and_adaptive_timesteps_are_drawn(tmp_path: Path, capsys) -> None:
    run = write_run(tmp_path, [{"step": 1, "loss": 1.0}])
    curves = NoiseLevelCurves([0, 500, 999], [2, 0.5, 1], [0, 250, 1000], [0.505, 1.495])
    write_noise_levels(run / "report", curves)
    assert write_and_list_charts(run) == ["adaptive_timesteps", "learned_weighting", "loss"]
    page = (run / "report" / "report.html").read_text()
    assert "from 0.5 at timestep 500 to 2 at timestep 0" in page
    assert "bins of timesteps: 2; from 0.505 times as often at timestep 0 to 1.5 times at timestep 250" in page
    weights, frequencies = draw_charts(RunNumbers({}, {}, {}, read_noise_levels(run / "report")))
    assert weights.figure.axes[0].lines[0].get_ydata().tolist() == [2, 0.5, 1]  # pyright: ignore
    assert frequencies.figure.axes[0].patches[0].get_data().values.tolist() == [0.505, 1.495]  # pyright: ignore
    uniform = NoiseLevelCurves([], [], [0, 500, 1000], [1, 1])
    (chart,) = draw_charts(RunNumbers({}, {}, {}, uniform))
    assert chart.text == "bins of timesteps: 2; not every bin has enough losses yet"
    file = run / "report" / "noise_levels.json"
    content = file.read_bytes()
    for damaged in (b"", b"[1]", b'{"edges": 1}', content.replace(b"0.505", b"null"), content.replace(b"[2,", b"[")):
        file.write_bytes(damaged)
        assert read_noise_levels(run / "report") is None
        assert "noise_levels.json is damaged and left out" in capsys.readouterr().err
    write_noise_levels(run / "report", None)  # of a run whose settings have changed
    assert not file.exists() and read_noise_levels(run / "report") is None


def test_the_last_line_of_a_step_is_used(tmp_path: Path) -> None:
    lines = [{"step": step, "loss": float(step), "lr": 1.0} for step in (1, 2, 3, 4)]
    repeated = [{"step": step, "loss": step + 0.5} for step in (3, 4, 5)]
    run = write_run(tmp_path, [*lines, {"step": 4, "validation/loss": 9.0}, *repeated, '{"step": 6, "lo'])
    series = read_series(run / "logs" / "metrics.jsonl")
    assert series["loss"].steps.tolist() == [1, 2, 3, 4, 5]
    assert series["loss"].values.tolist() == [1, 2, 3.5, 4.5, 5.5]
    assert series["lr"].values.tolist() == [1] * 4 and series["validation/loss"].values.tolist() == [9]


def test_the_texts_and_lines_of_charts(tmp_path: Path) -> None:
    lines = [{"step": step, "loss": None if step == 2 else 1 / step, "lr": 1e-5 * step} for step in (1, 2, 3)]
    validations = {"validation/loss": 1.0, "validation/loss_ema_0.9": 1.1, "validation/loss_t500-999": 1.5}
    validations["validation/loss_t500-999_ema_0.9"] = 2.0
    lines += [{"step": step, **validations, "validation/loss_t000-499": 0.5 / step} for step in (1, 3)]
    run = write_run(tmp_path, lines)
    charts = {chart.name: chart for chart in draw_charts(RunNumbers(read_series(run / "logs" / "metrics.jsonl"), {}))}
    assert list(charts) == ["loss", "loss_by_timestep", "lr"]
    assert charts["loss"].text.startswith("3 steps; ") and charts["loss"].text.endswith("not finite in 1 step")
    assert "first 1e-05, max 3e-05" in charts["lr"].text
    assert charts["loss_by_timestep"].text.endswith("at the last validation 000-499: 0.1667, 500-999: 1.5")
    labels = [line.get_label() for line in charts["loss"].figure.axes[0].lines]
    assert labels == ["loss of the step", "moving average", "validation", "validation, EMA 0.9", "not finite"]
    lines = charts["loss_by_timestep"].figure.axes[0].lines
    assert [list(line.get_ydata()) for line in lines] == [[0.5, 1.5], [0.5 / 3, 1.5]]


def test_charts_mark_changes_and_tell_dropped_captions_from_empty_ones() -> None:
    series = {name: Series(np.arange(1, 5), np.full(4, 0.5)) for name in ("loss", "lr")}
    tokens = {"num_captions": 9, "max_tokens": 75, "num_cut": [0, 0], "classes": {"0": (5, 5), "1-20": (4, 4)}}
    numbers = RunNumbers(series, {"tokens": {**tokens, "num_dropped": 3}}, {2: ["optim.lr: 1 -> 2", "the data"]})
    charts = {chart.name: chart for chart in draw_charts(numbers)}
    for name in ("loss", "lr"):
        assert charts[name].text.endswith("; changed at step 2: optim.lr: 1 -> 2, the data")
        marks = [line for line in charts[name].figure.axes[0].lines if line.get_label() == "settings or data changed"]
        assert [list(line.get_xdata()) for line in marks] == [[2, 2]]
    heights = [bar.get_height() for bar in charts["tokens"].figure.axes[0].patches]
    assert heights == [3, 2, 4] and charts["tokens"].text.endswith("3 dropped by caption dropout, 2 empty in the data")
    older = draw_charts(RunNumbers({}, {"tokens": tokens}))
    assert [bar.get_height() for bar in older[0].figure.axes[0].patches] == [5, 4]


@pytest.mark.parametrize(
    ("lines", "names"),
    [
        ([], []),
        ([{"step": 1, "loss": 0.5}], ["loss"]),
        ([{"step": step, "loss": None, "grad_norm": None} for step in (1, 2, 3)], ["loss"]),
        ([{"step": 0, "validation/loss": 0.5}], ["loss"]),
        ([{"step": 0, "validation/loss": None, "validation/loss_t000-999": None}], []),
        ([{"step": 1, "loss": 0.5, "unknown": 3, "lr": 0.0}], ["loss", "lr"]),
    ],
)
def test_a_report_needs_only_a_few_metrics(tmp_path: Path, lines: list[dict], names: list[str]) -> None:
    assert write_and_list_charts(write_run(tmp_path, lines)) == names
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("<img") == len(names) and ("No step is finished" in page) == (not names)


def test_many_missing_and_truncated_images(tmp_path: Path) -> None:
    run = write_run(tmp_path, [{"step": 1, "loss": 0.5}], samples=14)
    (run / "samples" / "step-00000000" / "000.png").unlink()
    truncated = run / "samples" / "step-00000013" / "000.png"
    truncated.write_bytes(truncated.read_bytes()[:9000])
    steps, strips = read_strips(run / "samples")
    assert len(steps) == 10 and (steps[0], steps[-1]) == (0, 13) and len(strips) == 8
    assert [image is None for image in strips[0].images] == [True, *[False] * 8, True]
    assert strips[0].prompt == "prompt 0 <b>&" and None not in strips[1].images
    file = write_report(run)
    assert file.stat().st_size < 3e6 and "prompt 0 &lt;b&gt;&amp;" in file.read_text()


def test_the_moving_average_is_unbiased() -> None:
    assert smooth(np.full(1000, 3.0)).tolist() == pytest.approx([3.0] * 1000)
    assert smooth(np.array([2.0])).tolist() == [2.0] and len(smooth(np.zeros(0))) == 0
    falling = smooth(np.linspace(1, 0, 1000))
    assert np.all(np.diff(falling) < 0) and math.isclose(falling[-1], 0.05, abs_tol=0.01)


def test_the_program_reports_wrong_input_and_failures(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path)])
    assert caught.value.code == 2 and "contains no logs/metrics.jsonl" in capsys.readouterr().err
    run = write_run(tmp_path / "run", [{"step": 1, "loss": 0.5}])
    (run / "report").touch()
    assert main([str(run)]) == 1 and "the report cannot be written" in capsys.readouterr().err


def test_a_report_process_runs_beside_training(tmp_path: Path) -> None:
    """`update` starts no report too early or beside another; failures are logged; `finish` waits for the last."""
    messages: list[str] = []
    sink = logger.add(messages.append, format="{level} {message}")
    page = write_run(tmp_path, [{"step": 1, "loss": 0.5}]) / "report" / "report.html"
    rare, eager = ReportProcess(tmp_path), ReportProcess(tmp_path, seconds_between=0)
    rare.update()
    assert rare._process is None
    eager.update()
    first = eager._process
    assert first is not None and not page.exists()  # `update` does not wait
    eager.update()
    assert eager._process is first
    eager.finish()
    assert first.returncode == 0 and page.is_file() and messages[-1].startswith("INFO report: ")
    digest = hashlib.sha256((tmp_path / "report" / "loss.png").read_bytes()).digest()
    shutil.rmtree(tmp_path / "logs")
    eager.finish()
    assert "cannot be written" in messages[-2] and "no logs/metrics.jsonl" in messages[-2]
    assert messages[-1].endswith("is not up to date; 1 report could not be written\n")
    assert hashlib.sha256((tmp_path / "report" / "loss.png").read_bytes()).digest() == digest
    logger.remove(sink)


def test_a_report_with_many_errors_ends(tmp_path: Path) -> None:
    """Nobody reads its errors while it runs, so more of them than a pipe holds (64 kB) must not stop it."""
    process = ReportProcess(tmp_path)
    messages: list[str] = []
    sink = logger.add(messages.append, format="{message}")
    write_run(tmp_path, [{"step": 1, "loss": 0.5}])
    chatty = "import sys; sys.stderr.write('x' * 200_000 + 'the last line'); sys.exit(1)"
    process._start_program([sys.executable, "-c", chatty])
    process._end_process()
    logger.remove(sink)
    assert "the last line" in messages[-1] and len(messages[-1]) < 25_000


def test_the_report_does_not_import_torch_or_pydantic() -> None:
    """With torch the report would start as slowly as a rank and take hundreds of MB of memory."""
    code = "import sys, sdxl_trainer.train.report.page; sys.exit(any(m in sys.modules for m in ('torch', 'pydantic')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
