"""What JSON records say of models, versions and hardware."""

import platform
from importlib.metadata import PackageNotFoundError

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import GPT2Config

from conftest import tiny_model
from flatllmbench import records
from flatllmbench.records import describe_model, hardware, versions
from flatllmcore import FlatLLMPruner, InputError
from flatllmcore.engine.checkpoint_sink import MANIFEST
from flatllmcore.utils.files import write_json
from tiny_text import documents, word_tokenizer


def test_versions_are_those_that_run():
    found = versions()
    assert found["torch"] == torch.__version__
    assert found["transformers"] == transformers.__version__
    assert found["python"] == platform.python_version()


def test_a_package_that_is_not_installed_is_left_out(monkeypatch):
    def version(package: str) -> str:
        if package == "datasets":
            raise PackageNotFoundError(package)
        return "1.0"

    monkeypatch.setattr(records, "version", version)
    assert "datasets" not in versions()
    assert versions()["torch"] == "1.0"


def test_the_hardware_names_the_device_and_the_threads_used():
    found = hardware(torch.device("cpu"))
    assert found["device"].endswith(f"CPU, {torch.get_num_threads()} threads")
    assert found["machine"] == platform.machine()


@pytest.fixture
def compressed(tmp_path):
    """The folder of a compressed model whose dense one, with tied embeddings, is in the folder ``dense`` beside it."""
    model = tiny_model(tie_word_embeddings=True, max_position_embeddings=32)
    model.save_pretrained(tmp_path / "dense")
    pruner = FlatLLMPruner(model, word_tokenizer(), target_sparsity=0.3, cal_dataset=documents(40), cal_nsamples=4)
    pruner.prune_model()
    model.save_pretrained(tmp_path / "small")
    write_json(tmp_path / "small" / MANIFEST, {"request": {"base_model": str(tmp_path / "dense")}})
    return tmp_path / "small"


def sizes(folder) -> dict[str, int]:
    """Count what is in the file of weights."""
    tensors = load_file(folder / "model.safetensors")
    linear = {name for name in tensors if "_proj.weight" in name}
    return {
        "total": sum(tensor.numel() for tensor in tensors.values()),
        "decoder_layers": sum(tensors[name].numel() for name in linear),
    }


def test_a_compressed_model_is_described_beside_its_dense_one(compressed):
    """Oracle: the tensors in the files of weights."""
    dense = sizes(compressed.parent / "dense")
    assert describe_model(compressed.parent / "dense") == {
        "model": "dense",
        "base_model": None,
        "achieved_sparsity_percent": 0.0,
        "parameters": dense,
    }
    described = describe_model(compressed)
    assert (described["model"], described["base_model"]) == ("small", "dense")
    assert described["parameters"] == sizes(compressed)
    removed = 1 - described["parameters"]["decoder_layers"] / dense["decoder_layers"]
    assert described["achieved_sparsity_percent"] == pytest.approx(100 * removed)
    assert removed > 0.2


def test_a_model_is_described_without_its_weights(compressed):
    expected = describe_model(compressed)
    (compressed / "model.safetensors").unlink()
    assert describe_model(str(compressed)) == expected


@pytest.mark.parametrize("has_manifest", [True, False])
def test_the_base_model_of_a_hub_id_is_that_of_its_manifest_and_needs_no_network(
    compressed, tmp_path, monkeypatch, has_manifest
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "cache" / "models--someone--small"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    write_json(compressed / MANIFEST, {"request": {"base_model": "meta-llama/Llama-2-7b-hf"}})
    if not has_manifest:
        (compressed / MANIFEST).unlink()
    compressed.rename(repository / "snapshots" / ("0" * 40))
    described = describe_model("someone/small", tmp_path / "cache")
    assert (described["model"], described["base_model"]) == ("small", "Llama-2-7b-hf" if has_manifest else None)


@pytest.mark.parametrize("manifest", ["{", "{}"])
def test_a_damaged_manifest_is_refused_by_name(compressed, manifest):
    (compressed / MANIFEST).write_text(manifest)
    with pytest.raises(InputError, match=r"small/flat_llm\.json"):
        describe_model(compressed)


def test_a_family_that_is_not_supported_is_refused(tmp_path):
    GPT2Config(n_layer=1, n_embd=8, n_head=1).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="'gpt2' is not supported"):
        describe_model(tmp_path)
