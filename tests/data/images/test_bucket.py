"""Buckets: kohya's numbers, and properties of the placement of any image."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdxl_trainer.data.images.bucket import BucketRule, choose_bucket, list_buckets, place_image

SDXL = BucketRule(resolution_px=1024, min_px=256, max_px=2048, step_px=64)
SDXL_BUCKETS = list_buckets(SDXL)
NO_UPSCALE = BucketRule(resolution_px=1024, min_px=256, max_px=2048, step_px=64, no_upscale=True)


def test_sdxl_has_kohyas_41_buckets():
    heights = {
        1088: 960,
        1152: 896,
        1216: 832,
        1280: 768,
        1344: 768,
        1408: 704,
        1472: 704,
        1536: 640,
        1600: 640,
        1664: 576,
        1728: 576,
        1792: 576,
        1856: 512,
        1920: 512,
        1984: 512,
    }
    landscape = [*heights.items(), *((2048, height) for height in (256, 320, 384, 448, 512))]
    assert SDXL_BUCKETS == sorted([(1024, 1024), *landscape, *((height, width) for width, height in landscape)])
    assert len(SDXL_BUCKETS) == 41


def test_the_shortest_side_may_equal_the_minimum():
    assert [
        size
        for size in list_buckets(BucketRule(resolution_px=256, min_px=64, max_px=1024, step_px=64))
        if size[1] == 64
    ] == [(width, 64) for width in range(576, 1025, 64)]


def test_limits_are_rounded_inwards_to_the_step():
    assert list_buckets(BucketRule(resolution_px=256, min_px=250, max_px=600, step_px=64)) == [(256, 256)]
    assert list_buckets(BucketRule(resolution_px=256, min_px=130, max_px=350, step_px=64)) == list_buckets(
        BucketRule(resolution_px=256, min_px=192, max_px=320, step_px=64)
    )
    assert list_buckets(BucketRule(resolution_px=64, min_px=32, max_px=600, step_px=128)) == []


@pytest.mark.parametrize(
    ("size", "bucket", "resized", "left_top"),
    [
        ((1920, 1080), (1344, 768), (1365, 768), (10, 0)),  # the free side rounds half up
        ((1919, 1080), (1344, 768), (1365, 768), (10, 0)),
        ((1080, 1919), (768, 1344), (768, 1365), (0, 10)),
        ((1500, 1000), (1216, 832), (1248, 832), (16, 0)),
        ((1024, 1024), (1024, 1024), (1024, 1024), (0, 0)),
        ((2048, 256), (2048, 256), (2048, 256), (0, 0)),
        ((100, 100), (1024, 1024), (1024, 1024), (0, 0)),
        ((1000, 3000), (576, 1728), (576, 1728), (0, 0)),
        ((10, 5000), (256, 2048), (256, 128000), (0, 62976)),
    ],
)
def test_known_placements(size, bucket, resized, left_top):
    placement = place_image(size, SDXL, SDXL_BUCKETS)
    assert (placement.bucket, placement.resized, (placement.left, placement.top)) == (bucket, resized, left_top)


def test_an_exact_match_wins_over_the_nearest_ratio():
    buckets = [(512, 512), (1024, 1024), (768, 1024)]
    assert choose_bucket((1024, 1024), buckets) == (1024, 1024)
    assert choose_bucket((600, 600), buckets) == (512, 512)
    # The distance is the difference of the ratios: 1.24 is nearer to 1.0 than to 1.5, although 1.5 / 1.24 < 1.24 / 1.0.
    assert choose_bucket((1240, 1000), [(1000, 1000), (1500, 1000)]) == (1000, 1000)


@pytest.mark.parametrize(
    ("size", "bucket", "resized"),
    [
        ((800, 600), (768, 576), (800, 600)),
        ((1500, 1000), (1216, 832), (1248, 832)),
        ((4000, 3000), (1088, 832), (1109, 832)),
        ((1024, 1024), (1024, 1024), (1024, 1024)),
        ((40, 900), (64, 896), (64, 1440)),  # thinner than one step: the only case that is enlarged
    ],
)
def test_no_upscale(size, bucket, resized):
    placement = place_image(size, NO_UPSCALE, list_buckets(NO_UPSCALE))
    assert (placement.bucket, placement.resized) == (bucket, resized)


@given(
    size=st.tuples(st.integers(1, 20000), st.integers(1, 20000)),
    rule=st.builds(
        lambda resolution, step, least, most, no_upscale: BucketRule(
            resolution_px=resolution,
            min_px=min(least, resolution),
            max_px=max(most, resolution),
            step_px=step,
            no_upscale=no_upscale,
        ),
        st.integers(256, 1536),
        st.sampled_from([32, 64, 128]),
        st.sampled_from([64, 128, 256]),
        st.sampled_from([512, 1024, 2048]),
        st.booleans(),
    ),
)
def test_any_image_covers_its_bucket_and_is_cropped_inside(size, rule):
    buckets = list_buckets(rule)
    placement = place_image(size, rule, buckets)
    (width, height), (resized_width, resized_height) = placement.bucket, placement.resized
    left, top, right, bottom = placement.crop
    assert width % rule.step_px == height % rule.step_px == 0 and min(width, height) >= rule.step_px
    assert resized_width >= width and resized_height >= height
    assert 0 <= left and 0 <= top and right <= resized_width and bottom <= resized_height
    assert (right - left, bottom - top) == (width, height)
    # Centred: the margins cropped from both sides differ by at most one pixel.
    assert 0 <= (resized_width - right) - left <= 1 and 0 <= (resized_height - bottom) - top <= 1
    if not rule.no_upscale:
        assert placement.bucket in buckets
        assert resized_width == width or resized_height == height  # no larger than necessary
    elif size[0] * size[1] <= rule.resolution_px**2 and min(size) >= rule.step_px:
        assert placement.resized == size  # never enlarged
    if min(resized_width, resized_height) >= 200:  # the aspect ratio is kept except for the rounding of one pixel
        error = abs(resized_width / resized_height * size[1] / size[0] - 1)
        assert error <= 1 / min(resized_width, resized_height)


@given(st.integers(64, 4096), st.sampled_from([32, 64]), st.sampled_from([64, 256]), st.sampled_from([2048, 4096]))
def test_buckets_do_not_exceed_the_area(resolution, step, least, most):
    rule = BucketRule(resolution_px=resolution, min_px=least, max_px=most, step_px=step)
    for width, height in list_buckets(rule):
        assert width % step == height % step == 0
        assert width * height <= resolution**2
