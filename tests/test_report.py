"""``python -m flatllmbench.report``: what its tables say is what the records say."""

import io
import re
from pathlib import Path

import pytest

from conftest import ROOT, one_line
from flatllmbench import plots, report
from flatllmbench.report import read_records, table_1
from flatllmbench.tables import markdown_table, measured_tables
from flatllmcore.errors import InputError
from markdown_tables import tables
from sample_records import (
    ACCURACIES,
    COMPRESSION,
    DENSE_MODEL,
    EVALUATION,
    LLAMA_2_7B,
    SCORING,
    SMALL_MODEL,
    TIMING,
    saved,
)

SAVED_LLAMA = SMALL_MODEL | {"base_model": "Llama-2-7b-hf"}
OTHERS = {"method": "flatllm+"}, {"model": "tiny-30"}, {"base_model": "other"}, {"achieved_sparsity_percent": 19.8}
OTHERS += {"gradient_nsamples": 16}, {"achieved_sparsity_percent": None}


def test_a_table_pads_its_columns_and_keeps_its_shape_whatever_is_in_a_cell():
    expected = "| a    | long |\n| ---- | ---: |\n| b\\|c |  1 2 |\n"
    assert markdown_table(("a", "long"), [("b|c", "1\n2")]) == expected
    with pytest.raises(ValueError, match="shorter"):
        markdown_table(("a", "b"), [("1",)])


class TestRecords:
    def test_a_folder_stands_for_all_below_it_and_each_is_read_once(self, tmp_path):
        path = saved(tmp_path, "a", COMPRESSION)
        for name, record in (("b", SCORING), ("c", EVALUATION), ("d", TIMING)):
            saved(tmp_path / "below", name, record)
        (tmp_path / "run.log").write_text("not a record")
        assert [run["kind"] for run in read_records([path, tmp_path])] == ["flatllm", "bi", "zero_shot", "speed"]

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"achieved_sparsity_percent": "1"}, "is not usable: Unknown format code 'f'"),
            ({"perplexity": [{"dense": 1}]}, "is not usable: the field 'dataset' is missing"),
            ({"elapsed_s": float("nan")}, "this is not JSON: "),
        ],
    )
    def test_a_record_that_cannot_be_used_is_named_with_what_is_wrong(self, tmp_path, change, reason):
        path = saved(tmp_path, "a", COMPRESSION, **change)
        with pytest.raises(InputError, match=rf"{path}:? {reason}"):
            read_records([saved(tmp_path, "b", COMPRESSION), path])

    def test_a_folder_without_records_is_refused(self, tmp_path):
        with pytest.raises(InputError, match=rf"no records in {tmp_path}"):
            read_records([tmp_path])


class TestCompressions:
    def test_rows_state_the_record_beside_the_dense_model_by_rising_target_and_what_they_depend_on(self, tmp_path):
        more = saved(tmp_path, "a", COMPRESSION, sparsity_ratio=50, peak_memory_gib={"host": 1, "device": 30.5})
        text = measured_tables(read_records([more, saved(tmp_path, "b", COMPRESSION)]), "compression")
        ((_, dense, compressed, last),) = tables(text)
        assert dense == ["0", "0.000", "4,000", "6,000", "8.000", "–", "–", "–"]
        assert compressed == ["20", "19.750", "3,210", "5,210", "10.000", "100.0", "1.25", "–"]
        assert (last[0], last[-2:]) == ("50", ["1.00", "30.50"])
        for fact in (
            "models/tiny",
            "flatllm on pydocs, 128 × 256 tokens, seed 42, multiples of 8",
            "pydocs, 332 × 256 tokens",
        ):
            assert fact in text
        for fact in ("Some GPU, x86_64, Linux", "python 3.11.7, torch 2.13.0", "\npython main.py --model tiny\n"):
            assert text.count(fact) == 1
        assert "random weights" not in text

    @pytest.mark.parametrize(
        "change",
        [
            *({"base_model": "models/other"}, {"nsamples": 64}, {"seed": 1}, {"rank_multiple": 1}, {"prune_qk": True}),
            {"kind": "flatllm+"},
            *({"importance_method": "gradient"}, {"gradient_nsamples": 4}),
            *({"request": {"dtype": "auto", "width_multiple": 32}}, {"rounded_to": "4 bits"}),
            *({"hardware": {"device": "Other GPU"}}, {"versions": {"python": "3"}}, {"request": {"dtype": "float32"}}),
            {"perplexity": [COMPRESSION["perplexity"][0] | {"windows": 10}]},
        ],
    )
    def test_runs_under_other_conditions_get_a_table_of_their_own(self, tmp_path, change):
        paths = saved(tmp_path, "a", COMPRESSION), saved(tmp_path, "b", COMPRESSION, **change)
        found = tables(measured_tables(read_records(paths), "compression"))
        assert [[row[0] for row in table[1:]] for table in found] == 2 * [["0", "20"]]

    def test_each_text_has_a_column_and_a_line_in_the_picture(self, tmp_path):
        other = {"dataset": "/data/c4", "seqlen": 256, "windows": 9, "dense": 20.0, "compressed": 24.0}
        records = read_records([saved(tmp_path, "a", COMPRESSION, perplexity=[*COMPRESSION["perplexity"], other])])
        text = measured_tables(records, "compression")
        ((header, dense, compressed),) = tables(text)
        place = header.index("perplexity, pydocs")
        assert header[place + 1] == "perplexity, c4"
        assert [row[place : place + 2] for row in (dense, compressed)] == [["8.000", "20.000"], ["10.000", "24.000"]]
        assert "perplexity on /data/c4, 9 × 256 tokens" in text
        assert plots.curve(records, 1) == [(100.0, 20.0), (80.25, 24.0)]


class TestTable1:
    def entry(self, *paths: Path, model: str = "Llama-2-7b-hf") -> list[list[str]]:
        """Return the rows of a model, dense and by FLAT-LLM."""
        (rows,) = tables(table_1(read_records(paths)))
        return [row[1:] for row in rows if row[0] == model and row[1] in ("dense", "FLAT-LLM")]

    def test_every_run_at_the_published_settings_stands_beside_with_its_difference(self, tmp_path):
        local = LLAMA_2_7B | {"base_model": "/data/Llama-2-7b-hf"}
        paths = saved(tmp_path, "a", LLAMA_2_7B), saved(tmp_path, "b", local, seed=1)
        settings = "flatllm on wikitext2, 256 × 4096 tokens, seed 42, multiples of 1"
        dense, _, ours, other = self.entry(*paths)
        assert dense == ["dense", "5.11", "5.11", "+0.00", "62.14", "not run", "not run", settings]
        assert ours == ["FLAT-LLM", "6.70", "6.74", "+0.04", "55.16", "not run", "not run", settings]  # a miss
        assert other[-1] == settings.replace("42", "1")
        assert self.entry(*paths, model="Llama-2-13b-hf")[0][2] == "not run"

    @pytest.mark.parametrize(
        "change",
        [
            *({"base_model": "meta-llama/Llama-2-7b-chat-hf"}, {"sparsity_ratio": 30}, {"seqlen": 2048}),
            *({"dataset": "c4"}, {"perplexity": [LLAMA_2_7B["perplexity"][0] | {"seqlen": 2048}]}),
            {"perplexity": [LLAMA_2_7B["perplexity"][0] | {"dataset": "c4"}]},
        ],
    )
    def test_a_run_at_other_settings_does_not_stand_here(self, tmp_path, change):
        path = saved(tmp_path, "a", LLAMA_2_7B, **change)
        assert {cell for row in self.entry(path) for cell in (row[2], row[3], row[7])} == {"not run"}

    def test_the_published_text_counts_wherever_it_stands_among_others(self, tmp_path):
        texts = [COMPRESSION["perplexity"][0], *LLAMA_2_7B["perplexity"]]
        _, ours = self.entry(saved(tmp_path, "a", LLAMA_2_7B, perplexity=texts))
        assert ours[1:4] == ["6.70", "6.74", "+0.04"]

    def test_accuracies_are_those_of_the_run_itself_and_of_the_dense_model_evaluated(self, tmp_path):
        own = saved(tmp_path, "a", LLAMA_2_7B, zero_shot=ACCURACIES | {"mean_accuracy": 55.0})
        dense, ours = self.entry(own, saved(tmp_path, "b", EVALUATION, model=DENSE_MODEL | {"model": "Llama-2-7b-hf"}))
        assert (dense[5:7], ours[5:7]) == (["62.14", "+0.00"], ["55.00", "-0.16"])  # a miss
        assert self.entry(tmp_path / "b.json")[0][1:7] == ["5.11", "not run", "not run", "62.14", "62.14", "+0.00"]

    @pytest.mark.parametrize(("change", "accuracy"), [({}, "54.00"), *((other, "not run") for other in OTHERS)])
    def test_or_of_an_evaluation_of_the_folder_it_saved_and_of_no_other(self, tmp_path, change, accuracy):
        saved(tmp_path, "a", LLAMA_2_7B)
        answers = ACCURACIES | {"mean_accuracy": 54.0}
        saved(tmp_path, "b", EVALUATION, model=SAVED_LLAMA | change, zero_shot=answers)
        saved(tmp_path, "c", EVALUATION, model=SAVED_LLAMA, zero_shot=ACCURACIES | {"mean_accuracy": None})
        assert self.entry(tmp_path)[1][5] == accuracy


class TestOtherTables:
    def test_accuracies_are_percentages_with_their_standard_error(self, tmp_path):
        paths = saved(tmp_path, "a", EVALUATION, model=SMALL_MODEL), saved(tmp_path, "b", EVALUATION)
        text = measured_tables(read_records(paths), "zero_shot")
        ((header, dense, compressed),) = tables(text)
        assert header == ["model", "method", "removed, %", "piqa", "mmlu", "mean accuracy, %"]
        assert dense == ["tiny", "–", "0.000", "78.12 ± 0.96", "45.67", "61.90 ± 0.48"]
        assert compressed[:3] == ["tiny-20", "flatllm", "19.750"]
        for fact in (
            "piqa: acc_norm, 0-shot, 1,838 samples",
            "mmlu: acc, mixed-shot",
            "lm_eval 0.4.13, `--dtype auto`",
        ):
            assert fact in text

    def test_speed_has_time_ratios_and_memory_and_nothing_where_nothing_was_measured(self, tmp_path):
        text = measured_tables(read_records([saved(tmp_path, "a", TIMING)]), "speed")
        ((_, dense, compressed),) = tables(text)
        first, memory = ["0.000", "8", "512", "64", "1,200.50"], ["2,147,483,648", "536,870,912", "3,221,225,472"]
        assert dense == ["tiny", *first, "–", "–", "12.00", "–", "–", *memory]
        ratios = ["–", "–", "–", "12.00", "1.19 (1.10–1.25)", "1.24", "1,073,741,824", "536,870,912", "–"]
        assert compressed == ["tiny-20", "19.750", "8", "512", "64", *ratios]
        assert "grid, bfloat16, sdpa, 9 repeats" in text


def test_the_curve_starts_at_the_dense_model_and_falls_in_size(tmp_path):
    percents = [saved(tmp_path, str(p), COMPRESSION, achieved_sparsity_percent=float(p)) for p in (30, 10)]
    assert plots.curve(read_records(percents), 0) == [(100.0, 8.0), (90.0, 10.0), (70.0, 10.0)]


def test_accuracies_of_a_method_start_at_the_dense_model_and_are_those_of_its_own_models(tmp_path):
    """Oracle: the means by hand, and the standard error of a mean of independent figures."""
    answers = ACCURACIES | {"tasks": ACCURACIES["tasks"] | {"mmlu": ACCURACIES["tasks"]["mmlu"] | {"stderr": 0.0128}}}
    models = DENSE_MODEL, SMALL_MODEL, *(SMALL_MODEL | other for other in OTHERS if "model" not in other)
    paths = [saved(tmp_path, str(i), EVALUATION, model=of, zero_shot=answers) for i, of in enumerate(models)]
    fewer = {"tasks": answers["tasks"] | {"piqa": answers["tasks"]["piqa"] | {"samples": 100}}}
    paths.append(saved(tmp_path, "fewer", EVALUATION, model=SMALL_MODEL, zero_shot=answers | fewer))
    found = plots.accuracy_curve(read_records([saved(tmp_path, "a", COMPRESSION)]), read_records(paths))
    assert [kept for kept, *_ in found] == [100, 80.25]
    assert found[1][1:] == pytest.approx((61.895, 0.8))  # 100 · √(0.0096² + 0.0128²) / 2


@pytest.mark.parametrize(("record", "pictures"), [(COMPRESSION, {"perplexity.png"}), (SCORING, set())])
def test_the_pictures_named_are_those_written(tmp_path, record, pictures):
    assert report.main([str(saved(tmp_path, "a", record)), "--out", str(tmp_path)]) == 0
    named = set(re.findall(r"!\[[^]]+\]\(([^)]+)\)", (tmp_path / "README.md").read_text()))
    assert named == {path.name for path in tmp_path.glob("*.png")} == pictures
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in named)


def test_a_page_that_cannot_be_made_whole_leaves_the_one_before(tmp_path, capsys):
    """Perplexities that no picture can show; a dollar in a name is one, not mathematics."""
    out = tmp_path / "out"
    argv = [str(saved(tmp_path, "a", COMPRESSION, dataset="$x^{")), "--out", str(out)]
    assert report.main(argv) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert before.keys() == {"README.md", "perplexity.png"}
    saved(tmp_path, "a", COMPRESSION, perplexity=[COMPRESSION["perplexity"][0] | {"dense": 0}])
    assert one_line(capsys, report.main, argv).startswith("error: the perplexities cannot be drawn (")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_terminal_that_lacks_a_character_shows_its_number(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdout", shown := io.TextIOWrapper(io.BytesIO(), "ascii"))
    assert report.main([str(saved(tmp_path, "a", COMPRESSION, dataset="–")), "--out", str(tmp_path / "out")]) == 0
    shown.flush()
    assert b"flatllm on \\u2013, " in shown.buffer.getvalue()


def test_what_cannot_be_used_is_one_line_and_nothing_is_written(tmp_path, capsys):
    path, out, good = tmp_path / "broken.json", tmp_path / "out", str(saved(tmp_path, "good", COMPRESSION))
    path.write_text("{}")
    line = one_line(capsys, report.main, [good, str(path), "--out", str(out)])
    assert line == f"error: {path} is not usable: the field 'kind' is missing\n"
    assert not out.exists()
    one_line(capsys, report.main, [good, "--out", str(path)])
    out.mkdir()
    (out / "README.md").write_text("# My own project\n")
    assert f"error: {out / 'README.md'} is no report" in one_line(capsys, report.main, [good, "--out", str(out)])
    (out / "README.md").unlink()
    (out / "perplexity.png").write_text("mine")
    assert "perplexity.png is of no report" in one_line(capsys, report.main, [good, "--out", str(out)])
    (out / "perplexity.png").unlink()
    for name in ("README.md", "perplexity.png"):
        (out / name).mkdir(parents=True)
        refusal = f"error: cannot write {out / name}: it is a folder"
        assert refusal in one_line(capsys, report.main, [good, "--out", str(out)])
        assert [path.name for path in out.iterdir()] == [name]
        (out / name).rmdir()


def test_the_committed_report_is_that_of_the_committed_records(tmp_path, capsys):
    assert report.main([str(ROOT / "results" / "records"), "--out", str(tmp_path)]) == 0
    committed = {path.name: path for path in (ROOT / "results").iterdir() if path.is_file()}
    assert set(committed) == {path.name for path in tmp_path.iterdir()}
    markdown = (tmp_path / "README.md").read_text()
    assert committed["README.md"].read_text() == markdown
    assert tables(capsys.readouterr().out) == [table for table in tables(markdown) if table[0][0] == "asked, %"]
