"""English text that every installation of this package has: Python's own documentation.

``pydoc_data.topics`` and the docstrings of the standard library and of packages that torch and
transformers bring along. Sources are parsed, never imported. The text therefore needs no network
and depends only on the installed versions, which :func:`pydocs_sources` reports. Parsing takes about
ten seconds, so the documents are kept in the user's cache folder, one file per set of versions.
"""

import ast
import hashlib
import importlib.util
import json
import logging
import os
import re
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Literal

from .files import write_atomically
from .progress import progress

logger = logging.getLogger(__name__)

PACKAGES = ("huggingface_hub", "networkx", "numpy", "torch", "transformers")
SPLITS = ("train", "test")
_SKIPPED_FOLDERS = {"site-packages", "test", "tests", "testing", "idlelib", "lib2to3", "__pycache__"}
_NOT_A_LETTER = re.compile(r"[^A-Za-z ]")
_TEST_SHARE = 48  # one module in 48 is test text


def pydocs_documents(split: Literal["train", "test"]) -> list[str]:
    """Return the documents of one split, in a fixed shuffled order.

    A document holds the prose paragraphs of one module's docstrings, or one help topic. A
    paragraph that occurred in an earlier document is dropped, so that no paragraph stands in both
    splits. Which split a module belongs to is read off a hash of its path.

    Raises:
        ValueError: If ``split`` is neither ``train`` nor ``test``.
    """
    if split not in SPLITS:
        raise ValueError(f"pydocs has the splits {', '.join(SPLITS)}; got {split!r}")
    is_test = split == "test"
    return [text for digest, text in _documents() if (digest % _TEST_SHARE == 0) == is_test]


def pydocs_sources() -> dict[str, str]:
    """Return the version of every package whose documentation makes up the text."""
    installed = (p for p in PACKAGES if importlib.util.find_spec(p))
    return {"python": python_version()} | {package: version(package) for package in installed}


@lru_cache(maxsize=1)
def _documents() -> list[tuple[int, str]]:
    """Return every document beside the hash of its path, in the order of the hashes."""
    recipe = Path(__file__).read_text(encoding="utf-8") + json.dumps(pydocs_sources())
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cached = cache_home / "flatllmcore" / f"pydocs-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}.json"
    if cached.is_file():
        documents = json.loads(cached.read_bytes())
    else:
        documents = _parsed_documents()
        try:
            write_atomically(cached, json.dumps(documents).encode())
        except OSError as error:
            logger.warning("the pydocs text cannot be kept for the next run: %s", error)
    return [(int(digest, 16), text) for digest, text in documents]


def _parsed_documents() -> list[tuple[str, str]]:
    """Return every document beside the hash of its path in hexadecimal, in the order of the hashes."""
    seen: set[str] = set()
    documents: list[tuple[str, str]] = []
    for name, text in _raw_documents():
        paragraphs = [p for p in dict.fromkeys(_prose_paragraphs(text)) if p not in seen]
        seen.update(paragraphs)
        if paragraphs:
            digest = hashlib.sha256(name.encode()).hexdigest()
            documents.append((digest, "\n\n".join(paragraphs)))
    return sorted(documents)


def _raw_documents() -> Iterator[tuple[str, str]]:
    from pydoc_data import topics

    for topic, text in sorted(topics.topics.items()):
        yield f"topics/{topic}", text
    files = [(package, root, path) for package, root in _roots() for path in sorted(root.rglob("*.py"))]
    for package, root, path in progress(files, "reading documentation", "file"):
        relative = path.relative_to(root)
        if _SKIPPED_FOLDERS.isdisjoint(relative.parts):
            yield f"{package}/{relative.as_posix()}", "\n\n".join(_docstrings(path))


def _roots() -> Iterator[tuple[str, Path]]:
    yield "python", Path(sysconfig.get_paths()["stdlib"])
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            yield package, Path(spec.origin).parent


def _docstrings(path: Path) -> Iterator[str]:
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


def _prose_paragraphs(text: str) -> Iterator[str]:
    """Yield the paragraphs that read as sentences rather than as code, tables or headings."""
    for paragraph in re.split(r"\n\s*\n", text):
        stripped = paragraph.strip()
        letters = len(stripped) - len(_NOT_A_LETTER.findall(stripped))
        if ">>>" not in stripped and len(stripped.split()) >= 6 and letters >= 0.8 * len(stripped):
            yield stripped
