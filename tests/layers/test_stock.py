"""The stock shape: a compressed model that is one of the dense class, narrower, for programs that know that class."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import oracle
from flatllmcore import FlatLLMPruner, InputError
from flatllmcore.core.rank_allocation import ImportancePreservingRankSelector
from flatllmcore.methods import METHODS
from flatllmcore.utils.dimensions import ModelDimensions
from flatllmcore.utils.layer_utils import dimensions_from_config
from flatllmcore.utils.names import PLAIN_FAMILIES

from .tiny_models import dense_model_of, generate, random_windows


def options(**fields: object) -> dict[str, object]:
    return {
        "shape": "stock",
        "width_multiple": 4,
        "target_sparsity": 0.3,
        "cal_dataset": random_windows(24, 1),
    } | fields


def test_the_published_method_gives_the_oracle_s_weights(published: PreTrainedModel) -> None:
    """In float64, but for the norms and rotary embeddings of transformers."""
    weights, sizes = oracle.weights_and_sizes(published)
    attention = {name: w for name, w in weights.items() if "mlp" not in name}
    FlatLLMPruner(published, **options()).prune_model()
    width, count = published.config.intermediate_size, sizes["L"]
    expected = oracle.compress(weights, sizes, random_windows(24, 1), [sizes["d"]] * count, [width] * count)
    assert {name: expected[name].shape for name in expected} == {n: w.shape for n, w in published.state_dict().items()}
    for name, weight in published.state_dict().items():
        if name in attention:
            assert torch.equal(weight, attention[name]), name
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("method", METHODS)
def test_the_model_is_of_the_dense_class_and_of_the_size_asked_for(
    published: PreTrainedModel, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No scores are measured, and none are needed."""
    monkeypatch.setattr("flatllmcore.pipeline.layer_importance", None)
    if METHODS[method].follows_dense and published.config.model_type not in PLAIN_FAMILIES:
        with pytest.raises(InputError, match=r"norm or scale|side by side"):
            FlatLLMPruner(published, **options(method=method))
        return
    dense_class, config_class, d = type(published), type(published.config), dimensions_from_config(published.config)
    pruner = FlatLLMPruner(published, **options(method=method))
    assert pruner.prune_model() is published
    width, stats = published.config.intermediate_size, pruner.get_compression_stats()
    assert (type(published), type(published.config), width % 4) == (dense_class, config_class, 0)
    assert {layer.mlp.down_proj.in_features for layer in published.model.layers} == {width}
    assert all(layer.self_attn.config is published.config for layer in published.model.layers)
    assert abs(stats["sparsity"] - 0.3) <= 2 * d.width_parameters / d.layer_parameters + 1e-9  # half a step
    published.float().save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} <= {"config.json", "model.safetensors", "generation_config.json"}
    assert "auto_map" not in (tmp_path / "config.json").read_text()
    loaded, tokens = AutoModelForCausalLM.from_pretrained(tmp_path), random_windows(3, 2)[:, :9]
    assert type(loaded) is dense_class
    assert torch.equal(generate(loaded, tokens), generate(published, tokens))
    with pytest.raises(InputError, match="compressed already"):
        pruner.prune_model()


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"target_sparsity": 0.75}, r"removing 75 % .* largest possible target is \d\d %; .* --shape per-layer"),
        ({"target_sparsity": 0.01, "width_multiple": 32}, "steps of 32 cannot remove 1 %"),
        ({"width_multiple": 97}, "width multiple 97 .* 1 to 96"),
        ({"rank_allocation": [0.5] * 3}, "of the shape 'per-layer', not 'stock'"),
    ],
)
def test_what_the_shape_has_no_way_to_is_refused_before_work(fields, reason) -> None:
    model = dense_model_of("llama")
    with pytest.raises(InputError, match=reason):
        FlatLLMPruner(model, **options(**fields)).prune_model()
    assert model.config.intermediate_size == 96


@pytest.mark.parametrize(("percent", "width"), [(0, 1536), (10, 1344), (20, 1152), (30, 896), (60, 320)])
def test_the_width_is_the_multiple_of_64_nearest_to_the_target(percent, width) -> None:
    """By hand for SmolLM2-135M: 3,538,944 weights per layer, of which a channel is 1,728."""
    selector = ImportancePreservingRankSelector(ModelDimensions("llama", 30, 576, 9, 3, 64, 1536), shape="stock")
    allocation = selector.stock(1 - percent / 100)
    assert set(allocation.per_layer("mlp_width")) == {width}
    assert abs(1536 - percent / 100 * 3538944 / 1728 - width) <= 32
    assert allocation.achieved_sparsity_percent == pytest.approx(100 * (1536 - width) * 1728 / 3538944)
