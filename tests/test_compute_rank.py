"""The program ``compute_rank.py``, called as from the command line."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from transformers import LlamaConfig

import compute_rank
from checkpoints import edit
from conftest import one_line
from flatllmcore.core.importance import ImportanceScores
from flatllmcore.core.rank_allocation import RankAllocation
from flatllmcore.core.rank_files import read_ranks
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


def save_scores(folder: Path, model_id: str = "some/tiny", scores: Sequence[float] = SCORES) -> None:
    sizes = dimensions_from_config(CONFIG)
    write_json(folder / "importance.json", ImportanceScores(model_id, "0", sizes, "pydocs", 1, 8, 42, tuple(scores)))


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def ranks_at(folder: Path, percent: int, *argv: str) -> RankAllocation:
    """Allocate ranks for one target, and return what was written."""
    assert compute_rank.main(["--sparsity_ratio", str(percent), "--no-plot", *argv]) == 0
    return read_ranks(folder / f"ranks_{percent}.json")


def test_without_arguments_every_file_under_ranks_gets_five_targets_and_a_plot(folder, capsys):
    save_scores(folder.parent / "nested" / "other", model_id="some/other")
    assert compute_rank.main([]) == 0
    expected = {"importance.json", "ranks.png"} | {f"ranks_{p}.json" for p in (10, 20, 30, 40, 50)}
    assert files(folder) == files(folder.parent / "nested" / "other") == expected
    assert (folder / "ranks.png").read_bytes().startswith(b"\x89PNG")
    output = capsys.readouterr().out
    assert "some/tiny" in output
    assert "some/other" in output


@pytest.mark.parametrize(
    ("theirs", "remedy"),
    [(Path.mkdir, "is a folder; move it"), (lambda place: place.write_bytes(b"my own picture"), "move or delete it")],
)
def test_a_picture_of_somebody_else_is_not_replaced_and_nothing_is_written_before(folder, capsys, theirs, remedy):
    theirs(folder / "ranks.png")
    assert compute_rank.main(["--sparsity_ratio", "20"]) == 2
    assert remedy in capsys.readouterr().err
    assert files(folder) == {"importance.json", "ranks.png"}


def test_written_ranks_meet_the_target_and_carry_the_digest_of_their_scores(folder, capsys):
    allocation = ranks_at(folder, 20)
    row = capsys.readouterr().out.splitlines()[-1].split()
    removed = 100 * (1 - allocation.parameters_after / allocation.parameters_before)
    ranges = [f"{min(sizes)}-{max(sizes)}" for sizes in map(allocation.per_layer, ("value_rank", "mlp_width"))]
    assert row == ["20", f"{removed:.3f}", f"{25 * sum(allocation.per_layer('keep')):.2f}", *ranges]
    assert files(folder) == {"importance.json", "ranks_20.json"}
    assert (allocation.sparsity_ratio, allocation.rank_multiple) == (20, 8)
    step = 8 * 3 * 256
    assert abs(allocation.parameters_after - 0.8 * allocation.parameters_before) <= step
    assert allocation.importance_sha256 == hashlib.sha256((folder / "importance.json").read_bytes()).hexdigest()


def test_prune_qk_lowers_the_value_ranks_less(folder):
    whole, pruned = (ranks_at(folder, 40, "--rank_multiple", "1", *flag) for flag in ([], ["--prune_qk"]))
    assert (whole.prune_qk, pruned.prune_qk) == (False, True)
    assert sum(pruned.per_layer("value_rank")) > sum(whole.per_layer("value_rank"))


def test_the_authors_scores_give_the_same_ranks_as_ours(folder, tmp_path):
    CONFIG.save_pretrained(tmp_path / "model")
    (tmp_path / "theirs").mkdir()
    torch.save(SCORES, tmp_path / "theirs" / "bi_score.pt")
    assert compute_rank.main(["--bi_score", "theirs", "--model", "model", "--no-plot"]) == 0
    assert compute_rank.main(["--no-plot", "--model", "model"]) == 0
    ours, theirs = (json.loads((d / "ranks_30.json").read_text()) for d in (folder, tmp_path / "theirs"))
    assert ours.pop("importance_sha256") != theirs.pop("importance_sha256")
    assert (ours.pop("fingerprint"), theirs.pop("fingerprint")) == ("0", None)
    assert ours == theirs


@pytest.mark.parametrize(
    ("prepare", "argv", "message"),
    [
        (lambda ranks: torch.save(SCORES, ranks / "bi_score.pt"), "--bi_score ranks/bi_score.pt", "name it by --model"),
        (lambda _: LlamaConfig(num_hidden_layers=5).save_pretrained("model"), "--model model", "num_layers 4, not 5"),
        (lambda ranks: torch.save(SCORES, ranks / "tiny" / "bi_score.pt"), "", "holds bi_score.pt and importance.json"),
        (lambda ranks: shutil.rmtree(ranks / "tiny"), "", "no importance.json or bi_score.pt at ranks"),
        (None, "--sparsity_ratio 10 90", "ranks/tiny/importance.json: removing 90 % of this model is impossible"),
        (None, "--sparsity_ratio 10 96", "--sparsity_ratio is 96; accepted: an integer, 1 to 95"),
        (lambda ranks: save_scores(ranks / "zz", scores=[1.7e308] * 4), "", "ranks/zz/importance.json cannot be drawn"),
        (lambda ranks: write_json(ranks / "tiny/ranks_30.json", {"mine": 1}), "", "tiny/ranks_30.json: "),
        ("full disk", "--sparsity_ratio 20", "No space left on device: ranks/tiny/ranks_20.json"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_leaves_every_file_as_it_was(
    folder, capsys, monkeypatch, prepare, argv, message
):
    assert compute_rank.main(["--sparsity_ratio", "20"]) == 0
    if callable(prepare):
        prepare(folder.parent)
    elif prepare:
        monkeypatch.setattr("os.fsync", Mock(side_effect=OSError(28, "No space left on device")))
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    assert message in one_line(capsys, compute_rank.main, argv.split())
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


def test_curves_of_an_earlier_release_are_none(folder, capsys):
    """They were of damage to the stream behind a layer, under another name."""
    edit(folder / "importance.json", curves=[{"mlp": [[0, 0], [1000, 1]]}] * len(SCORES))
    reason = "it has no curves of damage; score anew by main.py --importance_method damage"
    line = one_line(capsys, compute_rank.main, ["--sparsity_ratio", "20", "--importance_method", "damage"])
    assert line == f"error: ranks/tiny/importance.json: {reason}\n"
    assert files(folder) == {"importance.json"}
