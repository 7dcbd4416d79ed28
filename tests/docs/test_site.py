"""The pages of the documentation: as GitHub shows them, and as the site that `make docs` builds."""

import json
import re
import subprocess
import sys
import threading
from collections import Counter
from functools import cache, partial
from html import unescape
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from markdown_it import MarkdownIt

import flashu
import flashu.models
from tests.command import CHROMIUM

ROOT = Path(__file__).parents[2]
ELSEWHERE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "cluster/deploy/README.md", "flashu/embedded/README.md")
PAGES = sorted(
    {*(ROOT / "docs").rglob("*.md"), *(ROOT / name for name in ELSEWHERE)} - {*(ROOT / "docs/_build").rglob("*")}
)
LOADS = {
    "script": "src",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "object": "data",
    "embed": "src",
    "image": "href",
}
PHONE = 390


class Page(HTMLParser):
    """The ids of a page, what it links to, and what it loads."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.loaded = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.ids |= {values[name] for name in ("id", "name") if values.get(name)}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag == "link" and values.get("rel") not in ("index", "search", "next", "prev"):
            self.loaded.append(values["href"])
        elif values.get(LOADS.get(tag)):
            self.loaded.append(values[LOADS[tag]])
        self.loaded += re.findall(r"url\((.*?)\)", values.get("style") or "")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The site's folder, and what Sphinx said."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet", "-b", "html"]
    run = subprocess.run(
        [*command, "-d", folder / "doctrees", ROOT / "docs", folder / "html"],
        capture_output=True,
        text=True,
        cwd=folder,
    )
    return folder / "html", run.stdout + run.stderr


@pytest.fixture(scope="module")
def pages(built):
    site, _ = built
    found = {file: Page(file.read_text(encoding="utf-8")) for file in sorted(site.rglob("*.html"))}
    assert len(found) > 10
    return found


def test_the_site_is_built_without_a_warning(built):
    site, said = built
    assert said == ""
    assert (site / "index.html").exists()


def test_every_link_inside_the_site_leads_somewhere(pages):
    broken = []
    for file, page in pages.items():
        for link in [*page.links, *page.loaded]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            anchor = unquote(parts.fragment)
            if not target.is_file() or (anchor and target in pages and anchor not in pages[target].ids):
                broken.append((file.name, link))
    assert broken == []


def test_nothing_is_loaded_from_another_host(built, pages):
    site, _ = built
    loaded = [(file.name, link) for file, page in pages.items() for link in page.loaded]
    for file in site.rglob("*.css"):
        text = file.read_text(encoding="utf-8")
        loaded += [
            (file.name, url.strip("\"' "))
            for url in re.findall(r"url\((.*?)\)|@import\s+[\"'](.*?)[\"']", text)
            for url in url
        ]
    for file in site.rglob("*.svg"):
        loaded += [(file.name, url) for url in re.findall(r"href=\"([^\"]*)\"", file.read_text(encoding="utf-8"))]
    assert len(loaded) > 50
    assert [(name, link) for name, link in loaded if urlsplit(link).netloc] == []


def test_every_name_of_the_library_is_told(built):
    site, _ = built
    text = (site / "reference" / "api.html").read_text(encoding="utf-8")
    names = [f"flashu.{name}" for name in flashu.__all__] + [f"flashu.models.{name}" for name in flashu.models.__all__]
    for name in names:
        _, found, entry = text.partition(f'id="{name}"')
        assert found, name
        words = re.sub(r"<[^>]*>", "", entry.partition("<dd>")[2].partition("</p>")[0])
        assert len(unescape(words).split()) > 3, name


def test_files_of_the_repository_can_be_read_in_the_site(built, pages):
    """A page from elsewhere is a page of the site; any other file is there to be loaded down."""
    site, _ = built
    links = pages[site / "reference" / "settings.html"].links
    (yaml,) = {link for link in links if link.endswith("/default.yaml")}
    assert (site / "reference" / yaml).read_bytes() == (ROOT / "jobs/settings/configs/default.yaml").read_bytes()
    assert "5.7 million" in (site / "built-in-model.html").read_text(encoding="utf-8")


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium")
def test_no_page_scrolls_sideways_on_a_phone(built, pages, tmp_path):
    """All pages in frames of one, each as wide as a phone, which tell by how much they are wider inside.

    On so narrow a page, Furo has its content scroll by itself.
    """
    site, _ = built
    frames = "".join(
        f'<iframe width="{PHONE}" height="800" style="border: 0" src="/{file.relative_to(site).as_posix()}"></iframe>'
        for file in pages
    )
    script = """<script>onload = () => { document.title = JSON.stringify([...document.querySelectorAll("iframe")].map(
        frame => Math.max(...[...frame.contentDocument.querySelectorAll("html, .content")].map(
            each => each.scrollWidth - each.clientWidth)))) }</script>"""
    (site / "phone.html").write_text(f"<!doctype html><title></title>{frames}{script}", encoding="utf-8")
    handler = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    switches = "headless no-sandbox disable-gpu hide-scrollbars no-first-run disable-background-networking disable-sync"
    command = [CHROMIUM, *(f"--{switch}" for switch in switches.split()), f"--user-data-dir={tmp_path}", "--dump-dom"]
    try:
        page = f"http://127.0.0.1:{server.server_port}/phone.html"
        shown = subprocess.run([*command, page], capture_output=True, text=True, timeout=120, check=True).stdout
    finally:
        server.shutdown()
        server.server_close()
        (site / "phone.html").unlink()
    wider = json.loads(re.search("<title>(.*?)</title>", shown)[1])
    assert {file.name: by for file, by in zip(pages, wider, strict=True) if by} == {}


# ------------------------------------------------------------------------------------------------- on GitHub


@cache
def tracked():
    """What is in the repository; of a copy without one, all that is there."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    files = {ROOT / name for name in listed.stdout.split("\0") if name} if not listed.returncode else {*ROOT.rglob("*")}
    return files | {folder for file in files for folder in file.parents}


@cache
def markdown(file):
    """A page's links, pictures among them, and the anchors of its headings."""
    links, anchors, heads = [], set(), Counter()
    tokens = MarkdownIt("commonmark").enable("table").parse(file.read_text(encoding="utf-8"))
    for token, before in zip(tokens, [None, *tokens], strict=False):
        for child in token.children or ():
            links += [child.attrs[name] for name in ("href", "src") if name in child.attrs]
        if before and before.type == "heading_open":
            slug = anchor("".join(child.content for child in token.children if child.type in ("text", "code_inline")))
            anchors.add(f"{slug}-{heads[slug]}" if heads[slug] else slug)
            heads[slug] += 1
    return links, anchors


def anchor(heading):
    """As GitHub makes it of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_anchors_are_as_github_makes_them():
    assert anchor("What `flashu` does, step by step") == "what-flashu-does-step-by-step"
    assert anchor("FlashU's presets – T_cache & more") == "flashus-presets--t_cache--more"


@pytest.mark.parametrize("file", PAGES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_every_link_of_a_page_leads_somewhere_on_github(file):
    links, _ = markdown(file)
    broken = []
    for link in links:
        parts = urlsplit(link)
        if parts.scheme:
            fine = parts.scheme == "https" and parts.netloc and not re.search(r"\s", link)
        else:
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            fine = target in tracked() and not parts.netloc
            if fine and parts.fragment and target.suffix == ".md":
                fine = unquote(parts.fragment) in markdown(target)[1]
        if not fine:
            broken.append(link)
    assert broken == []
