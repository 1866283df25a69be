r"""Formulas (``$...$``, ``$$...$$``) as MathML, which browsers draw by themselves; short code is kept whole."""

from __future__ import annotations

import re
from html import unescape

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

# As pymdownx.arithmatex leaves them in its generic mode.
INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)
SHORT = re.compile(r"(?<!<pre>)<code>(?=[^<]{1,28}</code>)")  # browsers would break an option after its hyphens


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Goes over a page once it is HTML."""
    html = BLOCK.sub(lambda found: f'<div class="formula">{_mathml(found[1], "block")}</div>', html)
    html = INLINE.sub(lambda found: _mathml(found[1], "inline"), html)
    return SHORT.sub('<code class="whole">', html)


def _mathml(latex: str, display: str) -> str:
    return convert(unescape(latex).strip(), display=display)
