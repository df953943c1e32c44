"""FlatLLMReassembler by itself; tests/test_fedcore.py has it with FedCore."""

import copy
import logging

import pytest
from torch import nn

from conftest import assert_same_weights, tiny_model
from flatllmcore import FlatLLMConfig, FlatLLMPruner, FlatLLMReassembler, InputError, apply_flat_llm
from flatllmcore.core.rank_allocation import ImportancePreservingRankSelector
from flatllmcore.reassembler import StandaloneReassembler
from flatllmcore.utils.layer_utils import dimensions_from_config
from tiny_text import documents, word_tokenizer

TOKENIZER = word_tokenizer()
OPTIONS = {"cal_dataset": documents(60), "cal_nsamples": 12, "seqlen": 24, "device": "cpu"}
CONFIG = FlatLLMConfig(target_sparsity=0.4, **OPTIONS)
OTHER_SIZES = dimensions_from_config(tiny_model(intermediate_size=48).config)
OF_ANOTHER = ImportancePreservingRankSelector(OTHER_SIZES).floored([0.5, 0.5])


@pytest.fixture
def expected(model):
    return apply_flat_llm(copy.deepcopy(model), TOKENIZER, config=CONFIG)


@pytest.mark.parametrize(
    "call",
    [
        lambda model: FlatLLMReassembler.reassemble(model, TOKENIZER, CONFIG),
        lambda model: FlatLLMReassembler().reassemble(model, tokenizer=TOKENIZER, config=CONFIG),
        lambda model: FlatLLMReassembler.reassemble(model, TOKENIZER, None, target_sparsity=0.4, **OPTIONS),
        lambda model: FlatLLMReassembler.reassemble(model, architecture="llama", tokenizer=TOKENIZER, config=CONFIG),
    ],
    ids=["positional", "of an instance by name", "overrides", "architecture"],
)
def test_every_way_to_call_it_gives_the_same_model(call, model, expected):
    assert call(model) is model
    assert_same_weights(model.state_dict(), expected.state_dict())
    assert type(model) is type(expected)


def test_overrides_take_precedence_and_options_of_other_reassemblers_are_ignored_with_a_log_line(
    model, expected, caplog
):
    with caplog.at_level(logging.INFO, logger="flatllmcore"):
        FlatLLMReassembler.reassemble(model, TOKENIZER, CONFIG, target_sparsity=0.2, rank=8, decomposing_mode="x")
    assert model.num_parameters() > expected.num_parameters()
    assert "ignored, since FLAT-LLM has no such option: decomposing_mode, rank" in caplog.text


@pytest.mark.parametrize(("name", "other"), [("llama", "mistral"), ("mistral", "llama")])
def test_the_architecture_of_dense_and_compressed_models_is_told(name, other):
    model = tiny_model(name)
    with pytest.raises(InputError, match=f"not '{other}'"):
        FlatLLMReassembler.reassemble(model, TOKENIZER, CONFIG, architecture=other)
    assert FlatLLMReassembler._detect_model_architecture(model) == name
    FlatLLMReassembler.reassemble(model, TOKENIZER, CONFIG)
    assert FlatLLMReassembler._detect_model_architecture(model) == name


@pytest.mark.parametrize(
    ("scores", "target", "message"),
    [([0.3, 0.0], 0.5, "score of layer 1 is 0.0")]
    + [([0.3, 0.2], target, f"target_sparsity is {target}; accepted: 0 or more") for target in (-0.1, 1, 40)],
)
def test_scores_and_targets_that_give_no_ranks_are_refused(scores, target, message):
    with pytest.raises(InputError, match=message):
        FlatLLMReassembler.allocate_ranks(scores, target_sparsity=target)


@pytest.mark.parametrize("given", ["importance_scores", "rank_allocation"])
def test_scores_or_ranks_computed_apart_lead_to_the_same_model(model, expected, given, monkeypatch):
    scores = FlatLLMReassembler.compute_importance_scores(model, TOKENIZER, config=CONFIG)
    allocation = ImportancePreservingRankSelector(dimensions_from_config(model.config)).allocate(scores, 0.6)
    monkeypatch.setattr("flatllmcore.pipeline.layer_importance", None)  # nothing is scored again
    options = {"importance_scores": {given: scores}, "rank_allocation": {given: allocation, "target_sparsity": 1.0}}
    FlatLLMReassembler.reassemble(model, TOKENIZER, CONFIG, **options[given])
    assert_same_weights(model.state_dict(), expected.state_dict())


def test_shares_of_scores_alone_can_be_given(model):
    """Oracle: their mean is one minus the target, in the proportion of the scores; the floors of the shares."""
    assert FlatLLMReassembler.allocate_ranks([0.3, 0.2, 0.1], target_sparsity=0) == [1, 1, 1]
    keep = FlatLLMReassembler.allocate_ranks([0.3, 0.1], target_sparsity=0.4)
    assert str(keep) == "[0.9, 0.3]"
    pruner = FlatLLMPruner(model, TOKENIZER, CONFIG, rank_allocation=keep)
    pruner.prune_model()
    assert [layer.self_attn.value_head_dim for layer in model.model.layers] == [10, 3]
    stats = pruner.get_compression_stats()
    assert stats["target_sparsity"] == pytest.approx(stats["sparsity"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"importance_scores": [0.1] * 3}, "'scores' has 3 entries; the model has 2 layers"),
        ({"rank_allocation": [0.5] * 3}, "'layers' has 3 entries; the model has 2 layers"),
        ({"rank_allocation": [0.5, float("nan")]}, r"the shares to keep are \[0.5, nan\]"),
        ({"importance_scores": [0.5, None]}, "importance_scores are unusable"),
        ({"rank_allocation": [0.5, 1.5]}, "'keep' of layer 1 is 1.5; accepted: more than 0, at most 1"),
        ({"rank_allocation": OF_ANOTHER}, "the ranks belong to another model: intermediate_size 48, not 56"),
    ],
)
def test_scores_and_ranks_of_another_model_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        FlatLLMReassembler.reassemble(tiny_model(), TOKENIZER, CONFIG, **options)


def test_a_model_on_two_devices_is_refused(model):
    model.lm_head.to("meta")
    with pytest.raises(RuntimeError, match="several devices: cpu, meta"):
        FlatLLMReassembler.reassemble(model, TOKENIZER, CONFIG)


def test_an_additional_mapping_is_applied_after_the_compression(model):
    norm = type(model.model.norm)
    mapping = {norm: nn.Identity, nn.Module: nn.Identity}  # types are meant exactly
    FlatLLMReassembler.reassemble(model, TOKENIZER, CONFIG, additional_mapping=mapping)
    assert not any(type(module) is norm for module in model.modules())
    assert isinstance(model.model.norm, nn.Identity)
    assert len(model.model.layers) == 2


def test_the_base_class_is_as_fedcore_s():
    model, new = tiny_model(), nn.Identity()
    StandaloneReassembler.set_module(model, "model.layers.1.mlp", new)
    assert StandaloneReassembler.get_module(model, "model.layers.1.mlp") is new is model.model.layers[1].mlp
    assert StandaloneReassembler.supported_layers == StandaloneReassembler.supported_decomposed_layers == {}
