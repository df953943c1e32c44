"""Write the text `pydocs` that lies beside the embedded model: the documentation of Python and of some of its packages.

    python scripts/make_embedded_text.py --out out/text

`pydoc_data.topics` and the docstrings of the standard library and of packages that torch and transformers bring along.
Sources are parsed, never imported. A document holds the prose paragraphs of one module's docstrings, or one help topic;
a paragraph that occurred in an earlier document is dropped, so that none stands in both splits. The documents stand in
the order of a hash of their module's path, which also tells the split. The same installed versions give the same bytes.
"""

import argparse
import ast
import hashlib
import importlib.util
import json
import lzma
import re
import sysconfig
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from pydoc_data import topics

from tqdm import tqdm

PACKAGES = ("huggingface_hub", "networkx", "numpy", "torch", "transformers")
SKIPPED_FOLDERS = {"site-packages", "test", "tests", "testing", "idlelib", "lib2to3", "__pycache__"}
NOT_A_LETTER = re.compile(r"[^A-Za-z ]")
TEST_SHARE = 48  # one module in 48 is test text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for train.jsonl.xz and test.jsonl.xz")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    splits: dict[str, list[str]] = {"train": [], "test": []}
    for digest, text in documents():
        splits["test" if int(digest, 16) % TEST_SHARE == 0 else "train"].append(text)
    for split, texts in splits.items():
        lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        path = args.out / f"{split}.jsonl.xz"
        path.write_bytes(lzma.compress(lines.encode(), preset=9 | lzma.PRESET_EXTREME))
        print(f"{path}: {len(texts)} documents, {sum(map(len, texts))} characters")
    print(f"made of {sources()}")


def sources() -> dict[str, str]:
    """Return the version of every package whose documentation makes up the text."""
    return {"python": python_version()} | {package: version(package) for package in PACKAGES}


def documents() -> list[tuple[str, str]]:
    """Return every document beside the hash of its path in hexadecimal, in the order of the hashes."""
    seen: set[str] = set()
    found: list[tuple[str, str]] = []
    for name, text in raw_documents():
        paragraphs = [p for p in dict.fromkeys(prose_paragraphs(text)) if p not in seen]
        seen.update(paragraphs)
        if paragraphs:
            found.append((hashlib.sha256(name.encode()).hexdigest(), "\n\n".join(paragraphs)))
    return sorted(found)


def raw_documents() -> Iterator[tuple[str, str]]:
    """Yield the path and the text of every help topic and of every module's docstrings."""
    for topic, text in sorted(topics.topics.items()):
        yield f"topics/{topic}", text
    roots = {"python": Path(sysconfig.get_paths()["stdlib"])}
    roots |= {package: Path(importlib.util.find_spec(package).origin).parent for package in PACKAGES}
    files = [(package, root, path) for package, root in roots.items() for path in sorted(root.rglob("*.py"))]
    for package, root, path in tqdm(files, "reading documentation", unit="file", disable=None):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.isdisjoint(relative.parts):
            yield f"{package}/{relative.as_posix()}", "\n\n".join(docstrings(path))


def docstrings(path: Path) -> Iterator[str]:
    """Yield the docstrings of a module, its classes and its functions, in order."""
    try:
        pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    except (SyntaxError, UnicodeDecodeError):  # templates and deliberately broken files
        return
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring
        # Statement bodies only: docstrings never hide inside expressions.
        for body in ("body", "orelse", "finalbody"):
            pending.extend(reversed(getattr(node, body, [])))


def prose_paragraphs(text: str) -> Iterator[str]:
    """Yield the paragraphs that read as sentences rather than as code, tables or headings."""
    for paragraph in re.split(r"\n\s*\n", text):
        stripped = paragraph.strip()
        letters = len(stripped) - len(NOT_A_LETTER.findall(stripped))
        if ">>>" not in stripped and len(stripped.split()) >= 6 and letters >= 0.8 * len(stripped):
            yield stripped


if __name__ == "__main__":
    main()
