"""Models and tokenizers from a folder: what is read is what is there, and nothing else is asked."""

import copy
import json
import socket

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import tiny_model
from flatllmcore.engine.checkpoint_source import CheckpointSource
from flatllmcore.errors import InputError
from flatllmcore.utils.loading import load_model, load_tokenizer

DTYPES = ["float64", "float32", "bfloat16", "float16"]


@pytest.fixture
def checkpoint(tmp_path):
    tiny_model().float().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("dtype", DTYPES)
def test_auto_keeps_the_dtype_of_the_checkpoint(tmp_path, dtype):
    tiny_model().to(getattr(torch, dtype)).save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in load_model(str(tmp_path)).parameters()} == {getattr(torch, dtype)}


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_those_of_the_checkpoint_in_the_dtype_asked_for(checkpoint, dtype):
    """Oracle: the tensors of the file, cast."""
    model = load_model(str(checkpoint), dtype=dtype)
    stored = load_file(checkpoint / "model.safetensors")
    loaded = dict(model.named_parameters())
    assert loaded.keys() == stored.keys()
    for name, tensor in stored.items():
        assert torch.equal(loaded[name], tensor.to(getattr(torch, dtype))), name
    assert not model.training


def test_a_local_folder_needs_no_network(checkpoint, monkeypatch):
    def refuse(*_address: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert load_model(str(checkpoint)).config.num_hidden_layers == 2


def test_missing_weights_are_counted_and_the_first_is_named(checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    for name in ("model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.o_proj.weight"):
        del tensors[name]
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"2 weights are missing, first model\.layers\.0\.self_attn\.o_proj\.weight"):
        load_model(str(checkpoint))


def test_weights_that_the_config_does_not_know_are_refused(checkpoint):
    """A bias that no one adds would change every result unseen."""
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.bias"] = torch.ones(48)
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"1 weights have no place .* first model\.layers\.1\.self_attn\.q_proj\.bias"):
        load_model(str(checkpoint))


def test_the_rotary_frequencies_that_old_checkpoints_hold_are_no_such_weights(checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    assert load_model(str(checkpoint)).num_parameters() == tiny_model().num_parameters()


def test_tied_embeddings_are_not_missing(tmp_path):
    tiny_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_weights_of_other_shapes_are_named(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"vocab_size": 98}))
    with pytest.raises(InputError, match=r"2 weights have other shapes .* first lm_head\.weight"):
        load_model(str(checkpoint))


def test_pickled_weights_are_not_read(checkpoint):
    torch.save(load_file(checkpoint / "model.safetensors"), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(InputError, match="expected safetensors files"):
        load_model(str(checkpoint))


def test_a_folder_without_tokenizer_is_refused(checkpoint):
    with pytest.raises(InputError, match="no usable tokenizer"):
        load_tokenizer(str(checkpoint))


def fingerprint_of(folder, dtype="auto"):
    return CheckpointSource(str(folder), torch.device("cpu"), dtype).fingerprint()


def test_the_fingerprint_of_a_checkpoint_is_the_same_in_every_dtype(checkpoint):
    fingerprints = {fingerprint_of(checkpoint, dtype) for dtype in DTYPES}
    assert len(fingerprints) == 1
    assert len(fingerprints.pop()) == 16


@pytest.mark.parametrize(
    "matrix", ["embed_tokens", "layers.0.self_attn.q_proj", "layers.1.self_attn.v_proj", "layers.1.mlp.down_proj"]
)
def test_the_fingerprint_tells_that_one_matrix_was_trained_on(tmp_path, model, matrix):
    """A merged adapter changes a few projections and neither embeddings nor norms."""
    trained = copy.deepcopy(model)
    weight = trained.model.get_submodule(matrix).weight
    with torch.no_grad():
        weight += 0.05 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
    for name, saved in (("dense", model), ("trained", trained), ("copy", copy.deepcopy(model))):
        saved.save_pretrained(tmp_path / name)
    assert fingerprint_of(tmp_path / "trained") != fingerprint_of(tmp_path / "dense")
    assert fingerprint_of(tmp_path / "copy") == fingerprint_of(tmp_path / "dense")
