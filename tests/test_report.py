"""``python -m flatllmbench.report``: what its tables say is what the records say."""

import copy
import re
from pathlib import Path

import pytest

from flatllmbench import plots, published, report
from flatllmbench.page import html_page
from flatllmbench.runs import read_runs
from markdown_tables import tables
from sample_records import (
    ACCURACIES,
    COMPRESSION,
    DENSE_MODEL,
    EVALUATION,
    LLAMA_2_7B,
    SCORING,
    SLICEGPT_CELL,
    SMALL_MODEL,
    TIMING,
    saved,
)

ROOT = Path(__file__).resolve().parents[1]
TABLE_1 = "Ours beside the paper's Table 1"
RUNS = "Perplexity, size, time and memory"
LLAMA = COMPRESSION | LLAMA_2_7B
SAVED_LLAMA = SMALL_MODEL | {"model": "tiny-20", "base_model": "Llama-2-7b-hf"}


def section(markdown: str, heading: str) -> str:
    """Return what stands under a second- or third-level heading, up to the next of its level or above."""
    level, rest = re.split(rf"^(##+) {re.escape(heading)}$", markdown, maxsplit=1, flags=re.M)[1:]
    return re.split(rf"^#{{2,{len(level)}}} ", rest, maxsplit=1, flags=re.M)[0]


def markdown_of(*paths: Path) -> str:
    """Return the report of records, without drawing its pictures."""
    return report.report(read_runs(paths), pictures=())


def run(*paths: Path, out: Path) -> str:
    """Make the whole report of records, and return its README.md."""
    assert report.main([*map(str, paths), "--out", str(out)]) == 0
    return (out / "README.md").read_text()


def rows(markdown: str, heading: str, number: int = 0) -> list[list[str]]:
    """Return the rows of a section's first table, or of another, without its header."""
    return tables(section(markdown, heading))[number][1:]


class TestCompressions:
    def test_a_row_states_the_record_beside_the_dense_model(self, tmp_path):
        dense, compressed = rows(markdown_of(saved(tmp_path, "a", COMPRESSION)), RUNS)
        assert dense == ["0 (dense)", "0", "4,000", "6,000", "8.000", "1", "–", "–", "–", "–"]
        assert compressed == ["20", "19.750", "3,210", "5,210", "10.000", "1.250", "72.0", "100.0", "1.25", "–"]

    def test_everything_its_figures_depend_on_stands_below(self, tmp_path):
        text = section(markdown_of(saved(tmp_path, "a", COMPRESSION)), RUNS)
        for fact in ("models/tiny", "pydocs, 128 × 256 tokens, seed 42", "pydocs, 332 × 256 tokens", "multiples of 8"):
            assert fact in text
        for fact in ("Some GPU, Linux x86_64", "python 3.11.7, torch 2.13.0", "\npython main.py --sparsity_ratio 20\n"):
            assert fact in text

    def test_the_tables_go_to_stdout_too(self, tmp_path, capsys):
        readme = run(saved(tmp_path, "a", COMPRESSION), out=tmp_path / "out")
        assert tables(capsys.readouterr().out) == tables(section(readme, RUNS))

    def test_targets_of_one_model_share_a_table_in_rising_order(self, tmp_path):
        paths = [saved(tmp_path, str(p), COMPRESSION, sparsity_ratio=float(p)) for p in (50, 10, 30)]
        assert [row[0] for row in rows(markdown_of(*paths), RUNS)] == ["0 (dense)", "10", "30", "50"]

    @pytest.mark.parametrize(
        "change",
        [
            {"base_model": "models/other"},
            {"nsamples": 64},
            {"seed": 1},
            {"rank_multiple": 1},
            {"prune_qk": True},
            {"hardware": COMPRESSION["hardware"] | {"device": "Other GPU"}},
            {"versions": {"python": "3.12.0"}},
            {"perplexity": COMPRESSION["perplexity"] | {"windows": 10}},
            {"request": COMPRESSION["request"] | {"dtype": "float32"}},
        ],
        ids=lambda change: next(iter(change)),
    )
    def test_runs_under_other_conditions_get_a_table_of_their_own(self, tmp_path, change):
        paths = saved(tmp_path, "a", COMPRESSION), saved(tmp_path, "b", COMPRESSION, **change)
        text = section(markdown_of(*paths), RUNS)
        assert [[row[0] for row in table[1:]] for table in tables(text)] == 2 * [["0 (dense)", "20"]]
        headings = re.findall(r"^### (.*)$", text, re.M)
        assert len(set(headings)) == 2

    def test_memory_of_the_device_stands_beside_the_host_s(self, tmp_path):
        path = saved(tmp_path, "a", COMPRESSION, peak_memory_gib={"host": 1.25, "device": 30.5})
        assert rows(markdown_of(path), RUNS)[1][-2:] == ["1.25", "30.50"]

    def test_seconds_per_stage_are_those_of_the_record(self, tmp_path):
        text = markdown_of(saved(tmp_path, "a", COMPRESSION), saved(tmp_path, "b", SCORING))
        ((header, compression, scoring),) = tables(section(text, "Layers and stages"))
        by_stage = dict(zip(header, compression, strict=True))
        assert (by_stage["seconds"], by_stage["whole run"]) == ("tiny, 20 %", "100.0")
        assert (by_stage["forward"], by_stage["perplexity"], by_stage["angles"]) == ("30.00", "20.00", "–")
        assert dict(zip(header, scoring, strict=True))["angles"] == "30.00"


class TestTable1:
    def entry(self, markdown: str, model: str = "Llama-2 7B") -> list[list[str]]:
        return [row[1:] for row in rows(markdown, TABLE_1) if row[0] == model]

    def test_without_our_runs_it_has_the_published_figures_and_says_not_run(self, tmp_path):
        markdown = markdown_of(saved(tmp_path, "a", COMPRESSION))
        found = rows(markdown, TABLE_1)
        assert len(found) == 2 * len(published.MODELS)
        for model, method, *cells in found:
            place = next(i for i, known in enumerate(published.MODELS) if known.name == model)
            perplexity, accuracy = published.TABLE_1[method][place]
            assert cells == [f"{perplexity:.2f}", *2 * ["not run"], f"{accuracy:.2f}", *3 * ["not run"]]

    def test_every_method_is_there_for_every_model(self, tmp_path):
        markdown = markdown_of(saved(tmp_path, "a", COMPRESSION))
        for heading, place in (("Every method, perplexity", 0), ("Every method, mean accuracy, %", 1)):
            *theirs, dense, ours = rows(markdown, heading)
            assert [row[0] for row in theirs] == list(published.TABLE_1)
            for method, *cells in theirs:
                figures = published.TABLE_1[method]
                assert cells == ["–" if pair is None else f"{pair[place]:.2f}" for pair in figures]
            assert [dense, ours] == [["dense, here", *5 * ["not run"]], ["FLAT-LLM, here", *5 * ["not run"]]]

    def test_a_run_at_the_published_settings_stands_beside_with_its_difference(self, tmp_path):
        markdown = markdown_of(saved(tmp_path, "a", LLAMA))
        settings = "256 × 4096 tokens, seed 42, multiples of 1"
        assert self.entry(markdown) == [
            ["dense", "5.11", "5.11", "+0.00", "62.14", "not run", "not run", settings],
            ["FLAT-LLM", "6.70", "6.74", "+0.04", "55.16", "not run", "not run", settings],  # a miss
        ]
        assert self.entry(markdown, "Llama-2 13B")[0][2:4] == ["not run", "not run"]
        *_, ours = rows(markdown, "Every method, perplexity")
        assert ours == [f"FLAT-LLM, here, {settings}", "6.74", *4 * ["not run"]]
        needed = section(markdown, "What the cells that were not run need")
        assert "scripts/llama_7b.sh" not in needed
        assert "scripts/eval.sh results/Llama-2-7b-hf-20" in needed

    @pytest.mark.parametrize(
        "change",
        [
            {"base_model": "meta-llama/Llama-2-7b-chat-hf"},
            {"sparsity_ratio": 30.0},
            {"seqlen": 2048},
            {"dataset": "c4"},
            {"perplexity": LLAMA["perplexity"] | {"seqlen": 2048}},
            {"perplexity": LLAMA["perplexity"] | {"dataset": "c4"}},
        ],
        ids=["model", "ratio", "calibration_seqlen", "calibration_text", "seqlen", "text"],
    )
    def test_a_run_at_other_settings_stands_with_the_other_runs_alone(self, tmp_path, change):
        markdown = markdown_of(saved(tmp_path, "a", LLAMA, **change))
        assert {cell for row in self.entry(markdown) for cell in (row[2], row[3], row[7])} == {"not run"}
        assert rows(markdown, RUNS)[1][4] == "6.735"

    def test_runs_that_differ_in_settings_each_have_their_rows(self, tmp_path):
        paths = saved(tmp_path, "a", LLAMA), saved(tmp_path, "b", LLAMA, rank_multiple=8), saved(tmp_path, "c", LLAMA)
        markdown = markdown_of(*paths)
        assert len(self.entry(markdown)) == 6
        labels = [row[0] for row in rows(markdown, "Every method, perplexity")[-6:] if row[0].startswith("FLAT")]
        one, eight = (f"FLAT-LLM, here, 256 × 4096 tokens, seed 42, multiples of {multiple}" for multiple in (1, 8))
        assert sorted(labels) == sorted([one, f"{one}, run 2", eight])

    def test_a_local_folder_of_the_model_counts_as_the_model(self, tmp_path):
        markdown = markdown_of(saved(tmp_path, "a", LLAMA, base_model="/data/Llama-2-7b-hf"))
        assert self.entry(markdown)[1][2] == "6.74"

    def test_accuracies_come_from_the_run_itself(self, tmp_path):
        run = saved(tmp_path, "a", LLAMA, zero_shot=ACCURACIES | {"mean_accuracy": 55.0})
        dense, ours = self.entry(markdown_of(run))
        assert (dense[5], dense[6]) == ("not run", "not run")
        assert (ours[5], ours[6]) == ("55.00", "-0.16")  # a miss

    def test_accuracies_come_from_evaluations_of_the_dense_model_and_of_the_saved_folder(self, tmp_path):
        paths = [
            saved(tmp_path, "a", LLAMA),
            saved(tmp_path, "b", EVALUATION, model=DENSE_MODEL | {"model": "Llama-2-7b-hf"}),
            saved(tmp_path, "c", EVALUATION, model=SAVED_LLAMA, zero_shot=ACCURACIES | {"mean_accuracy": 54.0}),
        ]
        dense, ours = self.entry(markdown_of(*paths))
        assert (dense[5], ours[5]) == ("62.14", "54.00")

    @pytest.mark.parametrize(
        "change",
        [{"model": "tiny-30"}, {"base_model": "other"}, {"parameters": {"total": 5211, "decoder_layers": 3211}}],
        ids=lambda change: next(iter(change)),
    )
    def test_an_evaluation_of_another_folder_does_not_count(self, tmp_path, change):
        paths = saved(tmp_path, "a", LLAMA), saved(tmp_path, "b", EVALUATION, model=SAVED_LLAMA | change)
        assert self.entry(markdown_of(*paths))[1][5] == "not run"

    def test_a_dense_model_that_was_evaluated_alone_has_its_accuracy(self, tmp_path):
        path = saved(tmp_path, "a", EVALUATION, model=DENSE_MODEL | {"model": "Llama-2-7b-hf"})
        dense, ours = self.entry(markdown_of(path))
        assert dense[1:] == ["5.11", "not run", "not run", "62.14", "62.14", "+0.00", "accuracy alone"]
        assert (ours[2], ours[5]) == ("not run", "not run")

    def test_part_of_the_tasks_is_no_mean(self, tmp_path):
        part = ACCURACIES | {"mean_accuracy": None, "limit": 10}
        paths = saved(tmp_path, "a", LLAMA), saved(tmp_path, "b", EVALUATION, model=SAVED_LLAMA, zero_shot=part)
        markdown = markdown_of(*paths)
        assert self.entry(markdown)[1][5] == "not run"
        assert rows(markdown, "Zero-shot and few-shot accuracy")[0][-1] == "not run"

    def test_what_was_not_run_names_a_script_that_exists_and_its_weights(self, tmp_path):
        markdown = markdown_of(saved(tmp_path, "a", COMPRESSION))
        needed = rows(markdown, "What the cells that were not run need")
        assert [row[0] for row in needed] == [model.name for model in published.MODELS]
        for _, command, hub_id in needed:
            script = (ROOT / command.removeprefix("bash ")).read_text()
            assert f'MODEL="${{MODEL:-{hub_id}}}"' in script

    def test_nothing_is_needed_where_every_cell_was_run(self, tmp_path):
        records = []
        for model in published.MODELS:
            evaluated = DENSE_MODEL | {"model": model.folder}
            records += [
                saved(tmp_path, model.folder, LLAMA, base_model=model.hub_id, zero_shot=ACCURACIES),
                saved(tmp_path, f"{model.folder}-dense", EVALUATION, model=evaluated),
            ]
        markdown = markdown_of(*records)
        assert "### What the cells" not in markdown
        assert {cell for row in rows(markdown, TABLE_1) for cell in row if cell == "not run"} == set()

    def test_published_figures_are_those_the_scripts_expect(self):
        for model in published.MODELS:
            dense, ours = (published.figures(method, model).perplexity for method in ("dense", "FLAT-LLM"))
            script = (ROOT / model.script).read_text()
            assert f"perplexity at length 4096: dense {dense:.2f}, FLAT-LLM {ours:.2f}." in script


class TestOtherPublishedFigures:
    def test_perplexity_by_share_removed_stands_beside_modegpt(self, tmp_path):
        perplexity = LLAMA["perplexity"] | {"compressed": 8.0}
        path = saved(tmp_path, "a", LLAMA, sparsity_ratio=30.0, perplexity=perplexity)
        found = rows(markdown_of(path), "Perplexity by share removed")
        assert ["Llama-2 7B", "20", "6.70", "6.16", "not run", "not run"] in found
        assert ["Llama-2 7B", "30", "–", "7.51", "8.00", "+0.49"] in found
        assert len(found) == 10

    def test_minutes_of_calibration_leave_loading_measuring_and_saving_out(self, tmp_path):
        llama_13b = LLAMA | {"base_model": "meta-llama/Llama-2-13b-hf", "elapsed_s": 1000.0}
        found = rows(markdown_of(saved(tmp_path, "a", llama_13b)), "Minutes of calibration")
        assert found[0] == ["FLAT-LLM, published", "15", "one A100"]
        assert found[-1] == ["FLAT-LLM, here", "16.2", "Some GPU, Linux x86_64"]  # (1000 - 5 - 20 - 3) / 60

    def test_a_speed_up_counts_under_the_published_protocol_alone(self, tmp_path):
        models = [DENSE_MODEL | {"model": "Llama-2-7b-hf"}, SAVED_LLAMA | {"achieved_sparsity_percent": 20.4}]
        timing = TIMING | {"models": [model | {"weight_memory_bytes": 1} for model in models], "static_cache": False}
        cells = [SLICEGPT_CELL | {"model": 0, "decode_speedup": None}, SLICEGPT_CELL]
        same = saved(tmp_path, "a", timing, protocol="slicegpt", cells=cells)
        found = rows(markdown_of(same), "Speed-up of decoding")
        assert found[1] == ["20", "1.10", "1.19", "1.10–1.25", "+0.09", "Some GPU, Linux x86_64"]
        assert [row[2] for row in found if row[0] != "20"] == 4 * ["not run"]
        other_batch = [cell | {"batch_size": 64} for cell in cells]
        others = [
            saved(tmp_path, "b", timing, cells=cells),
            saved(tmp_path, "c", timing | {"cells": other_batch}),
            saved(tmp_path, "d", timing, protocol="slicegpt", cells=cells, compiled=True),
            saved(tmp_path, "e", timing, protocol="slicegpt", cells=cells, static_cache=True),
        ]
        assert {row[2] for row in rows(markdown_of(*others), "Speed-up of decoding")} == {"not run"}


class TestOtherRuns:
    def test_scores(self, tmp_path):
        (row,) = rows(markdown_of(saved(tmp_path, "a", SCORING)), "Importance of layers")
        calibration = "pydocs, 64 × 256 tokens, seed 7"
        assert row == ["tiny", calibration, "2", "0.0520", "0.3100", "100.0", "1.00", "2.50", "Some GPU, Linux x86_64"]

    def test_accuracies_are_percentages_with_their_standard_error(self, tmp_path):
        small = saved(tmp_path, "b", EVALUATION, model=SMALL_MODEL)
        markdown = markdown_of(saved(tmp_path, "a", EVALUATION), small)
        ((header, dense, compressed),) = tables(section(markdown, "Zero-shot and few-shot accuracy"))
        assert header == ["model", "removed, %", "piqa, acc_norm, 0-shot, %", "mmlu, acc, 5-shot, %", "mean, %"]
        assert dense == ["tiny", "0.000", "78.12 ± 0.96", "45.67", "62.14"]
        assert compressed[:2] == ["tiny-20", "19.750"]
        assert "lm_eval 0.4.13" in section(markdown, "Zero-shot and few-shot accuracy")

    def test_other_metrics_are_as_they_are_and_other_protocols_apart(self, tmp_path):
        words = {"metric": "word_perplexity", "value": 31.25, "stderr": None, "num_fewshot": None, "samples": 7}
        other = saved(tmp_path, "b", EVALUATION, zero_shot={"tasks": {"text": words}, "limit": 5})
        markdown = markdown_of(saved(tmp_path, "a", EVALUATION), other)
        text = section(markdown, "Zero-shot and few-shot accuracy")
        _, (header, row) = tables(text)
        assert (header[2], row[2], row[3]) == ("text, word_perplexity, mixed-shot", "31.25", "not run")
        assert "`--limit` 5" in text

    def test_speed_has_time_ratios_and_memory(self, tmp_path):
        text = section(markdown_of(saved(tmp_path, "a", TIMING)), "Speed and memory")
        times, ratios, memory = tables(text)
        first = ["tiny", "0.000", "8", "512", "64"]
        spreads = "1,200.50 (1,190.00–1,300.00)", "1,212.50", "12.00 (11.00–13.00)"
        assert times[1] == [*first, *spreads, "3,412", "666.7"]
        (ratio,) = ratios[1:]
        assert ratio[5:] == ["1.20 (1.15–1.31)", "1.22", "1.19 (1.10–1.25)", "1.24"]
        assert memory[1] == [*first, "6,000", "2,048.00", "512.00", "3,072.00"]
        assert "Medians of 9 interleaved repeats" in text
        assert "protocol grid, bfloat16, sdpa, static cache" in text

    def test_what_was_not_measured_is_left_out_of_a_cell(self, tmp_path):
        cell = SLICEGPT_CELL | {"peak_memory_bytes": None, "predicted": None}
        path = saved(tmp_path, "a", TIMING, protocol="slicegpt", cells=[cell])
        times, ratios, memory = tables(section(markdown_of(path), "Speed and memory"))
        assert (times[1][5], times[1][6], times[1][8]) == ("–", "–", "–")
        assert ratios[1][5:] == ["–", "–", "1.19 (1.10–1.25)", "–"]
        assert memory[1][-1] == "not run"

    def test_kinds_there_is_no_record_of_say_so(self, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "speedup.png").touch()  # of an earlier report
        markdown = run(saved(tmp_path, "a", SCORING), out=tmp_path / "out")
        for heading in (RUNS, "Zero-shot and few-shot accuracy", "Speed and memory"):
            assert "not run: no record" in section(markdown, heading)
        assert "Perplexity against the share of decoder-layer weights kept: not run." in markdown
        assert (tmp_path / "out" / "time.png").exists()
        assert not (tmp_path / "out" / "speedup.png").exists()


class TestPictures:
    def test_every_picture_named_is_written_and_every_picture_written_is_named(self, tmp_path):
        paths = saved(tmp_path, "a", COMPRESSION), saved(tmp_path, "b", TIMING)
        markdown = run(*paths, out=tmp_path / "out")
        named = set(re.findall(r"!\[[^]]+\]\(([^)]+)\)", markdown))
        assert named == {path.name for path in (tmp_path / "out").glob("*.png")}
        assert named == {"perplexity.png", "kept_share.png", "speedup.png", "time.png"}
        for name in named:
            assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")

    def test_the_curve_starts_at_the_dense_model_and_falls_in_size(self, tmp_path):
        percents = [saved(tmp_path, str(p), COMPRESSION, achieved_sparsity_percent=float(p)) for p in (10, 30)]
        assert plots.curve(read_runs(percents)) == [(100.0, 8.0), (90.0, 10.0), (70.0, 10.0)]

    def test_a_line_of_speed_ups_rises_in_the_share_removed_and_keeps_variants_apart(self, tmp_path):
        names = ("tiny-50-m1", 50.2), ("tiny-20-m1", 20.1), ("tiny-20-m8", 20.0), ("tiny-50-m8", 50.0)
        models = [DENSE_MODEL, *(SMALL_MODEL | {"model": n, "achieved_sparsity_percent": p} for n, p in names)]
        cells = [TIMING["cells"][1] | {"model": number} for number in range(1, 5)]
        path = saved(tmp_path, "a", TIMING, models=[m | {"weight_memory_bytes": 1} for m in models], cells=cells)
        lines = plots.speedup_lines(read_runs([path])[0])
        assert list(lines) == ["prefill", "decoding"]
        removed = {label: [point[0] for point in points] for label, points in lines["decoding"].items()}
        setting = "batch 8, 512 + 64 tokens"
        assert removed == {f"m1, {setting}": [20.1, 50.2], f"m8, {setting}": [20.0, 50.0]}
        predicted = lines["prefill"][f"m1, {setting}"][0][2]
        assert predicted == 1.22


def test_what_cannot_be_used_is_one_line_and_nothing_is_written(tmp_path, capsys):
    broken = copy.deepcopy(COMPRESSION)
    del broken["perplexity"]["dense"]
    path, out = saved(tmp_path, "broken", broken), tmp_path / "out"
    assert report.main([str(saved(tmp_path, "good", COMPRESSION)), str(path), "--out", str(out)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == f"error: {path} is not a usable record: the field 'perplexity.dense' is missing\n"
    assert not out.exists()


def test_an_out_that_cannot_be_a_folder_is_one_line(tmp_path, capsys):
    record = saved(tmp_path, "a", COMPRESSION)
    assert report.main([str(record), "--out", str(record)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_committed_report_is_that_of_the_committed_records(tmp_path):
    markdown = run(ROOT / "results" / "records", out=tmp_path)
    committed = {path.name: path for path in (ROOT / "results").iterdir() if path.is_file()}
    assert set(committed) == {path.name for path in tmp_path.iterdir()}
    assert committed["README.md"].read_text() == markdown
    pictures = {name: path.read_bytes() for name, path in committed.items() if path.suffix == ".png"}
    assert committed["index.html"].read_text() == html_page(markdown, pictures)
