"""Markdown of anything reads as that thing; a CommonMark parser is the judge."""

import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from flatllmbench.tables import Markdown, code, code_block, escaped, markdown_table

COMMONMARK = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
# Text as records hold it: any character of a line, with those that Markdown and HTML mean something by oftener.
LINES = st.text(
    st.one_of(st.sampled_from("\\`*_[]()<>|&~#!$-+.:/ ab1"), st.characters(codec="utf-8", exclude_categories=("C",))),
    min_size=1,
    max_size=40,
)


class Reader(HTMLParser):
    """Collects the text of a piece of HTML, and the names of its tags."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.tags = "", set()
        self.feed(html)

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)


def single_spaced(text: str) -> str:
    return " ".join(text.split())


@given(LINES)
def test_escaped_text_reads_as_it_is_and_makes_no_element(text):
    read = Reader(COMMONMARK.renderInline(escaped(text)))
    assert single_spaced(read.text) == single_spaced(text)
    assert read.tags == set()


@given(LINES)
def test_a_cell_reads_as_its_text_and_leaves_the_table_its_shape(text):
    read = Reader(COMMONMARK.render(markdown_table(("head", text), [(text, "last")])))
    assert single_spaced(read.text) == single_spaced(f"head {text} {text} last")
    assert read.tags == {"table", "thead", "tbody", "tr", "th", "td"}


@given(LINES.filter(str.strip))
def test_code_reads_as_it_is(text):
    read = Reader(COMMONMARK.renderInline(f"see {code(text)} there"))
    assert single_spaced(read.text) == single_spaced(f"see {text} there")
    assert read.tags == {"code"}


@given(st.lists(LINES, min_size=1, max_size=3))
def test_a_block_of_commands_reads_as_it_is(lines):
    read = Reader(COMMONMARK.render(f"{code_block(lines)}\nafter"))
    assert re.split(r"\n+after", read.text)[0] == "\n".join(lines).rstrip("\n")
    assert read.tags == {"pre", "code", "p"}


def test_names_stay_readable_in_the_source():
    assert escaped("pydocs_llama-20 at 20.0 %") == "pydocs_llama-20 at 20.0 %"


def test_a_table_pads_its_columns_and_escapes_bars():
    assert markdown_table(("a", "long"), [("b|c", "1")]) == "| a    | long |\n| ---- | ---: |\n| b\\|c |    1 |\n"


def test_what_is_markdown_already_goes_into_a_table_as_it_is():
    assert "| **b** |" in markdown_table(("a",), [(Markdown("**b**"),)])


def test_a_table_refuses_rows_of_another_width():
    with pytest.raises(ValueError, match="shorter"):
        markdown_table(("a", "b"), [("1",)])
