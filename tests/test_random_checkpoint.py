"""Checkpoints of random weights: whole for transformers, the same for the same seed, and made in little memory."""

import hashlib
import math
import shutil
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from benchmarks.random_checkpoint import main
from flatllmbench.random_checkpoint import with_layers, write_random_checkpoint
from python_process import LIBRARY, run_python

EMBEDDED = Path(__file__).resolve().parents[1] / "models" / "pydocs-llama"
SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=8, attention_bias=True),
}
SHARD = 20_000
MEMORY = """
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from transformers import LlamaConfig
from flatllmbench.random_checkpoint import write_random_checkpoint

def written(layers, folder):
    config = LlamaConfig(hidden_size=1024, intermediate_size=2816, num_attention_heads=8, vocab_size=1024,
                         num_hidden_layers=layers)
    write_random_checkpoint(config, Path(folder, str(layers)), max_shard_bytes=2**25)
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1)) / 1024

with TemporaryDirectory() as folder:
    print(written(1, folder), written(10, folder), sum(p.stat().st_size for p in Path(folder, "10").iterdir()) / 2**20)
"""


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def stored_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("shard_bytes", [SHARD, 2**30], ids=["sharded", "single"])
def test_transformers_loads_it_whole_and_it_computes(config, shard_bytes, tmp_path):
    write_random_checkpoint(config, tmp_path, dtype=torch.bfloat16, max_shard_bytes=shard_bytes)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert model.dtype == torch.bfloat16
    ids = torch.arange(64).view(2, 32)
    states = model(ids, output_hidden_states=True).hidden_states
    for before, after in pairwise(states):
        turned = torch.cosine_similarity(before.double(), after.double(), dim=-1)
        assert 0 < turned.mean() < 0.999  # a layer does something, and does not drown its input
        assert 0.01 < after.double().square().mean() < 100
    loss = model(ids, labels=ids).loss.item()
    assert abs(loss - math.log(config.vocab_size)) < 2  # near that of guessing: its perplexity is a finite number


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_files_and_names_are_those_that_save_pretrained_writes(config, tmp_path):
    """The oracle is the model class's own save_pretrained, at the same size of shards."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    write_random_checkpoint(config, ours, dtype=torch.float32, max_shard_bytes=SHARD)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(theirs, max_shard_size=SHARD)
    assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()}
    shapes = [{name: weight.shape for name, weight in stored_weights(folder).items()} for folder in (ours, theirs)]
    assert shapes[0] == shapes[1]
    for name in ("config.json", "generation_config.json", "model.safetensors.index.json"):
        assert (ours / name).read_text() == (theirs / name).read_text()


def test_the_seed_decides_the_bytes_and_the_shards_do_not_matter(tmp_path):
    config = CONFIGS["llama"]
    for name, seed, shard_bytes in (("a", 1, SHARD), ("b", 1, SHARD), ("c", 1, 2**30), ("d", 2, 2**30)):
        write_random_checkpoint(config, tmp_path / name, seed=seed, max_shard_bytes=shard_bytes)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    a, c, d = (stored_weights(tmp_path / name) for name in "acd")
    assert all(torch.equal(a[name], c[name]) for name in a)
    assert all(torch.equal(c[name], d[name]) == (c[name].ndim == 1) for name in c)


def test_a_shape_with_more_layers_begins_with_the_same_weights(tmp_path):
    for layers in (1, 2):
        write_random_checkpoint(with_layers(CONFIGS["qwen2"], layers), tmp_path / str(layers))
    short, long = stored_weights(tmp_path / "1"), stored_weights(tmp_path / "2")
    assert short.keys() < long.keys()
    assert all(torch.equal(short[name], long[name]) for name in short)


def test_matrices_have_variance_one_over_their_inputs(tmp_path):
    write_random_checkpoint(CONFIGS["llama"], tmp_path, dtype=torch.float32)
    weights = stored_weights(tmp_path)
    embedding = weights.pop("model.embed_tokens.weight")
    assert embedding.var().item() == pytest.approx(1, rel=0.1)
    for weight in weights.values():
        if weight.ndim == 2:
            assert weight.var().item() * weight.shape[1] == pytest.approx(1, rel=0.1)


def test_memory_does_not_grow_with_the_checkpoint():
    """The C library keeps freed tensors of less than 32 MB for later; it is told not to."""
    printed = run_python(MEMORY, [LIBRARY, LIBRARY.parent], MALLOC_MMAP_THRESHOLD_=str(2**20))
    one_layer, ten_layers, size = map(float, printed.split())
    assert size > 240
    assert ten_layers - one_layer < 64  # two shards of 32 MiB


def test_the_command_line_puts_a_tokenizer_beside_the_weights(tmp_path):
    assert main([str(EMBEDDED), str(tmp_path / "out"), "--layers", "9", "--tokenizer", str(EMBEDDED)]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.num_hidden_layers == 9
    assert torch.isfinite(model(**tokenizer("def main", return_tensors="pt")).logits).all()


def test_a_published_model_is_found_by_name(tmp_path, monkeypatch):
    written: list[PretrainedConfig] = []
    monkeypatch.setattr(
        "benchmarks.random_checkpoint.write_random_checkpoint", lambda config, *_, **__: written.append(config)
    )
    assert main(["llama-2-70b", str(tmp_path), "--layers", "2"]) == 0
    assert (written[0].hidden_size, written[0].num_key_value_heads, written[0].num_hidden_layers) == (8192, 8, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such/model", "OUT"], "or one of the names llama-2-7b"),
        (["SMALL", "OUT", "--tokenizer", str(EMBEDDED)], "4096 tokens and the model 97"),
        (["SMALL", "OUT"], "GiB of disk and 9.31e-07 GiB are free"),
        (["SMALL", "FULL"], "not empty"),
    ],
)
def test_unusable_arguments_get_one_line_and_write_nothing(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    CONFIGS["llama"].save_pretrained(tmp_path / "FULL")
    places = {"SMALL": tmp_path / "FULL", "OUT": tmp_path / "out", "FULL": tmp_path / "FULL"}
    assert main([str(places.get(word, word)) for word in arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert [path.name for path in places["FULL"].iterdir()] == ["config.json"]
