"""What a page says: to a browser, and before it is drawn."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

from lesa_ray.report.page.compared import with_untrained
from lesa_ray.report.page.figure import Figure
from lesa_ray.report.page.ranking import verdict
from lesa_ray.report.page.sections import make_sections
from lesa_ray.report.page.sources import gather

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """What a browser would make of a page: its text, ids and links; wrong nesting is an error."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.html = path.read_text()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.text = ""
        self.feed(self.html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.tags.append(tag)
        if named.get("id"):
            self.ids.append(str(named["id"]))
        self.fetched += [str(named[name]) for name in ("src", "xlink:href", "href", "srcset") if named.get(name)]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "title"):
            self.text += data

    def words(self) -> str:
        return " ".join(self.text.split())


def sections_of(*runs: str) -> tuple[str, list[str], dict[str, Figure]]:
    """All sentences of a page that is not drawn, what it says is missing, and its figures by name."""
    material = gather(runs)
    sections, missing = make_sections(material, "lesa-ray report")
    figures = {figure.name: figure for section in sections for figure in section.figures}
    verdicts = [sentence for _, one in material.comparisons for sentence in verdict(with_untrained(one))]
    tables = [" ".join(row) for section in sections for _, table in section.tables for row in table.rows]
    texts = [text for section in sections for text in section.texts]
    said = [*verdicts, *texts, *(figure.see for figure in figures.values()), *tables]
    return " ".join(said), missing, figures
