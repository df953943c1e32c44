"""Plans from configs: where things live, what more devices spare, and whether a calibrated plan gives back its run."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from benchmarks import plan as program
from benchmarks import plan_check
from flatllmbench import rates
from flatllmbench.costs import compression_costs, cut_layers, moment_bytes
from flatllmbench.machines import DEVICES, Machine, measured_machine
from flatllmbench.plan import Plan, Request, Seconds
from flatllmbench.plan_calibration import efficiency_of, request_of, seconds_by_rate
from flatllmbench.published_models import PUBLISHED_MODELS, find_config
from flatllmcore.utils.devices import GIB

ROOT = Path(__file__).resolve().parents[1]
EMBEDDED = ROOT / "models" / "pydocs-llama"
RECORD = ROOT / "results" / "records" / "pydocs-llama" / "pydocs-llama_flatllm_20.json"
SLOW = Machine("slow", 1.0, 2.0, 0.5, 1000.0, 1.0, 10.0, 5.0, 1.0, 1.0)


def request(model: str = "llama-2-70b", **changes: Any) -> Request:
    """The published run."""
    defaults = {"sparsity_ratio": 20, "nsamples": 256, "importance_nsamples": 128, "eval_windows": 84, "seqlen": 4096}
    return Request(config=find_config(model), **defaults | {"batch_size": 1, "itemsize": 2} | changes)


def tiny_request(**changes: Any) -> Request:
    config = LlamaConfig(
        vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4
    )
    defaults = {"sparsity_ratio": 20, "nsamples": 8, "importance_nsamples": 8, "eval_windows": 4, "seqlen": 16}
    return Request(config=config, **defaults | {"batch_size": 2, "itemsize": 2} | changes)


def stages(plan: Plan) -> dict[str, Seconds]:
    return {f"{stage.step}: {stage.name}": plan.seconds(stage) for stage in plan.stages()}


def output(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    assert program.main(list(arguments)) == 0
    return capsys.readouterr().out


class TestPlaces:
    @pytest.mark.parametrize(
        ("host_memory_gib", "memory_gib", "place"),
        [
            (64, 40, "host"),
            (64, 80, "device"),
            (33, 40, "host"),
            (31, 40, "file"),
            (31, None, "file"),
            (33, None, "host"),
        ],
    )
    def test_hidden_states_of_256_windows_of_a_70b_model_take_16_gib(self, host_memory_gib, memory_gib, place):
        machine = Machine("any", 1, 1, 1, 1, memory_gib, 1, 1, 1, host_memory_gib)
        assert Plan(request(), machine).states_place(256) == place

    def test_four_devices_hold_a_quarter_each(self):
        one, four = (Plan(request(processes=count), DEVICES["a100-40gb"]) for count in (1, 4))
        assert (one.states_place(256), four.states_place(256)) == ("host", "device")
        assert four.device_bytes()["hidden states"] == 4 * GIB
        assert one.host_bytes()["hidden states"] == 16 * GIB

    def test_a_70b_model_fits_one_gpu_of_24_gib_beside_64_gb_of_host_memory(self):
        plan = Plan(request(), DEVICES["a100-40gb"])
        assert not plan.is_in_memory
        assert 14 < sum(plan.device_bytes().values()) / GIB < 23
        assert sum(plan.host_bytes().values()) / GIB < 64

    def test_a_model_of_half_the_host_memory_is_held_in_it_by_each_process(self):
        machine = Machine("any", 1, 1, 1, 1, 40, 1, 1, 1, host_memory_gib=2.01 * 6_738_415_616 * 2 / GIB)
        assert Plan(request("llama-2-7b"), machine).is_in_memory
        assert not Plan(request("llama-2-7b", processes=2), machine).is_in_memory

    def test_a_model_that_fits_can_be_read_layer_by_layer_all_the_same(self, capsys):
        flags = ("llama-2-7b", "--host_memory_gib", "100")
        assert "weights in host memory" in output(capsys, *flags)
        assert "weights read layer by layer" in output(capsys, *flags, "--out_of_core")

    def test_memory_that_is_not_there_is_said(self, capsys):
        assert "MORE THAN ITS 16.0" in output(capsys, "llama-2-70b", "--device", "rtx-4090", "--memory_gib", "16")
        assert "MORE THAN" not in output(capsys, "llama-2-70b")


class TestTimes:
    def test_each_kind_of_work_is_divided_by_its_own_rate(self):
        """Hidden states in files, the model in memory, on a device with memory of its own."""
        plan = Plan(tiny_request(), Machine("slow", 1.0, 2.0, 0.5, 1e9, 1e-6, 10.0, 5.0, 1.0, 1e-3))
        costs = compression_costs(plan.allocation, plan.work(8))
        found = stages(plan)
        assert found["compression: forward"].compute == costs["forward"].operations / 1e12
        assert found["compression: moments"].compute == costs["moments"].operations / 2e12
        assert found["compression: solves"].compute == costs["solves"].operations / 0.5e12
        states = 8 * 16 * 48 * 2  # in and out of both passes but the output of the first
        assert found["compression: hidden states (host)"] == Seconds(copy=3 * 3 * states / 10e9)
        assert found["importance: weights"] == Seconds(copy=plan.dense_bytes / 10e9)
        assert found["load: weights"] == Seconds(disk=plan.dense_bytes / 1e9)
        assert found["compressed perplexity: weights"].disk == plan.compressed_bytes / 1e9

    def test_out_of_core_every_step_reads_the_model(self):
        plan = Plan(tiny_request(), Machine("small", 1.0, 2.0, 0.5, 1e9, None, 10.0, 5.0, 1.0, 1e-5))
        read = [stage.disk_bytes for stage in plan.stages() if stage.name == "weights"]
        assert read == [plan.dense_bytes] * 3 + [plan.compressed_bytes]
        assert {stage.name for stage in plan.stages() if "states" in stage.name} == {"hidden states (file)"}

    def test_two_sums_bracket_a_run(self):
        seconds = Seconds(compute=3.0, copy=1.0, link=0.5, disk=2.0)
        assert (seconds.one_after_another, seconds.overlapped) == (6.5, 3.5)
        assert seconds + seconds == Seconds(6.0, 2.0, 1.0, 4.0)

    def test_a_step_is_the_sum_of_its_stages(self):
        plan = Plan(request(), DEVICES["a100-40gb"])
        found = stages(plan)
        compression = [seconds for name, seconds in found.items() if name.startswith("compression: ")]
        assert plan.steps()["compression"] == sum(compression, Seconds())
        assert set(plan.steps()) == {"importance", "dense perplexity", "compression", "compressed perplexity"}

    def test_scores_and_perplexities_that_nobody_wants_take_no_time(self):
        plan = Plan(request(importance_nsamples=0, eval_windows=0), DEVICES["a100-40gb"])
        assert set(plan.steps()) == {"compression"}


class TestProcesses:
    def test_four_take_a_quarter(self):
        one, four = (Plan(request(processes=count), DEVICES["h200"]) for count in (1, 4))
        alone, shared = stages(one), stages(four)
        for name in (
            "importance: forward",
            "dense perplexity: forward",
            "compression: forward",
            "compression: moments",
        ):
            assert shared[name].compute == pytest.approx(alone[name].compute / 4)
        solves = shared["compression: solves"].compute, alone["compression: solves"].compute
        assert solves[0] == pytest.approx(solves[1] / 4, rel=0.03)  # the attention's are the first one's alone

    def test_the_largest_of_uneven_shares_counts(self):
        assert Plan(request(nsamples=5, processes=2), DEVICES["h200"]).work(5).windows == 3

    def test_what_a_process_sends_is_a_ring_s_share_of_the_sums_and_what_is_passed_on(self):
        plan = Plan(tiny_request(processes=4), SLOW)
        (stage,) = (stage for stage in plan.stages() if stage.linked_bytes)
        cut = cut_layers(plan.allocation)
        summed = sum(moment_bytes(plan.dimensions) + 2 * width * 48 for _, width in cut)
        passed_on = sum(2 * rank * 48 * (4 + 4) + 8 * (80**2 + width**2) / 2 for rank, width in cut)
        assert stage.linked_bytes == 2 * 3 / 4 * summed + passed_on
        assert plan.seconds(stage) == Seconds(link=stage.linked_bytes / 5e9)


class TestCalibration:
    def test_a_plan_calibrated_by_a_run_gives_back_its_times(self):
        record = json.loads(RECORD.read_text())
        config = find_config(str(EMBEDDED))
        efficiency = efficiency_of(record, config, SLOW)
        plan = Plan(request_of(record, config), SLOW, efficiency)
        found = seconds_by_rate(plan)
        for stage in ("forward", "moments", "solves", "perplexity", "load"):
            assert found[stage] == pytest.approx(record["stages_s"][stage])

    def test_a_record_says_what_was_run(self):
        record = json.loads(RECORD.read_text())
        found = request_of(record, find_config(str(EMBEDDED)))
        assert (found.nsamples, found.seqlen, found.itemsize) == (record["nsamples"], record["seqlen"], 2)
        assert found.batch_size * found.seqlen == 4096
        assert found.eval_windows == record["perplexity"]["windows"]

    def test_twice_the_windows_take_twice_the_forward_time(self, capsys, monkeypatch):
        monkeypatch.chdir(ROOT)  # the record names its model by a relative path
        flags = ("models/pydocs-llama", "--seqlen", "256", "--calibrate", str(RECORD), "--importance_nsamples", "0")
        once, twice = (output(capsys, *flags, "--nsamples", count).splitlines() for count in ("128", "256"))
        times = [
            float(next(line for line in lines if "compression: forward" in line).split("|")[7])
            for lines in (once, twice)
        ]
        assert times[1] == pytest.approx(2 * times[0], rel=1e-3)

    def test_the_check_finds_no_error_in_its_own_calibration_and_half_in_a_run_twice_as_fast(self):
        run = plan_check.Run("any", 48, 80, 2, 4, 4, 8, 16)
        stages_s = {"forward": 2.0, "moments": 1.0, "solves": 0.5, "perplexity": 3.0, "load": 0.1, "angles": 0.1}
        record = {
            "request": {"nsamples": 8, "batch_size": None, "dtype": "bfloat16"},
            "stages_s": stages_s,
            "sparsity_ratio": 20.0,
            "nsamples": 8,
            "seqlen": 16,
            "perplexity": {"windows": 3},
            "peak_memory_gib": {"host": 0.5},
        }
        fast = record | {"stages_s": {name: seconds / 2 for name, seconds in stages_s.items()}}
        rows = plan_check.compare((run, run), [record, fast], SLOW)["rows"]
        errors = [row["error_percent"] for row in rows]
        assert errors == pytest.approx([0.0] * 8 + [100.0] * 7 + [0.0])
        assert "+100" in plan_check.report({"rows": rows})

    def test_the_least_disturbed_time_of_each_stage_counts(self):
        several = [
            {"stages_s": {"forward": forward, "solves": solves}, "peak_memory_gib": {"host": 1.0}}
            for forward, solves in ((2.0, 1.0), (1.0, 3.0))
        ]
        assert plan_check.best_record(tuple(several))["stages_s"] == {"forward": 1.0, "solves": 1.0}

    def test_the_least_disturbed_rates_of_the_machine_count(self):
        quick = replace(SLOW, tflops=3.0, disk_gbytes_per_s=0.5)
        assert plan_check.fastest([SLOW, quick]) == replace(SLOW, tflops=3.0)


class TestCommandLine:
    def test_all_published_models_have_a_row(self, capsys):
        rows = [line.split("|") for line in output(capsys, "--all").splitlines() if line.startswith("| ")][1:]
        assert [row[1].strip() for row in rows[1:]] == list(PUBLISHED_MODELS)
        large = next(row for row in rows if "llama-2-70b" in row[1])
        assert [cell.strip() for cell in large[2:4]] == ["138.0", "16.0 (host)"]

    def test_numbers_of_the_machine_can_be_given(self, capsys):
        def compute_s(*flags: str) -> dict[str, float]:
            lines = output(capsys, "llama-2-7b", *flags).splitlines()
            cells = [line.split("|") for line in lines if line.startswith("| compression: ")]
            return {row[1].strip(): float(row[7]) for row in cells if row[7].strip()}

        slow, fast = compute_s("--tflops", "100"), compute_s("--tflops", "200", "--float64_tflops", "19.5")
        assert slow["compression: forward"] == pytest.approx(2 * fast["compression: forward"], rel=1e-3)
        assert slow["compression: moments"] == pytest.approx(2 * fast["compression: moments"], rel=1e-3)
        assert slow["compression: solves"] == fast["compression: solves"]
        half = compute_s("--tflops", "100", "--efficiency", "0.5")
        assert half["compression: solves"] == pytest.approx(2 * slow["compression: solves"], rel=1e-3)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["no/such/model"], "or one of the names llama-2-7b"),
            (["llama-2-7b", "--efficiency", "0"], "--efficiency 0 is out of range"),
            (["llama-2-7b", "--processes", "0"], "--processes 0 is out of range"),
            (["llama-2-7b", "--nsamples", "0"], "--nsamples 0 is out of range; 1 or more"),
            (["llama-2-7b", "--disk_gbytes_per_s", "-1"], "--disk_gbytes_per_s -1 is out of range"),
            (["llama-2-7b", "--seqlen", "5000"], "windows of 5000 tokens are out of range"),
            (["llama-2-7b", "--sparsity_ratio", "96"], "96 is out of range"),
            (["llama-2-7b", "--calibrate", "no.json"], "cannot read no.json"),
            (["llama-2-7b", "--calibrate", str(EMBEDDED / "config.json")], "it has no 'request'"),
        ],
    )
    def test_unusable_arguments_get_one_line(self, arguments, message, capsys):
        assert program.main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_this_machine_is_measured(tmp_path, monkeypatch):
    """Small products, a small copy and a small file are still faster than nothing and slower than anything built."""
    monkeypatch.setattr(rates, "_HOST_SIDE", 256)
    monkeypatch.setattr(rates, "_BYTES", 2**20)
    machine = measured_machine(torch.device("cpu"), tmp_path)
    for tflops in (machine.tflops, machine.moments_tflops, machine.float64_tflops):
        assert 1e-4 < tflops < 100
    for gbytes_per_s in (machine.bandwidth_gbytes_per_s, machine.disk_gbytes_per_s):
        assert 1e-3 < gbytes_per_s < 1e5
    assert machine.memory_gib is None
    assert list(tmp_path.iterdir()) == []
