"""Models and tokenizers from a folder: what is read is what is there, and nothing else is asked."""

import json
import os
import re
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from checkpoints import edit, on_disk
from conftest import assert_same_weights, tiny_model
from flatllmcore import FlatLLMPruner
from flatllmcore.errors import InputError
from flatllmcore.utils.files import write_json
from flatllmcore.utils.loading import load_config, load_model, load_tokenizer
from tiny_text import word_tokenizer

DTYPES = ["float64", "float32", "bfloat16", "float16"]


@pytest.fixture
def checkpoint(tmp_path):
    tiny_model().float().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_those_of_the_checkpoint_in_its_dtype_or_the_one_asked_for(checkpoint, dtype, monkeypatch):
    """Oracle: the tensors of the file, cast. A local folder needs no network."""
    for name in ("socket.connect", "getaddrinfo"):
        monkeypatch.setattr(f"socket.{name}", lambda *_: pytest.fail("the network was used"))
    GenerationConfig(temperature=0.3, do_sample=True).save_pretrained(checkpoint)
    model = load_model(str(checkpoint), dtype=dtype)
    assert model.generation_config.temperature == 0.3
    assert model.name_or_path == model.config.name_or_path == ""  # or somebody would ask the hub for it
    stored = load_file(checkpoint / "model.safetensors")
    loaded = dict(model.named_parameters())
    assert loaded.keys() == stored.keys()
    for name, tensor in stored.items():
        assert torch.equal(loaded[name], tensor.to(getattr(torch, dtype))), name
    assert not model.training
    model.save_pretrained(checkpoint)
    assert {tensor.dtype for tensor in load_model(str(checkpoint)).parameters()} == {getattr(torch, dtype)}


@pytest.mark.parametrize("load", [load_model, on_disk])
@pytest.mark.parametrize(
    ("lacks", "has", "config", "complaint"),
    [
        (["1.mlp.up_proj", "0.self_attn.o_proj"], {}, {}, "2 weights are missing, first model.layers.0.self_attn.o_"),
        # A bias that no one adds would change every result unseen.
        ([], {"1.self_attn.q_proj.bias": (48,)}, {}, "1 weights have no place .* model.layers.1.self_attn.q_proj.bias"),
        # As old checkpoints have.
        ([], {"0.self_attn.rotary_emb.inv_freq": (6,), "1.self_attn.masked_bias": ()}, {}, None),
        ([], {}, {"vocab_size": 98}, "2 weights have other shapes .* first lm_head.weight"),
        ([], {}, {"tie_word_embeddings": True}, "lm_head.weight differs from its embeddings"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_counted_and_the_first_is_named(
    checkpoint, load, lacks, has, config, complaint
):
    path = checkpoint / "model.safetensors"
    weights = load_file(path) | {f"model.layers.{name}": torch.ones(shape) for name, shape in has.items()}
    for name in lacks:
        del weights[f"model.layers.{name}.weight"]
    save_file(weights, path, {"format": "pt"})
    edit(checkpoint / "config.json", **config)
    if complaint is None:
        load(str(checkpoint))
        return
    with pytest.raises(InputError, match=complaint):
        load(str(checkpoint))


@pytest.mark.parametrize("load", [load_model, on_disk])
@pytest.mark.parametrize(
    ("field", "count", "complaint"),
    [
        ("num_hidden_layers", 30, "are missing"),
        ("num_hidden_layers", 10**5, "is 100,000;"),
        *((field, 10**12, f"{field} is 1,000,000,000,000; accepted") for field in ("num_hidden_layers", "num_labels")),
    ],
)
def test_layers_that_are_not_there_are_refused_before_they_take_minutes(checkpoint, load, field, count, complaint):
    edit(checkpoint / "config.json", **{field: count, "model_type": "qwen2"})
    with pytest.raises(InputError, match=complaint):
        load(str(checkpoint))
    if count == 10**12:
        word_tokenizer().save_pretrained(checkpoint)
        with pytest.raises(InputError, match=complaint):
            load_tokenizer(str(checkpoint))


def test_a_full_temporary_folder_is_no_fault_of_the_tokenizer(checkpoint, monkeypatch):
    word_tokenizer().save_pretrained(checkpoint)
    full = Mock(side_effect=Exception("No space left on device (os error 28)"))  # as it comes from Rust
    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left on device"):
        load_tokenizer(str(checkpoint))


@pytest.mark.parametrize("load", [load_model, on_disk])
def test_a_config_of_weights_that_are_rounded_as_they_run_is_refused(checkpoint, load):
    edit(checkpoint / "config.json", quantization_config={"quant_method": "bitnet", "quantization_mode": "online"})
    with pytest.raises(InputError, match="is quantised by bitnet; accepted: one that is not"):
        load(str(checkpoint))


@pytest.mark.parametrize("share", [0, -1, 1.5, 10**7])
def test_angles_are_not_made_wider_than_heads(checkpoint, share):
    edit(checkpoint / "config.json", rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": share})
    with pytest.raises(InputError, match=r"partial_rotary_factor is .*; accepted: above 0, up to 1"):
        load_config(str(checkpoint))


@pytest.mark.parametrize("load", [load_model, on_disk])
@pytest.mark.parametrize(
    ("harm", "complaint"),
    [
        (lambda places: places.float(), r"weights are F32, not I64, first .*self_attn.rotary_places"),
        (lambda places: places.flip(1) - 1, "rotary_places has places -1 to .* in heads of 8"),
        (lambda places: places + 200, "rotary_places has places 2"),
        (lambda places: places - places % 2, "rotary_places has places 0 to .* in heads of 8, each once"),
    ],
)
def test_places_of_rotary_pairs_are_those_of_a_head(tmp_path, load, harm, complaint):
    model = tiny_model(head_dim=8).float()
    data = torch.randint(97, (24, 16), generator=torch.Generator().manual_seed(0))
    pruner = FlatLLMPruner(model, target_sparsity=0.3, cal_dataset=data, method="flatllm+")
    pruner.prune_model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if name.endswith("rotary_places"))
    save_file(weights | {name: harm(weights[name])}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=complaint):
        load(str(tmp_path))


def pickle_weights(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def put_a_pipe_for_a_shard(folder):
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "pipe")
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": {"a": "pipe"}})


def spoil_the_generation_config(folder):
    (folder / "generation_config.json").write_bytes(b"\xff{")


@pytest.mark.parametrize("load", [load_model, on_disk])
@pytest.mark.parametrize(
    ("harm", "complaint"),
    [
        (pickle_weights, "expected safetensors files"),
        (put_a_pipe_for_a_shard, "pipe is no file"),
        (spoil_the_generation_config, r"/generation_config.json is unusable \(.*\); mend it, or delete it"),
    ],
)
def test_files_of_another_kind_are_refused_and_not_waited_for(checkpoint, load, harm, complaint):
    harm(checkpoint)
    with pytest.raises(InputError, match=complaint):
        load(str(checkpoint))


def test_weights_that_a_narrower_type_cannot_hold_are_refused(checkpoint):
    path = checkpoint / "model.safetensors"
    weights = load_file(path)
    weights["model.embed_tokens.weight"][3] = 1e6  # an embedding that no text may use
    save_file(weights, path, {"format": "pt"})
    assert load_model(str(checkpoint), dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(InputError, match=r"model.embed_tokens.weight of .* is not finite in torch.float16; a wider"):
        load_model(str(checkpoint), dtype="float16")


def test_a_tokenizer_that_merges_at_random_is_refused(tmp_path):
    tokenizer = Tokenizer(BPE({"a": 0}, [], dropout=0.5))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="it merges at random; take the dropout out of its model"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("load", [load_model, on_disk])
@pytest.mark.parametrize(
    ("dtype", "method"),
    [(torch.bool, None), (torch.complex64, None), (torch.int32, "gptq"), (torch.float8_e4m3fn, "fp8")],
    ids=str,
)
def test_weights_that_are_no_plain_numbers_are_refused_by_name(checkpoint, load, dtype, method):
    """With the method that quantised them, where the config says so."""
    path, name = checkpoint / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    edit(checkpoint / "config.json", **({"quantization_config": {"quant_method": method}} if method else {}))
    weights = load_file(path)
    save_file(weights | {name: weights[name].to(dtype)}, path, {"format": "pt"})
    state = f"is quantised by {method}" if method else "is damaged"
    with pytest.raises(InputError, match=rf"{state}: 1 weights are \w+, not F64, F32, F16, BF16, first {name}"):
        load(str(checkpoint))


def without_prefix(weights):
    return {name.removeprefix("model."): weight for name, weight in weights.items()}


def tied_as_head(weights):
    return {name.replace("model.embed_tokens", "lm_head"): weight for name, weight in weights.items()}


@pytest.mark.parametrize("spell", [without_prefix, tied_as_head, lambda weights: tied_as_head(without_prefix(weights))])
def test_weights_are_found_by_the_names_that_transformers_finds_them_by(tmp_path, spell):
    """Of a base model, and of a tied pair. Oracle: transformers' own loading; the identity is that of usual names."""
    model = tiny_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    usual = on_disk(str(tmp_path)).identity
    path = tmp_path / "model.safetensors"
    save_file(spell(load_file(path)), path, {"format": "pt"})
    expected = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert_same_weights(expected, model.state_dict())
    assert_same_weights(load_model(str(tmp_path)).state_dict(), expected)
    source = on_disk(str(tmp_path))
    assert_same_weights(
        {name: source._read(name) for name in source._names} | {"lm_head.weight": model.lm_head.weight}, expected
    )
    assert source.identity == usual


def test_an_adapter_beside_the_weights_is_not_used(checkpoint, monkeypatch, caplog):
    """transformers would where peft is installed, whether it is merged already or not."""
    expected = load_model(str(checkpoint)).state_dict()
    (checkpoint / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "no/such"}')
    for module in ("models.auto.auto_factory", "integrations.peft"):
        monkeypatch.setattr(f"transformers.{module}.is_peft_available", lambda: True)
    assert_same_weights(load_model(str(checkpoint)).state_dict(), expected)
    assert "the adapter beside the weights" in caplog.text


def respelled(config):
    rope = config.pop("rope_parameters")
    return config | {"rope_theta": rope["rope_theta"], "rope_scaling": None, "torch_dtype": config.pop("dtype")}


def test_the_identity_does_not_depend_on_how_the_same_model_is_stored_or_loaded(checkpoint):
    """Files, place, spelling of the config as by earlier versions, what is left at defaults, and --dtype."""
    bare = on_disk(str(checkpoint))
    assert re.fullmatch("[0-9a-f]{16}(-[0-9a-f]{16}){2}", bare.fingerprint())
    for folder in (checkpoint, checkpoint / "sharded"):
        word_tokenizer().save_pretrained(folder)
    first = on_disk(str(checkpoint))
    assert {part for part in first.identity if first.identity[part] != bare.identity[part]} == {"tokenizer"}
    load_model(str(checkpoint)).save_pretrained(checkpoint / "sharded", max_shard_size="20KB")
    path = checkpoint / "sharded" / "config.json"
    config = respelled(json.loads(path.read_text()))
    path.write_text(json.dumps({name: value for name, value in config.items() if name != "rms_norm_eps"}))
    assert len(list(path.parent.glob("*.safetensors"))) > 1
    for dtype in DTYPES:
        assert on_disk(str(path.parent), dtype).identity == first.identity
