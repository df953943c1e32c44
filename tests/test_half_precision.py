"""Weights of half a float32 on CPUs that have no instructions for them, and on those that have."""

import copy
import logging
from functools import partial
from unittest.mock import Mock

import pytest
import torch
from transformers import AutoModelForCausalLM

import main
from checkpoints import CPU, bytes_in, compress_to, in_memory, on_disk, save_inputs, stop_at, weights_in
from conftest import assert_same_weights, tiny_model
from flatllmcore.api import FlatLLMPruner
from flatllmcore.config import FlatLLMConfig
from flatllmcore.engine import compress
from flatllmcore.engine.checkpoint_sink import CheckpointSink
from flatllmcore.engine.importance import layer_importance
from flatllmcore.engine.memory import ModelInMemory
from flatllmcore.engine.perplexity import perplexity
from flatllmcore.engine.reuse import written
from flatllmcore.methods import flatllm, flatllm_plus
from flatllmcore.utils import devices
from flatllmcore.utils.names import IMPORTANCE_METHODS
from test_kills import OUT as RUN

STEPS = (flatllm.FlatLLMStep, flatllm_plus.PairStep, flatllm_plus.OutputStep)
HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture
def without_units(monkeypatch):
    monkeypatch.setattr(devices, "has_instructions_for", lambda _: False)


def config_of(method, windows, **fields):
    fields |= {"target_sparsity": 0.5, "rank_multiple": 1, "batch_size": 5, "device": "cpu"}
    return FlatLLMConfig(method=method, cal_dataset=windows, **fields)


@pytest.mark.parametrize("method", IMPORTANCE_METHODS)
def test_scores_and_perplexity_are_those_of_the_widened_model(model, windows, method, without_units):
    """Oracle: the same numbers in a model of float32, bit for bit."""
    half, widened = ModelInMemory(model.bfloat16(), CPU), ModelInMemory(copy.deepcopy(model).float(), CPU)
    assert layer_importance(half, windows, 5, method) == layer_importance(widened, windows, 5, method)
    assert perplexity(half, windows, 5) == perplexity(widened, windows, 5)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("method", "fields"), [("flatllm", {"preserve_qk_layers": False}), ("flatllm+", {})])
def test_a_model_is_compressed_as_the_widened_one_whose_solutions_are_rounded(
    model, windows, dtype, method, fields, without_units, monkeypatch
):
    """Oracle: a model of float32 of which each step's weights are rounded before anything runs through them.

    Its maps of values are found to that rounding too.
    """
    model.to(dtype).train().model.layers[0].requires_grad_(False)
    model.model.norm.weight.grad = torch.ones_like(model.model.norm.weight)
    widened, before = copy.deepcopy(model).float(), dict(model.named_parameters())
    FlatLLMPruner(model, config=config_of(method, windows, **fields)).prune_model()

    def rounded(weight):
        return weight.to(dtype).float() if weight.is_floating_point() else weight

    for step in STEPS:

        def solve(*args, solve=step.solve):
            solution = solve(*args)
            return solution._replace(weights={name: rounded(weight) for name, weight in solution.weights.items()})

        monkeypatch.setattr(step, "solve", solve)
    monkeypatch.setattr(compress, "written", lambda *given: written(*given[:-1], dtype))
    FlatLLMPruner(widened, config=config_of(method, windows, **fields)).prune_model()
    assert_same_weights(model.float().state_dict(), widened.state_dict())
    assert any("rotary_places" in name or "q_proj.up" in name for name in model.state_dict())
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("layers.0." not in name)
        if "norm" in name:
            assert parameter is before[name]
    assert all(module.training for module in model.modules())


def test_what_is_lent_comes_back_as_it_was(model, windows, without_units):
    """A failure comes in the last layer, behind one that is compressed."""
    model.to(torch.bfloat16).model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.inf
    before = {name: (parameter, parameter.data_ptr()) for name, parameter in model.named_parameters()}
    for run in (FlatLLMPruner.compute_importance_scores, FlatLLMPruner.prune_model):
        with pytest.raises(ValueError, match="layer 1 gives NaN or infinite"):
            run(FlatLLMPruner(model, config=config_of("flatllm", windows)))
        assert {name: (of, of.data_ptr()) for name, of in model.named_parameters()} == before


def test_weights_of_several_types_are_computed_with_as_they_are(windows, without_units):
    """Gemma's norms widen themselves; what an author kept apart has reasons."""
    model = tiny_model().to(torch.bfloat16)
    model.lm_head.float()
    source = ModelInMemory(model, CPU)
    with source.layer(0) as layer:
        assert {source.dtype, *(parameter.dtype for parameter in layer.parameters())} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("dtype", "method", "has_units"),
    [(torch.bfloat16, "flatllm", False), (torch.float16, "flatllm+", False), (torch.float16, "flatllm+", True)],
)
def test_the_bytes_are_the_same_in_memory_on_disk_and_behind_a_stop(
    tmp_path, windows, dtype, method, has_units, monkeypatch, caplog
):
    """And the folder's perplexity, as the run measures it, is that of the folder loaded in float32."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(devices, "has_instructions_for", lambda _: has_units)
    dense = str(tmp_path / "dense")
    tiny_model(num_hidden_layers=4).to(dtype).save_pretrained(dense)
    compress = partial(compress_to, dense=dense, windows=windows, method=method, prune_qk=True)
    compress(tmp_path / "disk")
    compress(tmp_path / "memory", source=in_memory(dense))
    kept = on_disk(dense)
    kept.is_kept = True
    compress(tmp_path / "kept", source=kept)
    with monkeypatch.context() as patch:
        stop_at(patch, STEPS[0 if method == "flatllm" else 2], 3)
        with pytest.raises(KeyboardInterrupt):
            compress(tmp_path / "stopped")
    compress(tmp_path / "stopped")
    assert "of 4 layers are finished" in caplog.text
    expected = bytes_in(tmp_path / "disk")
    assert all(bytes_in(tmp_path / name) == expected for name in ("memory", "kept", "stopped"))
    assert {weight.dtype for weight in weights_in(tmp_path / "disk").values()} - {torch.int64} == {dtype}

    source = on_disk(str(tmp_path / "disk"))
    assert (source.weights_dtype, source.dtype) == (dtype, dtype if has_units else torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "disk", dtype=torch.float32)
    loss = loaded(windows, labels=windows).loss
    assert perplexity(source, windows, 5) == pytest.approx(loss.exp().item(), rel=0.05 if has_units else 1e-6)


def test_a_run_that_was_computed_in_another_type_is_not_gone_on_with(tmp_path, monkeypatch, capsys):
    """As where a CPU without instructions for bfloat16 finds what one with them left: bytes would be of neither."""
    monkeypatch.chdir(save_inputs(tmp_path, torch.bfloat16))
    monkeypatch.setattr(devices, "has_instructions_for", lambda _: True)
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointSink, "publish", Mock(side_effect=KeyboardInterrupt))
        assert main.main(RUN) == 2
    with monkeypatch.context() as patch:
        patch.setattr(devices, "has_instructions_for", lambda _: False)
        assert main.main(RUN) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.endswith("(dtype torch.bfloat16 in torch.float32, not torch.bfloat16); finish that one or delete it")
    assert main.main(RUN) == 0
