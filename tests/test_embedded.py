"""The model and the text in the repository, and the scripts that made them."""

import argparse
import importlib.util
import json
import lzma
import re
import runpy
import sys

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import ROOT
from flatllmcore.engine.memory import ModelInMemory
from flatllmcore.engine.perplexity import perplexity
from flatllmcore.utils import text_sources
from flatllmcore.utils.data_utils import consecutive_windows
from flatllmcore.utils.loading import load_model, load_tokenizer
from flatllmcore.utils.text_sources import has_test_split, load_text

FOLDER = ROOT / "models" / "pydocs-llama"
LOG = json.loads((FOLDER / "training_log.json").read_text())


def test_it_is_small_grouped_and_in_bf16():
    model = load_model(str(FOLDER))
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 8_000_000
    assert model.num_parameters() == LOG["parameters"]
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert model.dtype == torch.bfloat16


def test_its_perplexity_is_the_stated_one():
    """Oracle: the training script, by the parent class alone: on the first windows; on all, what main.py recorded."""
    stated = LOG["test_perplexity"]
    windows = consecutive_windows(load_text("pydocs", "test"), load_tokenizer(str(FOLDER)), stated["seqlen"])
    model = load_model(str(FOLDER), dtype="float32")  # many processors are slow at bf16; the weights are the same
    measured = perplexity(ModelInMemory(model, torch.device("cpu")), windows[:32], 16)
    assert measured == pytest.approx(stated["value_of_first_32"], rel=1e-3)  # stated of sums in bf16
    record = json.loads((ROOT / "results/records/pydocs-llama/pydocs-llama_flatllm_20.json").read_text())
    (record,) = record["perplexity"]
    assert record["dense"] == pytest.approx(stated["value"], rel=1e-3)
    assert record["windows"] == stated["windows"] == len(windows)
    assert f"{record['dense']:.2f}" in (ROOT / "README.md").read_text()


def test_an_interrupted_training_goes_on_where_it_was(tmp_path, monkeypatch):
    """Oracle: the steps that are run, each one's windows a function of its number."""
    names = runpy.run_path(str(ROOT / "scripts" / "train_embedded.py"))["train"].__globals__
    batch, steps = names["batch_of_windows"], []
    tokens = np.random.default_rng(0).integers(50, size=500).astype(np.int16)
    args = argparse.Namespace(minutes=1, batch_size=2, seqlen=8, lr=1e-3, device="cpu", work_dir=tmp_path)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    monkeypatch.setitem(names, "SAVE_EVERY_S", 0)

    def train_until(count: int) -> LlamaForCausalLM:
        def interrupted_batch(tokens, step, args):
            steps.append(step)
            if len(steps) > count:
                raise KeyboardInterrupt
            return batch(tokens, step, args)

        steps.clear()
        monkeypatch.setitem(names, "batch_of_windows", interrupted_batch)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))
        with pytest.raises(KeyboardInterrupt):
            names["train"](model, tokens, args)
        return model

    train_until(5)
    assert steps == [0, 1, 2, 3, 4, 5]
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    assert saved["step"] == 5  # the sixth did not finish
    resumed = train_until(0)
    assert steps == [5]
    for name, tensor in resumed.state_dict().items():
        assert torch.equal(tensor, saved["model"][name]), name


def test_the_text_is_found_by_its_name_and_no_paragraph_stands_in_it_twice():
    texts = [load_text("pydocs", split) for split in ("train", "test")]
    paragraphs = [paragraph for text in texts for document in text.documents for paragraph in document.split("\n\n")]
    assert len(set(paragraphs)) == len(paragraphs)
    assert all(len(paragraph.split()) >= 6 and ">>>" not in paragraph for paragraph in paragraphs)
    sizes = [[len(text.documents), len(text.separator.join(text.documents).replace("\n", ""))] for text in texts]
    assert sizes[0] > sizes[1]
    readme = (text_sources.EMBEDDED_TEXT / "README.md").read_text()
    stated = re.findall(r"jsonl.xz` \| (\d+) \| ([\d,]+)", readme)
    assert [(str(len(text.documents)), f"{sum(map(len, text.documents)):,}") for text in texts] == stated
    assert has_test_split("pydocs")


def test_the_script_takes_the_prose_of_docstrings(tmp_path, monkeypatch):
    """Oracle: the paragraphs of a small package, sorted by hand."""
    spec = importlib.util.spec_from_file_location("make_embedded_text", ROOT / "scripts" / "make_embedded_text.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    prose = [f"These are six plain words {word}." for word in ("indeed", "again", "within")]
    package = tmp_path / "little"
    (package / "tests").mkdir(parents=True)
    (package / "__init__.py").write_text(f'"""{prose[0]}\n\nToo short.\n"""\ndef f():\n    "{prose[1]}"\n')
    (package / "other.py").write_text(f'"{prose[0]}"\nif True:\n    class A:\n        """{prose[2]}\n\n>>> 1 + 1"""\n')
    (package / "tests" / "skipped.py").write_text('"These are six words never seen."')
    (package / "broken.py").write_text("def (")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(script, "PACKAGES", ("little",))
    monkeypatch.setattr(script, "version", lambda package: "1")
    monkeypatch.setattr(script.topics, "topics", {})
    monkeypatch.setattr(script.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "none")})
    for out in ("a", "b"):
        monkeypatch.setattr(sys, "argv", ["make_embedded_text.py", "--out", str(tmp_path / out)])
        script.main()
    files = [sorted((tmp_path / out).iterdir()) for out in ("a", "b")]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]
    lines = [line for path in files[0] for line in lzma.decompress(path.read_bytes()).decode().splitlines()]
    assert sorted(json.loads(line)["text"] for line in lines) == sorted([f"{prose[0]}\n\n{prose[1]}", prose[2]])
