"""A report in Markdown as one HTML page that needs no other file: pictures inside it, tables that sort."""

import base64
from collections.abc import Mapping, Sequence
from importlib.resources import files
from itertools import pairwise
from string import Template
from typing import TYPE_CHECKING, Any

from .tables import NOT_RUN, NOT_THERE

if TYPE_CHECKING:  # markdown_it loads where it is used
    from markdown_it.token import Token


def html_page(markdown: str, pictures: Mapping[str, bytes]) -> str:
    """Return the page of a report.

    Args:
        markdown: CommonMark with tables; HTML in it is shown, not obeyed.
        pictures: PNGs by the name that the report has them under.
    """
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    parser.add_render_rule("table_open", _open_table)
    parser.add_render_rule("table_close", _close_table)
    parser.add_render_rule("fence", _commands)
    tokens = parser.parse(markdown)
    contents = _number_headings(tokens)
    _mark_cells(tokens)
    _put_in(pictures, tokens)
    body = parser.renderer.render(tokens, parser.options, {})
    links = "".join(f'<a href="#{anchor}">{title}</a>' for anchor, title in contents)
    template = Template(files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    return template.substitute(contents=links, body=body)


def _put_in(pictures: Mapping[str, bytes], tokens: Sequence["Token"]) -> None:
    """Put the pictures themselves in the place of their names."""
    for inside in (child for token in tokens for child in token.children or ()):
        if inside.type == "image":
            png = base64.b64encode(pictures[str(inside.attrs["src"])]).decode()
            inside.attrs["src"] = f"data:image/png;base64,{png}"


def _number_headings(tokens: Sequence["Token"]) -> list[tuple[str, str]]:
    """Give second-level headings an anchor; return anchors and titles, the latter as HTML."""
    from markdown_it.common.utils import escapeHtml

    contents: list[tuple[str, str]] = []
    for token, inside in pairwise(tokens):
        if token.type == "heading_open" and token.tag == "h2":
            token.attrSet("id", f"part-{len(contents) + 1}")
            title = "".join(child.content for child in inside.children or ())
            contents.append((f"part-{len(contents) + 1}", escapeHtml(title)))
    return contents


def _mark_cells(tokens: Sequence["Token"]) -> None:
    """Set apart the cells that hold no figure."""
    for token, inside in pairwise(tokens):
        if token.type == "td_open" and inside.content in (NOT_RUN, NOT_THERE):
            token.attrJoin("class", "missing")


# Render rules get the renderer, the tokens, the place among them, options and environment.


def _open_table(renderer: Any, *_: Any) -> str:
    return '<div class="table"><table>\n'


def _close_table(renderer: Any, *_: Any) -> str:
    return "</table></div>\n"


def _commands(renderer: Any, tokens: Sequence["Token"], place: int, options: Any, env: Any) -> str:
    block = type(renderer).fence(renderer, tokens, place, options, env)
    return f"<details><summary>Commands</summary>{block}</details>\n"
