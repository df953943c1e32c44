"""The program ``compute_rank.py``, called as from the command line."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

import compute_rank
from flatllmcore.core.importance import ImportanceScores
from flatllmcore.core.rank_allocation import RankAllocation
from flatllmcore.core.rank_files import load_ranks
from flatllmcore.utils.files import write_json
from flatllmcore.utils.layer_utils import dimensions_from_config

CONFIG = LlamaConfig(
    hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2
)
SCORES = [0.3, 0.1, 0.15, 0.25]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder below ``ranks/`` of the working folder, with the one importance file."""
    monkeypatch.chdir(tmp_path)
    save_scores(tmp_path / "ranks" / "tiny")
    return tmp_path / "ranks" / "tiny"


def save_scores(folder: Path, model_id: str = "some/tiny") -> None:
    scores = ImportanceScores(model_id, "0", dimensions_from_config(CONFIG), "pydocs", 1, 8, 42, tuple(SCORES))
    write_json(folder / "importance.json", scores)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def ranks_at(folder: Path, percent: int, *argv: str) -> RankAllocation:
    """Allocate ranks for one target, and return what was written."""
    assert compute_rank.main(["--sparsity_ratio", str(percent), "--no-plot", *argv]) == 0
    return load_ranks(folder / f"ranks_{percent}.json")


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Run, check status 2, nothing on stdout and no file changed, and return the one line on stderr."""
    monkeypatch.chdir(tmp_path)

    def run_refused(*argv: str) -> str:
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        assert compute_rank.main(argv) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("error: ")
        assert captured.err.count("\n") == 1
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        return captured.err

    return run_refused


def test_without_arguments_every_file_under_ranks_gets_five_targets_and_a_plot(folder, capsys):
    save_scores(folder.parent / "nested" / "other", model_id="some/other")
    assert compute_rank.main([]) == 0
    expected = {"importance.json", "ranks.png"} | {f"ranks_{p}.json" for p in (10, 20, 30, 40, 50)}
    assert files(folder) == files(folder.parent / "nested" / "other") == expected
    assert (folder / "ranks.png").read_bytes().startswith(b"\x89PNG")
    output = capsys.readouterr().out
    assert "some/tiny" in output
    assert "some/other" in output


def test_written_ranks_meet_the_target_and_carry_the_digest_of_their_scores(folder):
    allocation = ranks_at(folder, 20)
    assert files(folder) == {"importance.json", "ranks_20.json"}
    assert (allocation.sparsity_percent, allocation.rank_multiple) == (20, 8)
    step = 8 * 3 * 256
    assert abs(allocation.parameters_after - 0.8 * allocation.parameters_before) <= step
    assert allocation.importance_sha256 == hashlib.sha256((folder / "importance.json").read_bytes()).hexdigest()


def test_the_table_states_asked_and_achieved_ratios_and_ranges(folder, capsys):
    allocation = ranks_at(folder, 20, "--rank_multiple", "1")
    row = capsys.readouterr().out.splitlines()[-1].split()
    removed = 100 * (1 - allocation.parameters_after / allocation.parameters_before)
    kept = 100 * sum(layer.keep for layer in allocation.layers) / 4
    ranges = [
        f"{min(sizes)}-{max(sizes)}"
        for sizes in zip(*((layer.value_rank, layer.mlp_width) for layer in allocation.layers), strict=True)
    ]
    assert row == ["20", f"{removed:.3f}", f"{kept:.2f}", *ranges]


def test_prune_qk_lowers_the_value_ranks_less(folder):
    whole, pruned = (ranks_at(folder, 40, "--rank_multiple", "1", *flag) for flag in ([], ["--prune_qk"]))
    assert (whole.prune_qk, pruned.prune_qk) == (False, True)
    assert sum(layer.value_rank for layer in pruned.layers) > sum(layer.value_rank for layer in whole.layers)


def test_one_file_can_be_named(folder):
    save_scores(folder.parent / "other")
    ranks_at(folder, 10, "--bi_score", str(folder / "importance.json"))
    assert files(folder.parent / "other") == {"importance.json"}


def test_the_authors_scores_give_the_same_ranks_as_ours(folder, tmp_path):
    CONFIG.save_pretrained(tmp_path / "model")
    (tmp_path / "theirs").mkdir()
    torch.save(SCORES, tmp_path / "theirs" / "bi_score.pt")
    assert compute_rank.main(["--bi_score", "theirs", "--model", "model", "--no-plot"]) == 0
    assert compute_rank.main(["--no-plot", "--model", "model"]) == 0
    ours, theirs = (json.loads((d / "ranks_30.json").read_text()) for d in (folder, tmp_path / "theirs"))
    assert ours.pop("importance_sha256") != theirs.pop("importance_sha256")
    assert ours == theirs


def test_the_authors_scores_need_a_model(tmp_path, refused):
    torch.save(SCORES, tmp_path / "bi_score.pt")
    assert "--model" in refused("--bi_score", str(tmp_path))


def test_scores_of_another_model_are_refused(folder, tmp_path, refused):
    LlamaConfig(**(CONFIG.to_dict() | {"num_hidden_layers": 5})).save_pretrained(tmp_path / "model")
    assert "num_layers 4, not 5" in refused("--model", "model")


def test_two_importance_files_in_one_folder_are_refused(folder, refused):
    torch.save(SCORES, folder / "bi_score.pt")
    assert "holds bi_score.pt and importance.json" in refused()


def test_one_impossible_target_among_several_leaves_nothing_written(folder, refused):
    line = refused("--sparsity_ratio", "10", "90")
    assert "largest possible target is" in line
    assert str(Path("ranks/tiny/importance.json")) in line


@pytest.mark.parametrize("percent", ["0", "96"])
def test_a_ratio_out_of_range_is_refused(folder, refused, percent):
    line = refused("--sparsity_ratio", "10", percent)
    assert line == f"error: --sparsity_ratio is {percent}; accepted: an integer, 1 to 95\n"


def test_a_damaged_file_among_several_leaves_nothing_written(folder, refused):
    (folder.parent / "zzz").mkdir()
    (folder.parent / "zzz" / "importance.json").write_text("{}")
    assert "zzz" in refused()


def test_an_empty_ranks_folder_is_one_clear_line(refused):
    assert "no importance.json or bi_score.pt at ranks" in refused()


def test_a_full_disk_is_one_clear_line_and_keeps_earlier_ranks(folder, refused, monkeypatch):
    (folder / "ranks_20.json").write_text("earlier")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    assert "No space left on device" in refused("--sparsity_ratio", "20")
