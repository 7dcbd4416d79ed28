"""Sphinx's settings: the pages of this folder as a site, with the library's reference from its docstrings."""

from __future__ import annotations

import inspect
import os
import re
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]

from write_reference import written_beside  # noqa: E402

import flashu  # noqa: E402

project, html_title = "FlashU", "FlashU"
version = release = flashu.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_show_copyright = html_show_sourcelink = html_copy_source = html_use_index = html_domain_indices = False
smartquotes = False  # which would make a dash of an option's two
default_role = "code"  # as a docstring's `name` is meant
highlight_language = "none"
myst_heading_anchors = 4

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_inherit_docstrings = False
maximum_signature_line_length = 80
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(?!flashu|manifests|cluster|jobs).*"),  # what others document, elsewhere
    ("py:.*", r"flashu\.(models\.(showo2|wan_vae|geometry)\.\w+|generation\.Own|(patch|acceleration\.applied)\.Model)"),
]

# Pages that lie where GitHub looks for them, or beside what they are about. A page here holds their place.
ELSEWHERE = {
    "contributing": "CONTRIBUTING.md",
    "changelog": "CHANGELOG.md",
    "built-in-model": "flashu/embedded/README.md",
    "deploy": "cluster/deploy/README.md",
}
LINK = re.compile(r"(?<!!)\[((?:[^][]|\[[^][]*\])*)\]\(([^)\s:#]+)(#[^)\s]*)?\)")


def fill_in(app: Any, page: str, source: list[str]) -> None:
    """A page's text, from elsewhere if it is there, with links that work in the site."""
    file = Path(app.env.doc2path(page))
    if page in ELSEWHERE:
        file = DOCS.parent / ELSEWHERE[page]
        source[0] = file.read_text(encoding="utf-8") if file.exists() else source[0]
        app.env.note_dependency(str(file))
    pages = {DOCS.parent / path: DOCS / f"{name}.md" for name, path in ELSEWHERE.items()}
    pages[DOCS.parent / "README.md"] = DOCS / "index.md"

    def link(found: re.Match[str]) -> str:
        text, path, anchor = found.groups(default="")
        target = Path(os.path.normpath(file.parent / path))
        if not target.exists():  # or it is no link, but code
            return found[0]
        if target.is_dir():
            return text
        if DOCS not in target.parents and target not in pages:
            return f"[{text}](path:{os.path.relpath(target, DOCS / Path(page).parent)})"  # to be downloaded
        return f"[{text}](/{pages.get(target, target).relative_to(DOCS).as_posix()}{anchor})"

    source[0] = LINK.sub(link, source[0])


def lay_out(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """A docstring's lines `parameter: words` as a list, and after it the attributes that a comment is beside."""
    laid_out, inside = [], False
    for line in lines:
        if entry := re.match(r"(\w+(?:, \w+)*): (.*)", line):
            laid_out += [*([] if inside else [""]), f"- ``{entry[1]}``: {entry[2]}"]
            inside = True
        elif inside and line.startswith("    "):
            laid_out.append(line[2:])
        else:
            laid_out += ["", line] if inside or line.startswith("Raises ") else [line]
            inside = False
    if inspect.isclass(thing):
        own = inspect.get_annotations(thing)
        beside = written_beside(inspect.getsource(thing), "*") if own else {}
        said = {key.removeprefix("*."): words for key, words in beside.items()}
        laid_out += ["", *(f"- ``{key}``: {words}" for key, words in said.items() if key in own and key[0] != "_"), ""]
    lines[:] = laid_out


def shorten(app: Any, what: str, name: str, thing: Any, options: Any, signature: str, returns: str) -> tuple[str, str]:
    """Defaults that are no literals, and long ones, as three dots."""
    return re.sub(r"<(?:[^<>]|<\w+>)*>|\('[^()]*'\)", "...", signature or "") or signature, returns


def setup(app: Any) -> None:
    app.connect("source-read", fill_in)
    app.connect("autodoc-process-docstring", lay_out)
    app.connect("autodoc-process-signature", shorten)
