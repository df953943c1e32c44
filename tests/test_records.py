"""What JSON records say of models, versions and hardware."""

import platform
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from safetensors.torch import load_file

from conftest import tiny_model
from flatllmbench import records
from flatllmbench.records import describe_model, hardware, versions
from flatllmcore import FlatLLMPruner, InputError
from flatllmcore.engine.checkpoint_sink import MANIFEST
from flatllmcore.utils.files import write_json
from tiny_text import documents, word_tokenizer


def test_versions_and_hardware_are_those_that_run_and_what_is_not_installed_is_left_out(monkeypatch):
    assert versions()["torch"] == torch.__version__
    assert versions()["python"] == platform.python_version()
    assert hardware(torch.device("cpu"))["device"].endswith(f"CPU, {torch.get_num_threads()} threads")

    def version(package: str) -> str:
        if package == "datasets":
            raise PackageNotFoundError(package)
        return "1.0"

    monkeypatch.setattr(records, "version", version)
    assert "datasets" not in versions()


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
    numbers = {name: tensor.numel() for name, tensor in load_file(folder / "model.safetensors").items()}
    linear = (number for name, number in numbers.items() if "_proj.weight" in name)
    return {"total": sum(numbers.values()), "decoder_layers": sum(linear)}


def test_a_model_is_described_without_reading_its_weights(compressed):
    """Oracle: the tensors in the files of weights."""
    dense, small = sizes(compressed.parent / "dense"), sizes(compressed)
    for folder in (compressed, compressed.parent / "dense"):
        (folder / "model.safetensors").unlink()
    expected = {"model": "dense", "base_model": None, "achieved_sparsity_percent": 0.0, "parameters": dense}
    assert describe_model(compressed.parent / "dense") == expected
    removed = 1 - small["decoder_layers"] / dense["decoder_layers"]
    assert removed > 0.2
    expected = {"model": "small", "base_model": "dense", "parameters": small}
    assert describe_model(compressed) == expected | {"achieved_sparsity_percent": pytest.approx(100 * removed)}


@pytest.mark.parametrize("has_manifest", [True, False])
def test_the_base_model_of_a_hub_id_is_read_without_network(compressed, tmp_path, monkeypatch, has_manifest):
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
