"""The result of a measurement: values, intervals and verdicts, as JSON and as text. Who shows texts translates them."""

from collections.abc import Iterator, Sequence

import msgspec

from sdxl_trainer.configs.language.translate import translate, translate_label
from sdxl_trainer.train.evidence.printing import align_rows

HEADINGS = ("model", "value", "low", "high", "difference", "low", "high", "p", "verdict")
BETTER, WORSE, UNDECIDED, BASELINE = "better", "worse", "undecided", "baseline"
SIGNIFICANCE = 0.05


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """A measure of one model."""

    measure: str
    features: str  # name of the feature model; "" for x0 error
    model: str
    num_images: int
    value: float
    low: float
    high: float
    difference: float | None = None  # minus the baseline's
    difference_low: float | None = None
    difference_high: float | None = None
    p_value: float | None = None
    verdict: str = BASELINE


class Subsets(msgspec.Struct, frozen=True, kw_only=True):
    """KID over subsets of images, as papers report it."""

    features: str
    model: str
    num_subsets: int
    num_images: int  # of each subset
    mean: float
    deviation: float


class Floor(msgspec.Struct, frozen=True, kw_only=True):
    """A measure between two halves of the validation images, and between a half of each model's and the other half."""

    measure: str
    features: str
    num_images: int  # of each half
    value: float
    models: dict[str, float]


class Quality(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a measurement."""

    models: list[str]
    num_images: int
    feature_sizes: dict[str, int]  # numbers of an image, by the name of the feature model
    lines: list[Line]
    subsets: list[Subsets]
    floors: list[Floor]
    notes: list[str]
    folders: dict[str, str]  # of the images, by the label of their model


def judge(difference: float, p_value: float) -> str:
    """Return the verdict on a difference of a measure of which less is better."""
    if p_value >= SIGNIFICANCE:
        return UNDECIDED
    return WORSE if difference > 0 else BETTER


def write_lines(quality: Quality) -> Iterator[str]:
    """Yield the lines of a result."""
    number, baseline = quality.num_images, quality.models[0]
    yield translate(f"{number} generated images and as many validation images; lower is better; baseline: {baseline}")
    groups = dict.fromkeys((line.measure, line.features) for line in quality.lines)
    for measure, features in groups:
        yield f"\n{measure}" + (f", {features}" if features else "")
        lines = [line for line in quality.lines if (line.measure, line.features) == (measure, features)]
        rows = [[translate_label(heading) for heading in HEADINGS]]
        yield from align_rows([*rows, *(_format_row(line) for line in lines)])
    yield ""
    for each in quality.subsets:
        spread = f"{each.mean:.5f} ± {each.deviation:.5f}"
        yield translate(
            f"{each.model}: KID {spread} over {each.num_subsets} subsets of {each.num_images} images, {each.features}"
        )
    for floor in quality.floors:
        models = ", ".join(f"{label} {value:.4g}" for label, value in floor.models.items())
        yield translate(
            f"{floor.measure} of {floor.num_images} images with {floor.num_images} validation images of other "
            f"captions, {floor.features}: validation images {floor.value:.4g}, {models}"
        )
    yield from map(translate, quality.notes)


def _format_row(line: Line) -> list[str]:
    cells: Sequence[float | None] = (line.value, line.low, line.high, line.difference)
    cells = (*cells, line.difference_low, line.difference_high)
    shown = ["" if value is None else f"{value:.4g}" for value in cells]
    p_value = "" if line.p_value is None else f"{line.p_value:.2g}"
    return [line.model, *shown, p_value, translate_label(line.verdict)]
