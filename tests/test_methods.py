"""The door for the next method: throw-away ones, of which no other file knows a line."""

import copy
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from checkpoints import CPU, bytes_in, compress_to, in_memory, save_tiny_checkpoint, weights_in
from conftest import tiny_model
from flatllmcore import FlatLLMPruner, InputError
from flatllmcore.core.rank_allocation import RankAllocation
from flatllmcore.engine.compress import compress_layers
from flatllmcore.engine.memory import ModelInMemory
from flatllmcore.engine.protocols import Solution
from flatllmcore.methods import METHODS
from flatllmcore.utils.dimensions import Kept
from flatllmcore.utils.layer_utils import dimensions_from_config


class First:
    """Keeps the first channels of every MLP and no PCA, as many more as the layer comes later."""

    name = "first"
    importance_method = "angular"
    follows_dense = False

    def allocate(self, selector, scores, curves, keep_ratio):
        sizes = selector.dimensions
        widths = [int(keep_ratio * sizes.intermediate_size) + layer for layer in range(sizes.num_layers)]
        layers = tuple(Kept(keep_ratio, sizes.head_dim, width) for width in widths)
        return RankAllocation(100 * (1 - keep_ratio), False, 1, sizes, layers)

    def check(self, allocation, tokens):
        pass

    def steps(self, dimensions, kept):
        return [FirstChannels(kept)]


@dataclass
class FirstChannels:
    leaves: Kept
    part: str = ""
    notes: list[torch.Tensor] = field(default_factory=list)
    taps = ("mlp.down_proj.input",)

    def zeros(self, layer):
        return {"sum": torch.zeros(layer.mlp.down_proj.in_features, dtype=torch.float64)}

    def add(self, layer, sums, seen):
        sums["sum"] += seen["mlp.down_proj.input"].sum(0)

    def solve(self, layer, sums):
        self.notes.append(sums["sum"])
        width = self.leaves.mlp_width
        if width < 10:
            raise ArithmeticError("too narrow")
        weights = {f"mlp.{name}.weight": getattr(layer.mlp, name).weight for name in ("gate_proj", "up_proj")}
        weights = {name: weight[:width] for name, weight in weights.items()}
        return Solution(weights | {"mlp.down_proj.weight": layer.mlp.down_proj.weight[:, :width]})


def cut_by_hand(model, widths):
    """Return the dense model with narrower MLPs: its own class, which asks no config for the width."""
    model = copy.deepcopy(model)
    for layer, width in zip(model.model.layers, widths, strict=True):
        for projection in (layer.mlp.gate_proj, layer.mlp.up_proj):
            projection.weight.data = projection.weight.data[:width]
        layer.mlp.down_proj.weight.data = layer.mlp.down_proj.weight.data[:, :width]
    return model


@pytest.fixture
def first(monkeypatch):
    monkeypatch.setitem(METHODS, "first", First())


def test_a_further_method_compresses_a_checkpoint_out_of_core(first, tmp_path, windows):
    """Oracle: slices of the dense checkpoint's weights, and the dense model, its MLPs cut by hand."""
    folder = save_tiny_checkpoint(tmp_path / "dense")
    compress_to(tmp_path / "disk", folder, windows, method="first")
    compress_to(tmp_path / "memory", folder, windows, method="first", source=in_memory(folder))
    assert bytes_in(tmp_path / "disk") == bytes_in(tmp_path / "memory")
    expected = cut_by_hand(in_memory(folder).model, (33, 34, 35, 36))
    written = weights_in(tmp_path / "disk")
    assert written.keys() == expected.state_dict().keys()
    assert all(torch.equal(weight, expected.state_dict()[name]) for name, weight in written.items())
    FlatLLMPruner(tiny_model(), method="first", cal_dataset=windows).prune_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "disk")
    torch.testing.assert_close(loaded(windows).logits, expected(windows).logits, rtol=1e-12, atol=1e-12)


class FirstDirections(FirstChannels):
    """Keeps the first five directions of each value head."""

    def solve(self, layer, sums):
        values, output = layer.self_attn.v_proj.weight, layer.self_attn.o_proj.weight
        values, output = values.unflatten(0, (-1, 12))[:, :5], output.unflatten(1, (-1, 12))[..., :5]
        return Solution({"self_attn.v_proj.weight": values.flatten(0, 1), "self_attn.o_proj.weight": output.flatten(1)})


@pytest.mark.parametrize("widths", [(40, 30), (40, 9)], ids=["whole", "failing"])
def test_a_later_step_looks_at_the_compressed_part_and_the_layer_is_as_it_was(windows, widths):
    """Oracle: a dense model in which what is dropped is zero; of the layer looked at its values alone."""
    model, method, sums = tiny_model(), First(), []
    method.steps = lambda sizes, kept: [
        FirstDirections(replace(kept, mlp_width=sizes.intermediate_size), "self_attn"),
        FirstChannels(kept, "mlp", sums),
    ]
    source, before, parts = ModelInMemory(model, CPU), copy.deepcopy(model), list(model.modules())
    sizes = dimensions_from_config(model.config)
    allocation = RankAllocation(50.0, False, 1, sizes, tuple(Kept(0.5, 5, width) for width in widths))
    fails = pytest.raises(InputError, match="layer 1 cannot be compressed: too narrow")
    with fails if min(widths) < 10 else nullcontext():
        compress_layers(source, source, windows, method, allocation, batch_size=5, tolerance=0.96)
    assert all(part is own for part, own in zip(model.modules(), parts, strict=True))
    assert torch.equal(model(windows).logits, before(windows).logits)
    zeroed = copy.deepcopy(model)
    for layer, width, found in zip(zeroed.model.layers, widths, sums, strict=True):
        layer.self_attn.v_proj.weight.data.unflatten(0, (-1, 12))[:, 5:] = 0
        activations = []
        hook = layer.mlp.down_proj.register_forward_pre_hook(lambda _, inputs, note=activations: note.append(inputs[0]))
        zeroed(windows)
        hook.remove()
        torch.testing.assert_close(found, activations[0].sum((0, 1)), rtol=1e-10, atol=1e-10)
        layer.mlp.down_proj.weight.data[:, width:] = 0
