"""Grids and strips of generated images."""

import numpy as np
from PIL import Image

from sdxl_trainer.train.sampling.image_grid import GREY, build_image_grid, build_progress_strip, write_image


def test_a_strip_has_steps_and_prompts_and_no_gaps(tmp_path):
    shades, prompts = (40, 90), ("a cat on a mat", "一只猫")
    for number, (shade, prompt) in enumerate(zip(shades, prompts, strict=True)):
        for step in (0, 100) if number == 0 else (100,):  # the second prompt was added later
            image = Image.new("RGB", (64, 64 + 32 * number), (shade, shade, shade + step // 10))
            write_image(tmp_path / f"step-{step:08d}" / f"{number:03d}.png", image, f"{prompt}\nNegative prompt: none")
    (tmp_path / "step-00000100" / "002.png").write_bytes(b"damaged")
    strip = np.asarray(build_progress_strip(tmp_path))
    rows = [np.flatnonzero((strip[:, -1] == (shade, shade, shade + 10)).all(1)) for shade in shades]
    assert strip.shape[1] == 2 * 64 and [len(row) for row in rows] == [64, 96]
    for (first, *_), left_colour, shade in zip(rows, ((40, 40, 40), GREY), shades, strict=True):
        # Where the columns meet, no pixel lies between them.
        assert strip[first + 5, 62:66].tolist() == [list(left_colour)] * 2 + [[shade, shade, shade + 10]] * 2
        assert (strip[first - 18 : first] < 128).any()  # the prompt above the row
    assert (strip[:16, :64] < 128).any() and (strip[:16, 64:] < 128).any()  # the steps above their columns
    assert build_progress_strip(tmp_path / "none") is None


def test_labels_fit_below_their_images():
    images = [Image.new("RGB", (60, 60), "white")] * 2
    grid = np.asarray(
        build_image_grid(images, 2, ["a long text about a cat, a dog and a bird " * 3, "一只坐在垫子上的猫"])
    )
    assert (grid[60:, :60] < 128).any() and (grid[60:, 64:] < 128).any() and (grid[:, 60:64] == 255).all()
