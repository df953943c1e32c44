"""The text beside the embedded model, and the script that made it."""

import importlib.util
import json
import lzma
import re
import sys

from conftest import ROOT
from flatllmcore.utils import text_sources
from flatllmcore.utils.text_sources import has_test_split, load_text


def test_the_text_is_found_by_its_name_and_no_paragraph_stands_in_it_twice():
    texts = [load_text("pydocs", split) for split in ("train", "test")]
    paragraphs = [paragraph for text in texts for document in text.documents for paragraph in document.split("\n\n")]
    assert len(set(paragraphs)) == len(paragraphs)
    assert all(len(paragraph.split()) >= 6 and ">>>" not in paragraph for paragraph in paragraphs)
    sizes = [[len(text.documents), len(text.separator.join(text.documents).replace("\n", ""))] for text in texts]
    assert sizes[0] > sizes[1]
    readme = (text_sources.EMBEDDED_TEXT / "README.md").read_text()
    stated = re.findall(r"jsonl.xz` \| (\d+) \| ([\d,]+)", readme)
    assert [(str(len(text.documents)), f"{sum(map(len, text.documents)):,}") for text in texts] == stated
    assert has_test_split("pydocs")


def test_the_script_takes_the_prose_of_docstrings(tmp_path, monkeypatch):
    """Oracle: the paragraphs of a small package, sorted by hand."""
    spec = importlib.util.spec_from_file_location("make_embedded_text", ROOT / "scripts" / "make_embedded_text.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    prose = [f"These are six plain words {word}." for word in ("indeed", "again", "within")]
    package = tmp_path / "little"
    (package / "tests").mkdir(parents=True)
    (package / "__init__.py").write_text(f'"""{prose[0]}\n\nToo short.\n"""\ndef f():\n    "{prose[1]}"\n')
    (package / "other.py").write_text(f'"{prose[0]}"\nif True:\n    class A:\n        """{prose[2]}\n\n>>> 1 + 1"""\n')
    (package / "tests" / "skipped.py").write_text('"These are six words never seen."')
    (package / "broken.py").write_text("def (")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(script, "PACKAGES", ("little",))
    monkeypatch.setattr(script, "version", lambda package: "1")
    monkeypatch.setattr(script.topics, "topics", {})
    monkeypatch.setattr(script.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "none")})
    for out in ("a", "b"):
        monkeypatch.setattr(sys, "argv", ["make_embedded_text.py", "--out", str(tmp_path / out)])
        script.main()
    files = [sorted((tmp_path / out).iterdir()) for out in ("a", "b")]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]
    lines = [line for path in files[0] for line in lzma.decompress(path.read_bytes()).decode().splitlines()]
    assert sorted(json.loads(line)["text"] for line in lines) == sorted([f"{prose[0]}\n\n{prose[1]}", prose[2]])
