"""Documents say what the code does: pages that are generated are current, links lead somewhere."""

import contextlib
import os
import re
import sqlite3
import subprocess
from pathlib import Path

import pytest
from programs import ROOT
from requirements import build_requirements

from sdxl_trainer.configs.kohya import document as document_kohya
from sdxl_trainer.configs.kohya.first_trainer import FIRST_TRAINER_OPTIONS
from sdxl_trainer.configs.kohya.options import KOHYA_OPTIONS
from sdxl_trainer.configs.load import iterate_keys

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "zh").glob("*.md")])
CHINESE = {"README.md": "README.zh-CN.md"} | {
    f"docs/{name}.md": f"docs/zh/{name}.md"
    for name in "QUICKSTART DATA CACHE TRAINING FROM_KOHYA STRATEGY WATCH TROUBLESHOOTING RECIPES OPTIMIZERS ADAPTERS "
    "OBJECTIVE PRECISION LOW_MEMORY SAMPLING "
    "IMAGES CAPTIONS SHARDS DATA_SPEED CACHE_FORMAT".split()
}
CODE = ("configs", "launch", "data", "cache", "train")
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")
IMAGE = re.compile(r'<img\b[^>]* src="(?!https?:)([^"]+)"')
ANCHOR = re.compile(r"\]\((?!https?:)([^)#]*)#([^)]+)\)")
MODULE = re.compile(r"python -m sdxl_trainer\.(\w+(?:\.\w+)+)")
SCRIPT = re.compile(r"\b(?:bash|sbatch|python)(?: --\S+)* ((?:launch|tests|train|benchmarks)/[\w/]+\.\w+)")

TEST = re.compile(r"`(test_\w+\.py)?(?:::(test_\w+))?`")


def test_requirements_are_those_of_pyproject() -> None:
    content = (ROOT / "requirements.txt").read_text()
    assert content == build_requirements(), "python tests/requirements.py > requirements.txt"


def test_the_page_of_kohyas_options_is_current() -> None:
    page = (ROOT / "docs" / "FROM_KOHYA.md").read_text()
    assert page == document_kohya.build_page(), "python -m sdxl_trainer.configs.kohya.document > docs/FROM_KOHYA.md"
    chinese = document_kohya.build_page("zh")
    command = "python -m sdxl_trainer.configs.kohya.document --language zh > docs/zh/FROM_KOHYA.md"
    assert (ROOT / "docs" / "zh" / "FROM_KOHYA.md").read_text() == chinese, command
    prose = re.sub(r"^```.*?^```|`[^`]*`", "", chinese, flags=re.MULTILINE | re.DOTALL)
    assert re.findall(r"[a-z]+ [a-z]+ [a-z]+", prose) == [], "a note that no message of the catalogue is"
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| `") and not line.startswith("| `.")]
    assert [row[0].strip("| `") for row in rows] == [*KOHYA_OPTIONS, *FIRST_TRAINER_OPTIONS]
    # Every option has keys that there are, or a reason.
    known = set(iterate_keys())
    for row in rows:
        keys = re.findall(r"`([\w.]+)`", row[1])
        assert (
            row[1].startswith("as ") or (keys and set(keys) <= known) or (row[1] in ("–", "always") and len(row[2]) > 5)
        ), row


def test_tests_that_pages_name_exist() -> None:
    files = list((ROOT / "tests").rglob("test_*.py"))
    known = {file.name for file in files} | {""}
    for file in files:
        known.update(re.findall(r"^ *def (test_\w+)", file.read_text(), re.MULTILINE))
    named = {name for page in PAGES for pair in TEST.findall(page.read_text()) for name in pair}
    assert len(named) > 100 and named - known == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_pages_name_what_there_is(page: Path) -> None:
    text = page.read_text()
    targets = [page.parent / target for target in LINK.findall(text)]
    targets += [page.parent / target for target in IMAGE.findall(text)]
    targets += [find_program(module) for module in MODULE.findall(text)]
    targets += [ROOT / script for script in SCRIPT.findall(text) if script not in read_examples()]
    assert [str(target) for target in targets if not target.exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_anchors_lead_to_headings_and_mentioned_pages_exist(page: Path) -> None:
    text = page.read_text()
    for target, anchor in ANCHOR.findall(text):
        headings = re.findall(r"^#+ (.*)", (page.parent / target if target else page).read_text(), re.MULTILINE)
        # As GitHub makes them: lower case, without punctuation, a hyphen for each space.
        assert anchor in {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}, anchor
    assert [name for name in re.findall(r"\b(docs/[\w/]+\.\w+)", text) if not (ROOT / name).exists()] == []


def find_program(module: str) -> Path:
    """Return the file that `python -m sdxl_trainer.<module>` runs."""
    path = ROOT.joinpath(*module.split("."))
    return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")


def test_the_folder_map_is_true() -> None:
    page = (ROOT / "docs" / "ARCHITECTURE.md").read_text()
    rooms, missing = [], []
    for line in page[page.index("## The folder map") : page.index("## Terms")].splitlines():
        if found := re.match(r"\| `([\w/]+)/`", line):
            rooms.append(found[1])
            names = re.findall(r"`([\w/]+\.\w+)`", line)
            missing += [f"{found[1]}/{name}" for name in names if not (ROOT / found[1] / name).exists()]
    assert missing == []
    packages = {
        path.parent.relative_to(ROOT).as_posix() for folder in CODE for path in (ROOT / folder).rglob("__init__.py")
    }
    assert {room for room in rooms if room.split("/")[0] in CODE} == packages - {"data", "cache", "train"}
    paths = re.findall(r"`((?:configs|launch|data|cache|train|benchmarks|tests)/[\w/]+\.\w+)`", page)
    assert len(paths) > 30 and [path for path in paths if not (ROOT / path).exists()] == []


def list_blocks(page: str) -> list[tuple[str, list[str]]]:
    """Language and lines of every code block, without comments, which are prose."""
    blocks = re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    return [(language, [re.sub(r"\s+#.*", "", line) for line in body.splitlines()]) for language, body in blocks]


def list_targets(page: Path) -> list[str]:
    """The files that a page links to, each by its English name; not the other language's README."""
    targets = {(page.parent / target).resolve() for target in LINK.findall(page.read_text())}
    names = {target.relative_to(ROOT).as_posix().replace("docs/zh/", "docs/") for target in targets}
    return sorted(names - {"README.md", "README.zh-CN.md"})


@pytest.mark.parametrize("name", CHINESE)
def test_english_and_chinese_pages_say_the_same(name: str) -> None:
    """What a machine would read of them: commands, headings' levels, and links; of the READMEs names in code, too."""
    pages = [ROOT / name, ROOT / CHINESE[name]]
    english, chinese = (page.read_text() for page in pages)
    # Blocks of text show what programs print, in the page's language.
    blocks = [
        [(kind, [] if kind == "text" else lines) for kind, lines in list_blocks(page)] for page in (english, chinese)
    ]
    assert blocks[0] == blocks[1]
    assert re.findall(r"^#+", english, re.MULTILINE) == re.findall(r"^#+", chinese, re.MULTILINE)
    links = [list_targets(page) for page in pages]
    assert links[0] == links[1]
    if name == "README.md":
        names = [sorted(re.findall(r"(?<!`)`([^`\n]+)`(?!`)", page)) for page in (english, chinese)]
        assert names[0] == names[1]


@pytest.mark.parametrize("page", [ROOT / name for name in CHINESE.values()], ids=lambda page: page.name)
def test_chinese_pages_mark_links_to_english_ones(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+\.md)(?:#[^)]*)?\)(.{0,4})", page.read_text())
    english = [(target, mark) for target, mark in links if "zh" not in (page.parent / target).resolve().as_posix()]
    english = [(target, mark) for target, mark in english if not target.startswith("README")]
    assert [target for target, mark in english if mark not in ("（英文）", "，英文）")] == []


@pytest.mark.parametrize("page", [*CHINESE.values(), "docs/zh/CONFIG.md", "configs/language/zh_CN.po"])
def test_chinese_uses_one_word_for_a_thing(page: str) -> None:
    """Latents of other programs are 登记; what follows the first trainer is 后续版本; a mask is 蒙版."""
    assert re.findall("沿用|后继(?!续)|掩膜|掩码|真正的 SDXL|月亮", (ROOT / page).read_text(encoding="utf-8")) == []


def read_examples() -> dict[str, str]:
    """The code in docs/CONTRIBUTING.md, by the file that it says it belongs to."""
    page = (ROOT / "docs" / "CONTRIBUTING.md").read_text()
    return dict(re.findall(r"^```\w+ (\S+)\n(.*?)^```", page, re.MULTILINE | re.DOTALL))


def test_contributing_a_weighting(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from sdxl_trainer.configs import objective as settings
    from sdxl_trainer.train.objective import weightings
    from sdxl_trainer.train.objective.objective import build_weighting

    examples = read_examples()
    monkeypatch.setitem(weightings.WEIGHTINGS, "sigmoid", None)  # which is taken out again, whatever stands there then
    monkeypatch.setitem(settings.USUAL_GAMMA, "sigmoid", 0.0)
    exec(examples["train/objective/weightings.py"], dict(vars(weightings)))
    exec(examples["configs/objective.py"], dict(vars(settings)))
    config = settings.ObjectiveConfig.model_construct(weighting="sigmoid")
    weights = build_weighting(config)(torch.tensor([0.0, 1.0, torch.e**2]))
    assert weights.tolist() == pytest.approx([1, 0.8807971, 0.5])
    with pytest.raises(ValueError, match="weighting"):  # the name stands in the schema too
        settings.ObjectiveConfig.model_validate({"weighting": "sigmoid"})


def test_contributing_a_form_of_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sdxl_trainer.data.metadata import sources

    monkeypatch.setattr(sources, "READERS", dict(sources.READERS))
    monkeypatch.setattr(sources, "SUFFIXES", dict(sources.SUFFIXES))
    exec(read_examples()["data/metadata/sources.py"], dict(vars(sources)))
    with contextlib.closing(sqlite3.connect(tmp_path / "x.sqlite")) as database:
        database.execute("CREATE TABLE images (image_path, caption, score)")
        database.executemany(
            "INSERT INTO images VALUES (?, ?, ?)", [(f"/data/{at}.png", "a cat", None) for at in range(9000)]
        )
        database.commit()
    pieces = list(sources.read_metadata_file(tmp_path / "x.sqlite"))
    assert [len(items) for items in pieces] == [8192, 808]
    key, fields, *_ = pieces[1][-1]
    assert (key, fields["image_path"], fields["caption"]) == (
        "8999",
        "/data/8999.png",
        "a cat",
    ) and "score" not in fields
    (tmp_path / "y.sqlite3").write_bytes(b"no database, but long enough to be looked at")
    with pytest.raises(ValueError, match="no readable SQLite"):
        list(sources.read_metadata_file(tmp_path / "y.sqlite3"))


def test_contributing_a_launcher(tmp_path: Path) -> None:
    """Under an `mpirun` that starts two ranks one after the other; no machine of the tests has a real one."""
    for name in ("launch", "train", "bin"):
        (tmp_path / name).mkdir()
    for name in ("child.sh", "language.sh"):
        (tmp_path / "launch" / name).write_text((ROOT / "launch" / name).read_text())
    (tmp_path / "launch" / "mpirun.sh").write_text(read_examples()["launch/mpirun.sh"])
    (tmp_path / "train" / "main.py").write_text(
        "import os, sys\n"
        "names = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR')\n"
        "print(*(os.environ[name] for name in names), *sys.argv[1:])\n"
        "open(os.environ['SDXL_TRAINER_STATUS_FILE'], 'w').write('2')\n"
        "sys.exit(2)\n"
    )
    (tmp_path / "bin" / "mpirun").write_text(
        '#!/usr/bin/env bash\n[ "$1 $2" = "-np 2" ] || exit 9\nshift 2\nexport OMPI_COMM_WORLD_SIZE=2\n'
        "for OMPI_COMM_WORLD_RANK in 0 1; do export OMPI_COMM_WORLD_RANK OMPI_COMM_WORLD_LOCAL_RANK="
        '"$OMPI_COMM_WORLD_RANK"; "$@" || true; done\nexit 1\n'
    )
    (tmp_path / "bin" / "mpirun").chmod(0o755)
    environment = {**os.environ, "NPROC": "2", "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    command = ["bash", str(tmp_path / "launch" / "mpirun.sh"), "--cfg", "a b.yaml"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == [f"{rank} {rank} 2 127.0.0.1 --cfg a b.yaml" for rank in range(2)], done.stderr
    assert done.returncode == 2
