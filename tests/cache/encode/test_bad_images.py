"""Bad images are tried again only if they may have become good."""

import errno
from pathlib import Path

import pytest
from cache_samples import run_job, write_settings
from PIL import Image

from sdxl_trainer.cache.encode.bad_images import BadImages, hash_rules, write_bad_images
from sdxl_trainer.cache.encode.decoder import WorkItem
from sdxl_trainer.cache.encode.encode_plan import ITEM_OVERHEAD_BYTES, EncodePlan
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.data.checks.bad_limit import are_too_many
from sdxl_trainer.data.checks.unusable_images import get_bad_images_file
from sdxl_trainer.data.images.bucket import BucketRule
from sdxl_trainer.data.images.masks import BadMaskError
from sdxl_trainer.data.images.transforms import BadImageError


def build_error(cause: Exception | None, kind: type[Exception] = BadImageError) -> Exception:
    """Raise and catch an error as a reader does: `from None`, with the cause as its context."""
    try:
        try:
            if cause is not None:
                raise cause
        finally:
            raise kind("x.png: bad") from None
    except kind as error:
        return error


def test_unchanged_images_with_bad_bytes_are_left_out(tmp_path: Path) -> None:
    errors = {
        "bytes": build_error(OSError("truncated")),  # Pillow's, without a number
        "refused": build_error(None),
        "changed": build_error(None),
        "storage": build_error(OSError(errno.EIO, "Input/output error")),
        "memory": build_error(MemoryError()),
        "mask": build_error(None, BadMaskError),
        "strategy": build_error(None, ValueError),
        "gone": build_error(None),
    }
    first = BadImages(tmp_path, "rules")
    for key, error in errors.items():
        (tmp_path / key).write_bytes(b"x")
        first.add(key, str(tmp_path / key), error)
    file = get_bad_images_file(tmp_path)
    file.parent.mkdir()
    write_bad_images(tmp_path, [*first.lines, {"key": "odd", "source": None}])
    (tmp_path / "changed").write_bytes(b"xy")
    (tmp_path / "gone").unlink()
    for rules, left_out in (("rules", ["bytes", "refused"]), ("other rules", [])):
        items = [WorkItem(key=key, image_path=str(tmp_path / key), file="f") for key in [*errors, "new"]]
        plan = EncodePlan(rule=BucketRule(512, 256, 1024, 64), identity="i")
        for item in items:
            plan.add_item(item, 512 * 512, 16)
        plan.counts["new"] = len(items)
        again = BadImages(tmp_path, rules)
        again.leave_out_known([plan])
        assert [line["key"] for line in again.lines] == left_out
        assert [item.key for item in plan.items] == [key for key in [*errors, "new"] if key not in left_out]
        assert plan.counts["bad"] == len(left_out) and plan.counts["new"] == len(plan.items)
        assert plan.num_pixels == len(plan.items) * 512 * 512, "the trial encodes images of the average size"
        assert plan.bytes_needed == len(plan.items) * (512 * 512 // 4 + ITEM_OVERHEAD_BYTES)


def test_a_repair_keeps_the_list(tmp_path: Path, tiny_folder: Path) -> None:
    settings = write_settings(tmp_path, tiny_folder / "model")
    (tmp_path / "images").mkdir()
    for name in ("a", "b", "c"):
        Image.new("RGB", (96, 96)).save(tmp_path / "images" / f"{name}.png")
    (tmp_path / "images" / "bad.png").write_bytes(b"broken")
    assert run_job(settings) == 0
    file = get_bad_images_file(tmp_path / "latents")
    listed = file.read_bytes()
    assert listed.count(b"\n") == 1
    assert run_job(settings, "--repair") == 0 and file.read_bytes() == listed
    (tmp_path / "latents" / "a.npz").unlink()
    assert run_job(settings, "--repair") == 0 and file.read_bytes() == listed


def test_other_settings_try_all_again_but_not_another_limit() -> None:
    config = Config()
    rules = [
        hash_rules(config.model_copy(update={"data": config.data.model_copy(update=changed)}))
        for changed in ({}, {"max_bad_fraction": 0.5}, {"resolution_px": [640]})
    ]
    assert rules[0] == rules[1] != rules[2]


@pytest.mark.parametrize(
    ("num_bad", "fraction", "num_images", "expected"),
    [
        (1, 0.01, 1, True),
        (1, 0.01, 2, False),
        (2, 0.01, 2, True),
        (2, 0.01, 20, False),
        (3, 0.01, 20, True),
        (3, 0.01, 300, False),
        (1, 0.0, 1000, True),
        (0, 0.0, 1000, False),
        (20, 1.0, 20, False),
        (29, 0.29, 100, False),  # 0.29 * 100 is less than 29
        (30, 0.29, 100, True),
    ],
)
def test_one_or_two_bad_images_do_not_fail_a_small_set(
    num_bad: int, fraction: float, num_images: int, expected: bool
) -> None:
    assert are_too_many(num_bad, fraction, num_images) == expected
