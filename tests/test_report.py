"""``python -m flatllmbench.report``: what its tables say is what the records say."""

import copy
import json
from pathlib import Path

import pytest

from flatllmbench import report
from flatllmbench.tables import markdown_table

RECORD = {
    "command": "python main.py --sparsity_ratio 20",
    "request": {"prune_method": "flatllm", "dtype": "auto"},
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
    "base_model": "models/tiny",
    "sparsity_ratio": 20.0,
    "achieved_sparsity_percent": 19.75,
    "rank_multiple": 8,
    "parameters_before": {"decoder_linear": 4000, "total": 6000},
    "parameters_after": {"decoder_linear": 3210, "total": 5210},
    "dataset": "pydocs",
    "nsamples": 128,
    "seqlen": 256,
    "seed": 42,
    "perplexity": {"dataset": "pydocs", "seqlen": 256, "windows": 332, "dense": 8.0, "compressed": 10.0},
    "elapsed_s": 100.0,
    "stages_s": {"load": 5.0, "forward": 30.0, "perplexity": 20.0, "save": 3.0, "rest": 42.0},
    "peak_memory_gib": {"host": 1.25},
    "hardware": {"device": "Some GPU", "machine": "x86_64", "system": "Linux"},
}
CELLS = ["20", "19.750", "3,210", "5,210", "10.000", "1.250", "72.0", "100.0", "host 1.25"]


def saved(folder: Path, name: str, **changes) -> Path:
    path = folder / f"{name}.json"
    path.write_text(json.dumps(copy.deepcopy(RECORD) | changes))
    return path


def rows(text: str) -> list[list[str]]:
    """Return the cells of every table row in a Markdown text, without headers and rules."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if row[0] != report.HEADER[0] and not row[0].startswith("-")]


def run(capsys, *paths: Path, out: Path) -> str:
    assert report.main([*map(str, paths), "--out", str(out)]) == 0
    return capsys.readouterr().out


def refused(capsys, *paths: Path, out: Path) -> str:
    """Run, check status 2, nothing on stdout and nothing written, and return the one line on stderr."""
    assert report.main([*map(str, paths), "--out", str(out)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert not out.exists()
    return captured.err


def test_a_row_states_the_record_beside_the_dense_model(tmp_path, capsys):
    dense, compressed = rows(run(capsys, saved(tmp_path, "a"), out=tmp_path / "out"))
    assert dense == ["dense", "0", "4,000", "6,000", "8.000", "1", "", "", ""]
    assert compressed == CELLS


def test_the_readme_holds_the_same_table_with_everything_its_figures_depend_on(tmp_path, capsys):
    printed = run(capsys, saved(tmp_path, "a"), out=tmp_path / "out")
    readme = (tmp_path / "out" / "README.md").read_text()
    assert printed in readme
    for fact in ("models/tiny", "pydocs, 128 × 256 tokens, seed 42", "pydocs, 332 × 256 tokens", "multiples of 8"):
        assert fact in readme
    for fact in ("Some GPU, Linux x86_64", "python 3.11.7, torch 2.13.0", "\npython main.py --sparsity_ratio 20\n"):
        assert fact in readme
    assert "](perplexity.png)" in readme
    assert (tmp_path / "out" / "perplexity.png").read_bytes().startswith(b"\x89PNG")


def test_targets_of_one_model_share_a_table_in_rising_order(tmp_path, capsys):
    paths = [saved(tmp_path, str(percent), sparsity_ratio=percent) for percent in (50, 10, 30)]
    assert [row[0] for row in rows(run(capsys, *paths, out=tmp_path))] == ["dense", "10", "30", "50"]


@pytest.mark.parametrize(
    "change",
    [
        {"base_model": "models/other"},
        {"nsamples": 64},
        {"seed": 1},
        {"rank_multiple": 1},
        {"hardware": RECORD["hardware"] | {"device": "Other GPU"}},
        {"versions": {"python": "3.12.0"}},
        {"perplexity": RECORD["perplexity"] | {"windows": 10}},
        {"request": RECORD["request"] | {"dtype": "float32"}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_runs_under_other_conditions_get_a_table_of_their_own(tmp_path, capsys, change):
    printed = run(capsys, saved(tmp_path, "a"), saved(tmp_path, "b", **change), out=tmp_path / "out")
    assert [row[0] for row in rows(printed)] == ["dense", "20", "dense", "20"]
    assert rows((tmp_path / "out" / "README.md").read_text()) == rows(printed)


def test_memory_of_the_device_stands_beside_the_host_s(tmp_path, capsys):
    path = saved(tmp_path, "a", peak_memory_gib={"host": 1.25, "device": 30.5})
    assert rows(run(capsys, path, out=tmp_path))[1][-1] == "host 1.25, device 30.50"


def test_records_of_importance_scores_are_passed_over(tmp_path, capsys):
    scores = tmp_path / "bi.json"
    scores.write_text(json.dumps({"request": {"prune_method": "bi"}, "scores": [0.1]}))
    printed = run(capsys, scores, saved(tmp_path, "a"), out=tmp_path / "out")
    assert [row[0] for row in rows(printed)] == ["dense", "20"]
    assert "no record of a compression" in refused(capsys, scores, out=tmp_path / "none")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        (json.dumps({"request": {"prune_method": "flatllm"}}), "parameters_before"),
    ],
)
def test_what_is_not_a_record_is_one_clear_line(tmp_path, capsys, content, reason):
    path = tmp_path / "a.json"
    path.write_text(content)
    line = refused(capsys, saved(tmp_path, "good"), path, out=tmp_path / "out")
    assert str(path) in line
    assert reason in line


def test_a_missing_record_is_one_clear_line(tmp_path, capsys):
    assert "No such file" in refused(capsys, tmp_path / "none.json", out=tmp_path / "out")


def test_the_curve_starts_at_the_dense_model_and_falls_in_size(tmp_path):
    runs = [report.read_compression(saved(tmp_path, str(p), achieved_sparsity_percent=float(p))) for p in (10, 30)]
    assert report.curve(runs) == [(100.0, 8.0), (90.0, 10.0), (70.0, 10.0)]


def test_a_table_pads_its_columns_and_escapes_bars():
    assert markdown_table(("a", "long"), [("b|c", "1")]) == "| a    | long |\n| ---- | ---: |\n| b\\|c |    1 |\n"


def test_a_table_refuses_rows_of_another_width():
    with pytest.raises(ValueError, match="shorter"):
        markdown_table(("a", "b"), [("1",)])
