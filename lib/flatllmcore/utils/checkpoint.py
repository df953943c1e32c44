"""The folder of a compressed model: whether it may be written, how it is put in place, and its model card."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..errors import InputError
from ..layers.flat_attention import HeadwiseFactoredLinear
from .layer_utils import model_name

_NOT_RUN = "not run"


def check_output_folder(folder: Path, overwrite: bool) -> None:
    """Check that a model may be written to ``folder``; worth calling before the work whose result goes there.

    Raises:
        InputError: If ``folder`` is a file, or is not empty and ``overwrite`` is not given, or holds something
            other than a model.
    """
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


def count_parameters(model: PreTrainedModel) -> dict[str, int]:
    """Return ``decoder_linear``, weights of linear layers inside decoder layers, and ``total``, tied ones once.

    The second factors of pruned queries and keys count as linear weights.
    """
    modules = list(model.base_model.layers.modules())
    weights = [module.weight for module in modules if isinstance(module, nn.Linear)]
    weights += [module.up for module in modules if isinstance(module, HeadwiseFactoredLinear)]
    return {
        "decoder_linear": sum(weight.numel() for weight in weights),
        "total": sum(parameter.numel() for parameter in model.parameters()),
    }


def model_card(record: Mapping[str, Any]) -> str:
    """Return the Markdown model card, with YAML front matter, of a compressed model.

    Args:
        record: How the model was made:

            - ``base_model``: Hub id or folder of the dense model.
            - ``sparsity_ratio``, ``achieved_sparsity_percent``: percent of decoder-layer linear weights removed,
              asked and achieved.
            - ``prune_qk``: whether queries and keys were pruned too.
            - ``parameters_before``, ``parameters_after``: as :func:`count_parameters`.
            - ``dataset``, ``nsamples``, ``seqlen``, ``seed``: the calibration text.
            - ``perplexity``: ``{"dense": ..., "compressed": ..., "dataset": ..., "seqlen": ...}``, or nothing.
            - ``versions``: of libraries, by name.
            - ``command``: what was typed.
    """
    base_model = str(record["base_model"])
    is_local = Path(base_model).exists()
    base_name = model_name(base_model) if is_local else base_model
    front_matter = ["---", "library_name: transformers", "tags:", "- flat-llm", "- compressed"]
    if not is_local:  # the hub links this name to a repository
        front_matter.append(f"base_model: {json.dumps(base_model)}")
    front_matter += ["flat_llm:", f"  base_model: {json.dumps(base_name)}"]
    front_matter.append(f"  sparsity_ratio: {record['sparsity_ratio']:g}")
    return "\n".join([*front_matter, "---", "", *_facts(base_name, record), "", *_HOW_TO_LOAD])


def _facts(base_name: str, record: Mapping[str, Any]) -> list[str]:
    before, after = record["parameters_before"], record["parameters_after"]
    projections = "query, key, value and output" if record["prune_qk"] else "value and output"
    perplexity = record.get("perplexity") or {}
    measured_on = f" ({perplexity['dataset']}, windows of {perplexity['seqlen']} tokens)" if perplexity else ""
    return [
        f"# {base_name}, compressed by FLAT-LLM",
        "",
        f"{record['achieved_sparsity_percent']:.2f} % of the decoder layers' linear weights were removed,"
        f" without training: {projections} projections by head-wise PCA, MLPs by Nyström approximation.",
        "",
        "| | dense | compressed |",
        "|---|---:|---:|",
        f"| decoder-layer linear weights | {before['decoder_linear']:,} | {after['decoder_linear']:,} |",
        f"| all parameters | {before['total']:,} | {after['total']:,} |",
        f"| perplexity{measured_on} | {_figure(perplexity.get('dense'))} | {_figure(perplexity.get('compressed'))} |",
        "",
        f"- Removed: {record['sparsity_ratio']:g} % asked, {record['achieved_sparsity_percent']:.3f} % achieved.",
        f"- Calibration: {record['dataset']}, {record['nsamples']} samples of {record['seqlen']} tokens,"
        f" seed {record['seed']}.",
        f"- Versions: {', '.join(f'{name} {version}' for name, version in record['versions'].items())}.",
        f"- Command: `{record['command']}`",
    ]


def _figure(perplexity: float | None) -> str:
    return _NOT_RUN if perplexity is None else f"{perplexity:.3f}"


_HOW_TO_LOAD = """\
## Use

With `flatllmcore` installed:

```python
import flatllmcore
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

Without it, by the modelling files in this folder:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", trust_remote_code=True)
```
""".splitlines()


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
