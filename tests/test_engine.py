"""The pipeline against the float64 oracle of tests/oracle.py: same tokens, same ranks.

The models are in float64, but transformers computes norms, rotary embeddings and the loss in float32 whatever
the dtype: that, not the method, is what the tolerances of 1e-5 allow for.
"""

import copy
import math
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import oracle
from checkpoints import CPU, assert_same_up_to_sign, compressed
from conftest import tiny_model
from flatllmcore.core.rank_allocation import RankAllocation
from flatllmcore.engine.compress import compress_layers
from flatllmcore.engine.importance import angles_between, layer_importance, loss_metrics
from flatllmcore.engine.memory import ModelInMemory
from flatllmcore.engine.perplexity import perplexity
from flatllmcore.engine.reuse import written
from flatllmcore.engine.storage import StatesStorage
from flatllmcore.engine.walk import Walk, tapped
from flatllmcore.errors import InputError
from flatllmcore.layers.flat_attention import HeadwiseFactoredLinear
from flatllmcore.methods import METHODS, flatllm
from flatllmcore.utils.dimensions import Kept
from flatllmcore.utils.layer_utils import WRITERS, count_parameters, dimensions_from_config

TEST_WINDOWS = torch.randint(97, (6, 16), generator=torch.Generator().manual_seed(2))


def test_importance_equals_the_oracle(model, windows, device):
    found = layer_importance(ModelInMemory(model, device), windows, 5)
    assert found.scores == pytest.approx(oracle.importance(*oracle.weights_and_sizes(model), windows), rel=1e-5)
    assert found.zero_rows == 0


@pytest.mark.parametrize("prune_qk", [False, True])
@pytest.mark.parametrize("keep_ratio", [0.8, 0.55])
def test_the_perplexity_of_a_compressed_model_equals_the_oracle(model, keep_ratio, prune_qk, windows, device):
    """The oracle knows no factors of Q and K: it projects their weights at full width."""
    weights, sizes = oracle.weights_and_sizes(model)
    model, allocation, _ = compressed(model, windows, keep_ratio, prune_qk=prune_qk, device=device)
    ranks, widths = ([getattr(kept, name) for kept in allocation.layers] for name in ("value_rank", "mlp_width"))

    def expected(prune_qk: bool) -> float:
        return oracle.perplexity(oracle.compress(weights, sizes, windows, ranks, widths, prune_qk), sizes, TEST_WINDOWS)

    measured = perplexity(ModelInMemory(model, device), TEST_WINDOWS, 4)
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert measured == pytest.approx(expected(prune_qk), rel=1e-5)
    assert not prune_qk or measured != pytest.approx(expected(False), rel=1e-3)


@pytest.mark.parametrize("prune_qk", [False, True])
def test_the_result_does_not_depend_on_the_batch_size(model, windows, prune_qk):
    together, _, _ = compressed(copy.deepcopy(model), windows, batch_size=24, prune_qk=prune_qk)
    one_by_one, _, _ = compressed(model, windows, batch_size=1, prune_qk=prune_qk)
    assert_same_up_to_sign(together, one_by_one)


@pytest.mark.parametrize("keep_ratio", [0.9, 0.75, 0.6, 0.4, 0.2])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_reported_parameters_are_those_of_the_model(keep_ratio, kv_heads, windows):
    """Oracle: the sizes of the tensors under their names, the second factors of Q and K included."""
    model = tiny_model(num_key_value_heads=kv_heads)
    _, allocation, records = compressed(model, windows, keep_ratio, prune_qk=True)
    linear = [p.numel() for name, p in model.named_parameters() if ".layers." in name and "_proj." in name]
    assert allocation.parameters_after == sum(linear) == count_parameters(model)["decoder_linear"]
    for kept, record, layer in zip(allocation.layers, records, model.model.layers, strict=True):
        assert (record.value_rank, record.mlp_width) == (kept.value_rank, kept.mlp_width)
        assert record.query_key_rank == kept.query_key_rank
        assert isinstance(layer.self_attn.q_proj, HeadwiseFactoredLinear) == (kept.query_key_rank is not None)


def multiplications(sizes, first, method, scores, is_room):
    """Return those per token of the passes through two layers, ``first`` what the first keeps.

    ``scores`` are those of attention's two products with all positions. Nobody asks for what the last layer gives.
    """
    D, F, A = sizes.hidden_size, sizes.intermediate_size, sizes.num_heads * sizes.head_dim
    attention = D * (A + 2 * sizes.num_kv_heads * sizes.head_dim) + scores  # as far as o_proj
    if method == "flatllm":  # the dense layers as far as down_proj; o_proj on what it read, and the narrower MLP
        return 2 * (attention + A * D + 2 * D * F) + A * D + 3 * D * first.mlp_width + (not is_room) * attention
    # The dense stream; the other one as far as o_proj and down_proj; these on what they read.
    dense, other, ends = attention + A * D + 3 * D * F, attention + 2 * D * F, 2 * A * D + D * F
    return 2 * dense + 2 * other + ends + (not is_room) * 2 * (attention + D * F)


@pytest.mark.parametrize(("is_room", "dtype"), [(True, torch.float32), (True, torch.bfloat16), (False, torch.float32)])
@pytest.mark.parametrize("method", METHODS)
def test_a_layers_attention_is_computed_once_per_stream(windows, monkeypatch, method, is_room, dtype):
    """Oracle: torch's count of operations, against the least; what was no room for is computed once more.

    Nobody asks for what the last layer gives.
    """
    model = tiny_model(attn_implementation="eager").to(dtype)
    sizes, source = dimensions_from_config(model.config), ModelInMemory(model, CPU)
    allocation = RankAllocation(40.0, False, 1, sizes, tuple(Kept(0.6, 7, width) for width in (30, 40)))
    run, counts = Walk.run, []

    def counted(*args):
        counter = FlopCounterMode(display=False)
        try:
            with counter:
                return run(*args)
        finally:
            counts.append(counter.get_total_flops())

    monkeypatch.setattr(Walk, "run", counted)
    if not is_room:
        monkeypatch.setattr(StatesStorage, "spare", lambda *_: None)
    compress_layers(source, source, windows, METHODS[method], allocation, batch_size=5, tolerance=0.96)
    scores = 2 * windows.shape[1] * sizes.num_heads * sizes.head_dim
    expected = multiplications(sizes, allocation.layers[0], method, scores, is_room)
    assert sum(counts) == 2 * windows.numel() * expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rank", "width"), [(12, 56), (7, 56), (12, 30)])
def test_what_stands_for_a_part_gives_what_the_part_gives(windows, dtype, rank, width):
    """Oracle: the parts of the compressed layer. Two channels are equal."""
    model = tiny_model()
    for name in ("gate_proj", "up_proj"):
        weight = model.model.layers[0].mlp.get_submodule(name).weight.data
        weight[1] = weight[0]
    model.to(dtype)
    before, sizes = copy.deepcopy(model.model.layers[0]), dimensions_from_config(model.config)
    assert (sizes.head_dim, sizes.intermediate_size) == (12, 56)
    source = ModelInMemory(model, CPU)
    allocation = RankAllocation(10.0, False, 1, sizes, 2 * (Kept(0.9, rank, width),))
    config, _ = compress_layers(source, source, windows, METHODS["flatllm"], allocation, batch_size=5, tolerance=0.96)
    after, states = source.adopt(config).model.layers[0], torch.randn(3, 6, sizes.hidden_size).to(dtype)
    angles = model.model.rotary_emb(states, torch.arange(6)[None])
    calls = {"self_attn": {"position_embeddings": angles, "attention_mask": None}, "mlp": {}}
    for part, arguments in calls.items():
        stand_in = written(before, after, part, dtype)
        tap = f"{WRITERS[part]}.input"
        with tapped(before, [tap]) as look:
            read = look(partial(before.get_submodule(part), states, **arguments))[tap]
        stand_in.read = read.view(*states.shape[:2], -1)
        found, expected = stand_in(), after.get_submodule(part)(states, **arguments)
        if part == "self_attn":
            found, expected = found[0], expected[0]
        assert (found - expected).norm() <= (1e-6 if dtype == torch.float32 else 6e-3) * expected.norm()


@pytest.mark.parametrize("prune_qk", [False, True])
def test_the_log_says_where_attention_is_computed_again(model, windows, caplog, prune_qk):
    """That of queries and keys in two factors is no map of the dense one's."""
    caplog.set_level("INFO")
    compressed(model, windows, prune_qk=prune_qk)
    assert ("layer 0: self_attn is computed again" in caplog.text) == prune_qk


def test_a_failed_compression_leaves_the_model_as_it_was(model, windows):
    """The last layer's weights are spoiled, so the first, with a user's forward, is compressed when the walk fails."""
    first, last = model.model.layers
    with torch.no_grad():
        last.mlp.up_proj.weight[0, 0] = math.nan
    first.forward = own = first.forward
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match="layer 1"):
        compressed(model, windows)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], before[n]) or n.endswith("1.mlp.up_proj.weight") for n in before)
    assert model.training
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert [vars(module)["forward"] for module in model.modules() if "forward" in vars(module)] == [own]


def test_few_calibration_tokens_are_warned_of_and_do_not_blow_up(model, windows, caplog):
    """Oracle: the dense model's perplexity. Without the ridge, 56 channels solved from 48 tokens give far more."""
    before = perplexity(ModelInMemory(model, CPU), TEST_WINDOWS, 4)
    small, _, _ = compressed(model, windows[:3], 0.8)
    assert "48 calibration tokens are few for 56 MLP channels" in caplog.text
    assert perplexity(ModelInMemory(small, CPU), TEST_WINDOWS, 4) < 3 * before


def with_massive_token(dtype):
    """A model whose second layer has six massive MLP channels, nearly multiples of each other, at token 3."""
    model = tiny_model(intermediate_size=96, initializer_range=0.05)
    scale = (1e4 * torch.tensor([1, 0.7, 0.5, 0.3, 0.2, 0.1], dtype=torch.float64)).sqrt() / 32**0.5
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight
        embeddings[:, 0] = 0
        embeddings[3] *= 0.02
        embeddings[3, 0] = 1
        for layer in model.model.layers:  # nobody writes dimension 0, so it marks the token
            layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0
            layer.post_attention_layernorm.weight[0] = 1
        mlp = model.model.layers[1].mlp
        for projection in (mlp.gate_proj, mlp.up_proj):
            projection.weight[:6] *= 0.04
            projection.weight[:6, 0] = scale
        mlp.down_proj.weight[:, :6] *= 1e-3
    return model.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_with_massive_activations_is_compressed_as_by_float64_sums(dtype, windows, monkeypatch):
    """Oracle: the same activations summed in float64. The same channels stay, and the weights are close."""
    windows[::3, ::5] = 3
    model = with_massive_token(dtype)
    seen = []
    with model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0])):
        model(windows)
    assert seen[0].abs().max() > 3000
    found, _, _ = compressed(copy.deepcopy(model), windows, prune_qk=True)

    def add_head_moments(total, outputs):
        heads = outputs.double().unflatten(1, total.shape[:2]).transpose(0, 1)
        total += heads.mT @ heads

    monkeypatch.setattr(flatllm, "add_moment", lambda total, rows: total.add_(rows.double().T @ rows.double()))
    monkeypatch.setattr(flatllm, "add_head_moments", add_head_moments)
    expected, _, _ = compressed(model, windows, prune_qk=True)
    for (name, weight), right in zip(found.state_dict().items(), expected.state_dict().values(), strict=True):
        if "gate_proj" in name or "up_proj" in name:
            assert torch.equal(weight, right), name
        error = (weight.abs() - right.abs()).norm() / right.norm()  # an eigenvector's sign is anybody's choice
        assert error < 1e-2, name


@pytest.mark.parametrize("method", ["angular", "gradient"])
def test_infinite_activations_name_their_layer(model, windows, method):
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(math.inf)
    with pytest.raises(InputError, match="layer 1 gives NaN or infinite"):
        layer_importance(ModelInMemory(model, CPU), windows, 8, method)


def test_angles_of_rows_known_beforehand():
    """Opposite rows count as a right angle, a row of zeros as cosine one half; an identity block has no angle."""
    x = torch.tensor([[1.0, 0], [1, 0], [0, 0], [1, 0], [0.6, 0.8]])
    y = torch.tensor([[-1.0, 0], [0, 1], [1, 0], [1, 1], [1.8, 2.4]])
    angles, zeros = angles_between(x, y)
    assert angles.tolist() == pytest.approx([0.5, 0.5, 1 / 3, 0.25, 0], abs=1e-7)
    assert zeros == 1


def test_gradient_importance_equals_finite_differences(model, windows):
    """Oracle: the change of the loss when one unit of one token's row of a layer's output is scaled by 1 ± ε."""
    windows, epsilon = windows[:2, :4], 1e-2
    found = layer_importance(ModelInMemory(model, CPU), windows, 1, "gradient").scores
    together = layer_importance(ModelInMemory(model, CPU), windows, 2, "gradient").scores
    assert found == pytest.approx(together, rel=1e-6)

    def losses(layer, token, scale):
        """Return the loss of every window, and of each unit scaled: the units are 32 copies of the windows."""

        def scale_units(_module, _inputs, outputs):
            scaled = outputs.clone().unflatten(0, (32, -1))  # (units, windows, S, D)
            torch.diagonal(scaled[:, :, token], dim1=0, dim2=2).mul_(scale)
            return scaled.flatten(0, 1)

        hook = model.model.layers[layer].register_forward_hook(scale_units)
        try:
            logits = model(windows.repeat(32, 1)).logits[:, :-1]
        finally:
            hook.remove()
        per_token = torch.nn.functional.cross_entropy(logits.mT, windows[:, 1:].repeat(32, 1), reduction="none")
        return per_token.mean(1)  # (units * windows,)

    for layer in range(2):
        changes = (losses(layer, token, 1 + epsilon) - losses(layer, token, 1 - epsilon) for token in range(4))
        total = sum(change.abs().sum().item() for change in changes)
        assert found[layer] == pytest.approx(total / (2 * epsilon) / windows.numel(), rel=2e-3)


def test_metrics_are_the_moments_of_the_loss_s_gradients(model, windows):
    """Oracle: one backward pass of the whole model over all windows."""
    outputs = []

    def keep(_module, _inputs, output):
        output.retain_grad()
        outputs.append(output)

    hooks = [layer.register_forward_hook(keep) for layer in model.model.layers]
    logits = model(windows).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="sum").backward()
    for hook in hooks:
        hook.remove()
    found = loss_metrics(ModelInMemory(model, CPU), windows, 5)
    for upper, output in zip(found, outputs, strict=True):
        assert torch.equal(upper, upper.triu())
        expected = output.grad.flatten(0, 1).mT @ output.grad.flatten(0, 1)
        expected = (expected / expected.diagonal().mean()).double()
        torch.testing.assert_close(upper.mT @ upper, expected, rtol=1e-4, atol=1e-5)


def test_a_layer_whose_gradients_vanish_is_named(model, windows):
    model.model.norm.weight.data.zero_()
    with pytest.raises(InputError, match=r"layer 0 has gradients of mean square 0\.0 in"):
        loss_metrics(ModelInMemory(model, CPU), windows, 5)


@pytest.mark.parametrize(
    ("method", "lent"),
    [("angular", [0, 1, 2]), ("damage", [0, 1, 2]), ("gradient", 3 * [0, 1, 2, 2, 1])],  # 24 windows, three batches
)
def test_importance_borrows_one_layer_at_a_time(method, lent, windows):
    source, seen = ModelInMemory(tiny_model(num_hidden_layers=3), CPU), []
    layer_of = source.layer

    @contextmanager
    def lend(index):
        with layer_of(index) as layer:
            seen.append(index)
            yield layer
        seen.append("back")

    source.layer = lend
    layer_importance(source, windows, 8, method)
    assert seen == [step for index in lent for step in (index, "back")]
