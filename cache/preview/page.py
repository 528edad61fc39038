"""The page of the preview: one HTML file with thumbnails that loads nothing else, and the list of all findings."""

import base64
import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import jinja2
import numpy as np
import orjson
from PIL import Image, ImageDraw

from sdxl_trainer.cache.preview.contact_sheet import PreviewSample
from sdxl_trainer.cache.preview.survey import Section, Survey
from sdxl_trainer.cache.preview.tables import MAX_BUCKETS, DataTable, tabulate_survey
from sdxl_trainer.configs.language.pages import fill_text
from sdxl_trainer.configs.language.translate import get_language, join_label, translate, translate_label
from sdxl_trainer.data.files import write_atomic
from sdxl_trainer.data.images.bucket import BucketRule, Size, list_buckets, place_image
from sdxl_trainer.data.images.transforms import BadImageError, open_thumbnail, prepare_image
from sdxl_trainer.data.index.index import Index
from sdxl_trainer.data.metadata.values import TEXT_FIELDS
from sdxl_trainer.data.order.even_selection import select_evenly
from sdxl_trainer.data.text.captions import read_caption_fields

THUMBNAIL_PX = 180  # longer side
WEBP_QUALITY = 75
NUM_EXAMPLES = 4  # images of each bucket
MAX_FIGURES, MAX_IN_GROUP = 60, 8  # images of a section, and of a group of duplicates
MAX_CAPTION = 300  # letters
SHADE = (0, 0, 0, 150)  # over what a crop leaves out


@dataclass(frozen=True)
class EmbeddedImage:
    """An image within the page: its content as a URI, and its size in pixels."""

    uri: str
    width: int
    height: int


@dataclass(frozen=True)
class Exhibit:
    """An image on the page with its texts; `image` is None if it cannot be opened."""

    name: str
    caption: str
    detail: str
    image: EmbeddedImage | None


@dataclass(frozen=True)
class Chapter:
    """A section on the page: its first images, in groups of duplicates or one by one."""

    section: Section
    groups: list[list[Exhibit]]
    num_left: int  # images of the section that are not shown


class RecordNames:
    """Names and captions of records.

    Args:
        folders: a file below one of them is named by its path from there.
    """

    def __init__(self, records: Index, folders: Sequence[Path], separator: str):
        self._records, self._separator = records, separator
        self._prefixes = sorted((f"{folder.absolute()}/" for folder in folders), key=len, reverse=True)
        self._paths = records.arrow_column("image_path")

    def get_path(self, row: int) -> str:
        """Return the path of a record's image."""
        return str(self._paths[row])

    def get_name(self, row: int) -> str:
        """Return the short name of a record's image: with its folder if another folder holds a file of that name."""
        path = self.get_path(row)
        own = next((prefix for prefix in self._prefixes if path.startswith(prefix)), "")
        name = path.removeprefix(own)
        rivals = [prefix for prefix in self._prefixes if own and prefix != own and os.path.exists(prefix + name)]
        if not rivals:
            return name
        folder = os.path.basename(own.rstrip("/"))
        is_unique = folder not in (os.path.basename(prefix.rstrip("/")) for prefix in rivals)
        return f"{folder}/{name}" if is_unique else path

    def get_caption(self, row: int) -> str:
        """Return a record's caption, or its description, shortened."""
        caption = read_caption_fields(self._records.record(row), TEXT_FIELDS, self._separator)
        return caption if len(caption) <= MAX_CAPTION else f"{caption[:MAX_CAPTION]} ..."


@dataclass(frozen=True, kw_only=True)
class PageWriter:
    """Writes the page and the list of findings.

    Args:
        rule: bucket rule of the largest resolution.
        num_workers: threads that decode images.
    """

    name: str
    survey: Survey
    names: RecordNames
    rule: BucketRule
    num_workers: int

    def write_list(self, file: Path) -> None:
        """Write all findings as JSON Lines."""
        lines = []
        for section in self.survey.sections:
            for finding in section.findings:
                line = {"kind": section.name, "file": self.names.get_path(finding.row), "detail": finding.detail}
                lines.append(orjson.dumps({**line, "group": finding.group} if finding.group else line))
        write_atomic(file, b"".join(line + b"\n" for line in lines))

    def write_page(self, file: Path, list_file: Path, buckets: DataTable, tables: Sequence[DataTable]) -> None:
        """Write the page."""
        survey = self.survey
        with ThreadPoolExecutor(self.num_workers) as pool:
            chapters = [self._build_chapter(section, pool) for section in survey.sections if section.findings]
            examples = {
                bucket: list(pool.map(self._exhibit_crop, rows)) for bucket, rows in self._choose_examples().items()
            }
        page = _load_template().render(
            t=fill_text,
            show=translate_label,
            join=join_label,
            language=get_language(),
            name=self.name,
            written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            opened=f"{translate(survey.extent)}{translate_label('.')}",
            summary=tabulate_survey(survey),
            chapters=chapters,
            list_name=list_file.name,
            buckets=buckets,
            examples=examples,
            tables=tables,
        )
        write_atomic(file, page)

    def crop_examples(self, number: int) -> list[PreviewSample]:
        """Return images cropped as they will be encoded, from as many buckets as possible."""
        groups = list(self._choose_examples().values())
        in_turn = [group[place] for place in range(NUM_EXAMPLES) for group in groups if place < len(group)]
        with ThreadPoolExecutor(self.num_workers) as pool:
            return list(pool.map(self._crop_sample, in_turn[:number]))

    def count_buckets(self) -> dict[str, int]:
        """Return the number of images of each bucket, fullest first, as far as their sizes are known."""
        packed, counts = np.unique(_pack(self.survey.buckets), return_counts=True)
        order = np.argsort(-counts, kind="stable").tolist()
        return {_name_bucket(int(packed[at])): int(counts[at]) for at in order if packed[at]}

    def _choose_examples(self) -> dict[str, list[int]]:
        """Choose rows of each bucket, the fullest bucket first."""
        packed = _pack(self.survey.buckets)
        order = np.argsort(packed, kind="stable")
        starts = np.flatnonzero(np.diff(packed[order], prepend=-1))
        groups = {_name_bucket(int(packed[rows[0]])): rows for rows in np.split(order, starts[1:]) if len(rows)}
        fullest = list(self.count_buckets())[:MAX_BUCKETS]
        return {name: groups[name][select_evenly(len(groups[name]), NUM_EXAMPLES)].tolist() for name in fullest}

    def _crop_sample(self, row: int) -> PreviewSample:
        try:
            image = prepare_image(Path(self.names.get_path(row)), self.rule, list_buckets(self.rule))
        except BadImageError as error:
            pixels, note, bad = None, "", str(error)
        else:
            place = image.placement
            pixels, bad = image.pixels, None
            note = f"{image.original_size} to {place.bucket}, crop left {place.left} top {place.top}, no latents yet"
        name, caption = self.names.get_name(row), self.names.get_caption(row)
        return PreviewSample(key=name, caption=caption, note=note, latents=None, pixels=pixels, bad=bad)

    def _exhibit_crop(self, row: int) -> Exhibit:
        sample = self._crop_sample(row)
        image = None if sample.pixels is None else embed_image(Image.fromarray(sample.pixels))
        return Exhibit(sample.key, sample.caption, sample.bad or "", image)

    def _build_chapter(self, section: Section, pool: ThreadPoolExecutor) -> Chapter:
        groups: dict[int, list[int]] = {}
        num_shown = 0
        for place, finding in enumerate(section.findings):
            group = groups.setdefault(finding.group or -place - 1, [])
            if len(group) < MAX_IN_GROUP and num_shown < MAX_FIGURES:
                group.append(place)
                num_shown += 1
        shade = self._shade_crop if section.name == "cropped" else None
        shown = [section.findings[place] for group in groups.values() for place in group]
        exhibits = pool.map(lambda finding: self._exhibit_whole(finding.row, finding.detail, shade), shown)
        return Chapter(
            section=section,
            groups=[[next(exhibits) for _ in group] for group in groups.values() if group],
            num_left=section.num_found - num_shown,
        )

    def _exhibit_whole(self, row: int, detail: str, shade: Callable[[Image.Image, Size], None] | None) -> Exhibit:
        path, name, caption = Path(self.names.get_path(row)), self.names.get_name(row), self.names.get_caption(row)
        try:
            image, size = open_thumbnail(path, THUMBNAIL_PX)
        except BadImageError as error:
            return Exhibit(name, caption, detail or str(error), None)
        if shade is not None:
            shade(image, size)
        return Exhibit(name, caption, detail, embed_image(image))

    def _shade_crop(self, image: Image.Image, size: Size) -> None:
        """Darken the part of a thumbnail that the bucket leaves out."""
        place = place_image(size, self.rule, list_buckets(self.rule))
        scale = image.width / place.resized.width, image.height / place.resized.height
        box = [round(edge * scale[number % 2]) for number, edge in enumerate(place.crop)]
        shade = Image.new("RGBA", image.size, SHADE)
        ImageDraw.Draw(shade).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=(0, 0, 0, 0))
        image.paste(shade, mask=shade)


def embed_image(image: Image.Image) -> EmbeddedImage:
    """Return a thumbnail of an image for the page."""
    image = image.copy()
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=WEBP_QUALITY, method=2)
    uri = f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return EmbeddedImage(uri, image.width, image.height)


def _pack(buckets: np.ndarray) -> np.ndarray:
    """Return each bucket, [N, 2], as one number, [N] int64."""
    return buckets[:, 0] << 32 | buckets[:, 1]


def _name_bucket(packed: int) -> str:
    return str(Size(packed >> 32, packed & 0xFFFFFFFF))


def _load_template() -> jinja2.Template:
    """Load the page's template, which escapes every value."""
    options = {"autoescape": True, "undefined": jinja2.StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    return jinja2.Environment(**options).from_string(Path(__file__).with_name("page.html").read_text("utf-8"))
