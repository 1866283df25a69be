"""The documentation site: it builds strictly, its links lead somewhere, and nothing is loaded from another host."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import typer
import yaml
from support.paths import ROOT

import ddf_convert
from ddf_convert import cli

pytestmark = pytest.mark.slow  # the site is built once

LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "object": "data"}
NOT_LOADED = {"canonical", "next", "prev", "alternate"}  # what <link> can be without the browser fetching it
IN_STYLES = re.compile(r"url\(\s*['\"]?(?!data:)([^'\")]+)|@import\s+['\"]([^'\"]+)")


class Page(HTMLParser):
    """What a page links to, what it loads, and what can be linked to in it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.ids: set[str] = set()
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)
        self.loads += [found for pair in IN_STYLES.findall(self.text) for found in pair if found]

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link" and not NOT_LOADED & set(given.get("rel", "").split()):
            self.loads.append(given.get("href", ""))
        elif given.get(LOADED.get(tag, "")):
            self.loads.append(given[LOADED[tag]])
        if "srcset" in given:
            self.loads += [part.split()[0] for part in given["srcset"].split(",")]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    # Not --quiet: it hides warnings from --strict too.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr
    assert "WARNING -" not in built.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in site.glob("**/*.html")}


def internal(link: str) -> bool:
    parts = urlsplit(link)
    return not parts.scheme and not parts.netloc


def test_links_lead_somewhere(site, pages):
    broken = []
    for path, page in pages.items():
        if path.name == "404.html":  # shown at any address: its links begin at the root
            continue
        for link in {*page.links, *page.loads}:
            if not internal(link):
                continue
            parts = urlsplit(link)
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir():
                target /= "index.html"
            anchor = unquote(parts.fragment)
            if not target.is_relative_to(site) or not target.is_file():
                broken.append(f"{path.relative_to(site)}: {link}")
            elif anchor and not anchor.startswith("__") and target in pages and anchor not in pages[target].ids:
                broken.append(f"{path.relative_to(site)}: {link}: no such anchor")
    assert len(pages) > 30
    assert broken == []


def test_nothing_is_loaded_from_another_host(site, pages):
    assert [(path.name, load) for path, page in pages.items() for load in page.loads if not internal(load)] == []
    styles = list(site.glob("**/*.css"))
    assert len(styles) >= 3
    for file in styles:
        found = ["".join(pair) for pair in IN_STYLES.findall(file.read_text(encoding="utf-8"))]
        assert [address for address in found if not internal(address)] == [], file.name
    # Material would ask for the source's numbers of stars and releases, had the site a repository.
    assert "repo_url" not in yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def test_every_page_is_in_the_navigation(site):
    navigation = set(re.findall(r": ([\w/-]+\.md)$|- ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    named = {first or second for first, second in navigation}
    docs = ROOT / "docs"
    assert {page.relative_to(docs).as_posix() for page in docs.glob("**/*.md")} <= named
    assert all((site / name).with_suffix(".html").is_file() for name in named)


def test_every_public_name_is_in_the_reference(pages):
    reference = set().union(*(page.ids for path, page in pages.items() if path.parent.name == "api"))
    assert {f"ddf_convert.{name}" for name in ddf_convert.__all__} <= reference
    for module in (ddf_convert.layers, ddf_convert.recipes):
        assert {f"{module.__name__}.{name}" for name in module.__all__} <= reference


def test_every_command_and_option_is_in_the_reference(site, pages):
    page = pages[site / "commands.html"]
    pending = [("ddf-convert", typer.main.get_command(cli.app))]
    for path, command in pending:
        assert path.replace(" ", "-") in page.ids
        for parameter in command.params:
            for name in parameter.opts if parameter.param_type_name == "option" else ():
                assert re.search(rf"{re.escape(name)}\b", page.text), f"{path}: {name}"
        children = getattr(command, "commands", {}).items()
        pending += [(f"{path} {name}", child) for name, child in children if not child.hidden]
    assert len(pending) > 10


def test_formulas_are_drawn_by_the_browser(site, pages):
    page = pages[site / "operator.html"].text
    assert page.count("<math") >= 20
    assert "arithmatex" not in page
    assert "\\sum" not in page
