"""Progress bars: drawn for a terminal, with the time left, and nowhere else."""

import io
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import main
from checkpoints import save_inputs
from flatllmbench import speed
from flatllmcore.utils.progress import progress

TIME_LEFT = re.compile(r"\[\d\d:\d\d<(\?|\d\d:\d\d)")  # elapsed < left


class Terminal(io.StringIO):
    """A terminal that keeps what is drawn on it, and so never waits for somebody to read."""

    def isatty(self) -> bool:
        return True


@contextmanager
def terminal() -> Iterator[Terminal]:
    """Make stderr a terminal inside the block. No fixture: pytest sets stderr anew before it calls a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", Terminal())
        patch.setenv("COLUMNS", "100")
        patch.setenv("LINES", "24")
        yield sys.stderr


def compress(inputs: Path, folder: Path) -> None:
    places = {"--bi_score": "scores", "--save": "logs", "--save_model": "model"}
    flags = [part for flag, name in places.items() for part in (flag, str(folder / name))]
    flags += ["--model", str(inputs / "dense"), "--dataset", str(inputs / "text")]
    assert main.main([*flags, "--nsamples", "2", "--seqlen", "32", "--device", "cpu"]) == 0


def measure_speed(inputs: Path, folder: Path) -> None:
    sizes = ["--batch_size", "1", "--prompt_length", "8", "--new_tokens", "2", "--repeats", "2"]
    assert speed.main([str(inputs / "dense"), *sizes, "--device", "cpu", "--save", str(folder)]) == 0


@pytest.mark.parametrize(
    ("program", "stages"),
    [
        (compress, {"sampling text", "tokenising text", "importance", "perplexity", "compress"}),
        (measure_speed, {"loading", "speed"}),
    ],
)
def test_every_long_stage_has_a_bar_with_the_time_left_on_a_terminal_and_nowhere_else(program, stages, capfd, tmp_path):
    inputs = save_inputs(tmp_path / "inputs", torch.float32)
    with terminal() as drawn:
        program(inputs, tmp_path / "watched")
    frames = [frame for frame in re.split(r"[\r\n]", drawn.getvalue()) if TIME_LEFT.search(frame)]
    assert stages <= {frame.partition(":")[0] for frame in frames}
    capfd.readouterr()
    program(inputs, tmp_path / "unwatched")
    assert capfd.readouterr().err == ""


def test_a_bar_counts_to_its_total_and_is_wiped_and_is_drawn_by_rank_0_alone(monkeypatch):
    frames = []
    for rank in (0, 1):
        monkeypatch.setattr("flatllmcore.utils.processes._rank", lambda rank=rank: rank)
        with terminal() as drawn:
            assert list(progress(range(3), "counting", "thing")) == [0, 1, 2]
        frames.append(drawn.getvalue().split("\r")[1:-1])
    (first, *_, last), by_rank_1 = frames
    assert first.startswith("counting:   0%")
    assert "| 0/3 [" in first
    assert last.isspace()
    assert by_rank_1 == []
