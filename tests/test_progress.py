"""Progress bars: drawn for a terminal, with the time left, and nowhere else."""

import os
import pty
import re
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import pytest

import main
from flatllmbench import speed
from flatllmcore.utils.progress import progress

ROOT = Path(__file__).resolve().parents[1]
EMBEDDED = ROOT / "models" / "pydocs-llama"
SENTENCES = ["If the file does not exist, an error is raised. " * 20] * 8
TIME_LEFT = re.compile(r"\[\d\d:\d\d<(\?|\d\d:\d\d)")  # elapsed < left


@contextmanager
def terminal() -> Iterator[Callable[[], str]]:
    """Make stderr a terminal inside the block; the function given returns, after it, what was drawn.

    A thread reads along, since a terminal that is full makes who writes to it wait. No fixture: pytest sets stderr anew
    between setting fixtures up and calling a test.
    """
    reader, writer = pty.openpty()
    termios.tcsetwinsize(writer, (24, 100))
    drawn = bytearray()

    def read_along() -> None:
        while not drawn.endswith(b"\0"):
            drawn.extend(os.read(reader, 2**16))

    thread = Thread(target=read_along)
    thread.start()
    with os.fdopen(writer, "w") as stderr, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", stderr)
        try:
            yield lambda: drawn.decode().removesuffix("\0")
        finally:
            stderr.write("\0")
            stderr.flush()
            thread.join()
    os.close(reader)


def compress(folder: Path) -> None:
    (folder / "text").mkdir()
    for split in ("train", "test"):
        lines = [f'{{"text": "{sentence}"}}\n' for sentence in SENTENCES]
        (folder / "text" / f"{split}.jsonl").write_text("".join(lines))
    places = {"--bi_score": "scores", "--save": "logs", "--save_model": "model", "--dataset": "text"}
    flags = [part for flag, name in places.items() for part in (flag, str(folder / name))]
    assert main.main(["--model", str(EMBEDDED), *flags, "--nsamples", "2", "--seqlen", "32", "--device", "cpu"]) == 0


def measure_speed(folder: Path) -> None:
    sizes = ["--batch_size", "1", "--prompt_length", "8", "--new_tokens", "2", "--repeats", "2"]
    assert speed.main([str(EMBEDDED), *sizes, "--device", "cpu", "--save", str(folder)]) == 0


@pytest.mark.parametrize(
    ("program", "stages"),
    [
        (compress, {"reading train.jsonl", "sampling text", "tokenising text", "importance", "perplexity", "compress"}),
        (measure_speed, {"loading", "speed"}),
    ],
)
def test_every_long_stage_has_a_bar_with_the_time_left_on_a_terminal_and_nowhere_else(program, stages, capfd, tmp_path):
    (tmp_path / "watched").mkdir()
    with terminal() as drawn:
        program(tmp_path / "watched")
    frames = [frame for frame in re.split(r"[\r\n]", drawn()) if TIME_LEFT.search(frame)]
    assert stages <= {frame.partition(":")[0] for frame in frames}
    capfd.readouterr()
    program(tmp_path)
    assert capfd.readouterr().err == ""


def test_a_bar_counts_to_its_total_and_is_wiped_and_the_later_processes_of_a_group_draw_none(monkeypatch):
    monkeypatch.setattr("flatllmcore.utils.processes._store", object())
    for rank in (0, 1):
        monkeypatch.setattr("torch.distributed.get_rank", lambda rank=rank: rank)
        with terminal() as drawn:
            assert list(progress(range(3), "counting", "thing")) == [0, 1, 2]
        if rank == 0:
            first, *_, last = drawn().split("\r")[1:-1]
            assert first.startswith("counting:   0%")
            assert "| 0/3 [" in first
            assert last.isspace()
    assert drawn() == ""
