import errno
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from flatllmcore import InputError
from flatllmcore.utils.checkpoint import check_output_folder, model_card, put_in_place
from flatllmcore.utils.layer_utils import count_parameters

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


def test_overwriting_spares_what_is_no_model(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match="holds no model"):
        check_output_folder(tmp_path, overwrite=True)
    with pytest.raises(InputError, match="is a file"):
        check_output_folder(tmp_path / "thesis.tex", overwrite=True)


def test_a_model_takes_the_place_of_the_old_one_or_leaves_it(tmp_path, monkeypatch):
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    rename = Path.rename

    def fail_for_new(self, target):
        if self.name == "new":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail_for_new)
        with pytest.raises(OSError, match="Input/output"):
            put_in_place(tmp_path / "new", tmp_path / "old")
    assert {path.name for path in tmp_path.iterdir()} == {"new", "old"}
    assert (tmp_path / "old" / "old").exists()
    put_in_place(tmp_path / "new", tmp_path / "old")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old" / "new").exists()


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
    stated = ModelCard(card).data.to_dict()
    assert stated["library_name"] == "transformers"
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
