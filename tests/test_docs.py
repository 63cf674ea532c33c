"""The documentation site builds without a warning, and every link in it leads on."""

import inspect
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import keras_mha
from keras_mha import masks

pytestmark = pytest.mark.once

ROOT = Path(__file__).parent.parent
READMES = ["README.md", "README.zh-CN.md"]
CODE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
FETCHED_BY_CSS = re.compile(r"(?:@import|url\()\s*[\"']?(\w+:)?(//[^)\"']+)")


def public_names():
    """Names that a reader can look up, by what the package says of itself."""
    for name in keras_mha.__all__:
        value = getattr(keras_mha, name)
        if not inspect.ismodule(value):
            yield name
        elif hasattr(value, "__all__"):
            yield from (f"{name}.{part}" for part in value.__all__)
    kinds = (masks.Mask, masks.Tile)
    for name, value in vars(masks).items():
        if inspect.isclass(value) and issubclass(value, kinds):
            yield f"masks.{name}"


def pages_missing(site):
    """Public names without a page; a name that two modules export has one of them."""
    pages = {page.stem for page in (site / "api").glob("*.html")}
    names = set(public_names()) - {"__version__"}
    return {name for name in names if not {name, name.split(".")[-1]} & pages}


def notebooks_missing(site):
    made = {page.stem for page in (site / "notebooks").glob("*.html")}
    return {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} - made


def pictures_drawn(page):
    return page.read_text("utf-8").count('class="drawn"')


class Page(HTMLParser):
    """The anchors of a page, what its links point to, and what it loads by itself."""

    def __init__(self, path):
        super().__init__()
        self.anchors, self.links, self.loads = {""}, set(), set()
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.anchors |= {attributes.get("id"), attributes.get("name")}
        if tag == "a":
            self.links.add(attributes.get("href"))
        elif tag == "link":
            self.loads.add(attributes.get("href"))
        self.loads.add(attributes.get("src"))


def broken_links(site):
    """Pairs of a page and what it links to or loads that is not in the site."""
    pages = {path: Page(path) for path in site.rglob("*.html")}
    return {
        (str(path.relative_to(site)), target)
        for path, page in pages.items()
        for target in (page.links | page.loads) - {None}
        if not resolves(target, path, site, pages)
    }


def resolves(target, path, site, pages):
    parts = urlsplit(target)
    if parts.scheme:
        return True  # not of this site
    base = site if parts.path.startswith("/") else path.parent
    file = (base / unquote(parts.path).lstrip("/")).resolve() if parts.path else path
    file = file / "index.html" if file.is_dir() else file
    if file in pages:
        return unquote(parts.fragment) in pages[file].anchors
    return file.exists()


def loaded_from_the_network(site):
    """Pairs of a file and what it has a browser fetch from elsewhere."""
    found = {
        (str(path.relative_to(site)), target)
        for path in site.rglob("*.html")
        for target in Page(path).loads - {None}
        if urlsplit(target).netloc
    }
    for path in site.rglob("*.css"):
        urls = FETCHED_BY_CSS.findall(path.read_text("utf-8"))
        found |= {(str(path.relative_to(site)), "".join(url)) for url in urls}
    return found


@pytest.fixture
def site(tmp_path):
    """The site, built here or, as the checks of a change do, just before."""
    if built := os.environ.get("KERAS_MHA_SITE"):
        return ROOT / built
    pytest.importorskip("mkdocs")
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", f"--site-dir={tmp_path}"],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return tmp_path


def test_the_site_is_whole_and_loads_nothing_from_elsewhere(site):
    """One test, since the build takes a while: it runs the examples of the pages."""
    assert len(list(site.rglob("*.html"))) > 30
    assert not pages_missing(site)
    assert not notebooks_missing(site)
    assert pictures_drawn(site / "masks.html") >= 7
    assert not broken_links(site)
    assert not loaded_from_the_network(site)


@pytest.mark.parametrize(
    "link",
    ["b.html", "b.html#there", "#here", "picture.png", "folder/", "https://keras.io"],
)
def test_a_link_that_leads_somewhere_is_not_reported(small_site, link):
    (small_site / "a.html").write_text(f'<h1 id="here"></h1><a href="{link}"></a>')
    assert not broken_links(small_site)


@pytest.mark.parametrize("link", ["c.html", "b.html#gone", "#gone", "folder/c.png"])
def test_a_link_that_leads_nowhere_is_reported(small_site, link):
    (small_site / "a.html").write_text(f'<h1 id="here"></h1><a href="{link}"></a>')
    assert broken_links(small_site) == {("a.html", link)}


@pytest.mark.parametrize("url", ["https://cdn.net/x.js", "//cdn.net/x.js"])
def test_what_is_loaded_from_elsewhere_is_reported(small_site, url):
    (small_site / "a.html").write_text(f'<script src="{url}"></script>')
    (small_site / "a.css").write_text(
        f"@import '{url}'; b {{ background: url({url}) }}"
    )
    assert loaded_from_the_network(small_site) == {("a.html", url), ("a.css", url)}


@pytest.fixture
def small_site(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "index.html").write_text("")
    (tmp_path / "b.html").write_text('<h1 id="there"></h1>')
    (tmp_path / "picture.png").write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize("readme", READMES)
def test_what_a_readme_links_to_is_there(readme):
    text = CODE.sub("", (ROOT / readme).read_text("utf-8"))
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert any(link.startswith("#") for link in links)
    for link in links:
        if urlsplit(link).scheme:
            continue
        page, _, place = link.partition("#")
        assert (ROOT / page).is_file() or not page, link
        if place:
            assert place in anchors_of(page or readme), link


def anchors_of(page):
    """What GitHub makes of a page's headings."""
    text = CODE.sub("", (ROOT / page).read_text("utf-8"))
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", text, re.M)
    }


def test_the_chinese_readme_has_the_same_code():
    english, chinese = (CODE.findall((ROOT / n).read_text("utf-8")) for n in READMES)
    assert chinese == english
