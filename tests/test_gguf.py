"""GGUF files as models: what is read of them, what a run makes of them, and what is refused."""

import json
import sys
from pathlib import Path
from struct import pack

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.quantization_config import QuantizationMethod

import main
from checkpoints import bytes_in, on_disk, weights_in
from conftest import assert_same_weights
from flatllmcore import FlatLLMPruner, InputError
from flatllmcore.utils.loading import load_config, load_model, load_tokenizer
from tiny_gguf import TOKENS, tiny_llama, write_gguf

COUNT, HUGE = (pack("<IQ", 8, len(TOKENS) | more) for more in (0, 2**40))  # before the strings of an array
TEXT = "the cat and the dog, 10 of them; " * 40


@pytest.fixture
def compress(tmp_path, monkeypatch):
    """Run main.py with few characters of text; return the folder that it saves a model to."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)

    def run(model: str, name: str, *argv: str) -> Path:
        text = ["--dataset", "text.txt", "--eval_dataset", "text.txt", "--nsamples", "4", "--seqlen", "32"]
        places = ["--save", name, "--bi_score", f"{name}-scores", "--device", "cpu"]
        out = ["--save_model", f"{name}-model"] if "bi" not in argv else []
        assert main.main(["--model", model, *text, *places, *out, *argv]) == 0
        return tmp_path / f"{name}-model"

    return run


@pytest.mark.parametrize(
    ("kind", "dtype", "rounded_to"),
    [
        ("F32", "float32", None),
        ("BF16", "bfloat16", None),
        ("Q4_1", "bfloat16", "4 bits (Q4_1)"),
    ],
)
def test_weights_are_those_that_the_file_stands_for_in_its_own_type_or_bfloat16(tmp_path, kind, dtype, rounded_to):
    """Oracle: the package gguf, each weight rounded and back. By --dtype float32 they are exact."""
    path = tmp_path / "tiny.gguf"
    rounded = write_gguf(path, kind)
    for name in (str(path), str(tmp_path)):
        assert_same_weights(load_model(name, dtype="float32").state_dict(), rounded)
        model = load_model(name)
        assert_same_weights(model.state_dict(), {n: weight.to(getattr(torch, dtype)) for n, weight in rounded.items()})
        assert getattr(model.config, "rounded_to", None) == rounded_to
        assert model.generation_config.eos_token_id == 0
        assert load_tokenizer(name)("a b")["input_ids"] == [65, 221, 66]
    before = on_disk(str(path)).identity
    write_gguf(path, kind, model=tiny_llama(seed=1))  # in its place
    after = on_disk(str(path)).identity
    assert {part for part in before if before[part] != after[part]} == {"weights"}


def test_a_run_makes_of_a_gguf_what_it_makes_of_the_folder_that_holds_the_same_weights(compress, tmp_path):
    write_gguf(tmp_path / "tiny.Q4_1.gguf", "Q4_1")
    load_model("tiny.Q4_1.gguf").save_pretrained("dense")
    load_tokenizer("tiny.Q4_1.gguf").save_pretrained("dense")
    compress("tiny.Q4_1.gguf", "scored", "--prune_method", "bi")
    scores = json.loads(Path("scored-scores/importance.json").read_text())
    assert (scores["model_id"], len(scores["scores"])) == ("tiny.Q4_1", 2)
    folders = [compress(model, name) for model, name in (("tiny.Q4_1.gguf", "one"), ("dense", "two"))]
    one, two = map(weights_in, folders)
    assert_same_weights(one, two)
    card, files = (folders[0] / "README.md").read_text(), bytes_in(folders[0])
    assert "- Base model: tiny.Q4_1, whose weights its publisher had rounded to 4 bits (Q4_1).\n" in card
    assert "\nlicense: apache-2.0\n" in card
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json"} <= files.keys()
    assert not any(str(place).encode() in content for place in ("flat-llm-", tmp_path) for content in files.values())
    config = json.loads(files["config.json"])
    assert (config["rounded_to"], config["dtype"]) == ("4 bits (Q4_1)", "bfloat16")
    assert "quantization_config" not in config
    assert AutoTokenizer.from_pretrained(folders[0]).chat_template == load_tokenizer("dense").chat_template


def test_a_stopped_run_goes_on(compress, tmp_path, monkeypatch, capsys):
    """With a GGUF dequantised anew, as another process does."""
    write_gguf(tmp_path / "tiny.gguf", "Q8_0")
    whole = compress("tiny.gguf", "whole")
    monkeypatch.setattr("flatllmcore.engine.checkpoint_sink.CheckpointSink.complete", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compress("tiny.gguf", "stopped", "--bi_score", "whole-scores")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.gguf").touch()
    resumed = compress("tiny.gguf", "stopped", "--bi_score", "whole-scores")
    assert "2 of 2 layers are finished" in capsys.readouterr().out
    assert_same_weights(weights_in(resumed), weights_in(whole))


def test_a_model_in_memory_that_was_loaded_from_a_gguf_is_compressed_and_saved_as_any(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", "Q8_0")
    model, tokenizer = (
        auto.from_pretrained(tmp_path, gguf_file="tiny.gguf") for auto in (AutoModelForCausalLM, AutoTokenizer)
    )
    fields = {"target_sparsity": 0.3, "cal_dataset": [TEXT], "cal_nsamples": 4, "seqlen": 32, "device": "cpu"}
    expected = FlatLLMPruner(load_model(str(tmp_path), dtype="float32"), tokenizer, **fields).prune_model()
    FlatLLMPruner(model, tokenizer, **fields).prune_model().save_pretrained(tmp_path / "saved")
    assert_same_weights(load_model(str(tmp_path / "saved")).state_dict(), expected.state_dict())
    stated = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert [name for name in stated if "quanti" in name] == []


def with_sizes(**sizes):
    """Return a model that says that it has others than it has."""
    model = tiny_llama()
    vars(model.config).update(sizes)
    return model


@pytest.mark.parametrize(
    ("harm", "complaint"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:20000]), "cannot read .*tiny.gguf"),
        (lambda path: write_gguf(path, left_out=("blk.1.attn_norm.weight",)), "has 20 tensors of .*, and"),
        (lambda path: write_gguf(path, added={"rope_freqs.weight": np.ones(4, np.float32)}), "has 22 tensors"),
        (lambda path: path.write_bytes(path.read_bytes().replace(COUNT, HUGE, 1)), r"it ends within the \d+ numbers"),
        (lambda path: write_gguf(path, model=with_sizes(num_hidden_layers=10**6)), "num_layers is 1,000,000; accepted"),
        (lambda path: write_gguf(path, model=with_sizes(intermediate_size=63)), r", and transformers makes 21 of"),
        (lambda path: write_gguf(path, architecture="gpt2"), "family 'gpt2' is not supported|cannot read .*tiny.gguf"),
        (lambda path: write_gguf(path.with_name("other.gguf")), "2 GGUF files in .*; give one of them, .*other.gguf"),
    ],
)
def test_an_unusable_gguf_is_one_line(tmp_path, harm, complaint):
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    harm(path)
    with pytest.raises(InputError, match=complaint) as refusal:
        load_config(str(tmp_path))
    assert "\n" not in str(refusal.value)


def test_the_package_that_is_missing_is_named(tmp_path, monkeypatch):
    write_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r"import of gguf .* with the packages gguf and accelerate"):
        load_config(str(tmp_path))


def test_models_in_memory_of_other_quantisations_are_refused_by_name():
    model = tiny_llama()
    model.quantization_method = QuantizationMethod.BITS_AND_BYTES
    with pytest.raises(InputError, match="is quantised by bitsandbytes; accepted: "):
        FlatLLMPruner(model)
