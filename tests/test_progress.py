"""Progress bars: drawn for a terminal, with the time left, and nowhere else."""

import gzip
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet
from transformers import AutoTokenizer

import main
from flatllmbench import speed
from flatllmcore.utils.data_utils import consecutive_windows, sample_documents
from flatllmcore.utils.progress import progress
from flatllmcore.utils.text_sources import TextDataset, load_text

ROOT = Path(__file__).resolve().parents[1]
EMBEDDED = ROOT / "models" / "pydocs-llama"
SENTENCES = ["If the file does not exist, an error is raised. " * 20] * 8
TIME_LEFT = re.compile(r"\[\d\d:\d\d<(\?|\d\d:\d\d)")  # elapsed < left
# The bars of main.py while it scores, compresses and measures.
STAGES = (
    *("sampling text", "tokenising text"),
    *("importance", "perplexity", "compress"),
)


class Terminal(io.StringIO):
    """A terminal that keeps what is drawn on it, and so never waits for somebody to read."""

    def isatty(self) -> bool:
        return True


@contextmanager
def terminal() -> Iterator[Callable[[], str]]:
    """Make stderr a terminal inside the block; the function given returns what was drawn on it so far.

    No fixture: pytest sets stderr anew between setting fixtures up and calling a test.
    """
    stderr = Terminal()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", stderr)
        patch.setenv("COLUMNS", "100")
        patch.setenv("LINES", "24")
        yield stderr.getvalue


@pytest.fixture
def text(tmp_path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("".join(f'{{"text": "{sentence}"}}\n' for sentence in SENTENCES))
    return folder


def compress(folder: Path, text: Path) -> None:
    places = ("--bi_score", "scores", "--save", "logs", "--save_model", "model")
    flags = [part if part.startswith("--") else str(folder / part) for part in places]
    sizes = ["--nsamples", "2", "--seqlen", "32", "--device", "cpu"]
    assert main.main(["--model", str(EMBEDDED), "--dataset", str(text), *flags, *sizes]) == 0


def bars(drawn: str) -> dict[str, str]:
    """Return what each bar looked like last, by what it says is done."""
    frames = [frame for frame in re.split(r"[\r\n]", drawn) if TIME_LEFT.search(frame)]
    return {frame.partition(":")[0]: frame for frame in frames}


def test_every_long_stage_of_main_has_a_bar_with_the_time_left(text, tmp_path):
    with terminal() as drawn:
        compress(tmp_path, text)
        found = bars(drawn())
    assert [stage for stage in STAGES if not any(stage in bar for bar in found)] == []


def test_main_draws_nothing_where_stderr_is_no_terminal(capfd, text, tmp_path):
    compress(tmp_path, text)
    assert capfd.readouterr().err == ""


def measure_speed(folder: Path) -> None:
    sizes = ["--batch_size", "1", "--prompt_length", "8", "--new_tokens", "2", "--repeats", "2"]
    assert speed.main([str(EMBEDDED), *sizes, "--device", "cpu", "--save", str(folder)]) == 0


def test_the_speed_program_has_a_bar_with_the_time_left(tmp_path):
    with terminal() as drawn:
        measure_speed(tmp_path)
        assert {"loading", "speed"} <= bars(drawn()).keys()


def test_the_speed_program_draws_nothing_where_stderr_is_no_terminal(capfd, tmp_path):
    measure_speed(tmp_path)
    assert capfd.readouterr().err == ""


def test_the_later_processes_of_a_group_draw_nothing(monkeypatch):
    monkeypatch.setattr("flatllmcore.utils.processes._store", object())
    for rank in (0, 1):
        monkeypatch.setattr("torch.distributed.get_rank", lambda rank=rank: rank)
        with terminal() as drawn:
            assert list(progress(range(3), "counting", "thing")) == [0, 1, 2]
            assert ("counting" in drawn()) == (rank == 0)


def test_a_bar_counts_to_its_total_and_is_wiped_when_done():
    with terminal() as drawn:
        assert list(progress(range(3), "counting", "thing")) == [0, 1, 2]
        first, *_, last = drawn().split("\r")[1:-1]
    assert first.startswith("counting:   0%")
    assert "| 0/3 [" in first
    assert last.isspace()


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".jsonl.gz", ".parquet"])
def test_a_bar_counts_the_records_of_a_file(monkeypatch, tmp_path, suffix):
    moved = watch_bars(monkeypatch, "flatllmcore.utils.text_sources")
    path = tmp_path / f"text{suffix}"
    if suffix == ".parquet":
        parquet.write_table(pyarrow.table({"text": SENTENCES}), path)
    else:
        records = [{"text": sentence} for sentence in SENTENCES]
        written = "\n".join(map(json.dumps, records)) if "l" in suffix else json.dumps(records)
        path.write_bytes(gzip.compress(written.encode()) if suffix.endswith("gz") else written.encode())
    with terminal():
        assert load_text(str(path), "train").documents == SENTENCES
        assert moved() == [(f"reading {path.name}", len(SENTENCES), None)]


def test_text_is_tokenised_to_the_end_of_its_bar(monkeypatch):
    moved = watch_bars(monkeypatch, "flatllmcore.utils.data_utils")
    monkeypatch.setattr("flatllmcore.utils.data_utils._PIECE_CHARACTERS", 1000)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    text = TextDataset("some", "test", SENTENCES, "\n\n")
    with terminal():
        consecutive_windows(text, tokenizer, 16)
        sample_documents(text, tokenizer, 3, 16, seed=0)
        characters = len("\n\n".join(SENTENCES))
        assert moved() == [("tokenising text", characters, characters), ("sampling text", 3, 3)]


def watch_bars(monkeypatch, module: str) -> Callable[[], list[tuple[str, float, float]]]:
    """Return a function that gives what each of a module's bars was about, where it ended, and its total."""
    made = []

    def watched(*args, **kwargs):
        made.append(progress(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(f"{module}.progress", watched)
    return lambda: [(bar.desc.removesuffix(": "), bar.n, bar.total) for bar in made]
