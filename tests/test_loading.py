"""Models and tokenizers from a folder: what is read is what is there, and nothing else is asked."""

import json
import re
import socket

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import on_disk
from conftest import tiny_model
from flatllmcore.errors import InputError
from flatllmcore.utils.loading import load_model

DTYPES = ["float64", "float32", "bfloat16", "float16"]


@pytest.fixture
def checkpoint(tmp_path):
    tiny_model().float().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_those_of_the_checkpoint_in_its_dtype_or_the_one_asked_for(checkpoint, dtype, monkeypatch):
    """Oracle: the tensors of the file, cast. A local folder needs no network."""

    def refuse(*_address: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    model = load_model(str(checkpoint), dtype=dtype)
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
        (
            ["1.mlp.up_proj", "0.self_attn.o_proj"],
            {},
            {},
            "2 weights are missing, first model.layers.0.self_attn.o_proj.",
        ),
        # A bias that no one adds would change every result unseen.
        ([], {"1.self_attn.q_proj.bias": (48,)}, {}, "1 weights have no place .* model.layers.1.self_attn.q_proj.bias"),
        ([], {"0.self_attn.rotary_emb.inv_freq": (6,)}, {}, None),  # as old checkpoints have
        ([], {}, {"vocab_size": 98}, "2 weights have other shapes .* first lm_head.weight"),
        ([], {}, {"tie_word_embeddings": True}, "an lm_head.weight that differs from its embeddings"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_counted_and_the_first_is_named(
    checkpoint, load, lacks, has, config, complaint
):
    path, dense = checkpoint / "model.safetensors", json.loads((checkpoint / "config.json").read_text())
    weights = load_file(path) | {f"model.layers.{name}": torch.ones(shape) for name, shape in has.items()}
    for name in lacks:
        del weights[f"model.layers.{name}.weight"]
    save_file(weights, path, {"format": "pt"})
    (checkpoint / "config.json").write_text(json.dumps(dense | config))
    if complaint is None:
        load(str(checkpoint))
        return
    with pytest.raises(InputError, match=complaint):
        load(str(checkpoint))


@pytest.mark.parametrize("load", [load_model, on_disk])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize(
    ("layers", "complaint"), [(300, "are missing"), (10**5, "is 100,000;"), (10**12, "is 1,000,0")]
)
def test_layers_that_are_not_there_are_refused_before_they_take_minutes(checkpoint, load, layers, complaint, family):
    config = json.loads((checkpoint / "config.json").read_text())
    changed = config | {"num_hidden_layers": layers, "model_type": family}
    (checkpoint / "config.json").write_text(json.dumps(changed))
    with pytest.raises(InputError, match=complaint):
        load(str(checkpoint))


@pytest.mark.parametrize("load", [load_model, on_disk])
def test_pickled_weights_are_not_read(checkpoint, load):
    torch.save(load_file(checkpoint / "model.safetensors"), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(InputError, match="expected safetensors files"):
        load(str(checkpoint))


@pytest.mark.parametrize("matrix", ["embed_tokens", "layers.0.self_attn.q_proj", "layers.1.mlp.down_proj"])
def test_the_fingerprint_tells_that_one_matrix_was_trained_on_and_no_dtype(checkpoint, matrix):
    """A merged adapter changes a few projections and neither embeddings nor norms."""
    (dense,) = {on_disk(str(checkpoint), dtype).fingerprint() for dtype in DTYPES}
    assert re.fullmatch("[0-9a-f]{16}", dense)
    model = load_model(str(checkpoint))
    weight = model.model.get_submodule(matrix).weight
    with torch.no_grad():
        weight += 0.05 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
    model.save_pretrained(checkpoint)
    assert on_disk(str(checkpoint)).fingerprint() != dense
