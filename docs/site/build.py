"""Build the documents as a site in both languages, with search.

    python docs/site/build.py [FOLDER]      # default: site/

Pages of docs/ and docs/zh/ are copied. Links are rewritten: to pages, to copies of files outside docs/, and
from Chinese pages to English ones without a translation. The navigation is docs/README.md's list. A warning ends the
build with status 1. Needs `pip install -e ".[docs]"`.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
LINK = re.compile(r"\[([^\]]*)\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)]*)?\)")
LANGUAGE_SWITCH = re.compile(r"\[[^\]]+\]\(README(\.zh-CN)?\.md\)\n\n")  # the site has a menu
# An image with a width, which Markdown lacks and GitHub takes as HTML.
IMAGE = re.compile(r'<img alt="([^"]*)" src="([^"]*)" width="(\d+)">')
FENCE = re.compile(r"^(```\w+) (\S+)$", re.MULTILINE)  # a block with a file's name, which the site shows above it
ENTRY = re.compile(r"- \[([^\]]+)\]\(([^)]+)\)")
# Pages beside docs/, by the name that they have on the site.
OUTSIDE = {"README.md": "OVERVIEW.md", "CHANGELOG.md": "CHANGELOG.md", "SECURITY.md": "SECURITY.md"}


@dataclass(frozen=True)
class Language:
    """A language of the site."""

    name: str
    code: str  # the theme's
    folder: str  # of the site
    pages: Path
    outside: dict[str, str]


LANGUAGES = (
    Language("English", "en", "", DOCS, OUTSIDE),
    Language("简体中文", "zh", "zh", DOCS / "zh", {"README.zh-CN.md": "OVERVIEW.md"}),
)


def list_pages(language: Language) -> dict[Path, str]:
    """Return the name of every page on the site, such as `CACHE.md` or `gpu/README.md`, by its source."""
    sources = [*language.pages.glob("*.md"), *language.pages.glob("gpu/*.md")]
    names = {source: source.relative_to(language.pages).as_posix() for source in sources}
    return names | {ROOT / source: name for source, name in language.outside.items()}


def stage_pages(language: Language, folder: Path) -> None:
    """Write every page with the links of the site, and copy the files that they link to."""
    pages, english = list_pages(language), list_pages(LANGUAGES[0])
    copies: dict[Path, str] = {}

    def rewrite(source: Path, link: re.Match) -> str:
        text, target, anchor = link[1], Path(os.path.normpath(source.parent / link[2])), link[3] or ""
        if target not in pages and target in english:  # without a translation; as HTML, which no build checks
            up = "../" * (1 if pages[source] == "README.md" else 2)
            address = english[target].removesuffix(".md").removesuffix("README")
            return f'<a href="{up}{address}{"/" if address else ""}{anchor}">{text}</a>'
        if target not in pages and target not in copies:
            copies[target] = Path("files", target.relative_to(ROOT)).as_posix()
            (folder / copies[target]).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(target, folder / copies[target])
        name = pages.get(target) or copies[target]
        return f"[{text}]({os.path.relpath(name, Path(pages[source]).parent)}{anchor})"

    for source, name in pages.items():
        text = LANGUAGE_SWITCH.sub("", source.read_text(encoding="utf-8"), count=1)
        text = IMAGE.sub(r'![\1](\2){ width="\3" }', text)
        text = LINK.sub(lambda link, source=source: rewrite(source, link), text)
        text = FENCE.sub(r'\1 title="\2"', text)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def read_navigation(page_map: str) -> list[dict]:
    """Return mkdocs' navigation for a page map: a heading for each group, a list entry for each page."""
    _, *groups = re.split(r"^## ", page_map, flags=re.MULTILINE)
    entries = [{group.splitlines()[0]: [{title: name} for title, name in ENTRY.findall(group)]} for group in groups]
    return ["README.md", "OVERVIEW.md", *(entry for entry in entries if any(entry.values()))]


def list_alternates(language: Language) -> list[dict[str, str]]:
    """Return the entries of the menu of languages, relative to the home page of one."""
    up = "../" if language.folder else "./"
    return [{"name": one.name, "link": f"{up}{one.folder}/".replace("//", "/"), "lang": one.code} for one in LANGUAGES]


def build_language(language: Language, target: Path) -> None:
    """Build the pages of a language."""
    with tempfile.TemporaryDirectory() as work:
        pages = Path(work, "pages")
        pages.mkdir()
        stage_pages(language, pages)
        python = {"paths": [str(ROOT / ".types")], "options": {"show_source": False}}
        settings = {
            "docs_dir": "pages",
            "site_dir": "site",
            "nav": read_navigation((pages / "README.md").read_text(encoding="utf-8")),
            "extra": {"alternate": list_alternates(language)},
            "plugins": [{"search": {}}, {"mkdocstrings": {"handlers": {"python": python}}}],
        }
        fixed = (DOCS / "site" / "mkdocs.yml").read_text(encoding="utf-8").replace("LANGUAGE", language.code)
        file = Path(work, "mkdocs.yml")
        file.write_text(fixed + yaml.safe_dump(settings, allow_unicode=True), encoding="utf-8")
        command = [sys.executable, "-m", "zensical", "build", "--strict", "--config-file", str(file)]
        subprocess.run(command, check=True)
        shutil.copytree(Path(work, "site"), target / language.folder, dirs_exist_ok=True)


def main() -> int:
    target = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "site").resolve()
    shutil.rmtree(target, ignore_errors=True)
    try:
        for language in LANGUAGES:
            build_language(language, target)
    except subprocess.CalledProcessError:
        return 1
    sys.stdout.write(f"open {target / 'index.html'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
