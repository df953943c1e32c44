"""The library's own entry points, on tiny models in float64 and texts of 96 words."""

import copy
import json

import accelerate
import datasets
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import main
import oracle
from conftest import tiny_model
from flatllmcore import FlatLLMConfig, FlatLLMPruner, InputError, apply_flat_llm, compute_layer_importance
from flatllmcore.core.importance import METHODS
from flatllmcore.utils import check_sparsity, find_decoder_layers, find_layers, get_layer_dimensions
from flatllmcore.utils.data_utils import (
    padding_ids_of,
    read_calibration_data,
    sample_documents,
    sample_windows,
    windows_of_rows,
)
from flatllmcore.utils.text_sources import TextDataset
from tiny_text import documents, word_tokenizer, write_texts

TOKENIZER = word_tokenizer()
SMALL = {"cal_nsamples": 12, "seqlen": 24, "seed": 3, "device": "cpu"}


@pytest.fixture
def texts(tmp_path):
    return str(write_texts(tmp_path / "texts"))


def weights_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_weights(found, expected):
    assert found.keys() == expected.keys()
    different = [name for name in found if not torch.equal(found[name], expected[name])]
    assert not different


@pytest.mark.parametrize("preserve_qk_layers", [True, False])
def test_the_library_and_main_py_give_the_same_weights(model, texts, preserve_qk_layers, tmp_path):
    """Oracle: the model folder that the program writes, and its record."""
    model = model.float()
    model.save_pretrained(tmp_path / "dense")
    TOKENIZER.save_pretrained(tmp_path / "dense")
    command = f"--model {tmp_path}/dense --dataset {texts} --sparsity_ratio 40 --nsamples 12 --seqlen 24 --seed 3"
    folders = f"--device cpu --save {tmp_path}/logs --bi_score {tmp_path}/ranks --save_model {tmp_path}/compressed"
    flags = [] if preserve_qk_layers else ["--prune_qk"]
    assert main.main([*command.split(), *folders.split(), *flags]) == 0

    config = FlatLLMConfig(target_sparsity=0.4, preserve_qk_layers=preserve_qk_layers, cal_dataset=texts, **SMALL)
    pruner = FlatLLMPruner(model, TOKENIZER, config)
    pruner.prune_model()
    by_program = AutoModelForCausalLM.from_pretrained(tmp_path / "compressed")
    assert type(by_program) is type(model)
    assert by_program.config.to_dict()["per_layer_config"] == model.config.to_dict()["per_layer_config"]
    assert_same_weights(weights_of(model), weights_of(by_program))
    assert any("q_proj.up" in name for name in weights_of(by_program)) != preserve_qk_layers
    (record,) = (json.loads(path.read_text()) for path in (tmp_path / "logs").glob("*.json"))
    assert record["achieved_sparsity_percent"] == pytest.approx(100 * pruner.get_compression_stats()["sparsity"])


def test_the_given_object_is_changed_returned_saved_and_reloaded(model, texts, tmp_path):
    compressed = apply_flat_llm(model, TOKENIZER, target_sparsity=0.5, cal_dataset=texts, **SMALL)
    assert compressed is model
    model.save_pretrained(tmp_path / "saved")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float64)
    ids = torch.randint(97, (2, 10))
    assert torch.equal(reloaded(ids).logits, model(ids).logits)


def test_importance_scores_equal_the_oracle_and_leave_the_model_alone(model, texts):
    """Oracle: tests/oracle.py on the windows that the seed gives."""
    before = weights_of(model)
    found = compute_layer_importance(model, TOKENIZER, cal_dataset=texts, **SMALL)
    text = read_calibration_data(texts, nsamples=12, padding_ids=())
    windows = sample_windows(text, TOKENIZER, 12, 24, 3)
    assert found == pytest.approx(oracle.importance(*oracle.weights_and_sizes(model), windows), rel=1e-5)
    assert_same_weights(weights_of(model), before)


def test_every_importance_method_can_be_asked_for(model, texts):
    scores = {
        method: compute_layer_importance(model, TOKENIZER, cal_dataset=texts, importance_method=method, **SMALL)
        for method in METHODS
    }
    assert all(len(found) == 2 and min(found) > 0 for found in scores.values())
    assert scores["angular"] != scores["gradient"]


@pytest.mark.parametrize("preserve_qk_layers", [True, False])
def test_statistics_equal_the_weights_counted_on_the_model(model, texts, preserve_qk_layers):
    """Oracle: sizes of the two-dimensional and larger parameters inside decoder layers."""

    def count():
        return sum(p.numel() for p in model.model.layers.parameters() if p.ndim > 1)

    before, total_before = count(), sum(p.numel() for p in model.parameters())
    config = FlatLLMConfig(target_sparsity=0.3, preserve_qk_layers=preserve_qk_layers, cal_dataset=texts, **SMALL)
    pruner = FlatLLMPruner(model, TOKENIZER, config)
    assert pruner.prune_model() is model
    stats = pruner.get_compression_stats()
    assert stats["parameters_before"] == {"decoder_linear": before, "total": total_before}
    assert stats["parameters_after"] == {
        "decoder_linear": count(),
        "total": sum(p.numel() for p in model.parameters()),
    }
    assert stats["compression_ratio"] == pytest.approx(before / count())
    assert stats["sparsity"] == pytest.approx(1 - count() / before)
    assert check_sparsity(model) == pytest.approx(stats["sparsity"])
    if preserve_qk_layers:
        assert 0.3 <= stats["sparsity"] < 0.34  # published floors cut off a little more
    else:
        assert stats["sparsity"] == pytest.approx(0.3, abs=3 * 32 / before)  # one MLP channel of one layer
    dimensions = get_layer_dimensions(model)
    for name in ("value_rank", "mlp_width", "query_key_rank"):
        assert dimensions[name] == [layer[name] for layer in stats["layers"]]
    assert any(rank is not None for rank in dimensions["query_key_rank"]) != preserve_qk_layers


def test_there_are_no_statistics_before_pruning(model):
    with pytest.raises(RuntimeError, match="prune_model"):
        FlatLLMPruner(model, TOKENIZER).get_compression_stats()


@pytest.mark.parametrize("is_training", [True, False])
def test_the_mode_of_the_model_stays(model, texts, is_training):
    apply_flat_llm(model.train(is_training), TOKENIZER, cal_dataset=texts, **SMALL)
    assert all(module.training is is_training for module in model.modules())


def test_a_failure_leaves_the_model_as_it_was(model, texts):
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.inf
    before, kind = weights_of(model), type(model)
    with pytest.raises(InputError, match="layer 1"):
        apply_flat_llm(model, TOKENIZER, cal_dataset=texts, **SMALL)
    assert type(model) is kind
    assert_same_weights(weights_of(model), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_keep_their_dtype(model, texts, dtype):
    apply_flat_llm(model.to(dtype), TOKENIZER, cal_dataset=texts, **SMALL)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


class TestCalibrationData:
    ROWS = torch.randint(1, 97, (12, 24), generator=torch.Generator().manual_seed(5))

    def padded(self, lengths, value=0):
        rows = self.ROWS.clone()
        for row, length in zip(rows, lengths, strict=True):
            row[length:] = value
        return rows

    @pytest.mark.parametrize(
        "form",
        [
            lambda rows: rows,
            list,
            lambda rows: rows.tolist(),
            lambda rows: {"input_ids": rows},
            lambda rows: DataLoader(TensorDataset(rows), batch_size=5),
            lambda rows: DataLoader([{"input_ids": row} for row in rows], batch_size=5),
            lambda rows: datasets.Dataset.from_dict({"input_ids": rows.tolist()}),
            lambda rows: datasets.Dataset.from_dict({"input_ids": rows.tolist()}).with_format("torch"),
        ],
    )
    def test_token_ids_in_any_container_give_the_same_scores(self, form):
        """Oracle: the formula of tests/oracle.py on the rows themselves."""
        model = tiny_model()
        found = compute_layer_importance(model, cal_dataset=form(self.ROWS), cal_nsamples=12, device="cpu")
        assert found == pytest.approx(oracle.importance(*oracle.weights_and_sizes(model), self.ROWS), rel=1e-5)

    @pytest.mark.parametrize(
        "form",
        [
            lambda texts: texts,
            lambda texts: {"text": texts},
            lambda texts: DataLoader(texts, batch_size=7),
            lambda texts: datasets.Dataset.from_dict({"text": texts}),
        ],
    )
    def test_texts_in_any_container_give_the_same_weights(self, form):
        texts = documents(60)
        expected = tiny_model()
        apply_flat_llm(expected, TOKENIZER, cal_dataset=texts, **SMALL)
        model = tiny_model()
        apply_flat_llm(model, TOKENIZER, cal_dataset=form(texts), **SMALL)
        assert_same_weights(weights_of(model), weights_of(expected))

    def test_texts_are_sampled_as_the_program_samples(self):
        texts = documents(60)
        data = read_calibration_data(texts, nsamples=12, padding_ids=())
        expected = TextDataset("x", "train", texts, "\n\n")
        assert torch.equal(
            sample_documents(data, TOKENIZER, 12, 24, 3), sample_documents(expected, TOKENIZER, 12, 24, 3)
        )

    @pytest.mark.parametrize("with_mask", [True, False])
    @pytest.mark.parametrize("side", ["right", "left"])
    def test_padding_is_no_data(self, with_mask, side):
        """Oracle: the same rows without their padding."""
        model = tiny_model(pad_token_id=0)
        short = self.ROWS[:, :17]
        padding = torch.zeros(12, 7, dtype=torch.int64)
        parts = [(short, 1), (padding, 0)] if side == "right" else [(padding, 0), (short, 1)]
        batch = {"input_ids": torch.cat([ids for ids, _ in parts], dim=1)}
        if with_mask:
            batch["attention_mask"] = torch.cat([torch.full_like(ids, value) for ids, value in parts], dim=1)
        found = compute_layer_importance(model, cal_dataset=[batch], device="cpu")
        assert found == compute_layer_importance(model, cal_dataset=short, device="cpu")

    def test_rows_of_unequal_length_are_joined_and_cut_without_padding(self):
        lengths = [24, 10, 17, 3, 24, 24, 8, 1, 20, 24, 12, 24]
        rows = read_calibration_data(self.padded(lengths), nsamples=12, padding_ids=(0,))
        windows = windows_of_rows(rows, 24)
        real = [token for row, length in zip(self.ROWS.tolist(), lengths, strict=True) for token in row[:length]]
        assert windows.flatten().tolist() == real[: len(real) // 24 * 24]

    @pytest.mark.parametrize("empty", [[], torch.zeros(0, dtype=torch.int64)], ids=["list", "tensor"])
    def test_rows_without_tokens_are_as_if_not_there(self, empty):
        """A text tokenised line by line has many."""
        rows = read_calibration_data([empty, [1, 2, 3], empty, [4]], nsamples=9, padding_ids=())
        assert windows_of_rows(rows, 2).tolist() == [[1, 2], [3, 4]]

    def test_rows_of_one_token_can_be_joined(self):
        rows = read_calibration_data(torch.arange(6)[:, None], nsamples=6, padding_ids=())
        assert windows_of_rows(rows, 3).tolist() == [[0, 1, 2], [3, 4, 5]]

    def test_a_padding_id_between_real_tokens_stays(self):
        rows = read_calibration_data(torch.tensor([[0, 5, 0, 6, 0, 0]]), nsamples=1, padding_ids=(0,))
        assert rows[0].tolist() == [5, 0, 6]

    def test_the_padding_id_is_the_tokenizers_then_the_models_then_what_ends_a_text(self):
        config = tiny_model(pad_token_id=4, eos_token_id=[7, 8]).config
        assert padding_ids_of(config, word_tokenizer(pad_token="[PAD]")) == (0,)
        assert padding_ids_of(config, TOKENIZER) == (4,)
        config.pad_token_id = None
        assert padding_ids_of(config) == (7, 8)

    def test_other_calibration_text_gives_other_weights(self, texts):
        """A compression that ignored its data would pass every other test of sizes."""
        one, other = tiny_model(), tiny_model()
        apply_flat_llm(one, TOKENIZER, cal_dataset=documents(60, seed=0), **SMALL)
        apply_flat_llm(other, TOKENIZER, cal_dataset=documents(60, seed=9), **SMALL)
        name = "model.layers.0.self_attn.o_proj.weight"
        assert one.state_dict()[name].shape != other.state_dict()[name].shape or not torch.allclose(
            one.state_dict()[name], other.state_dict()[name]
        )

    def test_the_test_split_is_not_calibration_data(self, texts, tmp_path):
        with_test, without_test = tiny_model(), tiny_model()
        apply_flat_llm(with_test, TOKENIZER, cal_dataset=texts, **SMALL)
        (tmp_path / "texts" / "test.txt").unlink()
        apply_flat_llm(without_test, TOKENIZER, cal_dataset=texts, **SMALL)
        assert_same_weights(weights_of(with_test), weights_of(without_test))

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            ([], "empty"),
            (torch.zeros(0, 8, dtype=torch.int64), "empty"),
            (torch.zeros(4, 0, dtype=torch.int64), "0 tokens without padding"),
            ([[], []], "hold 0 tokens without padding"),
            (torch.ones(4, 1, dtype=torch.int64), "a window would have 1; .* 2 or more"),
            (torch.rand(2, 8), "token ids, which are integers"),
            (torch.ones(2, 3, 8, dtype=torch.int64), r"shape \(3, 8\)"),
            (DataLoader([[1, 2], [3, 4], [5, 6]], batch_size=3), "a list of 2 tensors"),
            (DataLoader(TensorDataset(torch.ones(2, 8), torch.ones(2, 8))), "a list of 2 tensors"),
            ([object()], "hold object"),
            (["a", torch.ones(4, dtype=torch.int64)], "mix texts and token ids"),
            (datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["a"]})}), "give one split"),
            (torch.full((2, 8), 97), "token id 97 is out of range"),
            (torch.zeros(2, 8, dtype=torch.int64), "0 tokens without padding"),
            (documents(2), "gives at most"),
        ],
    )
    def test_unusable_data_are_refused(self, data, message):
        with pytest.raises(InputError, match=message):
            apply_flat_llm(tiny_model(pad_token_id=0), TOKENIZER, cal_dataset=data, device="cpu")

    def test_windows_longer_than_the_model_takes_are_refused(self):
        with pytest.raises(InputError, match="takes 2 to 64"):
            apply_flat_llm(tiny_model(), TOKENIZER, cal_dataset=self.ROWS, seqlen=65)

    def test_text_needs_a_tokenizer(self):
        with pytest.raises(InputError, match="a tokenizer is needed"):
            apply_flat_llm(tiny_model(), cal_dataset=documents(60))


class TestModelsThatCannotBeCompressed:
    def test_another_family(self):
        gpt = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=97))
        with pytest.raises(InputError, match="'gpt2' is not supported; supported: llama, mistral"):
            apply_flat_llm(gpt, TOKENIZER)

    def test_a_module_without_config(self):
        with pytest.raises(InputError, match="a Linear has no config"):
            apply_flat_llm(torch.nn.Linear(2, 2), TOKENIZER)

    def test_a_model_without_head(self, model):
        with pytest.raises(InputError, match=r"accepted of this family: \w+ForCausalLM"):
            apply_flat_llm(model.model, TOKENIZER)

    def test_a_model_compressed_before(self, model, texts):
        apply_flat_llm(model, TOKENIZER, cal_dataset=texts, **SMALL)
        with pytest.raises(InputError, match="compressed already"):
            apply_flat_llm(model, TOKENIZER, cal_dataset=texts, **SMALL)

    def test_more_than_there_is_to_remove(self, model, texts):
        with pytest.raises(InputError, match="Q and K stay whole"):
            apply_flat_llm(model, TOKENIZER, target_sparsity=0.9, cal_dataset=texts, **SMALL)

    def test_weights_offloaded_to_disk(self, model, tmp_path):
        parts = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
        parts |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
        spread = accelerate.dispatch_model(model, parts, offload_dir=str(tmp_path))
        with pytest.raises(InputError, match=r"layers\.1\..* is offloaded"):
            apply_flat_llm(spread, TOKENIZER)


def hooked(model):
    parts = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "cpu", "model.norm": "cpu"}
    parts |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    return accelerate.dispatch_model(model, parts, force_hooks=True)


def hooks_of(model):
    return sorted(name for name, module in model.named_modules() if hasattr(module, "_hf_hook"))


def test_a_model_with_a_device_map_is_compressed_like_any_other(model, texts, tmp_path):
    expected = apply_flat_llm(copy.deepcopy(model), TOKENIZER, cal_dataset=texts, **SMALL)
    before = hooks_of(hooked(model))
    apply_flat_llm(model, TOKENIZER, cal_dataset=texts, **SMALL)
    assert "model.layers.1" in before
    assert hooks_of(model) == before
    assert_same_weights(weights_of(model), weights_of(expected))
    ids = torch.randint(97, (2, 10))
    assert torch.equal(model(ids).logits, expected(ids).logits)
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 13)


def test_a_failure_gives_the_device_map_s_hooks_back(model, texts):
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.inf
    before = hooks_of(hooked(model))
    with pytest.raises(InputError, match="layer 1"):
        apply_flat_llm(model, TOKENIZER, cal_dataset=texts, **SMALL)
    assert hooks_of(model) == before


class TestLayerUtils:
    def test_a_dense_model_is_not_sparse_and_zeros_count(self, model):
        assert check_sparsity(model) == 0
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.zero_()
        expected = 56 * 32 / (2 * get_dense_layer_parameters(model))
        assert check_sparsity(model) == pytest.approx(expected)

    @pytest.mark.parametrize("widths", [(20, 20), (20, 31)])
    def test_sparsity_of_a_compressed_model_is_relative_to_the_dense_one(self, model, widths, tmp_path):
        """Equal widths become the config's own, so that the dense width must be remembered elsewhere."""
        from flatllmcore.layers import adopt_compressed_layers, compress_decoder_layer, compressed_config

        layers, dense = model.model.layers, 2 * get_dense_layer_parameters(model)
        config = compressed_config(model.config, (12, 12), widths)
        weights = [
            {
                "mlp.gate_proj.weight": layer.mlp.gate_proj.weight[:width],
                "mlp.up_proj.weight": layer.mlp.up_proj.weight[:width],
                "mlp.down_proj.weight": layer.mlp.down_proj.weight[:, :width],
            }
            for layer, width in zip(layers, widths, strict=True)
        ]
        new = [compress_decoder_layer(layer, config, i, weights[i]) for i, layer in enumerate(layers)]
        adopt_compressed_layers(model, config, new)
        expected = 3 * 32 * (112 - sum(widths)) / dense
        assert check_sparsity(model) == pytest.approx(expected)
        model.save_pretrained(tmp_path)
        assert check_sparsity(AutoModelForCausalLM.from_pretrained(tmp_path)) == pytest.approx(expected)
        assert get_layer_dimensions(model)["intermediate_size"] == 56

    def test_dimensions_say_what_the_config_says(self):
        assert get_layer_dimensions(tiny_model("mistral"), "mistral") == {
            "architecture": "mistral",
            "num_layers": 2,
            "hidden_size": 32,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 12,
            "intermediate_size": 56,
            "value_rank": [12, 12],
            "mlp_width": [56, 56],
            "query_key_rank": [None, None],
        }

    def test_another_architecture_is_refused(self):
        with pytest.raises(InputError, match="family 'mistral', not 'llama'"):
            get_layer_dimensions(tiny_model("mistral"), "llama")

    def test_layers_are_found_by_kind_and_by_place(self, model):
        assert len(find_decoder_layers(model)) == 2
        linears = find_layers(find_decoder_layers(model)[0])
        assert set(linears) == {
            *(f"self_attn.{name}_proj" for name in "qkvo"),
            *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
        }


def get_dense_layer_parameters(model):
    return sum(p.numel() for p in model.model.layers[0].parameters() if p.ndim > 1)


def test_a_mask_of_another_shape_is_refused():
    rows = torch.zeros(4, 6, dtype=torch.int64)
    for mask in (torch.ones(3, 6), torch.ones(4, 5)):
        with pytest.raises(InputError, match="mask"):
            compute_layer_importance(tiny_model(), cal_dataset={"input_ids": rows, "attention_mask": mask})


def test_a_config_given_to_apply_flat_llm_counts():
    config = FlatLLMConfig(target_sparsity=0.2, cal_dataset=documents(60), **SMALL)
    model = apply_flat_llm(tiny_model(), TOKENIZER, config=config)
    assert check_sparsity(model) == pytest.approx(0.2, abs=0.03)


def test_queries_and_keys_are_the_dense_ones_and_each_layer_keeps_its_mode():
    model = tiny_model()
    model.train()
    model.model.layers[1].eval()
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    apply_flat_llm(model, TOKENIZER, 0.3, documents(60), **SMALL)
    after = model.state_dict()
    kept = [name for name in dense if "q_proj" in name or "k_proj" in name]
    assert len(kept) >= 4
    assert all(torch.equal(after[name], dense[name]) for name in kept)
    assert [layer.training for layer in model.model.layers] == [True, False]
