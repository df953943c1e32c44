"""Markdown tables that read as plain text too."""

import pytest

from flatllmbench.tables import markdown_table


def test_a_table_pads_its_columns_and_keeps_its_shape_whatever_is_in_a_cell():
    expected = "| a    | long |\n| ---- | ---: |\n| b\\|c |  1 2 |\n"
    assert markdown_table(("a", "long"), [("b|c", "1\n2")]) == expected


def test_a_table_refuses_rows_of_another_width():
    with pytest.raises(ValueError, match="shorter"):
        markdown_table(("a", "b"), [("1",)])
