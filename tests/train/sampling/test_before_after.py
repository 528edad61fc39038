"""The comparison of the first and the last step of a run's generated images."""

from pathlib import Path

from PIL import Image

from sdxl_trainer.train.sampling.image_grid import build_before_and_after, write_image

PROMPTS = ["a red heart", "a blue moon", "a star"]
PIXELS = len(PROMPTS) * 64 * 48
COLOURS = {0: "red", 50: "lime", 100: "blue"}


def write_step(folder: Path, step: int) -> None:
    for number in range(len(PROMPTS)):
        write_image(folder / f"step-{step:08d}" / f"{number:03d}.png", Image.new("RGB", (64, 48), COLOURS[step]))


def test_the_first_step_is_on_the_left_and_the_last_on_the_right(tmp_path: Path) -> None:
    write_step(tmp_path, 0)
    assert build_before_and_after(tmp_path, PROMPTS) is None
    for step in (50, 100):
        write_step(tmp_path, step)
    image = build_before_and_after(tmp_path, PROMPTS)
    assert image is not None and build_before_and_after(tmp_path, []) is None
    half = image.width // 2
    left, right = image.crop((0, 0, half, image.height)), image.crop((half, 0, image.width, image.height))
    assert (PIXELS, (255, 0, 0)) in left.getcolors(1 << 20)
    assert (PIXELS, (0, 0, 255)) in right.getcolors(1 << 20)
