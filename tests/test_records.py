"""The JSON record of a run."""

import json
import platform
from importlib.metadata import PackageNotFoundError

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import GPT2Config

from conftest import tiny_model
from flatllmbench import records
from flatllmbench.records import describe_model, hardware, versions, write_record
from flatllmcore import FlatLLMPruner, InputError
from flatllmcore.utils.checkpoint import model_card
from layers.test_checkpoint import RECORD as CARD
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


def test_a_record_is_read_back_as_it_was_and_makes_its_folder(tmp_path):
    record = {"layers": [{"layer": 0, "keep": 0.1 + 0.2}], "perplexity": None, "text": "wörter"}
    write_record(tmp_path / "new" / "run.json", record)
    assert json.loads((tmp_path / "new" / "run.json").read_text()) == record


def test_a_record_that_cannot_be_written_leaves_the_earlier_one(tmp_path):
    write_record(tmp_path / "run.json", {"run": 1})
    with pytest.raises(TypeError):
        write_record(tmp_path / "run.json", {"run": object()})
    assert json.loads((tmp_path / "run.json").read_text()) == {"run": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


@pytest.fixture
def compressed(tmp_path):
    """The folder of a compressed model whose dense one, with tied embeddings, is in the folder ``dense`` beside it."""
    model = tiny_model(tie_word_embeddings=True, max_position_embeddings=32)
    model.save_pretrained(tmp_path / "dense")
    pruner = FlatLLMPruner(model, word_tokenizer(), target_sparsity=0.3, cal_dataset=documents(40), cal_nsamples=4)
    pruner.prune_model()
    card = model_card(CARD | {"base_model": str(tmp_path / "dense"), "sparsity_ratio": 30})
    model.save_pretrained(tmp_path / "small")
    (tmp_path / "small" / "README.md").write_text(card)
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


def test_the_base_model_of_a_hub_id_is_named_as_its_own_description_names_it(compressed):
    (compressed / "README.md").write_text(model_card(CARD))  # made from meta-llama/Llama-2-7b-hf
    assert describe_model(compressed)["base_model"] == "Llama-2-7b-hf"


@pytest.mark.parametrize("card", [None, "", "# a card", "---\nlicense: mit\n---\n"])
def test_a_compressed_model_whose_card_does_not_say_has_no_base_model(compressed, card):
    (compressed / "README.md").unlink()
    if card is not None:
        (compressed / "README.md").write_text(card)
    assert describe_model(compressed)["base_model"] is None


@pytest.mark.parametrize("front_matter", ["a: [", "- a list", "flat_llm: yes", "flat_llm: {}"])
def test_a_damaged_card_is_refused_by_name(compressed, front_matter):
    (compressed / "README.md").write_text(f"---\n{front_matter}\n---\n")
    with pytest.raises(InputError, match=r"small/README\.md has damaged front matter"):
        describe_model(compressed)


@pytest.mark.parametrize("card", [model_card(CARD), None])
def test_a_model_in_the_hub_cache_needs_no_network(compressed, tmp_path, monkeypatch, card):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "cache" / "models--someone--small"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    compressed.rename(repository / "snapshots" / ("0" * 40))
    if card is None:
        (repository / "snapshots" / ("0" * 40) / "README.md").unlink()
    else:
        (repository / "snapshots" / ("0" * 40) / "README.md").write_text(card)
    described = describe_model("someone/small", tmp_path / "cache")
    assert (described["model"], described["base_model"]) == ("small", card and "Llama-2-7b-hf")


def test_a_family_that_is_not_supported_is_refused(tmp_path):
    GPT2Config(n_layer=1, n_embd=8, n_head=1).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="'gpt2' is not supported"):
        describe_model(tmp_path)
