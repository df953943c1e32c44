"""The pipeline against the float64 oracle of tests/oracle.py: same tokens, same ranks.

The models are in float64, but transformers computes norms, rotary embeddings and the loss in float32 whatever
the dtype: that, not the method, is what the tolerances of 1e-5 allow for.
"""

import copy
import math
from collections import Counter
from contextlib import contextmanager

import pytest
import torch

import oracle
from conftest import ranks_of, tiny_model, widths_of
from flatllmcore.core.importance import angles_between
from flatllmcore.core.rank_allocation import ImportancePreservingRankSelector
from flatllmcore.engine.compress import compress_layers
from flatllmcore.engine.importance import layer_importance
from flatllmcore.engine.memory import ModelInMemory, layer_arguments
from flatllmcore.engine.perplexity import perplexity
from flatllmcore.errors import InputError
from flatllmcore.methods import METHODS
from flatllmcore.utils.layer_utils import dimensions_from_config

CPU = torch.device("cpu")
VARIANTS = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    ("mistral", {"sliding_window": 5}),
]


def compressed(model, windows, percent=40, batch_size=5, device=CPU):
    dimensions = dimensions_from_config(model.config)
    allocation = ImportancePreservingRankSelector(dimensions, rank_multiple=1).allocate((0.3, 0.2), 1 - percent / 100)
    source = ModelInMemory(model, device)
    flat_config, records = compress_layers(
        source, source, windows, METHODS["flatllm"], allocation, batch_size=batch_size, tolerance=0.96
    )
    return source.adopt(flat_config), allocation, records


@pytest.mark.parametrize(("family", "overrides"), VARIANTS)
def test_importance_equals_the_oracle(family, overrides, windows, device):
    model = tiny_model(family, **overrides)
    found = layer_importance(ModelInMemory(model, device), windows, 5)
    assert found.scores == pytest.approx(oracle.importance(*oracle.weights_and_sizes(model), windows), rel=1e-5)
    assert found.zero_rows == 0


@pytest.mark.parametrize(("family", "overrides"), VARIANTS)
def test_compressed_logits_and_perplexity_equal_the_oracle(family, overrides, windows, device):
    """Bases are fixed only up to sign, so functions are compared, not weights."""
    model = tiny_model(family, **overrides)
    weights, sizes = oracle.weights_and_sizes(model)
    model, allocation, _ = compressed(model, windows, device=device)
    expected = oracle.compress(weights, sizes, windows, ranks_of(allocation), widths_of(allocation))

    test_windows = torch.randint(97, (6, 16), generator=torch.Generator().manual_seed(2))
    measured = perplexity(ModelInMemory(model, device), test_windows, 4)
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert measured.value == pytest.approx(oracle.perplexity(expected, sizes, test_windows), rel=1e-5)
    assert measured.predicted_tokens == 6 * 15


def test_perplexity_equals_the_parent_class_loss(model, windows):
    loss = torch.stack([model(ids[None], labels=ids[None]).loss for ids in windows]).mean()
    measured = perplexity(ModelInMemory(model, CPU), windows, 7)
    assert measured.value == pytest.approx(math.exp(loss.item()), rel=1e-6)


def test_the_result_does_not_depend_on_the_batch_size(model, windows):
    together, _, _ = compressed(copy.deepcopy(model), windows, batch_size=24)
    one_by_one, _, _ = compressed(model, windows, batch_size=1)
    for (name, a), (_, b) in zip(together.state_dict().items(), one_by_one.state_dict().items(), strict=True):
        torch.testing.assert_close(a.abs(), b.abs(), rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_a_layer_kept_whole_gives_the_very_same_logits(model, windows):
    """Oracle: the model itself. Nothing is to be removed, so both layers' shares are 1."""
    before = model(windows).logits
    dimensions = dimensions_from_config(model.config)
    whole = ImportancePreservingRankSelector(dimensions).allocate([0.3, 0.3], 1)
    source = ModelInMemory(model, CPU)
    flat_config, _ = compress_layers(source, source, windows, METHODS["flatllm"], whole, batch_size=8, tolerance=0.96)
    assert torch.equal(source.adopt(flat_config)(windows).logits, before)


def test_compression_changes_the_given_object_and_counts_its_parameters(model, windows):
    same, allocation, records = compressed(model, windows)
    assert same is model
    linear = sum(p.numel() for n, p in model.named_parameters() if "_proj.weight" in n and ".layers." in n)
    assert allocation.parameters_after == linear
    assert ranks_of(records) == ranks_of(allocation)


def test_a_layer_runs_once_for_its_statistics_and_once_compressed(windows, monkeypatch):
    """Oracle: the calls of every projection, in windows. Dense layers never reach their down projection."""
    seen = Counter()
    linear = torch.nn.Linear.forward

    def counting(self, inputs):
        seen[self.in_features, self.out_features] += len(inputs)
        return linear(self, inputs)

    model = tiny_model(num_hidden_layers=3)
    dimensions = dimensions_from_config(model.config)
    allocation = ImportancePreservingRankSelector(dimensions).allocate((0.3, 0.3, 0.3), 0.6)
    source = ModelInMemory(model, CPU)
    monkeypatch.setattr(torch.nn.Linear, "forward", counting)
    compress_layers(source, source, windows, METHODS["flatllm"], allocation, batch_size=5, tolerance=0.96)
    width = allocation.layers[0].mlp_width
    assert seen[32, 48] == 2 * 3 * 24  # q_proj, dense and compressed
    assert seen[32, 56] == 2 * 3 * 24  # gate_proj and up_proj, dense
    assert seen[32, width] == 2 * 3 * 24  # the same, compressed
    assert seen[56, 32] == 0
    assert seen[width, 32] == 3 * 24


def test_hidden_states_in_host_memory_give_the_same_result(windows, device, monkeypatch):
    """On a GPU they stay there while they fit; here they never do."""
    monkeypatch.setattr("flatllmcore.engine.storage._SHARE_OF_DEVICE", 0)
    on_host, _, _ = compressed(tiny_model(), windows, device=device)
    monkeypatch.undo()
    on_device, _, _ = compressed(tiny_model(), windows, device=device)
    for (name, a), (_, b) in zip(on_host.state_dict().items(), on_device.state_dict().items(), strict=True):
        torch.testing.assert_close(a.abs(), b.abs(), msg=lambda m, n=name: f"{n}: {m}")


def test_a_forward_that_a_user_put_on_a_layer_stays(windows):
    model = tiny_model()
    layer = model.model.layers[0]
    own = layer.forward
    layer.forward = own
    layer_arguments(model.model, 8, CPU)
    assert layer.__dict__["forward"] is own
    assert "forward" not in model.model.layers[1].__dict__


def test_a_failed_compression_leaves_the_model_as_it_was(model, windows):
    """The last layer's weights are spoiled, so the first has been compressed when the walk fails."""
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = math.nan
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match="layer 1"):
        compressed(model, windows)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], before[n]) or n.endswith("1.mlp.up_proj.weight") for n in before)
    assert model.training
    assert type(model).__name__ in {"LlamaForCausalLM", "MistralForCausalLM"}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_few_calibration_tokens_are_warned_of_and_do_not_blow_up(model, windows, caplog):
    """Oracle: the dense model's perplexity. Without the ridge, 56 channels solved from 48 tokens give far more."""
    test_windows = torch.randint(97, (6, 16), generator=torch.Generator().manual_seed(2))
    before = perplexity(ModelInMemory(model, CPU), test_windows, 4).value
    small, _, _ = compressed(model, windows[:3], percent=20)
    assert "48 calibration tokens are few for 56 MLP channels" in caplog.text
    assert perplexity(ModelInMemory(small, CPU), test_windows, 4).value < 3 * before


def test_infinite_activations_name_their_layer(model, windows):
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(math.inf)
    with pytest.raises(InputError, match="layer 1 gives NaN or infinite"):
        layer_importance(ModelInMemory(model, CPU), windows, 8)


def test_layer_arguments_are_those_the_model_passes(windows):
    """Oracle: the model's own hidden states, layer by layer."""
    model = tiny_model("mistral", sliding_window=5)
    arguments = layer_arguments(model.model, 16, CPU)
    states = model(windows, output_hidden_states=True).hidden_states
    outputs = states[0]
    for layer, given in zip(model.model.layers, arguments, strict=True):
        outputs = layer(outputs, **given)
    torch.testing.assert_close(model.model.norm(outputs), states[-1])


def test_an_identity_block_has_no_angle():
    x = torch.randn(50, 9)
    angles, zeros = angles_between(x, 3 * x)
    assert angles.max() < 1e-7
    assert zeros == 0


def test_opposite_rows_count_as_a_right_angle_and_zero_rows_as_cosine_one_half():
    x = torch.tensor([[1.0, 0], [1, 0], [0, 0], [1, 0]])
    y = torch.tensor([[-1.0, 0], [0, 1], [1, 0], [1, 1]])
    angles, zeros = angles_between(x, y)
    assert angles.tolist() == pytest.approx([0.5, 0.5, 1 / 3, 0.25])
    assert zeros == 1


def test_gradient_importance_equals_finite_differences(model, windows):
    """Oracle: the change of the loss when one unit of one token's row of a layer's output is scaled by 1 ± ε."""
    windows, epsilon = windows[:2, :4], 1e-2
    found = layer_importance(ModelInMemory(model, CPU), windows, 1, "gradient").scores
    together = layer_importance(ModelInMemory(model, CPU), windows, 2, "gradient").scores
    assert found == pytest.approx(together, rel=1e-6)

    def losses(layer, token, unit, scale):
        def scale_unit(_module, _inputs, outputs):
            scaled = outputs.clone()
            scaled[:, token, unit] *= scale
            return scaled

        hook = model.model.layers[layer].register_forward_hook(scale_unit)
        try:
            logits = model(windows).logits[:, :-1]
        finally:
            hook.remove()
        per_token = torch.nn.functional.cross_entropy(logits.mT, windows[:, 1:], reduction="none")
        return per_token.mean(1)  # (windows,)

    for layer in range(2):
        total = sum(
            (losses(layer, token, unit, 1 + epsilon) - losses(layer, token, unit, 1 - epsilon)).abs().sum().item()
            for token in range(4)
            for unit in range(32)
        )
        assert found[layer] == pytest.approx(total / (2 * epsilon) / windows.numel(), rel=2e-3)


class CountingSource(ModelInMemory):
    """Notes which layers are lent, and how many are out at a time."""

    def __init__(self, model):
        super().__init__(model, CPU)
        self.lent, self.out, self.most_out = [], 0, 0

    @contextmanager
    def layer(self, index):
        self.lent.append(index)
        self.out += 1
        self.most_out = max(self.most_out, self.out)
        with super().layer(index) as layer:
            yield layer
        self.out -= 1


@pytest.mark.parametrize(
    ("method", "lent"),
    [("angular", [0, 1, 2]), ("gradient", 3 * [0, 1, 2, 2, 1])],  # 24 windows are three batches of 8
)
def test_importance_borrows_one_layer_at_a_time(method, lent, windows):
    source = CountingSource(tiny_model(num_hidden_layers=3))
    layer_importance(source, windows, 8, method)
    assert source.lent == lent
    assert (source.most_out, source.out) == (1, 0)


def test_an_unknown_importance_method_is_refused_by_name(model, windows):
    with pytest.raises(InputError, match="'random' is unknown; accepted: angular, gradient"):
        layer_importance(ModelInMemory(model, CPU), windows, 2, "random")
