"""The folder of a compressed model: whether it may be written, how it is put in place, and its model card."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from ..errors import InputError
from .layer_utils import model_name

_CARD = """\
---
{metadata}
---

# {name}, compressed by FLAT-LLM

{achieved_sparsity_percent:.2f} % of the decoder layers' linear weights were removed, without training: \
{projections} projections by head-wise PCA, MLPs by Nyström approximation.

| | dense | compressed |
|---|---:|---:|
| decoder-layer linear weights | {parameters_before[decoder_linear]:,} | {parameters_after[decoder_linear]:,} |
| all parameters | {parameters_before[total]:,} | {parameters_after[total]:,} |
| perplexity ({perplexity[dataset]}, windows of {perplexity[seqlen]} tokens) | {perplexity[dense]:.3f} \
| {perplexity[compressed]:.3f} |

- Removed: {sparsity_ratio:g} % asked, {achieved_sparsity_percent:.3f} % achieved.
- Calibration: {dataset}, {nsamples} samples of {seqlen} tokens, seed {seed}.
- Versions: {packages}.
- Command: `{command}`

After `import flatllmcore`, or with `trust_remote_code=True` where it is not installed, \
`AutoModelForCausalLM.from_pretrained` loads this folder.
"""


def check_output_folder(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that is neither missing nor empty, nor holds a model where ``overwrite`` is given."""
    if not folder.exists():
        return
    if not folder.is_dir() or os.path.ismount(folder):  # to which nothing can be renamed
        raise InputError(f"cannot save to {folder}: it is a file, or a file system is mounted there")
    if not any(folder.iterdir()):
        return
    if not overwrite:
        raise InputError(f"cannot save to {folder}: it is not empty; give another folder or ask to overwrite it")
    if not (folder / "config.json").is_file():
        raise InputError(f"cannot overwrite {folder}: it holds no model (no config.json); give another folder")


def model_card(record: Mapping[str, Any]) -> str:
    """Return the Markdown model card, with YAML front matter, of a compressed model from the record of its run."""
    base_model = str(record["base_model"])
    is_local = Path(base_model).exists()
    name = model_name(base_model) if is_local else base_model
    data = ModelCardData(
        library_name="transformers",
        tags=["flat-llm", "compressed"],
        base_model=None if is_local else base_model,  # the hub links this name to a repository
        flat_llm={"base_model": name, "sparsity_ratio": record["sparsity_ratio"]},
    )
    projections = "query, key, value and output" if record["prune_qk"] else "value and output"
    packages = ", ".join(f"{package} {version}" for package, version in record["versions"].items())
    return _CARD.format(**record, metadata=data.to_yaml(), name=name, projections=projections, packages=packages)


def put_in_place(complete: Path, folder: Path) -> None:
    """Rename ``complete`` to ``folder``; what stood there is deleted when that is done."""
    replaced = folder.with_name(f".{folder.name}.replaced")
    if folder.exists():
        shutil.rmtree(replaced, ignore_errors=True)  # of a run that was killed before it had deleted it
        folder.rename(replaced)
    try:
        complete.rename(folder)
    except BaseException:
        if replaced.exists():
            replaced.rename(folder)
        raise
    if replaced.exists():
        shutil.rmtree(replaced)
