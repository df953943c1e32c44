"""FlatLLMReassembler by itself; tests/test_fedcore.py has it with FedCore."""

import copy
import logging

import pytest
import torch
from torch import nn

import flatllmcore
from conftest import tiny_model
from flatllmcore import FlatLLMConfig, FlatLLMReassembler, InputError, apply_flat_llm
from flatllmcore.core.rank_allocation import ImportancePreservingRankSelector
from flatllmcore.reassembler import StandaloneReassembler
from flatllmcore.utils.layer_utils import dimensions_from_config
from tiny_text import documents, word_tokenizer

TOKENIZER = word_tokenizer()
TEXTS = documents(60)
CONFIG = FlatLLMConfig(target_sparsity=0.4, cal_dataset=TEXTS, cal_nsamples=12, seqlen=24, device="cpu")


@pytest.fixture
def expected(model):
    fields = {name: getattr(CONFIG, name) for name in ("cal_nsamples", "seqlen", "device")}
    return apply_flat_llm(copy.deepcopy(model), TOKENIZER, target_sparsity=0.4, cal_dataset=TEXTS, **fields)


@pytest.mark.parametrize("reassembler", [FlatLLMReassembler, FlatLLMReassembler()], ids=["class", "instance"])
@pytest.mark.parametrize(
    "call",
    [
        lambda reassemble, model: reassemble(model, TOKENIZER, CONFIG),
        lambda reassemble, model: reassemble(model, tokenizer=TOKENIZER, config=CONFIG),
        lambda reassemble, model: reassemble(
            model, TOKENIZER, None, target_sparsity=0.4, cal_dataset=TEXTS, cal_nsamples=12, seqlen=24, device="cpu"
        ),
        lambda reassemble, model: reassemble(
            model, architecture=model.config.model_type, tokenizer=TOKENIZER, config=CONFIG
        ),
    ],
    ids=["positional", "by name", "overrides", "architecture"],
)
def test_every_way_to_call_it_gives_the_same_model(reassembler, call, model, expected):
    assert call(reassembler.reassemble, model) is model
    found, wanted = model.state_dict(), expected.state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert type(model) is type(expected)


def test_overrides_take_precedence_over_the_config(model):
    FlatLLMReassembler.reassemble(model, TOKENIZER, CONFIG, target_sparsity=0.2, preserve_qk_layers=True)
    expected = tiny_model(model.config.model_type.removeprefix("flat_"))
    FlatLLMReassembler.reassemble(expected, TOKENIZER, CONFIG, target_sparsity=0.4)
    assert model.num_parameters() > expected.num_parameters()


def test_options_of_other_reassemblers_are_ignored_with_a_log_line(model, caplog):
    with caplog.at_level(logging.INFO, logger="flatllmcore"):
        FlatLLMReassembler.reassemble(model, TOKENIZER, CONFIG, rank=8, decomposing_mode="channel")
    assert "ignored, since FLAT-LLM has no such option: decomposing_mode, rank" in caplog.text


def test_another_architecture_than_the_model_s_is_refused(model):
    other = {"llama": "mistral", "mistral": "llama"}[model.config.model_type]
    with pytest.raises(InputError, match=f"not '{other}'"):
        FlatLLMReassembler.reassemble(model, TOKENIZER, CONFIG, architecture=other)


def test_the_architecture_of_dense_and_compressed_models_is_told(model):
    name = model.config.model_type
    assert FlatLLMReassembler._detect_model_architecture(model) == name
    FlatLLMReassembler.reassemble(model, TOKENIZER, CONFIG)
    assert FlatLLMReassembler._detect_model_architecture(model) == name


def test_scores_alone_keep_the_share_of_the_pruned_projections(caplog):
    """Oracle: the mean is one minus the target, the order that of the scores."""
    with caplog.at_level(logging.INFO, logger="flatllmcore"):
        keep = FlatLLMReassembler.allocate_ranks([0.3, 0.1, 0.2], target_sparsity=0.4)
    assert sum(keep) / 3 == pytest.approx(0.6)
    assert keep[0] > keep[2] > keep[1]
    assert "Q and K are not counted" in caplog.text


@pytest.mark.parametrize("preserve_qk_layers", [True, False])
def test_with_a_model_the_target_is_of_all_its_projections(model, preserve_qk_layers):
    """Oracle: the selector the pipeline uses."""
    config = FlatLLMConfig(preserve_qk_layers=preserve_qk_layers, rank_multiple=2)
    found = FlatLLMReassembler.allocate_ranks([0.3, 0.2], target_sparsity=0.4, model=model, config=config)
    selector = ImportancePreservingRankSelector(
        dimensions_from_config(model.config), rank_multiple=2, prune_qk=not preserve_qk_layers
    )
    assert found == selector.allocate([0.3, 0.2], 40)


@pytest.mark.parametrize("target", [-0.1, 1, 40])
def test_a_target_out_of_range_is_refused(target):
    with pytest.raises(InputError, match="target_sparsity"):
        FlatLLMReassembler.allocate_ranks([0.3, 0.2], target_sparsity=target)


def test_a_target_of_nothing_keeps_everything(model):
    assert FlatLLMReassembler.allocate_ranks([0.3, 0.2, 0.1], target_sparsity=0) == [1, 1, 1]
    found = FlatLLMReassembler.allocate_ranks([0.3, 0.2], target_sparsity=0.0, model=model)
    assert (found.value_rank, found.mlp_width, found.achieved_sparsity_percent) == ((12, 12), (56, 56), 0)


def test_the_package_lists_what_it_makes_when_asked():
    assert set(flatllmcore.__all__) <= set(dir(flatllmcore))
    assert "__getattr__" in dir(flatllmcore)
    with pytest.raises(AttributeError, match="no attribute 'FlatLLMReassembly'"):
        _ = flatllmcore.FlatLLMReassembly


def test_scores_computed_apart_lead_to_the_same_ranks(model, expected):
    scores = FlatLLMReassembler.compute_importance_scores(model, TOKENIZER, config=CONFIG)
    allocation = FlatLLMReassembler.allocate_ranks(scores, target_sparsity=0.4, model=model)
    ranks = [layer.self_attn.value_head_dim for layer in expected.model.layers]
    assert list(allocation.value_rank) == ranks


def test_a_config_s_target_counts_for_the_ranks(model):
    scores, config = [0.3, 0.2], FlatLLMConfig(target_sparsity=0.2)
    by_config = FlatLLMReassembler.allocate_ranks(scores, model=model, config=config)
    assert by_config == FlatLLMReassembler.allocate_ranks(scores, target_sparsity=0.2, model=model)
    with pytest.raises(InputError, match="no importance scores"):
        FlatLLMReassembler.allocate_ranks([])


def test_a_model_on_two_devices_is_refused(model):
    model.lm_head.to("meta")
    with pytest.raises(RuntimeError, match="several devices"):
        FlatLLMReassembler.reassemble(model, TOKENIZER, CONFIG)


def test_an_additional_mapping_is_applied_after_the_compression(model):
    norm = type(model.model.norm)
    FlatLLMReassembler.reassemble(model, TOKENIZER, CONFIG, additional_mapping={norm: nn.Identity})
    assert not any(type(module) is norm for module in model.modules())
    assert isinstance(model.model.norm, nn.Identity)


class TestStandaloneReassembler:
    def test_it_has_the_tables_of_fedcore_s_base(self):
        assert StandaloneReassembler.supported_layers == StandaloneReassembler.supported_decomposed_layers == {}

    def test_modules_are_got_and_set_by_dotted_name(self):
        model = nn.Sequential(nn.Sequential(nn.ReLU()), nn.Linear(2, 2))
        new = nn.Identity()
        StandaloneReassembler.set_module(model, "0.0", new)
        assert StandaloneReassembler.get_module(model, "0.0") is new

    def test_a_mapping_replaces_modules_of_exactly_that_type(self):
        class Special(nn.Linear):
            pass

        model = nn.Sequential(nn.Linear(2, 2), Special(2, 2))
        StandaloneReassembler._apply_additional_mapping(model, {nn.Linear: nn.Identity})
        assert [type(module) for module in model] == [nn.Identity, Special]

    def test_parameters_on_two_devices_are_an_error(self):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
        with pytest.raises(RuntimeError, match="cpu, meta"):
            StandaloneReassembler._validate_device_consistency(model)
