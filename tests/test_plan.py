"""Plans and random checkpoints: operations and bytes against independent counts, and that the programs run."""

import json
import math
import re
import sys
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen3Config

import common
import compression_time
import forward_profile
import kept_attention
import quantized
import quantized_cache
from common import find_config
from conftest import EMBEDDED, one_line, shape
from flatllmcore.core.mlp_nystrom import reconstruct_down_projection, select_channels
from flatllmcore.core.rank_allocation import ImportancePreservingRankSelector
from flatllmcore.engine.checkpoint_source import CheckpointSource
from flatllmcore.engine.perplexity import perplexity
from flatllmcore.utils.data_utils import consecutive_windows
from flatllmcore.utils.layer_utils import count_parameters, dimensions_from_config
from flatllmcore.utils.loading import empty_causal_lm, load_tokenizer
from flatllmcore.utils.text_sources import load_text
from plan import MACHINES, main
from random_checkpoint import main as checkpoint_main
from random_checkpoint import write_random_checkpoint

D, F, H, G, LAYERS, WINDOWS, S = 64, 160, 4, 2, 3, 5, 16
d = D // H
SIZES = shape(H, G, D, F) | {"num_hidden_layers": LAYERS, "vocab_size": 97}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=8, attention_bias=True),
}


@pytest.fixture
def allocation():
    selector = ImportancePreservingRankSelector(dimensions_from_config(CONFIGS["llama"]))
    return selector.allocate(common.falling_scores(LAYERS), 0.6)


def test_operations_are_those_of_the_products_one_by_one(allocation):
    """Of every linear layer per token, every pair of tokens that attend, and the moments' and factors' own loops."""
    found = common.operations(CONFIGS["llama"], allocation, WINDOWS, S)
    forward = solves = 0
    pairs, tokens = S * S / 2, WINDOWS * S  # the counter sees the whole square: half of it is taken off
    for layer, (r, k) in enumerate((kept.value_rank, kept.mlp_width) for kept in allocation.layers):
        statistics = 2 * D * d * (H + G) + 2 * D * F  # and no down_proj
        small = 0 if layer == LAYERS - 1 else D * d * H + 3 * D * k  # o_proj on what it read before
        forward += 2 * tokens * (statistics + small) + WINDOWS * pairs * H * 2 * (d + d)
        cholesky = [sum(2 * j * (n - j) for j in range(n)) for n in (F, k)]
        inverse = sum(sum(range(2, 2 * (F - j), 2)) for j in range(F))
        products = D * k * 2 * (F - k) + D * 2 * sum(2 * i for i in range(k)) + 2 * d * r * D * (H + G)
        solves += sum(cholesky) + inverse + products
    assert found["forward"] == forward
    with FlopCounterMode(display=False) as counter:
        z, v = torch.ones(S, F, device="meta"), torch.ones(G, S, d, device="meta")
        z.T @ z, v.mT @ v
    whole = counter.get_flop_counts()["Global"]
    triangle = whole[torch.ops.aten.mm] / 2 + whole[torch.ops.aten.bmm]
    assert found["moments"] == LAYERS * WINDOWS * triangle
    assert found["solves"] == pytest.approx(solves, rel=0.03)  # the loops' lower orders
    with FlopCounterMode(display=False) as triangles:
        a = torch.ones(S, d * H, device="meta")
        z.T @ z, a.T @ a
    with FlopCounterMode(display=False) as crosses:
        y = torch.ones(D, S, device="meta")
        y @ z, y @ a
    expected = triangles.get_total_flops() / 2 + crosses.get_total_flops()
    found = common.operations(CONFIGS["llama"], allocation, WINDOWS, S, "flatllm+")
    assert found["moments"] == LAYERS * WINDOWS * expected


@pytest.mark.parametrize("keep", [0.3, 0.99])
def test_memory_of_a_solve_is_what_its_allocations_take(keep):
    config = LlamaConfig(hidden_size=256, intermediate_size=1024, num_hidden_layers=1, num_attention_heads=8)
    rows = torch.randn(1200, 1024, dtype=torch.float64)
    C, down_weight, width = rows.T @ rows, torch.randn(256, 1024), int(1024 * keep)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        reconstruct_down_projection(down_weight, C, select_channels(C, width))
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = torch.tensor([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    peak = C.nbytes + int(held.cumsum(0).max())
    assert common.solve_bytes(dimensions_from_config(config), width) == pytest.approx(peak, rel=0.05)


@pytest.mark.parametrize(
    ("name", "billions"), [("llama-2-7b", 6.738), ("llama-2-70b", 68.977), ("llama-3-8b", 8.03), ("mistral-7b", 7.242)]
)
def test_published_models_have_their_published_parameters(name, billions):
    assert count_parameters(empty_causal_lm(find_config(name)))["total"] / 1e9 == pytest.approx(billions, abs=5e-4)


def cells_of(capsys, *arguments: str) -> list[list[str]]:
    assert main(list(arguments)) == 0
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]


def test_the_readme_has_what_is_planned_for_the_published_models(capsys):
    _, _, *rows = cells_of(capsys, "--device", "a100-40gb")
    planned = [f" not run | {row[-1]} | {row[5]} |" for row in rows]
    readme = (common.ROOT / "README.md").read_text()
    assert sorted(planned) == sorted(re.findall(r" not run \|[^|\n]+\|[^|\n]+\|", readme))


def test_a_table_has_a_row_for_each_model_and_a_time_for_each_machine(capsys):
    flags = ("--nsamples", "8", "--importance_nsamples", "8", "--seqlen", "256")
    header, _, small, large = cells_of(capsys, EMBEDDED, "llama-2-7b", *flags)
    assert [cell for cell in header if cell.endswith("min")] == [f"{m.name}, min" for m in MACHINES.values()]
    assert (small[0], large[:3]) == (EMBEDDED, ["llama-2-7b", "13.5", f"{8 * 256 * 4096 * 2 / 2**30:.2f}"])
    (_, _, slow), (_, _, fast), (_, _, tiny) = (
        cells_of(capsys, EMBEDDED, *flags, "--device_tflops", tflops, "--device_gib", gib)
        for tflops, gib in (("1e-3", "1"), ("2e-3", "1"), ("1e-3", "0.001"))
    )
    assert float(slow[-1]) == pytest.approx(2 * float(fast[-1]), rel=0.01)
    assert tiny[-1] == "too small"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such/model"], "or one of the names llama-2-7b"),
        ([EMBEDDED, "--seqlen", "5000"], "windows of 5000 tokens are out of range"),
        ([EMBEDDED, "--device_tflops", "1"], "needs --device_gib"),
    ],
)
def test_unusable_arguments_get_one_line(arguments, message, capsys):
    assert message in one_line(capsys, main, arguments)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_random_checkpoint_is_as_save_pretrained_writes_it_and_computes(config, tmp_path):
    """The oracle is the model class's own save_pretrained, at the same size of shards."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    write_random_checkpoint(config, ours, torch.float32, max_shard_bytes=40_000)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(theirs, max_shard_size=40_000)
    assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()}
    shapes = [
        {name: tensor.shape for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
        for folder in (ours, theirs)
    ]
    assert shapes[0] == shapes[1]
    model, info = AutoModelForCausalLM.from_pretrained(ours, output_loading_info=True)
    assert not any(info.values())
    ids = torch.arange(64).view(2, 32)
    states = model(ids, output_hidden_states=True).hidden_states
    for before, after in pairwise(states):
        turned = torch.cosine_similarity(before, after, dim=-1)
        assert 0 < turned.mean() < 0.999  # a layer does something, and does not drown its input
    assert abs(model(ids, labels=ids).loss.item() - math.log(97)) < 2  # near that of guessing


def test_a_random_checkpoint_of_more_layers_has_a_tokenizer_beside_it(tmp_path):
    assert checkpoint_main([EMBEDDED, str(tmp_path / "out"), "--layers", "9", "--tokenizer", EMBEDDED]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (model.config.num_hidden_layers, model.dtype) == (9, torch.bfloat16)
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")("def main", return_tensors="pt")
    assert torch.isfinite(model(**ids).logits).all()
    assert checkpoint_main([EMBEDDED, str(tmp_path / "out")]) == 2  # it is not empty


def test_two_checkouts_compress_by_turns(monkeypatch, capsys, tmp_path):
    """Oracle: the seconds that are put into their records."""
    turns = []

    def run(command, env, **_):
        turns.append(Path(env["PYTHONPATH"]))
        assert Path(command[1]) == turns[-1].parent / "benchmarks" / "compression_time.py"  # knows its own names
        seconds = {common.ROOT / "lib": 3.0, tmp_path / "lib": 4.0}[turns[-1]]
        Path(command[command.index("--out") + 1]).write_text(json.dumps({"compress_cpu_s": seconds}))

    monkeypatch.setattr(compression_time.subprocess, "run", run)
    flags = ["--shape", "64x2", "--against", str(tmp_path), "--repeats", "2"]
    monkeypatch.setattr(sys, "argv", ["compression_time.py", *flags])
    compression_time.main()
    assert turns == 4 * [common.ROOT / "lib", tmp_path / "lib"]
    told = capsys.readouterr().out
    for method in (r"flatllm", r"flatllm\+"):
        assert re.search(rf"{method} +\| +3.00 \| +4.00 \| +0.75 \| 0.75-0.75", told)


def test_a_profile_of_a_layer_has_its_seven_projections_and_shares_of_one(capsys, monkeypatch):
    """Oracle: Q, K, V, O, gate, up and down, once each per pass. The machine's rate is a given one."""
    monkeypatch.setattr(forward_profile, "peak_rates", lambda *_: {"forward": 5e9})
    forward_profile.main([EMBEDDED, "--seqlen", "16", "--batch_size", "1", "--repeats", "2", "--device", "cpu"])
    printed = capsys.readouterr().out
    rows = {row[0]: row[1:] for row in (line.strip("| ").split(" | ") for line in printed.splitlines()[2:-2])}
    rows = {name.strip(): [cell.strip() for cell in cells] for name, cells in rows.items()}
    assert rows["aten::mm"][1] == "14"
    assert 0 < sum(float(share.rstrip("%")) for share, _ in rows.values()) <= 100.5
    rate, peak = map(float, re.search(r"matrix products ([\d.]+) of ([\d.]+) GFLOP/s", printed).groups())
    assert rate > 0
    assert peak == 5.0


@pytest.mark.parametrize("computed_in", [[], ["--as_stored"]])
def test_what_stands_for_attention_is_as_exact_as_the_weights_are_rounded(computed_in, capsys):
    """Oracle: the compressed weights in float64. What computes in bfloat16 rounds all that is computed too."""
    sizes = ["--nsamples", "2", "--seqlen", "64"]
    kept_attention.main(["--model", EMBEDDED, "--dataset", "pydocs", *sizes, *computed_in])
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in capsys.readouterr().out.splitlines()[2:]]
    found = {(method, what): list(map(float, errors)) for method, what, _, *errors in rows}
    assert all(int(row[2]) > 3 for row in rows)
    for method in ("flatllm", "flatllm+"):
        computed, kept = found[method, "computed from exact"], found[method, "kept from exact"]
        assert all(0 < error < other + 8e-3 for error, other in zip(kept, computed, strict=True))


def test_text_read_in_chunks_behind_a_cache_has_the_perplexity_of_whole_windows(tmp_path, capsys):
    """Oracle: the walk. The caches that quantise need a package of their own."""
    flags = ["--dataset", "pydocs", "--windows", "2", "--seqlen", "64", "--chunk", "24", "--bits"]
    quantized_cache.main([EMBEDDED, "--out", str(tmp_path / "out.json"), *flags])
    windows = consecutive_windows(load_text("pydocs", "test"), load_tokenizer(EMBEDDED), 64, 2)
    expected = perplexity(CheckpointSource(EMBEDDED, torch.device("cpu"), "float32"), windows, 2)
    (row,) = json.loads((tmp_path / "out.json").read_text())["perplexity"]
    assert float(row["as it is"]) == pytest.approx(expected, abs=0.006)
    assert row["as it is"] in capsys.readouterr().out


def test_quantised_models_are_measured_when_they_are_loaded_again(capsys):
    """Oracle: the walk's perplexity of the same bf16 weights. Of a package that is missing the row says so."""
    quantized.main([EMBEDDED, "--windows", "2"])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert [row[1] for row in rows] == list(quantized.WAYS)
    windows = consecutive_windows(load_text("pydocs", "test"), load_tokenizer(EMBEDDED), 256, 2)
    bf16 = perplexity(CheckpointSource(EMBEDDED, torch.device("cpu"), "float32"), windows, 2)
    size = sum(path.stat().st_size for path in Path(EMBEDDED).glob("*.safetensors")) / 1e6
    assert list(map(float, rows[0][2:])) == [pytest.approx(size, abs=0.06), pytest.approx(bf16, abs=0.006)]
    for _, way, *found in rows[1:]:
        needed = {"torchao": ["torchao"], "quanto": ["optimum", "optimum.quanto"], "gptq": ["llmcompressor"]}
        if not all(map(find_spec, needed[way.partition("-")[0]])):
            assert re.search(r"^no \((ModuleNotFoundError|ImportError): .*; see docs/QUANTIZE.md$", found[0])
        else:
            assert float(found[1]) == pytest.approx(bf16, rel=0.1)
