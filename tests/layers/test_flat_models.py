import copy
import re
from dataclasses import replace

import peft
import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
)
from transformers.cache_utils import Cache, QuantizedLayer, StaticCache
from transformers.integrations.executorch import convert_and_export_with_cache

from checkpoints import bytes_in, compressed
from flatllmcore.layers import compressed_config
from flatllmcore.utils.names import FAMILY_NAMES
from python_process import BLOCKED, run_python
from tiny_text import word_tokenizer

from .tiny_models import SIZES, compress, dense_model_of, generate, kept, project_in_full_size


def test_a_compressed_model_equals_the_dense_one_with_projected_weights(published, tokens):
    head_dim, width = published.model.layers[0].self_attn.head_dim, published.config.intermediate_size
    sizes = (head_dim // 2 + 1, head_dim, head_dim - 1), (width, width // 2, width // 3)
    flat, dense = compress(copy.deepcopy(published), *sizes), project_in_full_size(published, *sizes)
    torch.testing.assert_close(flat(tokens).logits, dense(tokens).logits, rtol=1e-3, atol=1e-3)
    assert torch.equal(generate(flat, tokens), generate(dense, tokens))


def test_continuous_batching_gives_the_same_tokens(flat_model):
    model = flat_model()
    prompts = [[1, 2, 3, 4, 5], [7, 8, 9]]
    settings = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    room = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)  # else it takes nearly all of the memory
    served = model.generate_batch(prompts, settings, room, progress_bar=False)
    found = [request.generated_tokens for request in served.values()]
    expected = [generate(model, torch.tensor([prompt]))[0, len(prompt) :].tolist() for prompt in prompts]
    assert found == [tokens[:6] for tokens in expected]


def test_a_uniform_model_needs_no_per_layer_config(tokens, tmp_path):
    """Made of such a config, the columns of its second factors start orthonormal."""
    config = compressed_config(dense_model_of("llama").config, kept((5,) * 3, (40,) * 3, (7,) * 3))
    assert (config.value_head_dim, config.intermediate_size, config.query_key_rank) == (5, 40, 7)
    model = AutoModelForCausalLM.from_config(config).eval()
    for layer in model.model.layers:
        up = layer.self_attn.k_proj.up
        torch.testing.assert_close(up.mT @ up, torch.eye(7).expand(2, 7, 7))
    model.save_pretrained(tmp_path)
    assert "per_layer_config" not in (tmp_path / "config.json").read_text()
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits, model(tokens).logits)


@pytest.mark.slow
def test_the_folder_loads_where_the_package_is_not_installed(tokens, tmp_path):
    expected = {}
    for family in FAMILY_NAMES:
        model = compress(dense_model_of(family))
        model.save_pretrained(tmp_path / family / "model")
        word_tokenizer().save_pretrained(tmp_path / family / "classifier")
        expected[family] = model(tokens).logits
    torch.save({"tokens": tokens, "logits": expected}, tmp_path / "expected.pt")
    program = f"""if True:
        import torch
        from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
        from transformers import dynamic_module_utils

        dynamic_module_utils.HF_MODULES_CACHE = {str(tmp_path / "modules")!r}
        expected = torch.load({str(tmp_path / "expected.pt")!r})
        tokens = expected["tokens"]
        for family, logits in expected["logits"].items():
            folder = {str(tmp_path)!r} + "/" + family
            for source, copy in (("/model", "/again"), ("/again", "/third")):
                model = AutoModelForCausalLM.from_pretrained(folder + source, trust_remote_code=True)
                assert type(model).__module__.startswith("transformers_modules"), type(model)
                assert torch.equal(model(tokens).logits, logits)
                model.generate(tokens, max_new_tokens=2, cache_implementation="static", disable_compile=True)
                model.save_pretrained(folder + copy)
            headless = AutoModel.from_pretrained(folder + "/third", trust_remote_code=True)
            assert torch.equal(headless(tokens).last_hidden_state, model.model(tokens).last_hidden_state)
            of_two = AutoModelForSequenceClassification.from_pretrained(folder + "/third", trust_remote_code=True)
            of_two.save_pretrained(folder + "/classifier")
            again = AutoModelForSequenceClassification.from_pretrained(folder + "/classifier", trust_remote_code=True)
            assert torch.equal(again(tokens).logits, of_two(tokens).logits) and of_two(tokens).logits.shape == (4, 2)
            tokenizer = AutoTokenizer.from_pretrained(folder + "/classifier", trust_remote_code=False)
            assert tokenizer("w3 w5")["input_ids"] == {word_tokenizer()("w3 w5")["input_ids"]}
    """
    run_python(BLOCKED + program, [])
    for family in FAMILY_NAMES:
        assert bytes_in(tmp_path / family / "third") == bytes_in(tmp_path / family / "model")


def test_the_model_without_a_head_and_the_classifier_are_loaded_by_auto_classes(flat_model, tokens, tmp_path):
    """Oracle: the layers of the causal language model, and a linear map of what its last token gives."""
    model = flat_model()
    model.save_pretrained(tmp_path)
    headless = AutoModel.from_pretrained(tmp_path)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    states = model.model(tokens).last_hidden_state
    assert torch.equal(headless(tokens).last_hidden_state, states)
    torch.testing.assert_close(classifier(tokens).logits, states[:, -1] @ classifier.score.weight.T)
    classifier(tokens, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    assert all(parameter.grad is not None for parameter in classifier.parameters())


def test_adapters_have_their_defaults_where_their_package_is_imported_later():
    code = "import sys, flatllmcore\nassert 'peft' not in sys.modules\nfrom peft.utils import constants as c\n"
    found = run_python(f"{code}print(len(c.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING['flat_qwen2']))")
    assert found.split()[-1] == "7"


def test_the_card_of_a_compressed_folder_is_kept_and_no_other(tmp_path, monkeypatch):
    """In place too, once; not from where nothing was loaded, nor over another, nor by a process that saves nothing."""
    model = compress(dense_model_of("llama"))
    ours, card = tmp_path / "ours", "---\nflat_llm: {}\n---\n"
    model.save_pretrained(ours)
    monkeypatch.chdir(ours)
    (ours / "README.md").write_text(card)
    model.save_pretrained(tmp_path / "made")
    loaded = AutoModelForCausalLM.from_pretrained(ours)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "README.md").write_text("other")
    for name in ("other", "ours", "ours", "again"):
        loaded.save_pretrained(tmp_path / name)
    loaded.save_pretrained(tmp_path / "second", is_main_process=False)
    (ours / "README.md").write_bytes("Modèle".encode("latin-1"))
    loaded.save_pretrained(tmp_path / "not utf-8")
    (ours / "README.md").write_text("---\nlicense: mit\n---\n")
    loaded.save_pretrained(tmp_path / "dense")
    cards = {path.parent.name: path.read_text() for path in tmp_path.glob("*/README.md")}
    marked = f"{card}\nThese weights were saved again: what is said above is of those before.\n"
    assert cards == {"ours": "---\nlicense: mit\n---\n", "other": "other", "again": marked}


def test_configs_are_compared_and_have_no_width_where_layers_differ(tmp_path):
    config, other = (compress(dense_model_of("llama")).config for _ in range(2))
    assert config == other
    compress(dense_model_of("llama")).save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config == AutoConfig.from_pretrained(tmp_path)
    other.initializer_range *= 2
    assert config != other
    assert config != compress(dense_model_of("llama"), (4, 16, 11)).config
    assert (hasattr(config, "intermediate_size"), getattr(config, "intermediate_size", 7)) == (False, 7)
    with pytest.raises(AttributeError, match=r"config\.per_layer_config\[i\]\.intermediate_size"):
        _ = config.intermediate_size


@pytest.fixture
def mixed_model():
    """A model whose middle layer has lost rotary pairs, and the others have two factors of Q and K."""
    first, middle, last = kept(qk=(7, None, 3))
    sizes = [first, replace(middle, query_key_pairs=4), last]
    return AutoModelForCausalLM.from_config(compressed_config(dense_model_of("llama").config, sizes)).eval()


@pytest.mark.parametrize(
    ("asked", "reached"),
    [
        ({}, {"v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "q_proj.down", "k_proj.down"}),
        ({"target_parameters": ["q_proj.up", "k_proj.up"], "target_modules": []}, {"q_proj", "k_proj"}),
        ({"target_modules": "all-linear"}, {f"{of}_proj" for of in "qkvo"} | {"gate_proj", "up_proj", "down_proj"}
         | {"q_proj.down", "k_proj.down"}),
    ],
)  # fmt: skip
def test_adapters_are_for_these_parts_and_merge_to_the_same_logits(mixed_model, tokens, asked, reached):
    """By PEFT's defaults, as RECOVER.md has it for second factors, and all."""
    model = mixed_model
    before = model(tokens).logits
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **asked))
    torch.manual_seed(0)
    trained = {name: part for name, part in adapted.named_parameters() if part.requires_grad}
    assert {re.search(r"(\w+_proj(\.down)?)\.(base_layer\.)*lora", name)[1] for name in trained} == reached
    for part in trained.values():
        torch.nn.init.normal_(part, std=0.1)
    expected = adapted(tokens).logits
    merged = adapted.merge_and_unload()
    assert type(merged) is type(model)
    torch.testing.assert_close(merged(tokens).logits, expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(expected, before, rtol=1e-3, atol=1e-4)


def test_a_model_is_exported_with_a_static_cache(tokens):
    model = compress(dense_model_of("llama", num_hidden_layers=2), (5, 11), (96, 33))
    cache = {"batch_size": 1, "max_cache_len": 16}
    model.generation_config = GenerationConfig(cache_implementation="static", cache_config=cache, max_length=16)
    model.generation_config.use_cache = True
    program = convert_and_export_with_cache(model, tokens[:1, :1], torch.tensor([0])).module()
    found = [program(input_ids=tokens[:1, i : i + 1], cache_position=torch.tensor([i])) for i in range(4)]
    torch.testing.assert_close(torch.cat(found, dim=1), model(tokens[:1, :4]).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(tokens, use_reentrant):
    gradients = []
    for is_checkpointed in (False, True):
        model = compress(dense_model_of("llama")).train()
        if is_checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model(tokens, labels=tokens).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("family", "ranks", "widths", "backend"),
    [
        *((name, (5, 11), (96, 33), "eager") for name in ("llama", "qwen3", "smollm3", "cohere2")),
        pytest.param("llama", (5,), (33,), "inductor", marks=pytest.mark.slow),  # one layer: it compiles for seconds
    ],
)
def test_prompt_and_decoding_trace_to_one_graph_each(family, ranks, widths, backend, tokens):
    """Oracle: the model as it is, on a prompt and one more token."""
    model = compress(dense_model_of(family, num_hidden_layers=len(ranks)), ranks, widths)
    both, caches = (torch.compile(model, fullgraph=True, backend=backend), model), (None, None)
    with torch.no_grad():
        for part in (tokens, torch.full((len(tokens), 1), 3)):
            found, expected = (of(part, past_key_values=cache) for of, cache in zip(both, caches, strict=True))
            torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)
            caches = found.past_key_values, expected.past_key_values
    torch._dynamo.reset()


@pytest.mark.parametrize("fields", [{"value_head_dim": 17}, {"query_key_rank": 0}, {"intermediate_size": 97}])
def test_the_config_refuses_widths_the_dense_model_has_not(fields):
    config_class = type(compress(dense_model_of("llama")).config)
    ((name, size),) = fields.items()
    complaint = rf"layer 1: {name} must be in 1\.\.{96 if size == 97 else 16}, got {size}"
    with pytest.raises(StrictDataclassClassValidationError, match=complaint):
        config_class(**SIZES, dense_intermediate_size=96, per_layer_config={1: fields})


@pytest.fixture
def factored_model(family, tokens):
    """A model of each family whose three layers keep Q and K whole, at 12 of 16 directions, and at fewer."""
    biases = {"attention_bias": True} if family in ("llama", "qwen3") else {}
    model, allocation, _ = compressed(dense_model_of(family, **biases), tokens, 0.78, prune_qk=True)
    assert [of.query_key_rank for of in allocation.layers] == [None, 12, 9]
    return model


class InGroups(QuantizedLayer):
    """Takes widths that groups divide, and keeps the numbers as they are."""

    def _quantize(self, tensor, axis):
        assert tensor.shape[-1] == SIZES["head_dim"]
        return tensor

    def _dequantize(self, tensor):
        return tensor


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_every_cache_and_every_attention_give_the_same_tokens(factored_model, tokens, implementation):
    """For a prompt in chunks, transformers shapes a static cache from a head_dim that the values do not have."""
    expected = generate(factored_model, tokens)
    factored_model.set_attn_implementation(implementation)
    static = {"cache_implementation": "static", "disable_compile": True}
    beforehand = StaticCache(factored_model.config, max_cache_len=24)
    beforehand.early_initialization(len(tokens), 2, 16, torch.float32, torch.device("cpu"))
    caches = beforehand, Cache(layers=[InGroups(residual_length=3) for _ in factored_model.model.layers])
    given = ({"past_key_values": cache} for cache in caches)
    for options in ({}, {"use_cache": False}, static, static | {"prefill_chunk_size": 4}, *given):
        assert torch.equal(generate(factored_model, tokens, **options), expected), options


def test_a_cache_may_have_been_begun_with_wider_keys_and_values(mixed_model, tokens):
    """As by prefix tuning, which knows the dense heads; what a layer has no place for is left out."""
    generator = torch.Generator().manual_seed(0)
    begun = [torch.randn(2, len(tokens), 2, 3, 16, generator=generator) for _ in mixed_model.model.layers]
    logits = []
    for is_wide in (True, False):
        cache = DynamicCache(config=mixed_model.config)
        for index, (keys, values) in enumerate(begun):
            attention = mixed_model.model.layers[index].self_attn
            narrow = keys[..., : attention.query_key_width], values[..., : attention.value_head_dim]
            cache.update(*((keys, values) if is_wide else narrow), index)
        logits.append([mixed_model(part, past_key_values=cache).logits for part in (tokens, tokens[:, :1])])
    assert all(map(torch.equal, *logits))


def test_logits_do_not_depend_on_the_batch_or_on_how_a_text_is_split(factored_model, tokens):
    whole = factored_model(tokens).logits
    torch.testing.assert_close(torch.cat([factored_model(row[None]).logits for row in tokens]), whole)
    cache = DynamicCache(config=factored_model.config)
    parts = [factored_model(part, past_key_values=cache).logits for part in tokens.split([4, 1, 4], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)
    assert {layer.keys.shape[-1] for layer in cache.layers} == {SIZES["head_dim"]}
