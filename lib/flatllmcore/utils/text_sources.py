"""Where text comes from: a named dataset (the hub's, a local copy of it, or pydocs), or a file or folder."""

import glob
import lzma
import re
import zlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

from ..errors import InputError
from .progress import progress

Split = Literal["train", "test"]
EMBEDDED_TEXT = Path(__file__).resolve().parents[3] / "models" / "pydocs-llama" / "text"
_SUFFIXES = (".txt", ".raw", ".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.xz", ".parquet")
_LINES = (".txt", ".raw")  # .raw: WikiText's own distribution
_ACCEPTED = ", ".join(_SUFFIXES)
_VALIDATION = ("validation", "valid", "val", "dev")
_SPLIT_WORDS = re.compile(f"(?<![a-z])(?:train|test|{'|'.join(_VALIDATION)})(?![a-z])")


@dataclass(frozen=True)
class TextDataset:
    """One split of a text: ``separator.join(documents)`` is the whole of it."""

    name: str
    split: str
    documents: list[str]
    separator: str


class _HubDataset(NamedTuple):
    """A dataset on the hub: which file holds each split, and other folders that local copies are in."""

    hub_id: str
    files: dict[str, str]
    folders: tuple[str, ...] = ()


_HUB_DATASETS = {
    "wikitext2": _HubDataset(
        "Salesforce/wikitext",
        {split: f"wikitext-2-raw-v1/{split}-00000-of-00001.parquet" for split in ("train", "test")},
        ("wikitext", "wikitext-2-raw-v1"),
    ),
    "c4": _HubDataset(
        "allenai/c4",
        {"train": "en/c4-train.00000-of-01024.json.gz", "test": "en/c4-validation.00000-of-00008.json.gz"},
    ),
    "alpaca": _HubDataset("tatsu-lab/alpaca", {"train": "data/train-00000-of-00001-a09b74b3ef9c3b56.parquet"}),
}
DATASET_NAMES = ("pydocs", *_HUB_DATASETS)


def load_text(
    name_or_path: str, split: Split, *, dataset_root: Path | None = None, cache_dir: Path | None = None
) -> TextDataset:
    """Return one split of a named dataset or of a local file or folder.

    The lines of a text file are its documents, and ``"\\n".join`` gives the file back exactly. Elsewhere every record
    is one: its column ``text``, or the Alpaca prompt made of ``instruction``, ``input`` and ``output``. A single file
    gives all of it as either split; a folder without test files gives its validation files as test split.

    Args:
        name_or_path: One of ``DATASET_NAMES``, else a path (``./c4`` for a folder called like a dataset).
        split: Which part.
        dataset_root: Folder with local copies of the named datasets; when given, the hub is not asked.
        cache_dir: Where files from the hub are kept; the hub's own cache by default.
    """
    is_alpaca = name_or_path == "alpaca"
    files = _files(name_or_path, "train" if is_alpaca else split, dataset_root, cache_dir)
    documents = [document for path in files for document in _read_documents(path)]
    if is_alpaca:
        documents = _alpaca_split(documents, split)
    return TextDataset(name_or_path, split, documents, "\n" if _ends(files[0], _LINES) else "\n\n")


def has_test_split(name_or_path: str, dataset_root: Path | None = None) -> bool:
    """Tell whether a text keeps apart a part to evaluate on; a single file does not."""
    if name_or_path in _HUB_DATASETS and dataset_root is None:
        return True
    place = _location(name_or_path, dataset_root)
    return name_or_path == "alpaca" or (place.is_dir() and bool(_files_in(place, name_or_path, "test")))


def _files(name: str, split: Split, dataset_root: Path | None, cache_dir: Path | None) -> list[Path]:
    if name in _HUB_DATASETS and dataset_root is None:
        return [_download(_HUB_DATASETS[name], split, cache_dir)]
    place = _location(name, dataset_root)
    files = [place] if place.is_file() else _files_in(place, name, split)
    if not files:
        raise InputError(f"no {split} text in {place}; expected {_ACCEPTED} files with the split in their name")
    if len({(path.parent, path.suffix) for path in files}) > 1:
        raise InputError(f"several texts are called {split}: {files[0]}, {files[-1]}; give the folder or file of one")
    return files


def _location(name: str, dataset_root: Path | None) -> Path:
    """Return the file or folder that a name or path stands for, where the hub is not asked."""
    hub = _HUB_DATASETS.get(name)
    if hub and dataset_root:
        places = [dataset_root / folder for folder in (name, hub.hub_id, *hub.folders)]
        files = [path for path in dataset_root.glob(f"{name}_*") if _ends(path, _SUFFIXES)]  # such as c4_demo.jsonl
        places += files if len(files) == 1 else []
    else:
        places = [EMBEDDED_TEXT if name == "pydocs" else Path(name).expanduser()]
    for place in places:
        if place.exists():
            return place
    raise InputError(
        f"no dataset or path called {name!r}; known datasets: {', '.join(DATASET_NAMES)}; "
        f"looked for {', '.join(map(str, places))}"
    )


def _files_in(folder: Path, name: str, split: Split) -> list[Path]:
    """Return the files of one split, which is the last word in a file's path that names one.

    As on the Hugging Face Hub, files are all train when no path names a split.
    """
    if name in _HUB_DATASETS:  # a clone may hold other configurations and shards
        published = folder / _HUB_DATASETS[name].files[split]
        if published.is_file():
            return [published]
    splits = defaultdict(list)
    for path in sorted(folder.rglob("[!.]*")):
        if _ends(path, _SUFFIXES):
            words = _SPLIT_WORDS.findall(str(path.relative_to(folder)).lower())
            splits[words[-1] if words else "unnamed"].append(path)
    if split == "test":
        return splits["test"] or [path for word in _VALIDATION for path in splits[word]]
    return splits["unnamed"] if splits.keys() == {"unnamed"} else splits["train"]


def _download(hub: _HubDataset, split: Split, cache_dir: Path | None) -> Path:
    """Return a file in the hub's cache; ``load_dataset(hub_id)`` would ask the hub even for what is there."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HTTPError

    try:
        return Path(hf_hub_download(hub.hub_id, hub.files[split], repo_type="dataset", cache_dir=cache_dir))
    except (OSError, HTTPError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"could not get {hub.hub_id} from the Hugging Face Hub ({reason}); "
            "without a network give --dataset_root DIR with a local copy, or a path as the dataset"
        ) from error


def _read_documents(path: Path) -> list[str]:
    try:
        if _ends(path, _LINES):  # not by load_dataset("text"), which makes line feeds of carriage returns
            return path.read_bytes().decode().split("\n")
        from datasets import load_dataset

        builder = "parquet" if _ends(path, (".parquet",)) else "json"
        file = glob.escape(str(path.absolute()))
        # Streaming makes no copy of the text; all that the cache gets is a lock.
        with TemporaryDirectory() as cache:
            rows = load_dataset(builder, data_files=file, split="train", streaming=True, cache_dir=cache)
            return [_document(row) for row in progress(rows, f"reading {path.name}", "row")]
    except StopIteration as error:
        raise InputError(f"{path} is empty") from error
    except (OSError, ValueError, TypeError, AttributeError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        raise InputError(f"cannot read text from {path} ({reason}); accepted: {_ACCEPTED}") from error


def _document(row: Mapping[str, Any]) -> str:
    """Return the text of a record, or the Alpaca prompt made of it."""
    if "text" in row:
        parts = [row["text"]]
    elif {"instruction", "output"} <= row.keys():
        parts = [row["instruction"], row.get("input") or "", row["output"]]
    else:
        raise ValueError(f"columns {', '.join(row)} where text, or instruction, input and output were expected")
    for part in parts:
        if not isinstance(part, str):
            raise ValueError(f"{type(part).__name__} where text was expected")
    return parts[0] if len(parts) == 1 else _alpaca_prompt(*parts)


def _alpaca_prompt(instruction: str, given: str, output: str) -> str:
    context, asked = "", f"\n\n### Instruction:\n{instruction}"
    if given:
        context, asked = ", paired with an input that provides further context", f"{asked}\n\n### Input:\n{given}"
    task = f"Below is an instruction that describes a task{context}. Write a response that appropriately completes the"
    return f"{task} request.{asked}\n\n### Response:\n{output}"


def _alpaca_split(documents: list[str], split: Split) -> list[str]:
    """Return the split SliceGPT made: a fifth held out with seed 42, then the first half of that as test."""
    from datasets import Dataset

    parts = Dataset.from_dict({"text": documents}).train_test_split(test_size=0.2, seed=42)
    part = parts["train"] if split == "train" else parts["test"].train_test_split(test_size=0.5, seed=42)["train"]
    return list(part["text"])


def _ends(path: Path, suffixes: tuple[str, ...]) -> bool:
    return path.name.lower().endswith(suffixes)
