"""A copy of the package inside another project, as ``external/flatllmcore``, works without the package itself."""

import shutil
import sys

import pytest

from python_process import BLOCKED, LIBRARY, run_python
from user_document import SAMPLES

PACKAGE = LIBRARY / "flatllmcore"
# Not of the standard library, and likely to be imported in the process that puts these folders on its path.
WELL_KNOWN = """
absl accelerate aiohttp attr attrs bitsandbytes bs4 certifi click cv2 datasets deepspeed diffusers einops evaluate
faiss fastapi fedcore filelock flask fsspec gradio h5py httpx huggingface_hub hypothesis jax jinja2 joblib keras
lightning lm_eval matplotlib mpmath msgspec multidict networkx nltk numba numpy omegaconf onnx optimum packaging pandas
peft PIL pkg_resources pluggy polars psutil pyarrow pydantic pytest ray regex requests rich safetensors scipy seaborn
sentencepiece setuptools six sklearn spacy sympy tdecomp tensorboard tensorflow timm tokenizers toml torch torchaudio
torchvision tqdm transformers triton trl typing_extensions urllib3 wandb wheel xformers yaml
"""

COMPRESS = """
import torch
from {package} import FlatLLMConfig, FlatLLMReassembler
from transformers import AutoModelForCausalLM

from conftest import tiny_model
from tiny_text import documents, word_tokenizer

model, tokenizer = tiny_model(), word_tokenizer()
config = FlatLLMConfig(target_sparsity=0.5, cal_dataset=documents(60), cal_nsamples=8, seqlen=16, device="cpu")
dense_size = model.num_parameters()
compressed_model = FlatLLMReassembler.reassemble(model, tokenizer, config)
assert compressed_model is model
assert type(model).__module__ == "{package}.layers.flat_llama"

model.save_pretrained("{folder}")
ids = torch.randint(97, (2, 10))
reloaded = AutoModelForCausalLM.from_pretrained("{folder}", dtype=torch.float64)
assert type(reloaded) is type(model)
assert torch.equal(reloaded(ids).logits, model(ids).logits)
assert reloaded.num_parameters() < dense_size

{analysis}

from {package}.core.absorption import AbsorptionCompressor
from {package} import layers
import sys
assert not [name for name in sys.modules if name.partition(".")[0] == "flatllmcore" and sys.modules[name]]
"""


@pytest.mark.parametrize("package", ["external.flatllmcore", "fedcore.external.flatllmcore"])
def test_a_copy_compresses_saves_and_reloads(package, tmp_path):
    copy = tmp_path.joinpath(*package.split("."))
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    analysis = SAMPLES["Layer-specific analysis"].replace("external.flatllmcore", package)
    code = COMPRESS.format(package=package, folder=tmp_path / "saved", analysis=analysis)
    sparsity, dimensions = run_python(BLOCKED + code, [tmp_path]).splitlines()
    assert sparsity.startswith("Current sparsity: 0.5")
    assert dimensions.startswith("Model dimensions: {'architecture': 'llama', 'num_layers': 2,")


def test_no_file_shadows_a_known_module():
    """FedCore puts these two folders at the front of sys.path."""
    names = {path.stem for folder in (PACKAGE, PACKAGE / "core") for path in folder.iterdir()} - {"__init__"}
    assert not names & (set(sys.stdlib_module_names) | set(WELL_KNOWN.split()))
