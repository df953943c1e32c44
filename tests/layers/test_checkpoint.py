import errno

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from flatllmcore import InputError
from flatllmcore.utils import checkpoint
from flatllmcore.utils.checkpoint import check_output_folder, count_parameters, model_card, save_compressed

from .tiny_models import RANKS, WIDTHS, compress, dense_model_of

RECORD = {
    "base_model": "meta-llama/Llama-2-7b-hf",
    "sparsity_ratio": 20,
    "achieved_sparsity_percent": 20.0004,
    "prune_qk": False,
    "parameters_before": {"decoder_linear": 1000, "total": 1200},
    "parameters_after": {"decoder_linear": 800, "total": 1000},
    "dataset": "wikitext2",
    "nsamples": 256,
    "seqlen": 4096,
    "seed": 42,
    "perplexity": {"dense": 5.4723, "compressed": 6.7, "dataset": "wikitext2", "seqlen": 4096},
    "versions": {"torch": "2.13.0"},
    "command": "python main.py --model x",
}


@pytest.fixture
def model():
    return compress(dense_model_of("llama"))


@pytest.fixture
def tokenizer():
    vocabulary = {"[UNK]": 0, "a": 1, "b": 2}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="[UNK]")))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_folder_holds_all_that_loading_needs(model, tokenizer, tokens, tmp_path):
    folder = tmp_path / "new" / "model"
    save_compressed(model, tokenizer, folder, "# card\n")
    assert names(folder.parent) == ["model"]
    assert names(folder) == [
        "README.md",
        "config.json",
        "flat_attention.py",
        "flat_llama.py",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert (folder / "README.md").read_text() == "# card\n"
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder)(tokens).logits, model(tokens).logits)
    assert AutoTokenizer.from_pretrained(folder)("a")["input_ids"] == tokenizer("a")["input_ids"]


def test_a_folder_in_use_is_refused_unless_overwriting(model, tmp_path):
    folder = tmp_path / "model"
    save_compressed(model, None, folder, "first")
    with pytest.raises(InputError, match="is not empty"):
        save_compressed(model, None, folder, "second")
    assert (folder / "README.md").read_text() == "first"
    (folder / "left over").touch()
    save_compressed(model, None, folder, "second", overwrite=True)
    assert (folder / "README.md").read_text() == "second"
    assert not (folder / "left over").exists()
    assert names(tmp_path) == ["model"]


def test_an_empty_folder_is_used(model, tmp_path):
    save_compressed(model, None, tmp_path, "card")
    assert (tmp_path / "config.json").is_file()


def test_overwriting_spares_what_is_no_model(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match="holds no model"):
        check_output_folder(tmp_path, overwrite=True)
    with pytest.raises(InputError, match="is a file"):
        check_output_folder(tmp_path / "thesis.tex", overwrite=True)


@pytest.mark.parametrize(
    ("failure", "raised"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(errno.ENOSPC, "No space left on device"), InputError),
        (SafetensorError("I/O error: No space left on device (os error 28)"), InputError),
        (OSError(errno.EIO, "Input/output error"), OSError),
    ],
)
@pytest.mark.parametrize("failing", ["weights", "flush", "rename"])
def test_a_failure_leaves_the_old_model_and_nothing_else(model, tmp_path, monkeypatch, failure, raised, failing):
    folder = tmp_path / "model"
    save_compressed(model, None, folder, "old")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*args, **kwargs):
        raise failure

    if failing == "weights":
        save = model.save_pretrained
        monkeypatch.setattr(model, "save_pretrained", lambda target: (save(target), fail()))
    elif failing == "flush":
        monkeypatch.setattr(checkpoint.os, "fsync", fail)
    else:
        rename = checkpoint.Path.rename
        monkeypatch.setattr(
            checkpoint.Path, "rename", lambda self, to: fail() if self.name == "complete" else rename(self, to)
        )
    with pytest.raises(raised):
        save_compressed(model, None, folder, "new", overwrite=True)
    assert names(tmp_path) == ["model"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("is_tied", [False, True])
def test_the_reported_size_is_the_size_on_disk(is_tied, tmp_path):
    model = compress(dense_model_of("llama", tie_word_embeddings=is_tied, attention_bias=True, mlp_bias=True))
    counted = count_parameters(model)
    hidden, heads, kv_heads, d = 64, 4, 2, 16
    per_layer = [
        hidden * (heads + kv_heads) * (d + rank) + 3 * hidden * width for rank, width in zip(RANKS, WIDTHS, strict=True)
    ]
    assert counted["decoder_linear"] == sum(per_layer)
    model.save_pretrained(tmp_path)
    assert counted["total"] == sum(weight.numel() for weight in load_file(tmp_path / "model.safetensors").values())


def test_the_card_states_how_the_model_was_made():
    card = model_card(RECORD)
    assert card.startswith("---\nlibrary_name: transformers\n")
    stated = ModelCard(card).data.to_dict()
    assert stated["base_model"] == "meta-llama/Llama-2-7b-hf"
    assert stated["flat_llm"] == {"base_model": "meta-llama/Llama-2-7b-hf", "sparsity_ratio": 20}
    for fact in ("20.000 % achieved", "5.472", "6.700", "256 samples of 4096 tokens, seed 42", "torch 2.13.0", "800"):
        assert fact in card
    assert "trust_remote_code=True" in card


def test_the_card_of_a_local_model_names_no_path_and_invents_no_perplexity(tmp_path):
    card = model_card(RECORD | {"base_model": str(tmp_path), "perplexity": None})
    stated = ModelCard(card).data.to_dict()
    assert "base_model" not in stated
    assert stated["flat_llm"] == {"base_model": tmp_path.name, "sparsity_ratio": 20}
    assert str(tmp_path.parent) not in card
    assert "| not run | not run |" in card
