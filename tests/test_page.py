"""The report as one HTML page: the same as the Markdown, whole by itself, harmless, and sortable in a real browser."""

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlparse

import pytest

from browser import BROWSER, opened
from flatllmbench import report
from flatllmbench.page import html_page
from flatllmbench.tables import escaped, markdown_table
from markdown_tables import tables
from sample_records import COMPRESSION, EVALUATION, LLAMA_2_7B, SCORING, TIMING, saved

VOID = {"meta", "img", "br", "hr"}
EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)> | `a` *b* _c_ [x](javascript:alert(3)) &lt; $x$ \\"


class Document(HTMLParser):
    """Checks that every element is closed in its place; collects elements, text and the cells of tables."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "script" not in self.open and "style" not in self.open:
            self.text += data
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """The folder of a report of every kind of record."""
    folder = tmp_path_factory.mktemp("report")
    for name, record in (("a", COMPRESSION), ("b", COMPRESSION | LLAMA_2_7B), ("c", SCORING), ("d", TIMING)):
        saved(folder / "records", name, record)
    saved(folder / "records", "e", EVALUATION)
    assert report.main([str(folder / "records"), "--out", str(folder / "out")]) == 0
    return folder / "out"


@pytest.fixture(scope="module")
def page(made) -> Document:
    return Document((made / "index.html").read_text())


def test_its_tables_have_the_cells_of_the_markdown(made, page):
    assert len(page.tables) > 10
    assert page.tables == tables((made / "README.md").read_text())


def test_nothing_in_it_is_loaded_from_elsewhere(page):
    loaded = [
        attrs[name] for _, attrs in page.elements for name in ("src", "srcset", "data", "poster") if name in attrs
    ]
    assert len(loaded) == 4  # the pictures
    assert all(source.startswith("data:image/png;base64,") for source in loaded)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"link", "iframe", "object", "embed", "base", "form"}
    assert [attrs for tag, attrs in page.elements if tag == "script"] == [{}]  # inline
    for target in [attrs["href"] for _, attrs in page.elements if "href" in attrs]:
        assert urlparse(target).scheme in ("", "https")


def test_every_part_is_linked_from_the_top_and_every_picture_is_described(page):
    anchors = {f"#{attrs['id']}" for tag, attrs in page.elements if tag == "h2"}
    assert anchors == {attrs["href"] for tag, attrs in page.elements if tag == "a" and attrs["href"].startswith("#")}
    assert len(anchors) == 7
    assert all(attrs["alt"] for tag, attrs in page.elements if tag == "img")


def test_what_a_record_says_is_shown_and_not_obeyed(tmp_path):
    name = f"models/{EVIL.replace('/', '')}"
    record = COMPRESSION | {"base_model": name, "dataset": EVIL, "command": f"{EVIL}\n```\n{EVIL}"}
    record |= {"versions": {EVIL: EVIL}, "hardware": dict.fromkeys(("device", "machine", "system"), EVIL)}
    model = EVALUATION["model"] | {"model": EVIL}
    tasks = {EVIL: EVALUATION["zero_shot"]["tasks"]["piqa"] | {"metric": EVIL}}
    saved(tmp_path, "a", record)
    saved(tmp_path, "b", EVALUATION | {"model": model, "zero_shot": {"tasks": tasks}})
    saved(tmp_path, "c", SCORING | {"request": SCORING["request"] | {"model": EVIL, "dataset": EVIL}})
    timed = [{**timed, "model": EVIL, "base_model": None} for timed in TIMING["models"]]
    saved(tmp_path, "d", TIMING | {"models": timed, "protocol": EVIL, "dtype": EVIL, "attention": EVIL})
    assert report.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 0

    shown = Document((tmp_path / "out" / "index.html").read_text())
    assert [attrs for tag, attrs in shown.elements if tag == "script"] == [{}]  # the page's own
    assert all(attrs["src"].startswith("data:") for tag, attrs in shown.elements if tag == "img")
    assert not [attrs for _, attrs in shown.elements if any(attribute.startswith("on") for attribute in attrs)]
    assert not [attrs for _, attrs in shown.elements if (attrs.get("href") or "").startswith("javascript:")]
    assert shown.text.count(EVIL) > 15
    assert shown.text.count(name) == 1


def test_a_title_of_a_part_is_escaped_in_the_contents():
    shown = Document(html_page(f"## {escaped(EVIL)}\n", {}))
    assert [attrs for tag, attrs in shown.elements if tag == "a"] == [{"href": "#part-1"}]
    assert shown.text.count(EVIL) == 2


def test_a_picture_that_is_not_there_is_an_error():
    with pytest.raises(KeyError, match=r"none\.png"):
        html_page("![alt](none.png)\n", {})


needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chrome or Chromium on PATH")
CLICK = "document.querySelectorAll('th button')[{}].click()"
# Columns as one click sorts them, and as a second does.
SORTED = {
    "signs and thousands": (
        ["-0.26", "+0.04", "9", "10", "1,000.5", "not run", "–"],
        ["1,000.5", "10", "9", "+0.04", "-0.26", "not run", "–"],
    ),
    "percent": (["2 %", "10 %", "100 %"], ["100 %", "10 %", "2 %"]),
    "quartiles": (["9.5 (1.0–99.0)", "12.0 (11.0–13.0)"], ["12.0 (11.0–13.0)", "9.5 (1.0–99.0)"]),
    "errors": (["8.00 ± 9.00", "45.67", "78.12 ± 0.96"], ["78.12 ± 0.96", "45.67", "8.00 ± 9.00"]),
    "dense": (["0 (dense)", "10", "20"], ["20", "10", "0 (dense)"]),
    "words": (["Llama-2 7B", "Llama-2 13B", "Llama-3 8B"], ["Llama-3 8B", "Llama-2 13B", "Llama-2 7B"]),
    "both": (["3", "7B of them", "words", "not run"], ["3", "words", "7B of them", "not run"]),
}


@needs_browser
def test_a_browser_shows_the_page_without_complaint_and_without_asking_for_anything(made, tmp_path):
    with opened(made / "index.html", tmp_path) as shown:
        assert shown.run("document.title") == "FLAT-LLM results"
        assert shown.run("[...document.images].every(image => image.naturalWidth > 100)")
        for button in range(shown.run("document.querySelectorAll('th button').length")):
            shown.run(CLICK.format(button))
        assert shown.errors == []
        assert {urlparse(request).scheme for request in shown.requests} == {"file", "data"}
        assert [request for request in shown.requests if request.startswith("file:")] == [
            (made / "index.html").as_uri()
        ]


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_is_no_wider_than_the_screen(made, tmp_path, width):
    with opened(made / "index.html", tmp_path) as shown:
        shown.screenshot(tmp_path / "shot.png", width, 800)
        assert shown.run("document.documentElement.scrollWidth") <= width


@needs_browser
def test_a_click_on_a_heading_sorts_by_its_column_and_another_the_other_way(tmp_path):
    """One table per column of ``SORTED``, beside a column that is all alike."""
    shuffled = [[*rising[1::2], *rising[::2]] for rising, _ in SORTED.values()]
    written = [markdown_table(("alike", "sorted"), [("x", cell) for cell in column]) for column in shuffled]
    path = tmp_path / "page.html"
    path.write_text(html_page("\n".join(written), {}))
    with opened(path, tmp_path / "profile") as shown:

        def columns() -> list[list[str]]:
            return shown.run("""[...document.querySelectorAll("tbody")].map(
                body => [...body.rows].map(row => row.cells[1].textContent))""")

        def directions() -> set[str | None]:
            return set(shown.run("[...document.querySelectorAll('th:nth-child(2)')].map(heading => heading.ariaSort)"))

        def click(column: int) -> None:
            for table in range(len(SORTED)):
                shown.run(CLICK.format(2 * table + column))

        assert columns() == shuffled
        click(1)
        assert columns() == [rising for rising, _ in SORTED.values()]
        assert directions() == {"ascending"}
        click(1)
        assert columns() == [falling for _, falling in SORTED.values()]
        assert directions() == {"descending"}
        click(0)
        assert columns() == [falling for _, falling in SORTED.values()]
        assert directions() == {None}
        assert shown.errors == []


@needs_browser
def test_an_error_in_a_page_is_noticed(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("<script>console.error('said'); undefined.name</script><img src='http://127.0.0.1:9/a.png'>")
    with opened(path, tmp_path / "profile") as shown:
        assert any("said" in error for error in shown.errors)
        assert any("TypeError" in error for error in shown.errors)
        assert "http://127.0.0.1:9/a.png" in shown.requests
