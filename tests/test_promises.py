"""The README's table of promises: each has tests that exist, or says that it was not run and why."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SECTION = (ROOT / "README.md").read_text().split("## What is promised")[1].split("</details>")[0]
ROWS = re.findall(r"^\| (.+?) \| (.+) \|$", SECTION, re.M)
PROOFS = [proof for promise, proof in ROWS if promise not in ("promise", "---")]


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
    tests = re.findall(r"`(tests/[^`]+)`", "".join(PROOFS))
    assert len(tests) > 80
    assert [test for test in tests if not exists(test)] == []


def test_every_promise_has_a_test_or_the_reason_why_it_was_not_run():
    assert len(PROOFS) > 50
    assert [proof for proof in PROOFS if not re.search(r"`tests/|^not run: .", proof)] == []


def test_a_test_that_is_not_there_is_noticed():
    assert exists("tests/test_promises.py::test_a_test_that_is_not_there_is_noticed")
    assert not exists("tests/test_promises.py::test_of_nothing")
    assert not exists("tests/test_nothing.py::test_of_nothing")
