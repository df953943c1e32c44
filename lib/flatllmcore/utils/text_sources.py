"""Where text comes from: a named dataset on the Hugging Face Hub, a local copy of it, pydocs, or a path."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import InputError
from .pydocs import pydocs_documents
from .text_files import RECORD_SEPARATOR, SUFFIXES, is_text_file, read_documents, split_files

Split = Literal["train", "test"]
HUB_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class TextDataset:
    """One split of a text: ``separator.join(documents)`` is the whole of it."""

    name: str
    split: str
    documents: list[str]
    separator: str


@dataclass(frozen=True)
class _HubDataset:
    """A dataset on the hub: which files hold each split, and other names its local copies go by."""

    hub_id: str
    files: dict[str, str]
    spellings: tuple[str, ...] = ()


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

    A single file has no splits: either name gives all of it. The test split of a folder is its
    validation files when it has no test files.

    Args:
        name_or_path: One of ``DATASET_NAMES``, else a path (``./c4`` for a folder called like a dataset).
        split: Which part; ``alpaca`` is split as the literature does, by two seeded shuffles.
        dataset_root: Folder with local copies of the named datasets; when given, the hub is not asked.
        cache_dir: Where files from the hub are kept; the hub's own cache by default.

    Raises:
        InputError: If there is no such text, it cannot be read, or the hub cannot be reached.
    """
    if name_or_path == "pydocs":
        return TextDataset(name_or_path, split, pydocs_documents(split), RECORD_SEPARATOR)
    published_split: Split = "train" if name_or_path == "alpaca" else split
    contents = [read_documents(path) for path in _files(name_or_path, published_split, dataset_root, cache_dir)]
    documents = [document for documents, _ in contents for document in documents]
    if name_or_path == "alpaca":
        documents = _alpaca_split(documents, split)
    return TextDataset(name_or_path, split, documents, contents[0][1])


def has_test_split(name_or_path: str, dataset_root: Path | None = None) -> bool:
    """Tell whether a text keeps apart a part to evaluate on; a single file does not.

    Raises:
        InputError: If there is no such text.
    """
    hub = _HUB_DATASETS.get(name_or_path)
    if name_or_path == "pydocs" or (hub and dataset_root is None):
        return True
    location = _location(name_or_path, hub, dataset_root)
    if name_or_path == "alpaca":
        return True
    return location.is_dir() and not {"test", "validation"}.isdisjoint(split_files(location))


def _files(name: str, split: Split, dataset_root: Path | None, cache_dir: Path | None) -> list[Path]:
    hub = _HUB_DATASETS.get(name)
    if hub and dataset_root is None:
        return _download(hub, hub.files[split], cache_dir)
    location = _location(name, hub, dataset_root)
    if location.is_file():
        return [location]
    published = sorted(location.glob(hub.files[split])) if hub else []
    return published or _files_of_split(location, split)  # a clone may hold other configurations and shards


def _location(name: str, hub: _HubDataset | None, dataset_root: Path | None) -> Path:
    if hub and dataset_root:
        return _local_copy(name, hub, dataset_root)
    path = Path(name).expanduser()
    if not path.exists():
        raise InputError(
            f"no dataset or path called {name!r}; known datasets: {', '.join(DATASET_NAMES)}; "
            f"or a folder or file ({', '.join(SUFFIXES)})"
        )
    return path


def _local_copy(name: str, hub: _HubDataset, root: Path) -> Path:
    candidates = [name, hub.hub_id, hub.hub_id.split("/")[1], *hub.spellings]
    folders = [root / candidate for candidate in candidates if (root / candidate).is_dir()]
    files = [path for path in sorted(root.glob(f"{name}*")) if path.is_file() and is_text_file(path)]
    if folders:
        return folders[0]
    if not files:
        raise InputError(
            f"no local copy of {name!r} in {root}; looked for the folders {', '.join(dict.fromkeys(candidates))} "
            f"and a file {name}* ({', '.join(SUFFIXES)})"
        )
    if len(files) > 1:
        names = ", ".join(path.name for path in files)
        raise InputError(f"several files in {root} could be {name!r} ({names}); give the path of one as the dataset")
    return files[0]


def _files_of_split(folder: Path, split: Split) -> list[Path]:
    splits = split_files(folder)
    files = splits.get(split) or (splits.get("validation") if split == "test" else None)
    if not files:
        raise InputError(
            f"no {split} text in {folder}; expected {', '.join(SUFFIXES)} files with the split in their name, "
            f"found {', '.join(sorted(splits)) or 'none'}"
        )
    kinds = {(path.parent, path.suffix) for path in files}
    if len(kinds) > 1:
        names = ", ".join(str(path.relative_to(folder)) for path in files[:4])
        raise InputError(f"several texts are called {split} in {folder} ({names}...); give the folder or file of one")
    return files


def _download(hub: _HubDataset, pattern: str, cache_dir: Path | None) -> list[Path]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError

    try:
        folder = snapshot_download(
            hub.hub_id,
            repo_type="dataset",
            allow_patterns=pattern,
            cache_dir=cache_dir,
            etag_timeout=HUB_TIMEOUT_S,
        )
        files = sorted(Path(folder).glob(pattern))
        if not files:  # an earlier download left a snapshot without these files, and there is no network now
            raise FileNotFoundError(f"no {pattern} in {folder}")
    except (OSError, HTTPError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"could not get {hub.hub_id} from the Hugging Face Hub ({reason}); "
            "without a network give --dataset_root DIR with a local copy, or a path as the dataset"
        ) from error
    return files


def _alpaca_split(documents: list[str], split: Split) -> list[str]:
    """Return the split SliceGPT made: a fifth held out with seed 42, then the first half of that as test."""
    from datasets import Dataset

    parts = Dataset.from_dict({"text": documents}).train_test_split(test_size=0.2, seed=42)
    if split == "train":
        return list(parts["train"]["text"])
    return list(parts["test"].train_test_split(test_size=0.5, seed=42)["train"]["text"])
