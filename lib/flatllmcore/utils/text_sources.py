"""Where text comes from: a named dataset (the hub's, a local copy of it, or pydocs), a hub id, or a file or folder."""

import csv
import gzip
import json
import logging
import lzma
import os
import re
import zlib
from codecs import BOM_UTF8
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import StringIO
from operator import ne
from pathlib import Path
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from ..errors import InputError, door
from .documents import alpaca_split, document_of
from .progress import progress

logger = logging.getLogger(__name__)

Split = Literal["train", "test"]
EMBEDDED_TEXT = Path(__file__).resolve().parents[3] / "models" / "pydocs-llama" / "text"
_SUFFIXES = (".txt", ".raw", ".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.xz", ".csv", ".parquet", ".arrow")
_LINES = (".txt", ".raw")  # .raw: WikiText's own distribution
_ACCEPTED = f"accepted: {', '.join(_SUFFIXES)}, in UTF-8"
_WITHOUT_HUB = "without a network give a folder with a copy as dataset_root, or a path as dataset"
_VALIDATION = ("validation", "valid", "val", "dev")
_SPLIT_WORDS = re.compile(f"(?<![a-z])(?:train|test|{'|'.join(_VALIDATION)})(?![a-z])")
_HUB_ID = re.compile(r"(\w[\w.-]*/(\w[\w.-]*))(?::([\w.-]+))?")  # and the name of one of its configurations
_NO_TEXT = re.compile(r"\..*|dataset_(?:info|infos|dict)\.json|state\.json|cache-.*\.arrow")  # of the datasets library
_MOST_FOLDERS = 10**5  # below that of one text
_ROWS = 1024  # of a table at a time


@dataclass(frozen=True)
class TextDataset:
    """One split of a text: ``separator.join(documents)`` is the whole of it.

    Lone surrogates, which are no characters and which no tokenizer takes, become U+FFFD, and the log says so.
    """

    name: str
    split: str
    documents: list[str]
    separator: str

    def __post_init__(self) -> None:
        read = [
            text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            for text in self.documents
        ]
        if count := sum(map(ne, read, self.documents)):
            logger.warning("%s: lone surrogates in %d documents are read as U+FFFD", self.name, count)
            object.__setattr__(self, "documents", read)


class _HubDataset(NamedTuple):
    """A dataset on the hub: which file holds each split, and other folders that local copies are in."""

    hub_id: str
    files: dict[str, str]
    folders: tuple[str, ...] = ()
    configuration: str | None = None
    others: tuple[str, ...] = ()  # its other configurations


_HUB_DATASETS = {
    "wikitext2": _HubDataset(
        "Salesforce/wikitext",
        {split: f"wikitext-2-raw-v1/{split}-00000-of-00001.parquet" for split in ("train", "test")},
        ("wikitext", "wikitext-2-raw-v1"),
        others=("wikitext-2-v1", "wikitext-103-v1", "wikitext-103-raw-v1"),
    ),
    "c4": _HubDataset(
        "allenai/c4",
        {"train": "en/c4-train.00000-of-01024.json.gz", "test": "en/c4-validation.00000-of-00008.json.gz"},
        others=("en.noblocklist", "en.noclean", "multilingual", "realnewslike"),
    ),
    "alpaca": _HubDataset("tatsu-lab/alpaca", {"train": "data/train-00000-of-00001-a09b74b3ef9c3b56.parquet"}),
}
_OTHERS = {name: hub.others for name, hub in _HUB_DATASETS.items()}
DATASET_NAMES = ("pydocs", *_HUB_DATASETS)


def load_text(
    name_or_path: str,
    split: Split,
    *,
    dataset_root: Path | None = None,
    cache_dir: Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> TextDataset:
    """Return one split of a dataset on the hub, of a named one, or of a local file or folder.

    The lines of a text file are its documents, and ``"\\n".join`` gives the file back but for a byte-order mark.
    Elsewhere every record is one: its column ``text``, or what is made of it (:func:`document_of`). A single file gives
    all of it as either split; a text without a test split gives its validation split as that.

    It is one of ``DATASET_NAMES``, a path (``./c4`` for a folder called like a dataset), or else a hub id, with
    ``:CONFIGURATION`` where the dataset has several. The hub is not asked where ``dataset_root`` is given, a folder
    with local copies. Conversations take a tokenizer with a chat template.
    """
    is_alpaca, hub = name_or_path == "alpaca", None if dataset_root else _hub_dataset(name_or_path)
    if hub and not hub.files:
        documents = _documents(_hub_rows(hub, split, cache_dir), name_or_path, tokenizer)
        return TextDataset(name_or_path, split, documents, "\n\n")
    files = _files(name_or_path, "train" if is_alpaca else split, dataset_root, cache_dir)
    documents = [document for path in files for document in _documents(_records(path), path, tokenizer)]
    if is_alpaca:
        documents = alpaca_split(documents, split)
    return TextDataset(name_or_path, split, documents, "\n" if _ends(files[0], _LINES) else "\n\n")


def has_test_split(name_or_path: str, dataset_root: Path | None = None) -> bool:
    """Tell whether a text keeps apart a part to evaluate on; a single file does not, what is on the hub is taken to."""
    if dataset_root is None and _hub_dataset(name_or_path):
        return True
    place = _location(name_or_path, dataset_root)
    return name_or_path == "alpaca" or (place.is_dir() and bool(_files_in(place, name_or_path, "test")))


def _hub_dataset(name: str) -> _HubDataset | None:
    """Return what a name stands for on the hub: a named dataset, else one by its id, unless there is such a path."""
    by_id = _HUB_ID.fullmatch(name)
    if name in _HUB_DATASETS or by_id is None or _ends(Path(name), _SUFFIXES) or os.path.exists(name):
        return _HUB_DATASETS.get(name)
    return _HubDataset(by_id[1], {}, (by_id[2],), by_id[3])


def _files(name: str, split: Split, dataset_root: Path | None, cache_dir: Path | None) -> list[Path]:
    if name in _HUB_DATASETS and dataset_root is None:
        return [_download(_HUB_DATASETS[name], split, cache_dir)]
    place = _location(name, dataset_root)
    files = [place] if place.is_file() else _files_in(place, name, split)
    if not files:
        problem = f"no {split} text in {place}; {_ACCEPTED}, with the split in the name"
        raise InputError("; not read: ".join(filter(None, (problem, ", ".join(_OTHERS.get(name, ()))))))
    if len({(path.parent, path.suffix) for path in files}) > 1:
        raise InputError(f"several texts are called {split}: {files[0]}, {files[-1]}; give the folder or file of one")
    return files


def _location(name: str, dataset_root: Path | None) -> Path:
    """Return the file or folder that a name or path stands for, where the hub is not asked."""
    problem, known = f"no dataset, file or folder called {name!r}", f"known datasets: {', '.join(DATASET_NAMES)}"
    hub = _hub_dataset(name)
    if not name:  # which would be the folder here
        raise InputError(f"{problem}; {known}")
    with door(problem, known):
        if hub and dataset_root:
            folders = dict.fromkeys((name, hub.hub_id, *hub.folders))
            places = [dataset_root / folder / (hub.configuration or "") for folder in folders]
            files = [path for path in dataset_root.glob(f"{name}_*") if _ends(path, _SUFFIXES)]  # as c4_demo.jsonl
            places += files if len(files) == 1 else []
        else:
            places = [EMBEDDED_TEXT if name == "pydocs" else Path(name).expanduser()]
        for place in places:
            if place.is_file() or place.is_dir():  # and no pipe or device
                return place
    raise InputError(f"{problem}; {known}; looked for {', '.join(map(str, places))}")


def _files_in(folder: Path, name: str, split: Split) -> list[Path]:
    """Return the texts of one split, which is the last word in a text's path that names one.

    As on the Hugging Face Hub, texts are all train when no path names a split.
    """
    if name in _HUB_DATASETS:  # a clone may hold other configurations and shards
        published = folder / _HUB_DATASETS[name].files[split]
        if published.is_file():
            return [published]
    splits = defaultdict(list)
    for path in sorted(_texts_in(folder)):
        place = path.relative_to(folder)
        words = _SPLIT_WORDS.findall(str(place).lower())
        if not set(place.parts).intersection(_OTHERS.get(name, ())):
            splits[words[-1] if words else "unnamed"].append(path)
    if split == "test":
        return splits["test"] or [path for word in _VALIDATION for path in splits[word]]
    return splits["unnamed"] if splits.keys() == {"unnamed"} else splits["train"]


def _texts_in(folder: Path) -> Iterator[Path]:
    """Yield the text files below a folder, also where links lead; what is hidden, or in a hidden folder, is none."""
    left_out: list[Path] = []
    for number, (parent, folders, names) in enumerate(os.walk(folder, onerror=_refuse_folder, followlinks=True)):
        place = Path(parent)
        if number > _MOST_FOLDERS:
            raise InputError(f"over {_MOST_FOLDERS} folders in {folder}; give the folder or file of one text")
        folders[:] = [name for name in folders if not name.startswith(".")]
        if any(place.samefile(above) for above in place.parents if above.is_relative_to(folder)):
            folders.clear()  # it is linked to where it is: nothing new
            continue
        for path in (place / name for name in names if not _NO_TEXT.fullmatch(name)):
            if _ends(path, _SUFFIXES):
                if not path.is_file():
                    raise InputError(f"{path} is a pipe, a device or a broken link; {_ACCEPTED}")
                yield path
            elif any(f"{suffix}." in path.name.lower() for suffix in _SUFFIXES):  # as of .jsonl.zst
                left_out.append(path)
    if left_out:
        logger.warning("%d files are left out, such as %s; %s", len(left_out), min(left_out), _ACCEPTED)


def _refuse_folder(error: OSError) -> None:
    raise InputError(f"cannot read {error.filename} ({error.strerror}); give the folder or file of one text") from error


def _download(hub: _HubDataset, split: Split, cache_dir: Path | None) -> Path:
    """Return a file in the hub's cache; ``load_dataset(hub_id)`` would ask the hub even for what is there."""
    from huggingface_hub import hf_hub_download

    with door(f"could not get {hub.hub_id} from the Hugging Face Hub", _WITHOUT_HUB):
        return Path(hf_hub_download(hub.hub_id, hub.files[split], repo_type="dataset", cache_dir=cache_dir))


def _hub_rows(hub: _HubDataset, split: Split, cache_dir: Path | None) -> Iterator[Any]:
    """Yield the records of any dataset on the hub; the library runs no code of it."""
    from datasets import load_dataset

    names = ("train",) if split == "train" else ("test", *_VALIDATION)
    several = "" if hub.configuration else f"; of several configurations name one, {hub.hub_id}:NAME"
    with door(f"could not get {hub.hub_id} from the Hugging Face Hub", f"{_WITHOUT_HUB}{several}"):
        splits = load_dataset(hub.hub_id, name=hub.configuration, cache_dir=cache_dir)
        if splits.keys().isdisjoint(names):
            raise InputError(f"{hub.hub_id} has no {split} split, but {', '.join(splits)}; give another, or a path")
        yield from next(splits[name] for name in names if name in splits)


def _documents(records: Iterable[Any], place: Path | str, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    rows = progress(records, f"reading {Path(place).name}", "record")
    return [document_of(record, place, number, tokenizer) for number, record in enumerate(rows, 1)]


def _records(path: Path) -> Iterator[Any]:
    """Yield the records of a file, or its lines."""
    if _ends(path, (".parquet", ".arrow")):
        from pyarrow import ipc, parquet

        with door(f"cannot read text from {path}", _ACCEPTED), path.open("rb") as file:
            is_arrow = _ends(path, (".arrow",))
            for batch in ipc.open_stream(file) if is_arrow else parquet.ParquetFile(file).iter_batches(_ROWS):
                batch.validate(full=True)
                yield from batch.to_pylist()
        return
    opened: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix.lower(), open)
    try:
        with opened(path, "rb") as file:
            if _ends(path, _LINES):
                yield from _parsed(file.read(), path, 1, str).removeprefix("\ufeff").split("\n")
                return
            if _ends(path, (".csv",)):
                yield from _parsed(file.read(), path, 1, _table_rows)
                return
            start = 3 if file.read(3) == BOM_UTF8 else file.seek(0)
            first = next((line.strip() for line in file if line.strip()), b"")
            if not first:
                raise InputError(f"{path} is empty; {_ACCEPTED}")
            file.seek(start)
            are_lines = first[:1] == b"{" and first[-1:] == b"}"
            for line, content in enumerate(file, 1) if are_lines else [(1, file.read())]:
                if content.strip():
                    # Not by load_dataset: it drops lone surrogates, takes texts for dates, and dies of nested brackets.
                    found = _parsed(content, path, line, json.loads)
                    yield from found if isinstance(found, list) else [found]
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise InputError(f"cannot read text from {path} ({error}); {_ACCEPTED}") from error


def _parsed(content: bytes, path: Path, line: int, parse: Callable[[str], Any]) -> Any:
    """Return what is made of UTF-8 that begins on a line of a file."""
    try:
        return parse(content.decode())
    except (ValueError, RecursionError, csv.Error) as error:
        line += content.count(b"\n", 0, getattr(error, "start", 0)) + getattr(error, "lineno", 1) - 1
        reason = getattr(error, "msg", error)
        raise InputError(f"cannot read text from {path} (line {line}: {reason}); {_ACCEPTED}") from error


def _table_rows(text: str) -> list[dict[str, str]]:
    """Return the rows of a table in CSV, by the names in its first."""
    csv.field_size_limit(max(len(text), csv.field_size_limit()))  # of a field: 128 KiB, unless it is raised
    reader = csv.DictReader(StringIO(text.removeprefix("\ufeff"), newline=""), strict=True)
    rows, names = list(reader), reader.fieldnames or []
    if len(set(names)) < len(names):
        raise csv.Error("two columns have one name")
    if short := next((number for number, row in enumerate(rows, 2) if None in row), None):  # of a comma in no quotes
        raise csv.Error(f"row {short} has more cells than the first")
    return rows


def _ends(path: Path, suffixes: tuple[str, ...]) -> bool:
    return path.name.lower().endswith(suffixes)
