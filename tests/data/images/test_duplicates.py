"""Duplicates among images: equal files, and images that look alike."""

import io
import random

import numpy as np
import pytest
from PIL import Image

from sdxl_trainer.data.images.demo_set import draw_image
from sdxl_trainer.data.images.duplicates import (
    MAX_BITS,
    Likeness,
    group_alike,
    group_equal_files,
    measure_likeness,
)


def draw_scene(seed: int) -> Image.Image:
    """Draw random smooth shades in colour, as a photo has them."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((320, 240), Image.Resampling.BICUBIC)


def compress(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def test_copies_in_other_sizes_and_compressions_look_alike_and_nothing_else_does():
    scenes = [draw_scene(seed) for seed in range(40)]
    copies = [compress(scene.resize((160 + 4 * at, 120 + 3 * at)), 30 + at) for at, scene in enumerate(scenes[:20])]
    groups = group_alike([measure_likeness(image) for image in [*scenes, *copies]])
    assert groups == [[at, at + 40] for at in range(20)]


def test_one_shape_in_two_colours_is_two_images_and_equal_flat_images_are_one_group():
    red, green = ((200, 0, 0), (0, 102, 0))  # of one brightness
    stars = [draw_image(colour, "star", (128, 128, 128), (256, 256), random.Random(0)) for colour in (red, green, red)]
    likenesses = [measure_likeness(star) for star in stars]
    assert likenesses[0].bits == likenesses[1].bits and group_alike(likenesses) == [[0, 2]]
    flat = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue", "red", "white", "blue", "red")]
    assert group_alike([measure_likeness(image) for image in flat]) == [[0, 2, 5], [1, 4]]
    assert group_alike([]) == []


def test_hashes_within_the_limit_are_found_wherever_they_differ():
    rng = np.random.default_rng(0)
    colours = np.zeros((8, 8, 3), np.uint8)
    for num_bits, expected in ((MAX_BITS, [[0, 1]]), (MAX_BITS + 1, [])):
        for _ in range(50):
            bits = int(rng.integers(2**63))
            flipped = bits ^ sum(1 << int(place) for place in rng.choice(64, num_bits, replace=False))
            assert group_alike([Likeness(bits, colours), Likeness(flipped, colours)]) == expected


def test_files_are_equal_by_all_their_bytes(tmp_path):
    contents = {"a": b"x" * 9000, "b": b"y" + b"x" * 8999, "c": b"x" * 9000, "d": b"x", "e": b"", "f": b""}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    paths = [str(tmp_path / name) for name in [*contents, "missing", "a"]]
    assert group_equal_files(paths, num_workers=2) == [[0, 2]]


@pytest.mark.parametrize("number", [3, 1000])
def test_the_order_of_images_does_not_change_their_groups(number):
    rng = np.random.default_rng(number)
    likenesses = [Likeness(int(bits), np.zeros((8, 8, 3), np.uint8)) for bits in rng.integers(0, 2**63, number)]
    likenesses[0] = likenesses[-1]
    assert group_alike(likenesses) == [[0, number - 1]]
