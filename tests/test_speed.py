"""The speed program: what is run in which order, what its figures are made of, and the record it leaves."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedModel

from conftest import ROOT, one_line
from flatllmbench import speed
from flatllmbench.speed import Timing, Workload
from flatllmcore.layers import compressed_config
from flatllmcore.layers.flat_attention import HeadwiseFactoredLinear
from layers.tiny_models import RANKS, SIZES, compress, dense_model_of, kept

SMALL = ["--batch_size", "1,2", "--prompt_length", "5,7", "--new_tokens", "3", "--repeats", "2", "--device", "cpu"]
CELL = [
    *("model", "batch_size", "prompt_length", "new_tokens", "repeats", "kv_cache_bytes", "peak_memory_bytes"),
    *("predicted", "decode_ms_per_token", "decode_tokens_per_s", "prefill_ms", "prefill_tokens_per_s"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[str]:
    """A dense model, two that were compressed from it, one of another size, and one of the stock shape."""
    folder = tmp_path_factory.mktemp("models")
    models = {
        "tiny": dense_model_of("llama"),
        "tiny-a": compress(dense_model_of("llama")),
        "tiny-b": compress(dense_model_of("llama"), ranks=(3, 3, 3), widths=(8, 8, 8)),
        "other": dense_model_of("llama", num_hidden_layers=2),
        "stock": dense_model_of("llama", intermediate_size=40),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
    return [str(folder / name) for name in models]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def record_of(*arguments: str, name: str = "tiny_speed") -> dict:
    """Run the program and return the record it writes."""
    assert speed.main([*arguments]) == 0
    return json.loads(Path("logs", f"{name}.json").read_text())


def tokens_of(workload: Workload) -> torch.Tensor:
    return torch.ones(workload.batch_size, workload.prompt_length or workload.new_tokens, dtype=torch.long)


# One run


def test_every_model_is_warmed_up_and_then_they_take_turns(monkeypatch):
    models = [SimpleNamespace(name=name, config=SimpleNamespace(vocab_size=9), device="cpu") for name in "ABC"]
    order = []
    monkeypatch.setattr(speed, "run", lambda model, *_: order.append(model.name) or len(order))
    timings = speed.measure(models, Workload(1, 2, 1), 2)
    assert "".join(order) == 3 * "ABC"
    assert timings == [[4, 7], [5, 8], [6, 9]]


@pytest.fixture
def clock(monkeypatch):
    """Set what the clock reads; every reading must have waited for the device."""

    def readings(*seconds: float) -> None:
        ready, left = [], iter(seconds)
        monkeypatch.setattr(speed, "synchronize", ready.append)
        monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: ready.pop() and next(left)))

    return readings


@pytest.mark.parametrize(
    ("workload", "readings", "prefill_s", "decode_s"),
    [
        (Workload(2, 5, 4), [10, 14, 26], 4, 3),  # before the prompt, at the first token, at the end: 12 for 4
        (Workload(2, 0, 3), itertools.accumulate([0, 1, 5, 2, 5, 9]), 0, 2),  # steps of 1, 2 and 9, and pauses of 5
    ],
)
def test_without_a_prompt_the_median_step_counts(clock, workload, readings, prefill_s, decode_s):
    clock(*readings)
    found = speed.run(dense_model_of("llama"), workload, tokens_of(workload))
    assert (found.prefill_s, found.decode_s) == (prefill_s, decode_s)


@pytest.mark.parametrize("prompt_length", [0, 5])
def test_memory_is_that_of_the_model_and_its_cache(prompt_length, monkeypatch):
    """Closed form of the cache: a key of head_dim and a value of the rank, per key/value head, token and sequence.

    The peak is of this model alone: what other models had allocated before does not count.
    """
    monkeypatch.setattr(speed, "restart_peak", lambda device: (1_000_000, 1_000_700))
    workload, model = Workload(3, prompt_length, 4), compress(dense_model_of("llama", tie_word_embeddings=True))
    for _ in range(2):  # the second finds no cache of the first
        found = speed.run(model, workload, tokens_of(workload))
    widths = sum(SIZES["head_dim"] + rank for rank in RANKS)
    assert found.kv_cache_bytes == 3 * (prompt_length + 4) * SIZES["num_key_value_heads"] * widths * 4
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert found.peak_memory_bytes == model.num_parameters() * 4 + buffers + 700


# Figures


def test_speedups_compare_runs_of_the_same_repeat():
    """Hand-made: the ratios are 2, 4 and 2 in decoding, where the medians' ratio is 4, and 3, 1 and 2 in prompts."""
    dense = [Timing(d, 64, p, 700) for p, d in ((3, 2), (2, 4), (8, 8))]
    flat = [Timing(d, 48, p, peak) for p, d, peak in ((1, 1, 500), (2, 1, 600), (4, 4, 550))]
    models = [dense_model_of("llama"), compress(dense_model_of("llama"))]
    first, second = speed.figures(models, Workload(8, 5, 3), [dense, flat])
    assert first["predicted"] is None
    assert not {"prefill_speedup", "decode_speedup"} & first.keys()
    assert second["decode_speedup"] == {"median": 2, "low": 2, "high": 3}
    assert second["prefill_speedup"] == {"median": 2, "low": 1.5, "high": 2.5}
    assert second["prefill_ms"] == {"median": 2000, "low": 1500, "high": 3000}
    assert (second["prefill_tokens_per_s"], second["decode_tokens_per_s"]) == (8 * 5 / 2, 8)
    assert (second["kv_cache_bytes"], second["peak_memory_bytes"], second["repeats"]) == (48, 600, 3)


def with_shorter_queries() -> PreTrainedModel:
    config = compressed_config(dense_model_of("llama").config, kept(qk=(None, 6, 3)))
    return AutoModelForCausalLM.from_config(config)


@torch.no_grad()
@pytest.mark.parametrize(
    "make",
    [
        lambda: dense_model_of("llama"),
        with_shorter_queries,
        lambda: compress(dense_model_of("llama", attention_bias=True, head_dim=24)),
        lambda: compress(dense_model_of("llama", tie_word_embeddings=True)),
    ],
    ids=["dense", "Q and K too", "biases and a head_dim of its own", "tied"],
)
def test_predictions_are_the_operations_of_the_weights_and_the_bytes_that_steps_read(make):
    """Oracles: products of each weight and of all pairs of tokens, the head's for one token; what a step reads."""
    model, workload = make(), Workload(3, 11, 4)
    cache = DynamicCache(config=model.config)
    model(torch.ones(3, 11, dtype=torch.long), past_key_values=cache)
    cached = []
    for _ in range(4):
        model(torch.ones(3, 1, dtype=torch.long), past_key_values=cache)
        cached.append(sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers))
    needs = speed._needs(model, workload, cached[-1])
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    weights += [module.up for module in model.modules() if isinstance(module, HeadwiseFactoredLinear)]
    assert needs["bytes"] == sum(weight.nbytes for weight in weights) + sum(cached) / 4
    attentions = [layer.self_attn for layer in model.model.layers]
    pairs = sum(model.config.num_attention_heads * each.head_dim + each.o_proj.in_features for each in attentions)
    head = model.lm_head.weight.numel()
    linear = sum(weight.numel() for weight in weights) - head
    assert needs["flops"] == 2 * (11 * linear + head + 11**2 * pairs)


# The program


def test_a_record_holds_every_model_at_every_cell(folders, here, capsys):
    record = record_of(*folders[:3], folders[4], *SMALL)
    assert record["kind"] == "speed"
    assert record["command"].startswith(f"python -m flatllmbench.speed {folders[0]}")
    assert record["request"]["repeats"] == 2
    assert [record[name] for name in ("protocol", "dtype", "attention")] == ["grid", "float32", "sdpa"]
    assert {"versions", "hardware", "elapsed_s"} <= record.keys()
    names = [(model["model"], model["base_model"]) for model in record["models"]]
    assert names == [("tiny", None), ("tiny-a", "tiny"), ("tiny-b", "tiny"), ("stock", "tiny")]
    sparsity = [model["achieved_sparsity_percent"] for model in record["models"]]
    assert sparsity[0] == 0 < sparsity[1] < sparsity[2]
    assert all(model["weight_memory_bytes"] >= 4 * model["parameters"]["total"] for model in record["models"])
    places = [(cell["batch_size"], cell["prompt_length"], cell["model"]) for cell in record["cells"]]
    assert places == list(itertools.product((1, 2), (5, 7), (0, 1, 2, 3)))
    for cell in record["cells"]:
        assert [name for name in cell if "speedup" not in name] == CELL
        assert (cell["predicted"] is None) == ("decode_speedup" not in cell) == (cell["model"] == 0)
        for name in ("prefill_ms", "decode_ms_per_token"):
            assert 0 < cell[name]["low"] <= cell[name]["median"] <= cell[name]["high"]
        assert cell["peak_memory_bytes"] is None
    assert "| tiny-b" in capsys.readouterr().out


def test_slicegpt_s_record_has_no_prompt(folders, here):
    sizes = ["--batch_size", "3", "--new_tokens", "4", "--repeats", "1", "--protocol", "slicegpt"]
    cells = record_of(*folders[:2], *sizes, name="tiny_speed_slicegpt")["cells"]
    for cell in cells:
        assert (cell["batch_size"], cell["prompt_length"], cell["new_tokens"]) == (3, 0, 4)
        assert not {"prefill_ms", "prefill_tokens_per_s", "prefill_speedup"} & cell.keys()
    assert cells[1]["predicted"].keys() == {"decode_speedup_bytes"}
    args = speed.parse_arguments(["a", "b", "--protocol", "slicegpt"])
    assert (args.batch_size, args.prompt_length, args.new_tokens) == ([128], [0], 256)  # as published


@pytest.mark.parametrize("path", sorted(ROOT.glob("benchmarks/shapes/*")), ids=lambda path: path.name)
def test_the_shapes_in_the_repository_can_be_compressed(path):
    args = speed.parse_arguments(["--shape", str(path), "--ratios", "10,50", "--rank_multiple", "1,8"])
    assert len(dict(speed.read_configs(args))) == 5


def test_a_shape_is_measured_without_weights(here):
    """Ranks differ between layers, and those of multiple 8 are multiples of 8."""
    sizes = SIZES | {"head_dim": 32, "intermediate_size": 128, "num_hidden_layers": 4}
    LlamaConfig(**sizes).save_pretrained("shape")
    flags = ["--shape", "shape", "--ratios", "30", "--rank_multiple", "1,8"]
    record = record_of(*flags, *SMALL, name="shape_speed")
    assert [model["model"] for model in record["models"]] == ["shape", "shape-30-m1", "shape-30-m8"]
    for model in record["models"][1:]:
        assert model["achieved_sparsity_percent"] == pytest.approx(30, abs=2)
    floors, multiples = (config for _, config in [*speed.read_configs(speed.parse_arguments(flags))][1:])
    assert len({layer.value_head_dim for layer in floors.per_layer_config}) > 1
    assert {layer.value_head_dim % 8 for layer in multiples.per_layer_config} == {0}


@pytest.mark.parametrize(
    "flags",
    ["", "--shape d", "--batch_size 1,0", "--repeats 0", "--threads 9999999", "--protocol slicegpt --prompt_length 8"],
)
def test_arguments_that_do_not_go_together_are_refused(flags, here):
    with pytest.raises(SystemExit, match="2"):
        speed.main(["dense", *flags.split()] if flags else [])


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["{dense}", "{dense}/nowhere"], "nowhere"),
        (["{flat}", "{dense}"], "compressed already"),
        (["{dense}", "{other}"], "num_layers 2, not 3"),
        (["{stock}", "{dense}"], "intermediate_size 96, not 40"),
        (["--shape", "{dense}", "--ratios", "20,99"], "99"),
        (["--shape", "{dense}", "--save", "{dense}/config.json/x"], "config.json/x: Not a directory"),
    ],
)
def test_bad_input_gets_one_line_and_leaves_nothing(arguments, complaint, folders, here, capsys):
    places = dict(zip(("dense", "flat", "smaller", "other", "stock"), folders, strict=True))
    assert complaint in one_line(capsys, speed.main, [argument.format(**places) for argument in arguments])
    assert list(here.iterdir()) == []


def test_all_models_are_measured_in_one_dtype_and_by_as_many_threads_as_asked(folders, here):
    before = torch.get_num_threads()
    dense_model_of("llama").to(torch.bfloat16).save_pretrained("half")
    try:
        torch.set_num_threads(2)
        record = record_of(folders[0], "half", *SMALL, "--threads", "1")
    finally:
        torch.set_num_threads(before)
    assert record["dtype"] == "float32"
    assert record["hardware"]["device"].endswith(" 1 threads")
    assert record_of(folders[0], "half", *SMALL, "--dtype", "bfloat16")["dtype"] == "bfloat16"
