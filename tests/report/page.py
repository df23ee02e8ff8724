"""A report as a browser would read it."""

import json
from functools import cached_property
from html.parser import HTMLParser
from typing import Any

VOID = ("meta", "img")


class Page(HTMLParser):
    """Tags with attributes, text by tag, cells of tables, figures by title; tags must nest."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: dict[str, str] = {}
        self.rows: list[list[str]] = []
        self.titles: list[str] = []
        self.data = ""  # of the script element with JSON
        self.own = ""  # the page without its scripts
        self.feed(text)
        self.close()
        assert self.open == [], self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.own += self.get_starttag_text() or ""
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "figcaption":
            self.titles.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        tag = self.open[-1] if self.open else ""
        if tag == "script":
            if self.tags[-1][1].get("type") == "application/json":
                self.data += data
            return
        self.own += data
        self.text[tag] = self.text.get(tag, "") + data
        if tag in ("td", "th"):
            self.rows[-1][-1] += data
        if "figcaption" in self.open and tag != "button":
            self.titles[-1] += data

    @cached_property
    def figures(self) -> dict[str, dict[str, Any]]:
        """The page's figures by their titles, in the page's order."""
        if not self.data:
            return {}
        made = json.loads(self.data)["figures"]
        places = [attributes["id"] for _, attributes in self.tags if attributes.get("class") == "plot"]
        assert sorted(places) == sorted(made)
        return {title: made[place] for title, place in zip(self.titles, places, strict=True)}

    def named(self, title: str) -> set[str]:
        """The names of a figure's lines."""
        return {trace["name"] for trace in self.figures[title]["traces"]}
