"""What JSON records say of models, versions and hardware."""

import platform

import pytest
import torch
from safetensors.torch import load_file

from checkpoints import hub_cache
from conftest import tiny_model
from flatllmbench import provenance
from flatllmbench.provenance import describe_model, hardware, versions
from flatllmcore import FlatLLMPruner, InputError
from flatllmcore.utils.checkpoint import MANIFEST
from flatllmcore.utils.files import write_json
from tiny_text import documents, word_tokenizer


def test_versions_and_hardware_are_those_that_run_and_what_is_not_installed_is_left_out(monkeypatch):
    assert versions()["torch"] == torch.__version__
    assert versions()["python"] == platform.python_version()
    assert hardware(torch.device("cpu"))["device"].endswith(f"CPU, {torch.get_num_threads()} threads")

    monkeypatch.setattr(provenance, "_PACKAGES", ("torch", "no_such_package"))
    assert versions().keys() == {"python", "torch"}


@pytest.fixture
def compressed(tmp_path):
    """The folder of a compressed model whose dense one, with tied embeddings, is in the folder ``dense`` beside it."""
    model = tiny_model(tie_word_embeddings=True, max_position_embeddings=32)
    model.save_pretrained(tmp_path / "dense")
    pruner = FlatLLMPruner(model, word_tokenizer(), target_sparsity=0.3, cal_dataset=documents(40), cal_nsamples=4)
    pruner.prune_model()
    model.save_pretrained(tmp_path / "small")
    request = {"base_model": str(tmp_path / "dense"), "method": "flatllm"}
    write_json(tmp_path / "small" / MANIFEST, {"request": request})
    return tmp_path / "small"


def test_a_model_is_described_without_reading_its_weights(compressed):
    """Oracle: the tensors in the files of weights."""
    sizes = {}
    for base, name in ((None, "dense"), ("dense", "small")):
        file = compressed.parent / name / "model.safetensors"
        numbers = {weight: tensor.numel() for weight, tensor in load_file(file).items()}
        linear = sum(number for weight, number in numbers.items() if "_proj.weight" in weight)
        sizes[name] = {"total": sum(numbers.values()), "decoder_layers": linear}
        file.unlink()
        removed = pytest.approx(100 - 100 * linear / sizes["dense"]["decoder_layers"])
        expected = {"model": name, "base_model": base, "method": base and "flatllm", "parameters": sizes[name]}
        made = {"achieved_sparsity_percent": removed, "gradient_nsamples": None}
        assert describe_model(str(file.parent)) == expected | made
    assert sizes["small"]["decoder_layers"] < 0.8 * sizes["dense"]["decoder_layers"]


@pytest.mark.parametrize("has_manifest", [True, False])
def test_the_base_model_of_a_hub_id_is_read_without_network(compressed, tmp_path, monkeypatch, has_manifest):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    write_json(compressed / MANIFEST, {"request": {"base_model": "meta-llama/Llama-2-7b-hf"}})
    if not has_manifest:
        (compressed / MANIFEST).unlink()
    compressed.rename(hub_cache(tmp_path / "cache", "models--someone--small"))
    described = describe_model("someone/small", tmp_path / "cache")
    assert (described["model"], described["base_model"]) == ("small", "Llama-2-7b-hf" if has_manifest else None)


def test_a_manifest_that_does_not_say_what_was_compressed_is_none(compressed):
    (compressed / MANIFEST).write_text('{"request": {}}')
    assert describe_model(str(compressed))["base_model"] is None


@pytest.mark.parametrize("manifest", ["{", "{}"])
def test_a_damaged_manifest_is_refused_by_name(compressed, manifest):
    (compressed / MANIFEST).write_text(manifest)
    with pytest.raises(InputError, match=r"small/flat_llm\.json"):
        describe_model(str(compressed))
