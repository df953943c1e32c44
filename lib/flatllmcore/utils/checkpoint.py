"""The folder of a compressed model: whether it may be written, how it is put in place, and its model card."""

import logging
import os
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from huggingface_hub import ModelCard, ModelCardData

from ..errors import InputError, door
from .dimensions import LayerRecord
from .files import LEFT_OVER, check_writable, read_json
from .names import STOCK, public_name, public_text

logger = logging.getLogger(__name__)

MANIFEST, MODEL_CARD = "flat_llm.json", "README.md"
_REPLACED = ".replaced"  # where a model is, in the one that takes its place, until it is deleted

_CARD = """\
---
{metadata}
---

# {name}, compressed by FLAT-LLM

{achieved_sparsity_percent:.2f} % of the decoder layers' linear weights were removed, without training: {parts}.

| | dense | compressed |
|---|---:|---:|
| decoder-layer linear weights | {parameters_before[decoder_linear]:,} | {parameters_after[decoder_linear]:,} |
| all parameters | {parameters_before[total]:,} | {parameters_after[total]:,} |
{perplexities}
- Base model: {name}{rounded}.
- Removed: {sparsity_ratio:g} % asked, {achieved_sparsity_percent:.3f} % achieved.
- Calibration: {dataset}, {nsamples} samples of {seqlen} tokens, seed {seed}.
- Versions: {packages}.
{uneven}- Command: `{command}`

{loading}`AutoModelForCausalLM.from_pretrained` loads this folder.
"""

_UNEVEN = """\
- Quantisation: not all inputs of linear layers are multiples of 64 (but of {input_divisor}), as groups of weights want.
  bitsandbytes' NF4 is silently wrong on the others on a CPU.
"""


@dataclass
class Manifest:
    """What was asked, what is worth remembering, and which layers are done: the whole state of a run."""

    request: dict[str, Any]
    results: dict[str, Any] = field(default_factory=dict)
    layers: list[LayerRecord] = field(default_factory=list)
    shards: dict[str, str] = field(default_factory=dict)  # SHA-256 of each layer's file
    files: list[str] = field(default_factory=list)  # in its folder that the run writes, itself apart


def read_manifest(folder: Path, asked: Mapping[str, Any]) -> Manifest | None:
    """Return the manifest in a folder, if there is one; InputError if it is of another request than the one asked."""
    if not (folder / MANIFEST).exists():
        return None
    manifest = read_json(folder / MANIFEST, Manifest)
    earlier = manifest.request
    changed = "; ".join(
        f"{name} {asked.get(name)}, not {earlier.get(name)}"
        for name in sorted(earlier.keys() | asked.keys())
        if asked.get(name) != earlier.get(name)
    )
    if changed:
        raise InputError(f"{folder} holds a run of another request ({changed}); finish that one or delete it")
    return manifest


def partial_folder(folder: Path) -> Path:
    """Return where a model is written until it is whole."""
    folder = Path(os.path.realpath(folder))
    return folder.parent / f"{folder.name}.partial"  # also of /, which has no name


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder that a run writes inside the block; InputError if another run has it."""
    place = _lock_file(folder)
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        held = FileLock(place).acquire(timeout=0)
    except Timeout as error:
        raise InputError(f"another run is writing {folder}; wait for it, or give another place") from error
    with held:
        try:
            yield
        finally:
            place.unlink(missing_ok=True)


def _lock_file(folder: Path) -> Path:
    """Return the file that a run holds, beside the folder so that it outlives the renaming; refuse what is no lock."""
    place = partial_folder(folder).with_name(f".{partial_folder(folder).name}.lock")
    _check_is_ours(place, place.is_file() and not place.stat().st_size)
    return place


def _check_is_ours(place: Path, is_ours: bool) -> None:
    if os.path.lexists(place) and (place.is_symlink() or not is_ours):  # a link would be renamed and not the folder
        raise InputError(f"{place} is in the way: it is no unfinished run's; move it, or give another folder")


def check_output_folder(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that a model cannot be put at, or not without harm to what is there.

    It must be missing or empty, or, with ``overwrite``, hold what its manifest says that a run wrote and nothing else.
    """
    partial = partial_folder(folder)
    if folder.exists():
        if not folder.is_dir() or os.path.ismount(folder):  # to which nothing can be renamed
            raise InputError(f"cannot save to {folder}: it is a file, or a file system is mounted there")
        if any(folder.iterdir()) and not overwrite:
            raise InputError(f"cannot save to {folder}: it is not empty; give another folder or ask to overwrite it")
        if other := find_other(folder):
            raise InputError(f"cannot overwrite {folder}: no run wrote {other}; move it, or give another folder")
    for place in (Path(os.path.realpath(folder)), partial.parent):
        check_writable(place)
    is_begun = partial.is_dir() and (  # if only what a kill left of writing its manifest
        (partial / MANIFEST).is_file() or all(p.match(LEFT_OVER) and p.is_file() for p in partial.iterdir())
    )
    _check_is_ours(partial, is_begun)
    _lock_file(folder)


def find_other(folder: Path) -> Path | None:
    """Return something in a folder that its manifest does not say that a run wrote there, if there is such."""
    manifest = folder / MANIFEST
    names = [MANIFEST, *read_json(manifest, Manifest).files] if manifest.is_file() else []
    known = {place for name in names for place in (folder / name, *(folder / name).parents)}
    found = (path for path in folder.rglob("*") if folder / _REPLACED not in (path, *path.parents))
    return next((path for path in found if path not in known), None)


def stated_licence(card: Path | None) -> dict[str, Any]:
    """Return in words what a model card, if there is one, says of its model's licence, by the names in front matter."""
    if card is None:
        return {}
    with door(f"the model card {card} cannot be read", "mend it, or take it away"):
        stated = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    found = {}
    for name in ("license", "license_name", "license_link"):
        words = of if isinstance(of := stated.get(name), list) else [of]
        if words and all(
            isinstance(word, str | int | float | date) and not isinstance(word, bool) for word in words[:9]
        ):
            found[name] = ", ".join(map(str, words[:9]))  # not all: an alias may make endless ones
        elif of is not None:
            logger.warning("%s: its %s is not in words, and left out", card, name)
    return found


def model_card(record: Mapping[str, Any], parts: str) -> str:
    """Return the Markdown model card, with YAML front matter, of a compressed model from the record of its run.

    ``parts`` is what its method does to a layer, in words.
    """
    base_model = str(record["base_model"])
    name = public_name(base_model)
    is_local = Path(base_model).exists()
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["flat-llm", "compressed"],
        base_model=None if is_local else base_model,  # the hub links this name to a repository
        flat_llm={"base_model": name} | {of: record[of] for of in ("method", "sparsity_ratio")},
        **record["licence"],
    )
    loading = "After `import flatllmcore`, or with `trust_remote_code=True` where it is not installed, "
    if record["shape"] == STOCK:
        parts = "channels of the MLPs, as many in every layer"
        loading = "The model is of the same class as the base model, and plain "
    packages = ", ".join(f"{package} {version}" for package, version in record["versions"].items())
    words = (
        word if word == name else re.sub(r"^(--\w+=)?.*/(?=.)", r"\1", public_text(word))
        for word in shlex.split(record["command"])
    )
    public = {"dataset": public_text(record["dataset"]), "command": shlex.join(words)}
    perplexities = "".join(
        f"| perplexity ({public_name(of['dataset'])}, windows of {of['seqlen']} tokens) | {of['dense']:.3f} | "
        f"{of['compressed']:.3f} |\n"
        for of in record["perplexity"]
    )
    rounded = f", whose weights its publisher had rounded to {bits}" if (bits := record["rounded_to"]) else ""
    made = {"metadata": data.to_yaml(), "name": name, "parts": parts, "packages": packages}
    made |= {"perplexities": perplexities, "rounded": rounded, "loading": loading}
    made["uneven"] = _UNEVEN.format(**record) if record["input_divisor"] % 64 else ""
    return _CARD.format(**{**record, **public, **made})


def put_in_place(complete: Path, folder: Path, overwrite: bool) -> None:
    """Rename ``complete`` to ``folder``; a model that ``overwrite`` replaces goes into the former, and then away.

    Where it cannot be deleted a warning says so: the new one is in its place all the same.
    """
    check_output_folder(folder, overwrite)  # others may have written there in the meantime
    replaced = complete / _REPLACED
    try:
        if folder.exists():
            folder.rename(replaced)
        complete.rename(folder)
    except BaseException:
        if replaced.exists() and not folder.exists():
            replaced.rename(folder)
        raise
    try:
        if (folder / _REPLACED).exists():
            shutil.rmtree(folder / _REPLACED)
    except OSError as error:
        logger.warning("the new model is in %s; the earlier one, in it, cannot be deleted: %s", folder, error)
