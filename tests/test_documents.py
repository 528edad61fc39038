"""Documents say what the code does: pages that are generated are current, links lead somewhere."""

import re
from pathlib import Path

import pytest

from sdxl_trainer.configs import document_kohya
from sdxl_trainer.configs.kohya_options import KOHYA_OPTIONS
from sdxl_trainer.configs.load import iterate_keys
from sdxl_trainer.configs.seed_options import SEED_OPTIONS

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")
MODULE = re.compile(r"python -m sdxl_trainer\.(\w+)\.(\w+)")
SCRIPT = re.compile(r"\b(?:bash|sbatch|python)(?: --\S+)* ((?:launch|tests|train|benchmarks)/[\w/]+\.\w+)")


def test_the_page_of_kohyas_options_is_current() -> None:
    page = (ROOT / "docs" / "FROM_KOHYA.md").read_text()
    assert page == document_kohya.build_page(), "python -m sdxl_trainer.configs.document_kohya > docs/FROM_KOHYA.md"
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| `")]
    assert [row[0].strip("| `") for row in rows] == [*KOHYA_OPTIONS, *SEED_OPTIONS]
    # Every option has keys that there are, or a reason.
    known = set(iterate_keys())
    for row in rows:
        keys = re.findall(r"`([\w.]+)`", row[1])
        assert row[1].startswith("as ") or (keys and set(keys) <= known) or (row[1] == "–" and len(row[2]) > 5), row


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_name_what_there_is(page: Path) -> None:
    text = page.read_text()
    targets = [page.parent / target for target in LINK.findall(text)]
    targets += [ROOT / folder / f"{module}.py" for folder, module in MODULE.findall(text)]
    targets += [ROOT / script for script in SCRIPT.findall(text)]
    assert [str(target) for target in targets if not target.exists()] == []


def list_blocks(page: str) -> list[tuple[str, list[str]]]:
    """Language and lines of every code block, without comments, which are prose."""
    blocks = re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    return [(language, [re.sub(r"\s+#.*", "", line) for line in body.splitlines()]) for language, body in blocks]


def test_both_readmes_say_the_same() -> None:
    """What a machine would read of them: commands, headings' levels, links, and names in code."""
    english, chinese = ((ROOT / name).read_text() for name in ("README.md", "README.zh-CN.md"))
    assert list_blocks(english) == list_blocks(chinese) and len(list_blocks(english)) >= 5
    assert re.findall(r"^#+", english, re.MULTILINE) == re.findall(r"^#+", chinese, re.MULTILINE)
    links = [sorted(set(LINK.findall(page)) - {"README.md", "README.zh-CN.md"}) for page in (english, chinese)]
    assert links[0] == links[1]
    names = [sorted(re.findall(r"(?<!`)`([^`\n]+)`(?!`)", page)) for page in (english, chinese)]
    assert names[0] == names[1]
