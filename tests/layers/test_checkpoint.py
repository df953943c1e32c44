import pytest
from huggingface_hub import ModelCard

from flatllmcore import InputError
from flatllmcore.utils.checkpoint import check_output_folder, model_card, put_in_place

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


def test_a_model_that_cannot_be_put_in_place_leaves_the_old_one(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "weights").touch()
    with pytest.raises(FileNotFoundError):
        put_in_place(tmp_path / "missing", tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "weights"]


def test_the_card_states_how_the_model_was_made_and_names_no_path(tmp_path):
    card = model_card(RECORD)
    stated = ModelCard(card).data.to_dict()
    assert stated["library_name"] == "transformers"
    assert stated["base_model"] == "meta-llama/Llama-2-7b-hf"
    assert stated["flat_llm"] == {"base_model": "meta-llama/Llama-2-7b-hf", "sparsity_ratio": 20}
    for fact in ("20.000 % achieved", "5.472", "6.700", "256 samples of 4096 tokens, seed 42", "torch 2.13.0", "800"):
        assert fact in card
    assert "trust_remote_code=True" in card
    of_local_model = model_card(RECORD | {"base_model": str(tmp_path)})
    stated = ModelCard(of_local_model).data.to_dict()
    assert "base_model" not in stated
    assert stated["flat_llm"] == {"base_model": tmp_path.name, "sparsity_ratio": 20}
    assert str(tmp_path.parent) not in of_local_model
