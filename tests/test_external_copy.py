"""A copy of the package inside another project, as ``external/flatllmcore``, works without the package itself."""

import re
import shutil
import sys
from importlib.metadata import packages_distributions

import pytest

from python_process import BLOCKED, LIBRARY, run_python, run_python_anew
from user_document import SAMPLES

PACKAGE = LIBRARY / "flatllmcore"
# Beside what is installed here, what may be where a copy is put on the path.
WELL_KNOWN = """
bitsandbytes cv2 deepspeed diffusers einops faiss fedcore flask h5py httpx jax keras lightning numba omegaconf onnx
optimum peft polars ray seaborn sentencepiece spacy tdecomp tensorboard tensorflow timm toml torchaudio torchvision
triton trl wandb wheel xformers
"""

COMPRESS = """
import torch
from external.flatllmcore import FlatLLMConfig, FlatLLMReassembler
from transformers import AutoModelForCausalLM

from conftest import tiny_model
from tiny_text import documents, word_tokenizer

model, tokenizer = tiny_model(), word_tokenizer()
config = FlatLLMConfig(target_sparsity=0.5, cal_dataset=documents(60), cal_nsamples=8, seqlen=16, device="cpu")
dense_size = model.num_parameters()
compressed_model = FlatLLMReassembler.reassemble(model, tokenizer, config)
assert compressed_model is model
assert type(model).__module__ == "external.flatllmcore.layers.flat_models"

model.save_pretrained("{folder}")
ids = torch.randint(97, (2, 10))
reloaded = AutoModelForCausalLM.from_pretrained("{folder}", dtype=torch.float64)
assert type(reloaded) is type(model)
assert torch.equal(reloaded(ids).logits, model(ids).logits)
assert reloaded.num_parameters() < dense_size

{analysis}

from external.flatllmcore.core.absorption import AbsorptionCompressor
from external.flatllmcore import layers
import sys
assert not [name for name in sys.modules if name.partition(".")[0] == "flatllmcore" and sys.modules[name]]
"""


def test_a_copy_compresses_saves_and_reloads(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "external/flatllmcore", ignore=shutil.ignore_patterns("__pycache__"))
    code = COMPRESS.format(folder=tmp_path / "saved", analysis=SAMPLES["Layer-specific analysis"])
    sparsity, dimensions = run_python(BLOCKED + code, [tmp_path]).splitlines()
    assert sparsity.startswith("Current sparsity: 0.5")
    assert dimensions.startswith("Model dimensions: {'architecture': 'llama', 'num_layers': 2,")


OLDER = """
import sys
from types import ModuleType
sys.modules["transformers"] = ModuleType("transformers")
sys.modules["transformers"].__version__ = "4.41.2"
sys.path[:0] = [{core!r}] * {is_alone}
try:
    import {module}
except ImportError as error:
    print(error)
"""


@pytest.mark.parametrize("module", ["flatllmcore", "external.flatllmcore", "external.flatllmcore.utils", "absorption"])
def test_an_older_transformers_is_refused_in_a_line_with_the_version_needed(module, tmp_path):
    """Oracle: what pyproject.toml asks for. The last is FedCore's way to load a copy."""
    copy = shutil.copytree(PACKAGE, tmp_path / "external" / "flatllmcore")
    code = OLDER.format(module=module, core=str(copy / "core"), is_alone=module == "absorption")
    needed = re.search(r"transformers>=([\d.]+)", (LIBRARY.parent / "pyproject.toml").read_text())[1]
    expected = f"flatllmcore needs transformers {needed} or later; here it is 4.41.2\n"
    assert run_python(code, [tmp_path, LIBRARY]) == expected


def test_python_without_docstrings_which_transformers_reads_is_refused():
    code = "try:\n import flatllmcore\nexcept ImportError as error:\n print(error)"
    expected = "transformers reads docstrings, which -OO and PYTHONOPTIMIZE=2 leave out; run Python without\n"
    assert run_python_anew(code, PYTHONOPTIMIZE="2") == expected


def test_no_file_shadows_a_known_module():
    """FedCore puts these two folders at the front of sys.path."""
    names = {path.name.removesuffix(".py") for folder in (PACKAGE, PACKAGE / "core") for path in folder.iterdir()}
    assert not names & {*sys.stdlib_module_names, *packages_distributions(), *WELL_KNOWN.split()}
