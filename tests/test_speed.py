"""The speed program: what is run in which order, what its figures are made of, and the record it leaves."""

import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

from flatllmbench import speed, timing
from flatllmbench.arithmetic import decode_bytes, prefill_flops
from flatllmbench.speed_figures import figures_of, spread
from flatllmbench.timing import PromptTiming, Runner, Timing, Workload, measure
from flatllmcore.utils import devices
from flatllmcore.utils.loading import load_model
from layers.tiny_models import RANKS, SIZES, compress, dense_model_of, random_model

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
CLOCK_READINGS = 5  # of a run with a prompt
CELL = {
    *("model", "batch_size", "prompt_length", "new_tokens", "repeats", "prefill_ms", "decode_ms_per_token"),
    *("prefill_tokens_per_s", "decode_tokens_per_s", "time_to_first_token_ms", "peak_memory_bytes", "kv_cache_bytes"),
    *("prefill_speedup", "decode_speedup", "predicted"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """A dense model, two that were compressed from it, and one of another size."""
    folder = tmp_path_factory.mktemp("models")
    models = {
        "tiny": dense_model_of("llama"),
        "tiny-a": compress(dense_model_of("llama")),
        "tiny-b": compress(dense_model_of("llama"), ranks=(3, 3, 3), widths=(8, 8, 8)),
        "other": dense_model_of("llama", num_hidden_layers=2),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
    return [folder / name for name in models]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: object) -> dict:
    """Run the program on a small grid, unless told otherwise, and return the record it writes."""
    small = ["--batch_size", "1,2", "--prompt_length", "5,7", "--new_tokens", "3", "--repeats", "2", "--device", "cpu"]
    before = set(Path("logs").glob("*.json"))
    assert speed.main([*map(str, arguments), *small]) == 0
    (record,) = set(Path("logs").glob("*.json")) - before
    return json.loads(record.read_text())


def tokens_of(workload: Workload) -> torch.Tensor:
    return workload.random_tokens(SIZES["vocab_size"], CPU)


def test_every_model_is_warmed_up_and_then_they_take_turns():
    order = []

    def stand_in(name: str) -> SimpleNamespace:
        return SimpleNamespace(
            model=SimpleNamespace(config=SimpleNamespace(vocab_size=9)),
            device=CPU,
            is_compiled=False,
            warm_up=lambda workload, tokens: order.append(f"warm {name}"),
            run=lambda workload, tokens: order.append(name) or name,
        )

    done = []
    timings = measure([stand_in(name) for name in "ABC"], Workload(1, 2, 1), 3, lambda: done.append(len(order)))
    assert order == ["warm A", "warm B", "warm C", *"ABCABCABC"]
    assert timings == [["A"] * 3, ["B"] * 3, ["C"] * 3]
    assert done == list(range(1, 13))


def test_seconds_are_differences_of_the_clock():
    """The clock is read at the start, with the cache at hand, after the prompt, at the first token and at the end."""
    clock = iter([10, 11, 14, 16, 28]).__next__
    workload = Workload(2, 5, 4)
    measured = Runner(dense_model_of("llama"), CPU, clock=clock).run(workload, tokens_of(workload))
    assert measured.prompt == PromptTiming(prefill_s=3, first_token_s=6)
    assert measured.decode_s == 3  # 12 for 4


def test_without_a_prompt_the_median_step_counts():
    clock = itertools.accumulate([0, 1, 5, 2, 5, 9]).__next__  # steps of 1, 2 and 9, and pauses of 5
    workload = Workload(2, 0, 3)
    measured = Runner(dense_model_of("llama"), CPU, clock=clock).run(workload, tokens_of(workload))
    assert (measured.prompt, measured.decode_s) == (None, 2)


def test_speedups_compare_runs_of_the_same_repeat():
    """Hand-made: the ratios are 2, 4 and 2 in decoding, where the medians' ratio is 4, and 3, 1 and 2 in prompts."""
    dense = [Timing(PromptTiming(p, p + 1), d, 64) for p, d in ((3, 2), (2, 4), (8, 8))]
    flat = [Timing(PromptTiming(p, p + 1), d, 48) for p, d in ((1, 1), (2, 1), (4, 4))]
    configs = [dense_model_of("llama").config, compress(dense_model_of("llama")).config]
    workload = Workload(8, 5, 3)
    first, second = figures_of(workload, configs, [dense, flat], itemsize=4)
    assert (first["prefill_speedup"], first["decode_speedup"], first["predicted"]) == (None, None, None)
    assert second["decode_speedup"] == {"median": 2, "low": 2, "high": 3}
    assert second["prefill_speedup"] == {"median": 2, "low": 1.5, "high": 2.5}
    assert second["prefill_ms"] == {"median": 2000, "low": 1500, "high": 3000}
    assert second["time_to_first_token_ms"] == 3000
    assert (second["prefill_tokens_per_s"], second["decode_tokens_per_s"]) == (8 * 5 / 2, 8)
    assert (second["kv_cache_bytes"], second["peak_memory_bytes"], second["repeats"]) == (48, None, 3)
    assert second["predicted"] == {
        "prefill_speedup_flops": prefill_flops(configs[0], 8, 5) / prefill_flops(configs[1], 8, 5),
        "decode_speedup_bytes": decode_bytes(configs[0], 8, 5, 3, 4) / decode_bytes(configs[1], 8, 5, 3, 4),
    }


def test_a_spread_is_the_median_and_the_quartiles():
    assert spread([5, 1, 4, 2, 3]) == {"median": 3, "low": 2, "high": 4}
    assert spread([7]) == {"median": 7, "low": 7, "high": 7}


@pytest.mark.parametrize("has_static_cache", [False, True], ids=["growing", "static"])
@pytest.mark.parametrize("prompt_length", [0, 5])
def test_bytes_of_the_cache_are_its_keys_and_values(prompt_length, has_static_cache):
    """Closed form: a key of head_dim and a value of the rank, per key/value head, token, sequence and layer."""
    workload = Workload(3, prompt_length, 4)
    runner = Runner(compress(dense_model_of("llama")), CPU, has_static_cache=has_static_cache)
    runner.warm_up(workload, tokens_of(workload))
    widths = sum(SIZES["head_dim"] + rank for rank in RANKS)
    expected = 3 * (prompt_length + 4) * SIZES["num_key_value_heads"] * widths * 4
    assert runner.run(workload, tokens_of(workload)).kv_cache_bytes == expected


def test_memory_of_weights_counts_tied_ones_once(tmp_path):
    model = dense_model_of("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    buffers = sum(buffer.numel() * buffer.itemsize for buffer in model.buffers())
    assert Runner(model, CPU).weight_memory_bytes == model.num_parameters() * 4 + buffers


def test_peak_memory_is_that_of_the_model_alone(monkeypatch):
    """Other models' weights are allocated before and do not count; the own cache, if static, is and does."""
    monkeypatch.setattr(timing, "reset_peak_allocated", lambda device: 1_000_000)
    monkeypatch.setattr(timing, "peak_allocated_bytes", lambda device: 1_000_700)
    workload = Workload(3, 5, 4)
    for has_static_cache in (False, True):
        runner = Runner(compress(dense_model_of("llama")), CPU, has_static_cache=has_static_cache)
        runner.warm_up(workload, tokens_of(workload))
        measured = runner.run(workload, tokens_of(workload))
        held = measured.kv_cache_bytes if has_static_cache else 0
        assert measured.peak_memory_bytes == runner.weight_memory_bytes + held + 700


def recorded_steps(monkeypatch, runner: Runner) -> list[tuple[tuple[int, ...], int]]:
    """Return a list that gets the shape of the input and the cached length of every call of the model from now on."""
    steps = []
    forward = runner.model.forward

    def recording(input_ids, past_key_values, **options):
        steps.append((tuple(input_ids.shape), int(past_key_values.get_seq_length())))
        return forward(input_ids, past_key_values=past_key_values, **options)

    monkeypatch.setattr(runner.model, "forward", recording)
    return steps


def test_slicegpt_feeds_one_token_per_step_to_a_growing_cache(monkeypatch):
    workload = Workload(4, 0, 6)
    runner = Runner(compress(dense_model_of("llama")), CPU)
    steps = recorded_steps(monkeypatch, runner)
    runner.run(workload, tokens_of(workload))
    assert steps == [((4, 1), length) for length in range(6)]


@pytest.mark.parametrize("has_static_cache", [False, True], ids=["growing", "static"])
def test_every_run_of_the_grid_reads_its_prompt_into_an_empty_cache(monkeypatch, has_static_cache):
    workload = Workload(2, 5, 3)
    runner = Runner(compress(dense_model_of("llama")), CPU, has_static_cache=has_static_cache)
    runner.warm_up(workload, tokens_of(workload))
    steps = recorded_steps(monkeypatch, runner)
    for _ in range(2):
        runner.run(workload, tokens_of(workload))
    assert steps == 2 * [((2, 5), 0), ((2, 1), 5), ((2, 1), 6), ((2, 1), 7)]


@pytest.fixture
def events(monkeypatch) -> list[str]:
    """What happens: "compile" for every graph that torch.compile makes, in place of the compiler's own work."""
    happened: list[str] = []
    compile_model = torch.compile

    def backend(graph, inputs):
        happened.append("compile")
        return graph.forward

    monkeypatch.setattr(
        torch, "compile", lambda model, fullgraph, mode: compile_model(model, fullgraph=fullgraph, backend=backend)
    )
    yield happened
    torch.compiler.reset()


def compiled_runner(model, events: list[str], **options: bool) -> Runner:
    return Runner(model, CPU, is_compiled=True, clock=lambda: events.append("clock") or len(events), **options)


@pytest.mark.slow
@pytest.mark.parametrize("has_static_cache", [False, True], ids=["growing", "static"])
def test_compiling_is_over_before_the_first_timed_run(events, has_static_cache):
    """Two workloads, as in a grid, and more models of one class than torch.compile makes graphs of by default."""
    one_layer = {"num_hidden_layers": 1}
    flat = [compress(dense_model_of("llama", **one_layer), ranks=(rank,), widths=(40,)) for rank in range(3, 8)]
    runners = [
        compiled_runner(model, events, has_static_cache=has_static_cache)
        for model in (dense_model_of("llama", **one_layer), *flat)
    ]
    for workload, some in ((Workload(1, 5, 4), runners), (Workload(2, 7, 4), runners[:2])):
        done: list[int] = []
        events.clear()
        measure(some, workload, 2, lambda done=done: done.append(len(events)))
        warm = done[len(some) - 1]
        assert events[:warm].count("compile") >= 2 * len(some)
        assert events[warm:] == ["clock"] * CLOCK_READINGS * 2 * len(some)


@pytest.mark.slow
def test_compiling_in_a_timed_run_is_an_error(events, monkeypatch):
    monkeypatch.setattr(Runner, "warm_up", lambda *_: None)
    with pytest.raises(RuntimeError, match="fail_on_recompile"):
        measure([compiled_runner(dense_model_of("llama"), events)], Workload(1, 5, 2), 1, lambda: None)


def test_a_record_holds_every_model_at_every_cell(folders, here, capsys):
    record = run(*folders[:3])
    assert record["kind"] == "speed"
    assert record["command"].startswith(f"python -m flatllmbench.speed {folders[0]}")
    assert record["request"]["repeats"] == 2
    about_all = ("protocol", "dtype", "attention", "compiled", "static_cache")
    assert [record[name] for name in about_all] == ["grid", "float32", "sdpa", False, False]
    assert {"versions", "hardware", "elapsed_s"} <= record.keys()
    assert [model["model"] for model in record["models"]] == ["tiny", "tiny-a", "tiny-b"]
    sparsity = [model["achieved_sparsity_percent"] for model in record["models"]]
    assert sparsity[0] == 0 < sparsity[1] < sparsity[2]
    for model in record["models"]:
        assert model["weight_memory_bytes"] >= 4 * model["parameters"]["total"]
    places = [(cell["batch_size"], cell["prompt_length"], cell["model"]) for cell in record["cells"]]
    assert places == list(itertools.product((1, 2), (5, 7), (0, 1, 2)))
    for cell in record["cells"]:
        assert cell.keys() == CELL
        is_dense = cell["model"] == 0
        for name in ("prefill_speedup", "decode_speedup", "predicted"):
            assert (cell[name] is None) == is_dense
        for name in ("prefill_ms", "decode_ms_per_token"):
            assert 0 < cell[name]["low"] <= cell[name]["median"] <= cell[name]["high"]
        assert cell["time_to_first_token_ms"] > 0
        assert cell["peak_memory_bytes"] is None
    shown = capsys.readouterr().out
    for label in ("| tiny-b", "predicted by operations", "predicted by bytes", "tokens/s", "not run"):
        assert label in shown


def test_slicegpt_s_record_has_no_prompt(folders, here, capsys):
    sizes = ["--batch_size", "3", "--new_tokens", "4", "--repeats", "1", "--protocol", "slicegpt"]
    assert speed.main([*map(str, folders[:2]), *sizes]) == 0
    record = json.loads(Path("logs/tiny_speed_slicegpt.json").read_text())
    dense, flat = record["cells"]
    assert (dense["batch_size"], dense["prompt_length"], dense["new_tokens"]) == (3, 0, 4)
    for cell in (dense, flat):
        assert [cell[name] for name in ("prefill_ms", "prefill_tokens_per_s", "time_to_first_token_ms")] == [None] * 3
        assert cell["prefill_speedup"] is None
    assert flat["predicted"].keys() == {"prefill_speedup_flops", "decode_speedup_bytes"}
    assert flat["predicted"]["prefill_speedup_flops"] is None


def test_the_defaults_of_slicegpt_are_the_published_ones():
    args = speed.parse_arguments(["a", "b", "--protocol", "slicegpt"])
    assert (args.batch_size, args.prompt_length, args.new_tokens) == ([128], [0], 256)


def test_the_help_shows_commands_that_the_program_takes():
    commands = re.findall(r"^ +python -m flatllmbench.speed (.+)$", speed.__doc__, re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        args = speed.parse_arguments(command.split())
        speed.check_arguments(args)
        assert args.shape is None or (ROOT / args.shape / "config.json").is_file()


@pytest.mark.parametrize("path", sorted(ROOT.glob("benchmarks/shapes/*")), ids=lambda path: path.name)
def test_the_shapes_in_the_repository_can_be_compressed(path):
    args = speed.parse_arguments(["--shape", str(path), "--ratios", "10,50", "--rank_multiple", "1,8"])
    speed.check_configs(args, speed.read_configs(args))


def test_a_shape_is_measured_without_weights(here):
    """Ranks differ between layers, and those of multiple 8 are multiples of 8."""
    sizes = SIZES | {"head_dim": 32, "intermediate_size": 128, "num_hidden_layers": 4}
    LlamaConfig(**sizes).save_pretrained("shape")
    assert [path.name for path in Path("shape").iterdir()] == ["config.json"]
    record = run("--shape", "shape", "--ratios", "30", "--rank_multiple", "1,8", "--static_cache")
    assert record["static_cache"]
    assert [model["model"] for model in record["models"]] == ["shape", "shape-30-m1", "shape-30-m8"]
    assert [model["base_model"] for model in record["models"]] == [None, "shape", "shape"]
    for model in record["models"][1:]:
        assert model["achieved_sparsity_percent"] == pytest.approx(30, abs=2)
    args = speed.parse_arguments(["--shape", "shape", "--ratios", "30", "--rank_multiple", "1,8"])
    floors, multiples = (config for _, config in speed.read_configs(args)[1:])
    assert len({layer.value_head_dim for layer in floors.per_layer_config}) > 1
    assert {layer.value_head_dim % 8 for layer in multiples.per_layer_config} == {0}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "--shape"),
        (["{dense}", "--shape", "{dense}"], "not both"),
        (["{dense}", "{dense}/nowhere"], "nowhere"),
        (["{flat}", "{dense}"], "compressed already"),
        (["{dense}", "{other}"], "num_layers 2, not 3"),
        (["{dense}", "{flat}", "--batch_size", "1,0"], "--batch_size 0"),
        (["{dense}", "{flat}", "--prompt_length", "0"], "--prompt_length 0"),
        (["{dense}", "{flat}", "--repeats", "0"], "--repeats 0"),
        (["{dense}", "{flat}", "--threads", "0"], "--threads 0"),
        (["{dense}", "{flat}", "--prompt_length", "60", "--new_tokens", "5"], "65 tokens"),
        (["{dense}", "--protocol", "slicegpt", "--prompt_length", "8"], "has no prompt"),
        (["--shape", "{dense}", "--ratios", "20,99"], "99"),
        (["--shape", "{dense}", "--rank_multiple", "0"], "--rank_multiple 0"),
        (["{dense}", "{flat}", "--rank_multiple", "8"], "give --shape too"),
        (["{dense}", "{flat}", "--ratios", "20"], "give --shape too"),
        (["--shape", "{flat}"], "compressed already"),
        (["{dense}", "--device", "moon"], "moon"),
    ],
)
def test_bad_input_gets_one_line_and_leaves_nothing(arguments, complaint, folders, here, capsys):
    places = dict(zip(("dense", "flat", "smaller", "other"), folders, strict=True))
    defaults = {"--prompt_length": "8", "--new_tokens": "2", "--repeats": "1", "--batch_size": "1"}
    if "slicegpt" in arguments:
        del defaults["--prompt_length"]
    given = [argument.format(**places) for argument in arguments]
    assert speed.main([*itertools.chain(*defaults.items()), *given]) == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err.count("\n")) == ("", 1)
    assert complaint in shown.err
    assert list(here.iterdir()) == []


def test_threads_are_set_before_anything_is_measured(folders, here, monkeypatch):
    before = torch.get_num_threads()
    seen = set()
    run_model = Runner.run
    monkeypatch.setattr(Runner, "run", lambda *args: seen.add(torch.get_num_threads()) or run_model(*args))
    try:
        record = run(*folders[:2], "--threads", before + 1)
        assert seen == {before + 1}
        assert record["hardware"]["device"].endswith(f"{before + 1} threads")
    finally:
        torch.set_num_threads(before)


def test_an_interruption_gets_one_line_and_leaves_no_record(folders, here, capsys, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Runner, "run", interrupt)
    assert speed.main([*map(str, folders[:2]), "--device", "cpu", "--prompt_length", "8"]) == 2
    assert capsys.readouterr().err == "error: interrupted; run it again\n"
    assert list(here.rglob("*.json")) == []


def test_models_that_do_not_fit_together_are_refused_before_they_are_loaded(folders, here, capsys, monkeypatch):
    weights = sum(load_model(str(folder)).num_parameters() * 4 for folder in folders[:2])
    monkeypatch.setattr(devices, "free_host_memory", lambda: weights - 1)
    monkeypatch.setattr(speed, "load_model", None)
    assert speed.main([*map(str, folders[:2]), "--device", "cpu", "--prompt_length", "8"]) == 2
    assert "all are loaded at once: measure fewer" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_to_gets_one_line(folders, here, capsys):
    Path("file").touch()
    sizes = ["--prompt_length", "8", "--new_tokens", "2", "--repeats", "1", "--device", "cpu"]
    assert speed.main([*map(str, folders[:2]), *sizes, "--save", "file"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "file" in error


def test_models_of_two_dtypes_are_not_compared_unless_one_is_asked_for(folders, here, capsys):
    random_model(LlamaConfig(**SIZES, dtype="bfloat16")).to(torch.bfloat16).save_pretrained("half")
    assert speed.main([str(folders[0]), "half"]) == 2
    assert "one --dtype" in capsys.readouterr().err
    assert run(folders[0], "half", "--dtype", "bfloat16")["dtype"] == "bfloat16"


def test_the_device_is_waited_for_before_the_clock_is_read(monkeypatch):
    happened = []
    monkeypatch.setattr(timing, "synchronize", lambda device: happened.append("wait"))
    runner = Runner(dense_model_of("llama"), CPU, clock=lambda: happened.append("read") or 0.0)
    runner.run(Workload(1, 5, 2), tokens_of(Workload(1, 5, 2)))
    assert happened == ["wait", "read"] * CLOCK_READINGS
