"""Where text comes from: a named dataset (the hub's, a local copy of it, or pydocs), or a file or folder."""

import lzma
import re
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
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
_SPLIT_WORDS = {"train": {"train"}, "test": {"test"}, "validation": {"validation", "valid", "val", "dev"}}


@dataclass(frozen=True)
class TextDataset:
    """One split of a text: ``separator.join(documents)`` is the whole of it."""

    name: str
    split: str
    documents: list[str]
    separator: str


class _HubDataset(NamedTuple):
    """A dataset on the hub: which files hold each split, and other names its local copies go by."""

    hub_id: str
    files: dict[str, str]
    spellings: Sequence[str] = ()


_HUB_DATASETS = {
    "wikitext2": _HubDataset(
        "Salesforce/wikitext",
        {split: f"wikitext-2-raw-v1/{split}-*.parquet" for split in ("train", "test")},
        ("wikitext-2-raw-v1", "wikitext-2-raw", "wikitext-2"),
    ),
    "c4": _HubDataset(
        "allenai/c4",
        {"train": "en/c4-train.00000-of-01024.json.gz", "test": "en/c4-validation.00000-of-00008.json.gz"},
    ),
    "alpaca": _HubDataset("tatsu-lab/alpaca", {"train": "data/train-*.parquet"}),
}
DATASET_NAMES = ("pydocs", *_HUB_DATASETS)


def load_text(
    name_or_path: str, split: Split, *, dataset_root: Path | None = None, cache_dir: Path | None = None
) -> TextDataset:
    """Return one split of a named dataset or of a local file or folder.

    The lines of a text file are its documents, and ``"\\n".join`` gives the file back exactly. Elsewhere every record
    is one: its column ``text``, or the Alpaca prompt made of ``instruction``, ``input`` and ``output``. A single file
    gives all of it as either split; a folder without test files gives its validation files as test split. ``alpaca`` is
    split as the literature does, by two seeded shuffles.

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
    splits = _local_splits(name_or_path, dataset_root)
    return name_or_path == "alpaca" or not {"test", "validation"}.isdisjoint(splits)


def _files(name: str, split: Split, dataset_root: Path | None, cache_dir: Path | None) -> list[Path]:
    hub = _HUB_DATASETS.get(name)
    if hub and dataset_root is None:
        return _download(hub, hub.files[split], cache_dir)
    splits = _local_splits(name, dataset_root)
    files = splits.get("any") or splits.get(split) or (splits.get("validation") if split == "test" else None)
    if not files:
        raise InputError(
            f"no {split} text in {_location(name, dataset_root)}; expected {_ACCEPTED} files with the split in their "
            f"name, found {', '.join(sorted(splits)) or 'none'}"
        )
    if len({(path.parent, path.suffix) for path in files}) > 1:
        names = ", ".join(map(str, files[:4]))
        raise InputError(f"several texts are called {split} ({names}...); give the folder or file of one")
    return files


def _local_splits(name: str, dataset_root: Path | None) -> dict[str, list[Path]]:
    """Return the files of a local text by split: train, test and validation of a folder, "any" of a single file.

    A split is read off the words of a file's name, else of the folders it is in. As on the Hugging Face Hub, files
    are all train when no name tells a split.
    """
    place = _location(name, dataset_root)
    if place.is_file():
        return {"any": [place]}
    splits = defaultdict(list)
    for path in sorted(place.rglob("*")):
        parts = path.relative_to(place).parts
        if path.is_file() and _ends(path, _SUFFIXES) and not any(part.startswith(".") for part in parts):
            words = (set(re.findall("[a-z]+", part.lower())) for part in reversed(parts))
            told = (split for found in words for split, names in _SPLIT_WORDS.items() if found & names)
            splits[next(told, "unnamed")].append(path)
    unnamed = splits.pop("unnamed", [])
    if unnamed and not splits:
        splits["train"] = unnamed
    hub = _HUB_DATASETS.get(name)
    published = {split: sorted(place.glob(pattern)) for split, pattern in hub.files.items()} if hub else {}
    # A clone may hold other configurations and shards.
    return splits | {split: files for split, files in published.items() if files}


def _location(name: str, dataset_root: Path | None) -> Path:
    """Return the file or folder that a name or path stands for, where the hub is not asked."""
    hub = _HUB_DATASETS.get(name)
    if hub and dataset_root:
        candidates = dict.fromkeys([name, hub.hub_id, hub.hub_id.split("/")[1], *hub.spellings])
        folders = [dataset_root / candidate for candidate in candidates if (dataset_root / candidate).is_dir()]
        files = [path for path in sorted(dataset_root.glob(f"{name}*")) if path.is_file() and _ends(path, _SUFFIXES)]
        if folders or len(files) == 1:
            return (folders or files)[0]
        raise InputError(
            f"no local copy of {name!r} in {dataset_root}; expected one of the folders {', '.join(candidates)} or "
            f"one file {name}* ({_ACCEPTED}), found {', '.join(path.name for path in files) or 'none'}"
        )
    path, advice = Path(name).expanduser(), f"known datasets: {', '.join(DATASET_NAMES)}; or a file or folder"
    if name == "pydocs":
        copy = dataset_root and dataset_root / name
        path = copy if copy and copy.is_dir() else EMBEDDED_TEXT
        advice = "this package is installed without the repository; give the path of its models/pydocs-llama/text"
    if not path.exists():
        raise InputError(f"no dataset or path called {name!r}; {advice}")
    return path


def _download(hub: _HubDataset, pattern: str, cache_dir: Path | None) -> list[Path]:
    """Return files of the hub's cache, got if need be; ``load_dataset(hub_id)`` asks the hub even for what is there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError

    try:
        folder = snapshot_download(
            hub.hub_id, repo_type="dataset", allow_patterns=pattern, cache_dir=cache_dir, etag_timeout=10
        )
        files = sorted(Path(folder).glob(pattern))
        if not files:  # an earlier download left a snapshot without these files, and there is no network now
            raise FileNotFoundError(f"no {pattern} in {folder}")
    except (OSError, HTTPError) as error:
        raise InputError(
            f"could not get {hub.hub_id} from the Hugging Face Hub ({_first_line(error)}); "
            "without a network give --dataset_root DIR with a local copy, or a path as the dataset"
        ) from error
    return files


def _read_documents(path: Path) -> list[str]:
    if not _ends(path, _SUFFIXES):
        raise InputError(f"{path} is not a kind of text file known here; accepted: {_ACCEPTED}")
    try:
        if _ends(path, _LINES):  # not by load_dataset("text"), which makes line feeds of carriage returns
            return path.read_bytes().decode().split("\n")
        return _read_records(path)
    except InputError:
        raise
    except (OSError, ValueError, EOFError, StopIteration, zlib.error, lzma.LZMAError) as error:
        raise InputError(f"{path} is damaged or not what its name says ({_first_line(error)})") from error


def _read_records(path: Path) -> list[str]:
    from datasets import load_dataset

    builder = "parquet" if _ends(path, (".parquet",)) else "json"
    pattern = re.sub(r"([*?[])", r"[\1]", str(path.absolute()))  # these characters would match others
    documents: list[str] = []
    # Streaming makes no copy of the text; all that the cache gets is a lock.
    with TemporaryDirectory() as cache, progress(None, f"reading {path.name}", "row") as bar:
        dataset = load_dataset(builder, data_files=pattern, split="train", streaming=True, cache_dir=cache)
        for columns in dataset.iter(1000):
            found = _documents_of(columns, path)
            documents += found
            bar.update(len(found))
    return documents


def _documents_of(columns: Mapping[str, list[Any]], path: Path) -> list[str]:
    if "text" in columns:
        parts = [columns["text"]]
    elif {"instruction", "output"} <= columns.keys():
        instructions, outputs = columns["instruction"], columns["output"]
        parts = [instructions, [given or "" for given in columns.get("input", [""] * len(outputs))], outputs]
    else:
        raise InputError(
            f"{path} has the columns {', '.join(columns)}; expected text, or instruction, input and output"
        )
    for value in chain(*parts):
        if not isinstance(value, str):
            raise InputError(f"{path} has {type(value).__name__} where text was expected")
    return parts[0] if len(parts) == 1 else list(map(_alpaca_prompt, *parts))


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


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
