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
| perplexity{measured_on} | {dense} | {compressed} |

- Removed: {sparsity_ratio:g} % asked, {achieved_sparsity_percent:.3f} % achieved.
- Calibration: {dataset}, {nsamples} samples of {seqlen} tokens, seed {seed}.
- Versions: {packages}.
- Command: `{command}`

## Use

With `flatllmcore` installed (else with `trust_remote_code=True`, by the modelling files in this folder):

```python
import flatllmcore
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```
"""


def check_output_folder(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that is neither missing nor empty, nor holds a model where ``overwrite`` is given."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"cannot save to {folder}: it is a file; give a folder")
    if os.path.ismount(folder):  # nothing can be renamed to it
        raise InputError(f"cannot save to {folder}: a file system is mounted there; give a folder inside it")
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
    measured_on, dense, compressed = "", "not run", "not run"
    if perplexity := record.get("perplexity"):
        measured_on = f" ({perplexity['dataset']}, windows of {perplexity['seqlen']} tokens)"
        dense, compressed = (f"{perplexity[which]:.3f}" for which in ("dense", "compressed"))
    return _CARD.format_map(
        {
            **record,
            "metadata": data.to_yaml(),
            "name": name,
            "projections": "query, key, value and output" if record["prune_qk"] else "value and output",
            "measured_on": measured_on,
            "dense": dense,
            "compressed": compressed,
            "packages": ", ".join(f"{package} {version}" for package, version in record["versions"].items()),
        }
    )


def put_in_place(complete: Path, folder: Path) -> None:
    """Rename ``complete`` to ``folder``; what stood there is deleted when that is done."""
    replaced = folder.with_name(f".{folder.name}.replaced")
    if folder.exists():
        if replaced.exists():  # of a run that was killed before it had deleted it
            shutil.rmtree(replaced)
        folder.rename(replaced)
    try:
        complete.rename(folder)
    except BaseException:
        if replaced.exists():
            replaced.rename(folder)
        raise
    if replaced.exists():
        shutil.rmtree(replaced)
