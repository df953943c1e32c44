"""Reading documents from local files: text, JSON, JSON lines and Parquet, alone or in a folder with splits."""

import gzip
import json
import re
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from io import BufferedIOBase
from itertools import chain, islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..errors import InputError
from .progress import progress

RECORD_SEPARATOR = "\n\n"
_TEXT_SUFFIXES = (".txt", ".raw")  # .raw: WikiText's own distribution
_JSON_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
SUFFIXES = (*_TEXT_SUFFIXES, *_JSON_SUFFIXES, ".parquet")
_COLUMNS = ("text", "instruction", "input", "output")
_SPLIT_WORDS = {"train": {"train"}, "test": {"test"}, "validation": {"validation", "valid", "val", "dev"}}
_INSTRUCTION_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Response:\n{output}"
)
_INPUT_PROMPT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n{output}"
)


def is_text_file(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES)


def read_documents(path: Path) -> tuple[list[str], str]:
    """Return the documents of one file and the separator that joins them.

    The lines of a text file are its documents, and ``"\\n".join`` gives the file back exactly.
    Elsewhere every record is a document: its column ``text``, or the Alpaca prompt made of
    ``instruction``, ``input`` and ``output``.

    Raises:
        InputError: If the file is damaged, of another kind, or holds no text.
    """
    name = path.name.lower()
    try:
        if name.endswith(_TEXT_SUFFIXES):
            return path.read_bytes().decode().split("\n"), "\n"  # bytes: keeps carriage returns
        if name.endswith(_JSON_SUFFIXES):
            return [_document(record, path) for record in _json_records(path)], RECORD_SEPARATOR
        if name.endswith(".parquet"):
            return [_document(record, path) for record in _parquet_records(path)], RECORD_SEPARATOR
    except InputError:
        raise
    except (ValueError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path} is damaged or not what its name says ({reason})") from error
    raise InputError(f"{path} is not a kind of text file known here; accepted: {', '.join(SUFFIXES)}")


def split_files(folder: Path) -> dict[str, list[Path]]:
    """Return the text files of a folder by split: train, test, validation.

    A split is read off the words of a file's name, else of the folders it is in. As on the
    Hugging Face Hub, files are all train when no name tells a split.
    """
    splits = defaultdict(list)
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if path.is_file() and is_text_file(path) and not any(part.startswith(".") for part in inside.parts):
            splits[_split_of(inside)].append(path)
    unnamed = splits.pop("", [])
    return dict(splits) or ({"train": unnamed} if unnamed else {})


def _split_of(path: Path) -> str:
    for part in reversed(path.parts):
        words = set(re.findall("[a-z]+", part.lower()))
        for split, names in _SPLIT_WORDS.items():
            if words & names:
                return split
    return ""


def _parquet_records(path: Path) -> Iterator[dict[str, Any]]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file, _bar(path, "row", file.metadata.num_rows) as bar:
        columns = [name for name in file.schema_arrow.names if name in _COLUMNS]
        for batch in file.iter_batches(columns=columns or None):
            yield from batch.to_pylist()
            bar.update(batch.num_rows)


def _json_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of JSON lines, of a JSON list, or of an object that holds one list."""
    is_compressed = path.name.lower().endswith(".gz")
    with path.open("rb") as stored, _bar(path, "B", path.stat().st_size) as bar:
        values = _lines_or_whole(gzip.GzipFile(fileobj=stored) if is_compressed else stored)
        head = list(islice(values, 2))
        for record in chain(head, values) if len(head) > 1 else chain.from_iterable(map(_unwrapped, head)):
            yield record
            bar.update(stored.tell() - bar.n)


def _bar(path: Path, unit: str, total: int) -> tqdm:
    return progress(None, f"reading {path.name}", unit, total)


def _unwrapped(value: Any) -> list[Any]:
    if isinstance(value, dict) and not value.keys() & set(_COLUMNS):
        lists = [member for member in value.values() if isinstance(member, list)]
        return lists[0] if len(lists) == 1 else [value]
    return value if isinstance(value, list) else [value]


def _lines_or_whole(file: BufferedIOBase) -> Iterator[Any]:
    """Yield one JSON value per line, or the one value that the whole file is."""
    first_line = file.readline()
    try:
        first = json.loads(first_line)
    except ValueError:  # a value that spans lines
        whole = first_line + file.read()
        if whole.strip():
            yield json.loads(whole)
        return
    yield first
    yield from (json.loads(line) for line in file if line.strip())


def _document(record: Mapping[str, Any], path: Path) -> str:
    if not isinstance(record, Mapping):
        raise InputError(
            f"{path} holds {type(record).__name__} where records were expected: objects with named columns"
        )
    if "text" in record:
        return _checked_text(record, ("text",), path)["text"]
    if "instruction" in record and "output" in record:
        values = _checked_text({"input": ""} | dict(record), ("instruction", "input", "output"), path)
        return (_INPUT_PROMPT if values["input"] else _INSTRUCTION_PROMPT).format(**values)
    raise InputError(
        f"{path} has the columns {', '.join(map(str, record)) or '(none)'}; "
        "expected text, or instruction, input and output"
    )


def _checked_text(record: Mapping[str, Any], columns: Iterable[str], path: Path) -> dict[str, str]:
    values = {column: record[column] for column in columns}
    for column, value in values.items():
        if not isinstance(value, str):
            raise InputError(f"{path} has {type(value).__name__} in column {column!r} where text was expected")
    return values
