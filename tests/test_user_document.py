"""The flatllmcore user document's code samples, word for word, and the names that it lists.

A local folder with a tiny model stands in for the hub id, and a local text for WikiText-2.
"""

import json
import math
import os
import re
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from types import ModuleType

import pytest
import torch

import flatllmcore
from conftest import ROOT, tiny_model
from fedcore_stand_in import write_fedcore
from flatllmcore import (
    FlatLLMConfig,
    FlatLLMPruner,
    FlatLLMReassembler,
    ImportancePreservingRankSelector,
    apply_flat_llm,
)
from flatllmcore.layers import FlatLlamaAttention, FlatLlamaDecoderLayer, FlatMistralAttention, FlatMistralDecoderLayer
from flatllmcore.utils import check_sparsity, data_utils, text_sources
from python_process import LIBRARY, run_python
from tiny_text import documents, word_tokenizer
from user_document import SAMPLES

TOKENIZER = word_tokenizer()
IDS = torch.randint(1, 97, (4, 12), generator=torch.Generator().manual_seed(2))
# Of the document's code blocks themselves, one after the other, so that no formatter changes the copies.
DIGEST = "f4ea360a4e3ba88e185ae0a03b49517de8d2b0e6699edd6f8a4582106eaf7d56"


@pytest.fixture
def wikitext2(tmp_path, monkeypatch):
    """A local text in place of the download of WikiText-2's train split; the test split is not there to be read."""
    path = tmp_path / "wikitext2-train.txt"
    path.write_text("\n".join(documents(400)))

    def download(hub, split, cache_dir):
        assert "wikitext" in hub.hub_id
        assert split == "train"
        return path

    monkeypatch.setattr(text_sources, "_download", download)


def run_sample(name, names):
    exec(SAMPLES[name], names)
    return names


def namespace(model, **names):
    return {"model": model, "tokenizer": TOKENIZER, "FlatLLMReassembler": FlatLLMReassembler} | names


class TestSamples:
    def test_quick_start(self, tmp_path, wikitext2):
        """A local folder stands in for the hub id; its longest window is 64 tokens."""
        folder, names = tmp_path / "model", {}
        tiny_model().float().save_pretrained(folder)
        TOKENIZER.save_pretrained(folder)
        sample = SAMPLES["Quick start: reassemble with a configuration"]
        exec(sample.replace("meta-llama/Llama-2-7b-hf", str(folder)), names)
        assert names["compressed_model"] is names["model"]
        assert 0.5 <= check_sparsity(names["model"]) < 0.53

    def test_convenience_functions(self, wikitext2, capsys):
        names = run_sample("Convenience functions", namespace(tiny_model()))
        assert names["compressed_model"] is names["model"]
        assert 0.6 <= check_sparsity(names["model"]) < 0.64
        assert capsys.readouterr().out == f"Layer importance scores: {names['importance_scores']}\n"
        assert all(0 < score < 0.5 for score in names["importance_scores"])

    def test_fedcore(self, tmp_path):
        """With a stand-in for FedCore; ``cal_dataset`` is a local text here by a changed default."""
        (tmp_path / "text.txt").write_text("\n".join(documents(400)))
        code = f"""
from pathlib import Path
from conftest import tiny_model
from tiny_text import word_tokenizer
from flatllmcore import FlatLLMReassembler
from flatllmcore.utils import text_sources
text_sources._download = lambda *_: Path({str(tmp_path / "text.txt")!r})
from fedcore.algorithm.low_rank.reassembly.core_reassemblers import REASSEMBLERS, Reassembler
model, tokenizer = tiny_model(), word_tokenizer()
{SAMPLES["Integration with FedCore"]}
assert compressed_model is model and isinstance(reassembler, Reassembler)
print(type(model).__name__)
"""
        assert run_python(code, [write_fedcore(tmp_path), LIBRARY]) == "FlatLlamaForCausalLM\n"

    @pytest.mark.parametrize("family", ["llama", "mistral"])
    def test_architecture_detection(self, family, capsys):
        run_sample("Architecture detection", namespace(tiny_model(family)))
        assert capsys.readouterr().out == f"Detected: {family}\n"

    def test_custom_importance(self, wikitext2, capsys):
        names = run_sample("Custom importance computation", namespace(tiny_model(), FlatLLMConfig=FlatLLMConfig))
        keep = names["rank_allocation"]
        assert math.fsum(keep) / 2 == pytest.approx(0.6)
        assert capsys.readouterr().out == f"Rank allocation per layer: {keep}\n"

    def test_layer_analysis(self, monkeypatch, capsys):
        """The package under the name of its copy; test_external_copy.py runs this sample in a real copy."""
        monkeypatch.setitem(sys.modules, "external", ModuleType("external"))
        for name in ("flatllmcore", "flatllmcore.utils"):
            monkeypatch.setitem(sys.modules, f"external.{name}", sys.modules[name])
        run_sample("Layer-specific analysis", namespace(tiny_model()))
        sparsity, dimensions = capsys.readouterr().out.splitlines()
        assert sparsity == "Current sparsity: 0.0000"
        assert dimensions.startswith("Model dimensions: {'architecture': 'llama', 'num_layers': 2, 'hidden_size': 32")

    def test_compression_statistics(self, wikitext2, capsys):
        names = run_sample("Compression statistics", namespace(tiny_model(), FlatLLMPruner=FlatLLMPruner))
        assert names["pruned_model"] is names["model"]
        ratio, reduction = re.fullmatch(
            r"Compression ratio: (.+)x\nParameter reduction: (.+)%\n", capsys.readouterr().out
        ).groups()
        assert float(ratio) == pytest.approx(2, abs=0.1)
        assert float(reduction) == pytest.approx(50, abs=3)

    @pytest.mark.slow
    def test_a_stranger_s_shell_runs_the_documents(self, tmp_path):
        """The three steps on the embedded model and all samples in one session, registered in both orders."""
        settings = {"PYTHON": sys.executable, "OUT": str(tmp_path), "DEVICE": "cpu"}
        done = subprocess.run(
            ["bash", ROOT / "tests" / "user_documents.sh"],
            env=os.environ | settings,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        said = [line.partition(":")[0] for line in done.stdout.splitlines()]
        assert said[-16:] == 2 * [
            *("Layer importance scores", "Detected", "Rank allocation per layer", "Current sparsity"),
            *("Model dimensions", "Compression ratio", "Parameter reduction", "One of FedCore's"),
        ]
        assert done.stdout.endswith("One of FedCore's: True True\n")
        record = json.loads((tmp_path / "records/pydocs-llama/pydocs-llama_flatllm_20.json").read_text())
        scores = (tmp_path / "ranks/pydocs-llama/importance.json").read_bytes()
        ranks = json.loads((tmp_path / "ranks/pydocs-llama/ranks_20.json").read_text())
        assert ranks["importance_sha256"] == sha256(scores).hexdigest()
        assert ranks["mlp_width"] == [layer["mlp_width"] for layer in record["layers"]]
        assert record["perplexity"][0]["compressed"] > record["perplexity"][0]["dense"] > 1

    def test_every_sample_is_the_document_s_own_byte_for_byte(self):
        assert sha256("".join(SAMPLES.values()).encode()).hexdigest() == DIGEST

    def test_every_sample_is_run(self):
        """Names in the tests above, and in no table that could be filled without running anything."""
        source = Path(__file__).read_text().partition("class TestSamples")[2].partition("def test_every_sample_is")[0]
        assert [name for name in SAMPLES if f'"{name}"' not in source] == []


class TestComponents:
    """The names that the document lists without a sample."""

    def test_core(self):
        assert flatllmcore.core.FlatLLMPruner is FlatLLMPruner
        assert flatllmcore.core.ImportancePreservingRankSelector is ImportancePreservingRankSelector

    @pytest.mark.parametrize(
        ("family", "attention", "layer"),
        [
            ("llama", FlatLlamaAttention, FlatLlamaDecoderLayer),
            ("mistral", FlatMistralAttention, FlatMistralDecoderLayer),
        ],
    )
    def test_layers_are_those_of_a_compressed_model(self, wikitext2, family, attention, layer):
        for part in apply_flat_llm(tiny_model(family), TOKENIZER).model.layers:
            assert (type(part), type(part.self_attn)) == (layer, attention)

    def test_utilities(self, tmp_path):
        (tmp_path / "text.txt").write_text("\n".join(documents(30)))
        text = text_sources.load_text(str(tmp_path / "text.txt"), "train")
        windows = data_utils.sample_documents(text, TOKENIZER, 6, 16, seed=1)
        running_text = " ".join(documents(30) * 2)  # the last document is followed by the first
        assert all(TOKENIZER.decode(window) in running_text for window in windows)
        counts = {"nsamples": 6, "seqlen": 16, "tokens": 96, "distinct_tokens": len(set(windows.flatten().tolist()))}
        assert data_utils.calibration_statistics(windows) == counts

    @pytest.mark.parametrize(
        ("target", "sizes"),
        [(0.2, {}), (0.7, {}), (0.9, {"intermediate_size": 800, "num_attention_heads": 2, "num_key_value_heads": 1})],
    )
    def test_compression_ratios(self, target, sizes, wikitext2):
        """The target, 20 % to 90 %, is what is removed; 90 % of a model with few weights in Q and K."""
        model = apply_flat_llm(tiny_model(**sizes), TOKENIZER, target_sparsity=target)
        assert target <= check_sparsity(model) < target + 0.04

    @pytest.mark.parametrize("options", [{}, {"preserve_qk_layers": False}, {"method": "flatllm+"}], ids=str)
    def test_a_target_of_nothing_leaves_the_function_as_it_was(self, options, wikitext2):
        """``target_sparsity`` goes from 0.0; oracle: the dense model's logits, bitwise."""
        model = tiny_model(num_hidden_layers=3)
        before = model(IDS).logits
        pruner = FlatLLMPruner(model, TOKENIZER, target_sparsity=0.0, **options)
        assert pruner.prune_model() is model
        assert torch.equal(model(IDS).logits, before)
        assert pruner.get_compression_stats()["sparsity"] == check_sparsity(model) == 0
        assert [layer["keep"] for layer in pruner.get_compression_stats()["layers"]] == [1, 1, 1]
        assert {type(layer) for layer in model.model.layers} == {FlatLlamaDecoderLayer}
