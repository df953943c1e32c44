"""docs/PROMISES.md: each promise has tests that exist, or says that it was not run and why."""

import ast
import re
from functools import cache

from conftest import ROOT
from markdown_tables import tables

TEXT = (ROOT / "docs" / "PROMISES.md").read_text()
PROOFS = {promise: proof for _header, *rows in tables(TEXT) for promise, proof in rows}


@cache
def found_in(file: str) -> set[str]:
    """Return what pytest would find in a file: ``file::Class::test`` and ``file::test``."""
    nodes = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
    classes = {f"{file}::{node.name}": node.body for node in nodes if isinstance(node, ast.ClassDef)} | {file: nodes}
    return {f"{of}::{node.name}" for of, body in classes.items() for node in body if isinstance(node, ast.FunctionDef)}


def test_every_test_named_exists():
    named = re.findall(r"`(tests/[^`]+)`", TEXT)
    assert len(named) > 80
    assert [test for test in named if "::test_" not in test or test not in found_in(test.partition("::")[0])] == []


def test_every_promise_has_a_test_or_the_reason_why_it_was_not_run():
    assert len(PROOFS) > 50
    assert [promise for promise, proof in PROOFS.items() if not re.search(r"tests/.*::test_|^not run: .", proof)] == []
