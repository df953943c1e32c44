"""The library's own entry points, on tiny models in float64 and texts of 96 words."""

import copy
import json
from functools import partial
from pathlib import Path

import accelerate
import datasets
import numpy as np
import pandas
import pytest
import torch
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForCausalLM

import compute_rank
import main
import oracle
from conftest import assert_same_weights, tiny_model
from flatllmcore import FlatLLMConfig, FlatLLMPruner, InputError, apply_flat_llm, compute_layer_importance
from flatllmcore.core.importance import ImportanceScores
from flatllmcore.pipeline import TO_SCORE, Pipeline
from flatllmcore.utils import check_sparsity, find_decoder_layers, find_layers, get_layer_dimensions
from flatllmcore.utils.data_utils import padding_ids_of, read_calibration_data, sample_documents, windows_of_rows
from flatllmcore.utils.files import write_json
from flatllmcore.utils.layer_utils import count_parameters, dimensions_from_config
from flatllmcore.utils.text_sources import TextDataset, load_text
from layers.tiny_models import compress, dense_model_of
from tiny_text import documents, word_tokenizer, write_texts

TOKENIZER = word_tokenizer()
SMALL = {"cal_nsamples": 12, "seqlen": 24, "seed": 3, "device": "cpu"}


@pytest.fixture
def texts(tmp_path):
    return str(write_texts(tmp_path / "texts"))


def weights_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("preserve_qk_layers", [True, False])
def test_the_library_and_main_py_give_the_same_weights(model, texts, preserve_qk_layers, tmp_path):
    """Oracle: the model folder that the program writes, and its record."""
    model = model.float()
    model.save_pretrained(tmp_path / "dense")
    TOKENIZER.save_pretrained(tmp_path / "dense")
    texts += f"+{write_texts(tmp_path / 'others')}"
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
    assert record["prune_qk"] != preserve_qk_layers
    assert record["parameters_after"] == count_parameters(by_program)
    said = "query, key, value and output projections" in (tmp_path / "compressed" / "README.md").read_text()
    assert said != preserve_qk_layers
    assert record["achieved_sparsity_percent"] == pytest.approx(100 * pruner.get_compression_stats()["sparsity"])


def test_library_and_programs_name_one_largest_target_before_a_text_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = tiny_model()
    model.save_pretrained("dense")
    TOKENIZER.save_pretrained("dense")
    sizes = dimensions_from_config(model.config)
    write_json(Path("ranks/importance.json"), ImportanceScores("m", "0", sizes, "none", 1, 8, 42, (0.1, 0.2)))
    with pytest.raises(InputError) as refused:
        apply_flat_llm(model, TOKENIZER, target_sparsity=0.75, cal_dataset="no/text")
    target = ["--sparsity_ratio", "75"]
    capsys.readouterr()  # the bar of save_pretrained
    assert main.main(["--model", "dense", "--dataset", "no/text", "--eval_dataset", "no/text", *target]) == 2
    assert compute_rank.main(target) == 2
    by_main, by_compute_rank = capsys.readouterr().err.splitlines()
    assert by_main == f"error: {refused.value}"
    assert by_compute_rank == f"error: ranks/importance.json: {refused.value}"


@pytest.mark.parametrize(("width", "is_long"), [(576, True), (192, False)])
def test_what_will_take_a_cpu_long_is_said_with_what_shortens_it(width, is_long, caplog):
    """Of 128 x 4096 tokens; oracle: SmolLM2-135M's pass, 24 D² operations per token and layer, is 0.35 hours."""
    config = tiny_model(hidden_size=width, num_hidden_layers=1, max_position_embeddings=4096).config
    config.num_hidden_layers = 30
    ids = torch.randint(97, (128, 4096), generator=torch.Generator().manual_seed(0))
    Pipeline(config, FlatLLMConfig(cal_dataset=ids, device="cpu")).windows(TO_SCORE)
    assert ("128 x 4096 tokens take a CPU about 0.3 hours" in caplog.text) == ("--nsamples" in caplog.text) == is_long


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_given_object_is_changed_returned_saved_and_reloaded(family, texts, dtype, tmp_path):
    """Weights keep their dtype, and each layer its mode; those of Q and K are bitwise the dense ones."""
    model = tiny_model(family).to(dtype).train()
    model.model.layers[1].eval()
    kept = {name: weight for name, weight in weights_of(model).items() if "q_proj" in name or "k_proj" in name}
    assert apply_flat_llm(model, TOKENIZER, target_sparsity=0.5, cal_dataset=texts, **SMALL) is model
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    for layer, is_training in zip(model.model.layers, (True, False), strict=True):
        assert all(module.training is is_training for module in layer.modules())
    assert_same_weights({name: model.state_dict()[name] for name in kept}, kept)
    model.save_pretrained(tmp_path / "saved")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=dtype)
    assert type(reloaded) is type(model)
    assert_same_weights(weights_of(reloaded), weights_of(model))


def test_importance_scores_equal_the_oracle_and_leave_the_model_alone(model, texts):
    """Oracle: tests/oracle.py on the windows that the seed gives."""
    before = weights_of(model)
    found = compute_layer_importance(model, TOKENIZER, cal_dataset=texts, **SMALL)
    windows = sample_documents(load_text(texts, "train"), TOKENIZER, 12, 24, 3)
    assert found == pytest.approx(oracle.importance(*oracle.weights_and_sizes(model), windows), rel=1e-5)
    by_gradient = compute_layer_importance(model, TOKENIZER, cal_dataset=texts, importance_method="gradient", **SMALL)
    assert len(by_gradient) == 2
    assert by_gradient != found
    assert_same_weights(weights_of(model), before)


@pytest.mark.parametrize("preserve_qk_layers", [True, False])
def test_statistics_equal_the_weights_counted_on_the_model(model, texts, preserve_qk_layers):
    """Oracle: sizes of the two-dimensional and larger parameters inside decoder layers."""

    def count():
        linear = sum(p.numel() for p in model.model.layers.parameters() if p.ndim > 1)
        return {"decoder_linear": linear, "total": sum(p.numel() for p in model.parameters())}

    before = count()
    config = FlatLLMConfig(target_sparsity=0.3, preserve_qk_layers=preserve_qk_layers, cal_dataset=texts, **SMALL)
    pruner = FlatLLMPruner(model, TOKENIZER, config)
    with pytest.raises(RuntimeError, match="prune_model"):
        pruner.get_compression_stats()
    pruner.prune_model()
    stats = pruner.get_compression_stats()
    assert (stats["parameters_before"], stats["parameters_after"]) == (before, count())
    ratio = before["decoder_linear"] / count()["decoder_linear"]
    assert stats["compression_ratio"] == pytest.approx(ratio)
    assert stats["sparsity"] == pytest.approx(1 - 1 / ratio)
    assert check_sparsity(model) == pytest.approx(stats["sparsity"])
    # Published floors cut off a little more; else a channel of one layer is the step.
    most = 0.34 if preserve_qk_layers else 0.3 + 3 * 32 / before["decoder_linear"]
    assert 0.3 - 3 * 32 / before["decoder_linear"] <= stats["sparsity"] < most
    dimensions = get_layer_dimensions(model)
    for name in ("value_rank", "mlp_width", "query_key_rank"):
        assert dimensions[name] == [layer[name] for layer in stats["layers"]]
    assert any(rank is not None for rank in dimensions["query_key_rank"]) != preserve_qk_layers


class TestCalibrationData:
    ROWS = torch.randint(1, 97, (12, 24), generator=torch.Generator().manual_seed(5))

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
            lambda texts: DataLoader(texts, batch_size=7),
            lambda texts: datasets.Dataset.from_dict({"text": texts}),
            lambda texts: pandas.DataFrame({"text": texts})["text"],
        ],
    )
    def test_texts_in_any_container_are_sampled_as_the_program_samples(self, form):
        texts = documents(60)
        data = read_calibration_data(form(texts), nsamples=12, padding_ids=())
        expected = TextDataset("x", "train", texts, "\n\n")
        assert torch.equal(
            sample_documents(data, TOKENIZER, 12, 24, 3), sample_documents(expected, TOKENIZER, 12, 24, 3)
        )

    def test_calibration_data_are_read_once(self):
        """For the scores and for the compression; the data count how often they are gone through."""

        class Counting(list):
            readings = 0

            def __iter__(self):
                self.readings += 1
                return super().__iter__()

        texts = Counting(documents(60))
        apply_flat_llm(tiny_model(), TOKENIZER, cal_dataset=texts, **SMALL)
        assert texts.readings == 1

    @pytest.mark.parametrize("with_mask", [True, False])
    @pytest.mark.parametrize("side", ["right", "left"])
    def test_padding_is_no_data(self, with_mask, side):
        """Oracle: the same rows without their padding."""
        model = tiny_model(pad_token_id=0)
        short, padding = self.ROWS[:, :17], torch.zeros(12, 7, dtype=torch.int64)
        batch = {"input_ids": torch.cat([short, padding] if side == "right" else [padding, short], dim=1)}
        if with_mask:
            batch["attention_mask"] = (batch["input_ids"] != 0).long()
        found = compute_layer_importance(model, cal_dataset=[batch], device="cpu")
        assert found == compute_layer_importance(model, cal_dataset=short, device="cpu")

    @pytest.mark.parametrize(
        ("data", "seqlen", "windows"),
        [
            ([[1, 2, 3, 0], [4, 0, 0, 0], [5, 6, 7, 8]], 3, [[1, 2, 3], [4, 5, 6]]),  # unequal rows, padded
            ([torch.zeros(0, dtype=torch.int64), [1, 2, 3], [], [4]], 2, [[1, 2], [3, 4]]),  # lines without tokens
            (torch.arange(1, 7)[:, None], 3, [[1, 2, 3], [4, 5, 6]]),  # rows of one token
            ([[0, 5, 0, 6, 0, 0]], 3, [[5, 0, 6]]),  # a padding id between real tokens stays
            ([1, 2, 3, 4, 5, 6], 3, [[1, 2, 3], [4, 5, 6]]),  # one row
            *((row, 3, [[1, 2, 3], [4, 5, 6]]) for row in (np.arange(1, 7), range(1, 7), list(torch.arange(1, 7)))),
        ],
    )
    def test_rows_are_joined_without_padding_and_cut(self, data, seqlen, windows):
        rows = read_calibration_data(data, nsamples=9, padding_ids=(0,))
        assert windows_of_rows(rows, seqlen).tolist() == windows

    def test_rows_are_read_until_there_are_windows_enough(self):
        rows = read_calibration_data(([1, 2, 3] for _ in range(99)), 4, (), seqlen=8)
        assert len(windows_of_rows(rows, 8)) == 4
        batches = [[1] * 10] * 4 + [[1] * 100] * 4
        for size in (1, 4, 8):  # without a length the first rows are all
            assert read_calibration_data(DataLoader(batches, size, collate_fn=list), 4, ())[0].shape == (10,)
            assert len(read_calibration_data(DataLoader(batches, size, collate_fn=list), 4, ())) == 4

    def test_the_padding_id_is_the_tokenizers_then_the_models_then_what_ends_a_text(self):
        config = tiny_model(pad_token_id=4, eos_token_id=[7, 8]).config
        assert [padding_ids_of(config, word_tokenizer(**pad)) for pad in ({"pad_token": "[PAD]"}, {})] == [(0,), (4,)]
        config.pad_token_id = None
        assert padding_ids_of(config) == (7, 8)

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            ([], "empty"),
            ([[], []], "hold 0 tokens without padding"),
            (torch.ones(4, 1, dtype=torch.int64), "for windows of 1; .* 2 or more"),
            (torch.rand(2, 8), "accepted: integers"),
            (DataLoader([[1, 2], [3, 4], [5, 6]], batch_size=3), r"no texts or token ids .* a list \(.*only"),
            (["a", torch.ones(4, dtype=torch.int64)], "mix texts and token ids"),
            (datasets.DatasetDict({"train": datasets.Dataset.from_dict({"a": [1]})}), r"has train \(Dataset\); acc"),
            ([{"text": ["a"]}, {"text": ["b", None]}], r"data, record 3 has text \(NoneType\); accepted"),
            (pandas.DataFrame({"text": documents(60)}), "are a DataFrame; accepted: a list of its texts"),
            (torch.full((2, 8), 97), "token ids 97 to 97 are out of range"),
            ({"input_ids": torch.ones(4, 6, dtype=torch.int64), "attention_mask": torch.ones(4, 5)}, "mask"),
            (documents(2), "gives at most"),
        ],
    )
    def test_unusable_data_are_refused(self, data, message):
        with pytest.raises(InputError, match=message):
            apply_flat_llm(tiny_model(pad_token_id=0), TOKENIZER, cal_dataset=data, device="cpu")


PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")


def misfit():
    """A model whose MLPs are wider than its config says."""
    model = tiny_model(intermediate_size=24)
    model.config.intermediate_size = 23
    return model


MAKERS = {
    r"accepted of this family: \w+ForCausalLM": lambda _: tiny_model().model,
    r"layers\.1\..* is offloaded": lambda folder: accelerate.dispatch_model(
        tiny_model(), dict.fromkeys(PARTS, "cpu") | {PARTS[2]: "disk"}, offload_dir=folder
    ),
    r"down_proj is Linear\(weight \[32, 24\]\), and by the config Linear\(weight \[32, 23\]\)": lambda _: misfit(),
    "the model is a DataParallel; accepted": lambda _: torch.nn.DataParallel(tiny_model()),
    "is torch.float8_e4m3fn; accepted: models that are not quantised": lambda _: tiny_model().to(torch.float8_e4m3fn),
    "compressed already": lambda _: apply_flat_llm(tiny_model(), TOKENIZER, 0.5, documents(60), **SMALL),
}
PRUNED = r"mlp.up_proj is Linear\(weight_orig .* and by the config Linear\(weight \["
ADAPTED = r"mlp.adapter is Linear\(weight \[32, 32\]\), and by the config None"
HOOKED = r"layers.1.mlp is LlamaMLP\(\) hooked or compiled, and by the config LlamaMLP\(\);"
SHARED = "share a weight, 1.mlp.gate_proj.weight and 1.mlp.up_proj.weight"
OF_AN_MLP = [  # of a model whose second one is changed so
    (PRUNED, lambda mlp: prune.random_unstructured(mlp.up_proj, "weight", 0.5)),
    (ADAPTED, lambda mlp: mlp.add_module("adapter", torch.nn.Linear(32, 32, bias=False))),
    (r"mlp.act_fn is ReLU\(\), and by the config SiLU", lambda mlp: setattr(mlp, "act_fn", torch.nn.ReLU())),
    (HOOKED, lambda mlp: mlp.register_forward_hook(lambda *given: given[-1] + 1)),
    (HOOKED, lambda mlp: mlp.register_full_backward_hook(lambda *_: None)),
    (HOOKED, lambda mlp: mlp.register_full_backward_pre_hook(lambda *_: None)),
    (HOOKED, lambda mlp: mlp.compile(backend="eager")),
    (HOOKED, lambda mlp: setattr(mlp, "forward", mlp.forward)),
    (SHARED, lambda mlp: setattr(mlp.up_proj, "weight", mlp.gate_proj.weight)),
]


def with_changed_mlp(change, _folder):
    model = tiny_model()
    change(model.model.layers[1].mlp)
    return model


@pytest.mark.parametrize(
    ("message", "make"), [*MAKERS.items(), *((message, partial(with_changed_mlp, of)) for message, of in OF_AN_MLP)]
)
def test_a_model_that_cannot_be_compressed_is_refused(message, make, texts, tmp_path):
    with pytest.raises(InputError, match=message):
        apply_flat_llm(make(str(tmp_path)), TOKENIZER, cal_dataset=texts, **SMALL)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        *(({"rank_allocation": ranks}, "rank_allocation is unusable") for ranks in (0.5, ["a", "b"], [10**400, 1])),
        ({"tokenizer": "gpt2"}, "'gpt2' is of <class 'str'>; accepted: a tokenizer"),
        ({"config": {"target_sparsity": 0.2}}, "is of <class 'dict'>; accepted: a FlatLLMConfig"),
        ({"tokenizer": None}, "a tokenizer is needed"),
        *(
            (fields | {"preserve_qk_layers": False}, f"does not prune Q and K by {fields['importance_method']} ranks")
            for fields in ({"importance_method": "damage"}, {"method": "flatllm+", "importance_method": "angular"})
        ),
    ],
)
def test_what_is_of_another_kind_is_refused(texts, fields, message):
    with pytest.raises(InputError, match=message):
        FlatLLMPruner(tiny_model(), **({"tokenizer": TOKENIZER, "cal_dataset": texts} | fields)).prune_model()


@pytest.mark.parametrize("method", ["flatllm", "flatllm+"])
def test_weights_that_a_half_cannot_hold_are_refused(texts, method):
    """In the last layer, behind which nothing runs; half of the channels have to do what all did."""
    model = tiny_model()
    torch.manual_seed(0)
    model.model.layers[-1].mlp.down_proj.weight.data.uniform_(-6e4, 6e4)
    model.half()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(
        InputError, match=r"layer 1 gives NaN or infinite mlp\.down_proj\.weight in torch\.float16; a wider"
    ):
        apply_flat_llm(model, TOKENIZER, 0.5, texts, method=method, **SMALL)
    assert_same_weights(model.state_dict(), before)


def test_what_the_caller_has_switched_on_changes_nothing_and_the_model_can_be_trained(texts):
    model = tiny_model()
    expected = apply_flat_llm(tiny_model(), TOKENIZER, None, texts, importance_method="gradient", **SMALL)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(InputError, match=r"was made under torch\.inference_mode"):
            FlatLLMPruner(tiny_model())
        pruner = FlatLLMPruner(model, TOKENIZER, cal_dataset=texts, importance_method="gradient", **SMALL)
        assert len(pruner.compute_importance_scores()) == 2
        with torch.device("meta"):
            pruner.prune_model()
    assert not any(parameter.is_inference() for parameter in model.parameters())
    assert_same_weights(weights_of(model), weights_of(expected))


@pytest.mark.parametrize("shape", [{}, {"shape": "stock", "width_multiple": 8}], ids=str)
def test_a_model_is_not_compressed_twice_and_a_second_call_is_refused_before_it_scores(texts, monkeypatch, shape):
    """By the pruner that compressed it, and by another that was made before."""
    model = tiny_model()
    pruners = [FlatLLMPruner(model, TOKENIZER, cal_dataset=texts, **shape, **SMALL) for _ in range(2)]
    pruners[0].prune_model()
    monkeypatch.setattr("flatllmcore.pipeline.layer_importance", None)
    for pruner in pruners:
        with pytest.raises(InputError, match="compressed already"):
            pruner.prune_model()


def hooked(model):
    return accelerate.dispatch_model(model, dict.fromkeys(PARTS, "cpu"), force_hooks=True)


def hooks_of(model):
    return sorted(name for name, module in model.named_modules() if hasattr(module, "_hf_hook"))


def test_a_model_with_a_device_map_is_compressed_like_any_other(model, texts):
    expected = apply_flat_llm(copy.deepcopy(model), TOKENIZER, cal_dataset=texts, **SMALL)
    before = hooks_of(hooked(model))
    apply_flat_llm(model, TOKENIZER, cal_dataset=texts, **SMALL)
    assert "model.layers.1" in before
    assert hooks_of(model) == before
    assert_same_weights(weights_of(model), weights_of(expected))
    ids = torch.randint(97, (2, 10))
    assert torch.equal(model(ids).logits, expected(ids).logits)
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 13)


def test_what_stands_round_a_model_or_looks_on_is_no_hindrance(texts):
    """As a Trainer in mixed precision leaves it, compiled as a whole, and asked for hidden states before."""
    model, expected = tiny_model(), apply_flat_llm(tiny_model(), TOKENIZER, cal_dataset=texts, **SMALL)
    model(torch.randint(97, (1, 5)), output_hidden_states=True)
    model.forward = model.forward
    model.compile(backend="eager")
    assert_same_weights(weights_of(apply_flat_llm(model, TOKENIZER, cal_dataset=texts, **SMALL)), weights_of(expected))


def test_a_failure_leaves_the_model_and_its_hooks_as_they_were(model, texts):
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.inf
    weights, hooks = weights_of(model), hooks_of(hooked(model))
    kind = type(model)
    with pytest.raises(InputError, match="layer 1"):
        apply_flat_llm(model, TOKENIZER, cal_dataset=texts, **SMALL)
    assert (type(model), hooks_of(model)) == (kind, hooks)
    assert_same_weights(weights_of(model), weights)


class TestLayerUtils:
    def test_a_dense_model_is_not_sparse_and_zeros_count(self, model):
        assert check_sparsity(model) == 0
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.zero_()
        dense = sum(p.numel() for p in model.model.layers.parameters() if p.ndim > 1)
        assert check_sparsity(model) == pytest.approx(56 * 32 / dense)

    @pytest.mark.parametrize("widths", [(40, 40, 40), (96, 40, 33)])
    def test_sparsity_of_a_compressed_model_is_relative_to_the_dense_one(self, widths, tmp_path):
        """Equal widths become the config's own, so that the dense width must be remembered elsewhere."""
        model = dense_model_of("llama")
        dense = sum(p.numel() for p in model.model.layers.parameters() if p.ndim > 1)
        compress(model, (16, 16, 16), widths).save_pretrained(tmp_path)
        expected = pytest.approx(3 * 64 * (3 * 96 - sum(widths)) / dense)
        assert check_sparsity(model) == check_sparsity(AutoModelForCausalLM.from_pretrained(tmp_path)) == expected
        assert get_layer_dimensions(model)["intermediate_size"] == 96

    def test_dimensions_say_what_the_config_says(self):
        sizes = {"hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 12, "intermediate_size": 56}
        widths = {"value_rank": [12, 12], "mlp_width": [56, 56], "query_key_rank": [None, None]}
        expected = {"architecture": "mistral", "num_layers": 2} | sizes | widths
        assert get_layer_dimensions(tiny_model("mistral"), "Mistral") == expected
        with pytest.raises(InputError, match="family 'mistral', not 'llama'"):
            get_layer_dimensions(tiny_model("mistral"), "llama")

    def test_layers_are_found_by_kind_and_by_place(self, model):
        assert list(find_decoder_layers(model)) == list(model.model.layers)
        attention = {f"self_attn.{name}_proj" for name in "qkvo"}
        mlp = {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
        assert set(find_layers(find_decoder_layers(model)[0])) == attention | mlp
