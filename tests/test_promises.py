"""docs/PROMISES.md: each promise has tests that exist, or says that it was not run and why."""

import ast
import re
from pathlib import Path

from markdown_tables import tables

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "PROMISES.md").read_text()
PROOFS = {promise: proof for _header, *rows in tables(TEXT) for promise, proof in rows}


def exists(test: str) -> bool:
    """Return whether pytest would find ``file::Class::test`` or ``file::test``."""
    file, *names = test.split("::")
    if not (ROOT / file).is_file() or not names[-1].startswith("test_"):
        return False
    nodes = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
    for name in names:
        found = [n for n in nodes if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name == name]
        if not found:
            return False
        nodes = found[0].body
    return True


def test_every_test_named_exists():
    named = re.findall(r"`(tests/[^`]+)`", TEXT)
    assert len(named) > 80
    assert [test for test in named if not exists(test)] == []


def test_every_promise_has_a_test_or_the_reason_why_it_was_not_run():
    assert len(PROOFS) > 50
    assert [promise for promise, proof in PROOFS.items() if not re.search(r"tests/.*::test_|^not run: .", proof)] == []
