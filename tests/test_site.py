"""The site of the documents: it builds without a warning, its links lead somewhere, and a browser shows it."""

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urljoin, urlsplit

import pytest
from browser import NO_BROWSER, open_browser, open_page
from programs import ROOT

DOCS = ROOT / "docs"
FIGURES = sorted((DOCS / "figures").glob("*.dot"))
PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def load_tool(name: str) -> ModuleType:
    """Import a program of docs/site."""
    spec = importlib.util.spec_from_file_location(f"site_{name}", DOCS / "site" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built by the command of docs/CONTRIBUTING.md."""
    target = tmp_path_factory.mktemp("built") / "site"
    command = [sys.executable, str(DOCS / "site" / "build.py"), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "Warning" not in done.stdout + done.stderr, done.stdout + done.stderr
    return target


class _Page(HTMLParser):
    """Addresses that a page refers to, and the names of its places."""

    def __init__(self, text: str):
        super().__init__()
        self.addresses: list[str] = []
        self.places: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.addresses.append(value)
            elif name in ("id", "name") and value:
                self.places.add(value)


def test_every_link_of_the_site_leads_somewhere(site: Path) -> None:
    pages = {path.relative_to(site).as_posix(): _Page(path.read_text()) for path in site.rglob("*.html")}
    assert {"index.html", "zh/index.html", "CACHE/index.html", "zh/CACHE/index.html"} <= set(pages)
    lost = []
    for name, page in pages.items():
        for address in page.addresses if name.rpartition("/")[2] != "404.html" else ():
            target = urlsplit(urljoin(f"http://site/{name}", address))
            if target.netloc != "site":
                continue
            path = unquote(target.path).lstrip("/")
            path += "index.html" if path == "" or path.endswith("/") else ""
            if not (site / path).is_file():
                lost.append((name, address))
            elif target.fragment and path in pages and unquote(target.fragment) not in pages[path].places:
                lost.append((name, address))
    assert lost == []


def test_the_interface_is_documented(site: Path) -> None:
    page = (site / "API" / "index.html").read_text()
    for name in (
        "data.formats.latents.read_latents",
        "data.order.plan.Plan.batch",
        "train.objective.losses.compute_huber",
    ):
        assert f'id="sdxl_trainer.{name}"' in page


@pytest.mark.skipif(bool(NO_BROWSER), reason=NO_BROWSER)
@pytest.mark.parametrize("all_pages", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_browser_shows_the_site(site: Path, all_pages: bool) -> None:
    with serve(site) as address, open_browser() as browser:
        for name in list_addresses(site) if all_pages else ["", "zh/", "HOW_ORDER/"]:
            page, visit = open_page(browser, address + name)
            page.wait_for_load_state("networkidle")
            assert visit.complaints == [] and not visit.overflow, (name, visit.complaints)
            assert [request for request in visit.requests if not request.startswith(address)] == []
            page.close()


@pytest.mark.skipif(bool(NO_BROWSER), reason=NO_BROWSER)
@pytest.mark.parametrize(
    ("folder", "words", "found"), [("", "gradient_release", "LOW_MEMORY"), ("zh/", "检查点", "zh/")]
)
def test_the_search_finds_pages_in_both_languages(site: Path, folder: str, words: str, found: str) -> None:
    with serve(site) as address, open_browser() as browser:
        page, _ = open_page(browser, address + folder)
        page.wait_for_load_state("networkidle")
        page.keyboard.press("/")
        page.wait_for_selector("input:focus")
        page.keyboard.type(words)
        page.wait_for_selector(f"a[href*='{found}'] mark, a[href*='{found}']:has(mark)")


def list_addresses(site: Path) -> list[str]:
    """Return the addresses of all pages."""
    pages = [path.parent.relative_to(site).as_posix() for path in sorted(site.rglob("index.html"))]
    return ["" if page == "." else f"{page}/" for page in pages]


class serve:  # noqa: N801
    """A web server for a folder."""

    def __init__(self, folder: Path):
        self._command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "-d", str(folder)]

    def __enter__(self) -> str:
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self._process.stdout
        port = re.search(r"port (\d+)", self._process.stdout.readline())
        assert port
        return f"http://127.0.0.1:{port[1]}/"

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout
        self._process.stdout.close()


@pytest.mark.parametrize(("language", "folder"), [("en", DOCS), ("zh", DOCS / "zh")])
def test_the_page_of_messages_is_current(language: str, folder: Path) -> None:
    command = f"python docs/site/messages.py --language {language} > {folder.relative_to(ROOT)}/MESSAGES.md"
    page = load_tool("messages").build_page(language)
    assert (folder / "MESSAGES.md").read_text(encoding="utf-8") == page, command
    assert page.count("\n| `") > 200
    if language == "en":
        assert "| `cache.dir` | holds no latent cache |" in page and "| `model.latents_std` | must be above 0 |" in page


@pytest.mark.parametrize("page_map", [DOCS / "README.md", DOCS / "zh" / "README.md"], ids=["en", "zh"])
def test_the_page_map_lists_every_page(page_map: Path) -> None:
    named = {
        (page_map.parent / name).resolve() for name in re.findall(r"^- .*?\]\(([^)]+)\)", page_map.read_text(), re.M)
    }
    translated = {path.name for path in (DOCS / "zh").glob("*.md")} if page_map.parent != DOCS else set()
    pages = {DOCS / "zh" / path.name if path.name in translated else path for path in DOCS.glob("*.md")}
    assert named - {DOCS / "gpu" / "README.md"} == pages - {page_map}


@pytest.mark.parametrize("figure", FIGURES, ids=lambda path: path.stem)
def test_figures_are_those_of_their_sources(figure: Path) -> None:
    """By their texts, because each release of graphviz draws a little differently."""
    drawn = re.findall(r"<text [^>]*>([^<]*)</text>", (DOCS / "images" / f"how-{figure.stem}.svg").read_text())
    labels = re.findall(r'label="([^"]*)"', figure.read_text())
    wanted = [line.strip() for label in labels for line in label.split("\\n")]
    assert sorted(text.replace("&#39;", "'").replace("&#45;", "-").strip() for text in drawn) == sorted(wanted)


def test_the_examples_of_the_interface_run(tmp_path: Path) -> None:
    examples = PYTHON.findall((DOCS / "API.md").read_text())
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(examples)], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    shape, *batches = done.stdout.splitlines()
    assert ast.literal_eval(shape) == (4, 16, 12)
    # 6 samples of bucket 0 and 4 of bucket 1 in batches of 2.
    assert len(batches) == 5 and sorted(line[0] for line in batches) == ["0", "0", "0", "1", "1"]


def count_words(text: str) -> int:
    return len(re.findall(r"[\w'’.%-]+", text))


def list_sentences(prose: str) -> Iterator[str]:
    """Yield the sentences of a page without headings, tables and code. A list entry ends one."""
    for sentence in re.split(r"(?<=[.!?:;])\s+|\n\s*\n|\n\s*(?:- |\d+\. )", prose):
        if len(sentence.split()) > 2:
            yield sentence


# Generated pages, whose texts are those of the code.
GENERATED = {"CONFIG.md", "FROM_KOHYA.md", "MESSAGES.md"}
FORBIDDEN = re.compile(
    r"\b(is|are) told\b|\btells? (so|you so)\b|\btakes? up\b|\bsettles?\b|\bgives? up\b|\bexcuses?\b|\bcomplains?\b|"
    r"\bgo(es)? on\b|\bcomes? to its end\b|\bto be had\b|\bknows? of\b|\bof no one\b",
    re.IGNORECASE,
)


def measure(page: Path) -> list[str]:
    """Return what of the rules for documents a page breaks."""
    text = re.sub(r"^```.*?^```|<!--.*?-->", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    prose = "\n".join(line for line in text.splitlines() if not line.startswith(("|", "#", "!", ":::")))
    lengths = [len(sentence.split()) for sentence in list_sentences(prose)]
    addressed = 1000 * len(re.findall(r"\byour?s?\b", prose, re.IGNORECASE)) / max(1, count_words(prose))
    broken = []
    if count_words(text) > 2500:
        broken.append(f"{count_words(text):,} words; at most 2,500")
    if sum(lengths) > 20 * len(lengths):
        broken.append(f"{sum(lengths) / len(lengths):.1f} words a sentence; at most 20")
    if addressed < 3:
        broken.append(f'"you" {addressed:.1f} times in 1,000 words; at least 3')
    broken += [f"{match[0]!r}" for match in FORBIDDEN.finditer(re.sub(r"`[^`]*`", "", text))]
    return broken


@pytest.mark.parametrize("page", sorted({*DOCS.glob("*.md"), ROOT / "README.md"}), ids=lambda page: page.name)
def test_pages_keep_the_rules_for_documents(page: Path) -> None:
    if page.name in GENERATED:
        pytest.skip("generated from the code")
    assert measure(page) == []
