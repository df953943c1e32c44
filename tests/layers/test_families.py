"""Models of every family through the engine to a saved model.

Oracles: the float64 method of tests/oracle.py, and the model itself where nothing is removed.
"""

import pytest
import torch
from torch.nn import functional as F
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

import oracle
from checkpoints import CPU, bytes_in, compress_to, compressed, in_memory, on_disk
from flatllmcore import FlatLLMConfig, FlatLLMPruner, InputError
from flatllmcore.core.rank_allocation import ImportancePreservingRankSelector
from flatllmcore.core.rotary_pairs import has_free_pairs
from flatllmcore.engine.importance import layer_importance
from flatllmcore.engine.memory import ModelInMemory
from flatllmcore.engine.perplexity import perplexity
from flatllmcore.layers import family_of
from flatllmcore.utils import devices
from flatllmcore.utils.layer_utils import count_parameters, dimensions_from_config
from flatllmcore.utils.loading import load_model
from flatllmcore.utils.names import FAMILY_NAMES, PLAIN_FAMILIES

from .published import PUBLISHED
from .tiny_models import generate, random_windows

ONE_EACH = {fields["model_type"]: name for name, fields in PUBLISHED.items()}.values()  # of every family
WINDOWS = random_windows(24, 1)
SCALING = ["Gemma-2-2b", "Gemma-3-1b", "Granite-3.1-2b", "Command-R7B"]  # embeddings, scores, or logits


def set_attention(model: PreTrainedModel, implementation: str) -> None:
    model.set_attn_implementation(implementation if model._supports_sdpa else "eager")  # SDPA cannot cap scores


def test_every_family_has_a_row_and_a_published_model():
    for name in FAMILY_NAMES:
        assert family_of(CONFIG_MAPPING[name]()).config_class.model_type == f"flat_{name}"
    assert {fields["model_type"] for fields in PUBLISHED.values()} == set(FAMILY_NAMES)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_keep_ratio_1_leaves_logits_as_they_were(published, implementation):
    set_attention(published, implementation)
    windows = random_windows(3, 2)
    expected = published(windows).logits
    kept_whole, _, _ = compressed(published, WINDOWS, 1)
    assert type(kept_whole) is family_of(kept_whole.config)
    assert torch.equal(kept_whole(windows).logits, expected)


def test_importance_equals_the_oracle(published):
    windows = random_windows(5, 2)
    found = layer_importance(ModelInMemory(published, CPU), windows, 2)
    assert found.scores == pytest.approx(oracle.importance(*oracle.weights_and_sizes(published), windows), rel=1e-5)


@pytest.mark.parametrize("prune_qk", [False, True], ids=["Q and K whole", "Q and K pruned"])
def test_a_compressed_model_equals_the_oracle(published, prune_qk):
    """The engine runs in float64, but transformers' norms and rotary embeddings do not: hence 1e-5."""
    weights, sizes = oracle.weights_and_sizes(published)
    test_windows = random_windows(6, 2)
    dense_perplexity = oracle.perplexity(weights, sizes, test_windows)
    model, ranks, _ = compressed(published, WINDOWS, 0.6, prune_qk=prune_qk)
    assert any(kept.query_key_rank is not None for kept in ranks.layers) == prune_qk
    value_ranks, mlp_widths = zip(*((kept.value_rank, kept.mlp_width) for kept in ranks.layers), strict=True)
    weights = oracle.compress(weights, sizes, WINDOWS, value_ranks, mlp_widths, prune_qk)
    expected = oracle.perplexity(weights, sizes, test_windows)
    measured = perplexity(ModelInMemory(model, CPU), test_windows, 4)
    assert measured == pytest.approx(expected, rel=1e-5)
    assert abs(expected / dense_perplexity - 1) > 1e-3  # or nothing was compressed


@pytest.mark.parametrize(
    ("published", "prune_qk"),
    [
        *((name, False) for name in PUBLISHED),
        *((name, True) for name in ("Llama with biases", "Qwen3-0.6B", "Hunyuan-1.8B", "Command-R7B")),
    ],
    indirect=["published"],
)
def test_save_load_generate_and_save_again_are_bit_exact(published, prune_qk, tmp_path):
    model, ranks, _ = compressed(published.float(), WINDOWS, 0.7, prune_qk=prune_qk)
    tokens = random_windows(4, 3)[:, :9]
    model.save_pretrained(tmp_path / "first")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    trusted = AutoModelForCausalLM.from_pretrained(tmp_path / "first", trust_remote_code=True)
    assert type(loaded) is type(trusted) is type(model)
    assert [layer.self_attn.value_head_dim for layer in loaded.model.layers] == [
        kept.value_rank for kept in ranks.layers
    ]
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert torch.equal(generate(loaded, tokens), generate(model, tokens))
    is_tied = loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert is_tied == loaded.config.tie_word_embeddings
    loaded.save_pretrained(tmp_path / "second")
    for file in (tmp_path / "first").iterdir():
        assert (tmp_path / "second" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("published", [*ONE_EACH, "Llama with biases"], indirect=True)
def test_the_second_method_leaves_a_model_that_is_saved_and_loaded(published, tmp_path):
    """Pairs stay where a norm looks at all of them, where they are neighbours, and in a layer that turns none.

    The largest target that is named before layers are scored is the one that their curves go as far as.
    """
    config = FlatLLMConfig(method="flatllm+", target_sparsity=0.5, rank_multiple=1, cal_dataset=WINDOWS)
    if published.config.model_type not in PLAIN_FAMILIES:
        with pytest.raises(InputError, match=r"flatllm\+ by damage .* accepted: flatllm"):
            FlatLLMPruner(published, config=config)
        return
    before = count_parameters(published)["decoder_linear"]
    are_free = [has_free_pairs(layer.self_attn) for layer in published.model.layers]
    expected = {"smollm3": [True, False, True]} | dict.fromkeys(
        ("llama", "mistral", "ministral", "qwen2", "seed_oss"), [True] * 3
    )
    assert are_free == expected.get(published.config.model_type, [False] * 3)
    found = layer_importance(ModelInMemory(published, CPU), WINDOWS, 8, "damage")
    selector = ImportancePreservingRankSelector(
        dimensions_from_config(published.config), rank_multiple=1, prune_qk=True
    )
    with pytest.raises(InputError, match="largest possible target is") as early:
        FlatLLMPruner(published, config=config, target_sparsity=0.99).prune_model()
    with pytest.raises(InputError) as late:
        selector.allocate(found.scores, 0.01, found.curves_in_nats)
    assert str(early.value) == str(late.value)
    model = FlatLLMPruner(published, config=config).prune_model()
    assert count_parameters(model)["decoder_linear"] == pytest.approx(before / 2, rel=0.02)
    losing = [i for i, layer in enumerate(model.model.layers) if hasattr(layer.self_attn, "rotary_places")]
    assert all(are_free[i] for i in losing)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert torch.equal(loaded(WINDOWS).logits, model(WINDOWS).logits)
    assert torch.equal(generate(loaded, WINDOWS[:3]), generate(model, WINDOWS[:3]))


@pytest.mark.parametrize(
    ("published", "has_units"),
    [*((name, True) for name in ONE_EACH), *((name, False) for name in ["Llama with biases", *SCALING])],
    indirect=["published"],
)
def test_out_of_core_gives_the_bytes_of_the_model_in_memory(published, tmp_path, monkeypatch, has_units):
    """In a dtype that rounds much: what scales embeddings or logits must be rounded alike."""
    monkeypatch.setattr(devices, "has_instructions_for", lambda _: has_units)
    dense = str(tmp_path / "dense")
    published.to(torch.bfloat16).save_pretrained(dense)
    for folder, source in (("disk", on_disk(dense)), ("memory", in_memory(dense))):
        compress_to(tmp_path / folder, dense, WINDOWS, source=source, prune_qk=not has_units)
    assert bytes_in(tmp_path / "disk") == bytes_in(tmp_path / "memory")
    measured, scores = perplexity(on_disk(dense), WINDOWS, 5), layer_importance(on_disk(dense), WINDOWS, 5)
    assert (measured, scores) == (
        perplexity(in_memory(dense), WINDOWS, 5),
        layer_importance(in_memory(dense), WINDOWS, 5),
    )
    widened = load_model(dense).float()(WINDOWS, labels=WINDOWS).loss.exp().item()
    assert measured == pytest.approx(widened, rel=0.05 if has_units else 1e-6)


@pytest.mark.parametrize("published", ONE_EACH, indirect=True)
@pytest.mark.parametrize(("implementation", "cache"), [("sdpa", "dynamic"), ("sdpa", "static"), ("eager", "dynamic")])
def test_a_batch_of_4_with_padding_equals_four_batches_of_1(published, implementation, cache):
    """In float64, where no near tie of two tokens depends on the order of a sum; eager attention has no such masks."""
    model, _, _ = compressed(published, WINDOWS, 0.7)
    set_attention(model, implementation)
    model.to(torch.float32 if model.config._attn_implementation == "eager" else torch.float64)
    options = {"cache_implementation": cache, "disable_compile": True}
    prompts = [row[: 9 - 2 * i] for i, row in enumerate(random_windows(4, 3))]
    padded = torch.stack([F.pad(prompt, (9 - len(prompt), 0)) for prompt in prompts])
    together = generate(model, padded, attention_mask=(padded != 0).long(), **options)[:, 9:]
    one_by_one = [generate(model, prompt[None], **options)[0, len(prompt) :] for prompt in prompts]
    assert torch.equal(together, torch.stack(one_by_one))


@pytest.mark.parametrize(
    ("family", "obstacle"),
    [
        *[(name, "fused projections") for name in ("phi3", "glm", "glm4")],
        *[(name, "experts in place of MLPs") for name in ("mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss")],
        *[(name, "state-space layers") for name in ("jamba", "mamba", "falcon_mamba", "zamba2")],
        ("gemma3", "its language model inside a larger one"),
    ],
)
def test_a_family_that_does_not_fit_is_refused_in_one_line_that_says_why(family, obstacle):
    with pytest.raises(InputError, match=f"^model family '{family}', which has {obstacle}, is not supported; .*olmo3$"):
        dimensions_from_config(CONFIG_MAPPING[family]())
