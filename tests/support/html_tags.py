"""Reads an HTML page, and checks that its tags nest."""

import re
from html.parser import HTMLParser


class Tags(HTMLParser):
    """Checks that tags nest, and keeps the text and the attributes."""

    VOID = ("meta", "br", "wbr")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read_page_that_stands_alone(html: str) -> Tags:
    """Reads a page, and checks that it needs no other file and runs nothing."""
    page = Tags(html)
    assert not {"script", "link", "img", "iframe", "object"} & page.tags
    assert not {"src", "href", "onclick", "onload"} & {name for name, _ in page.attributes}
    assert not re.search(r"http|url\(|@import", html)
    return page
