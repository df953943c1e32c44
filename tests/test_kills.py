"""Runs that are killed at random changes to files, again and again, end with the bytes of a run left in peace.

KILLS=100 pytest -m slow tests/test_kills.py
"""

import functools
import itertools
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

import process_groups
from checkpoints import bytes_in, compress_to, save_inputs, save_tiny_checkpoint
from flatllmcore.engine import checkpoint_sink
from flatllmcore.engine.checkpoint_sink import CheckpointSink
from flatllmcore.utils.checkpoint import MANIFEST
from flatllmcore.utils.files import write_json
from python_process import run_forked

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("KILLS", "6"))
NEVER = 10**6
OUT = [
    *("--model", "dense", "--dataset", "text", "--sparsity_ratio", "30", "--seqlen", "32", "--device", "cpu"),
    *("--nsamples", "6", "--save_model", "out", "--bi_score", "scores", "--save", "logs"),
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return save_inputs(tmp_path_factory.mktemp("inputs"), torch.bfloat16)


def kill_before_change(number: int, log: str = os.devnull) -> None:
    """Have this process killed before it changes files for the so-many-th time; ``log`` gets a byte for each."""
    changes, written = itertools.count(), os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def audit(event: str, args: tuple) -> None:
        is_written = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)
        if is_written or event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            if next(changes) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            os.write(written, b".")

    sys.addaudithook(audit)


def kill_run(number: int) -> None:
    """Have a run of main.py killed, and its shards written in two parts, so that one may be left half-written."""
    save_file = checkpoint_sink.save_file

    def save_in_two_parts(tensors, path, metadata):
        save_file(tensors, path, metadata)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with path.open("ab") as file:
            file.write(whole[len(whole) // 2 :])

    checkpoint_sink.save_file = save_in_two_parts
    kill_before_change(number, "changes")


def run(folder: Path, flags: list[str], kill_at: int) -> int | None:
    """Run main.py, killed on its way or not; return its exit status."""
    process = process_groups.start([*OUT, *flags], folder, folder / "stderr", functools.partial(kill_run, kill_at))
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), (folder / "stderr").read_text()
    return process.exitcode


@pytest.mark.parametrize("flag", ["--out_of_core", "--overwrite"])
def test_a_run_killed_at_random_changes_ends_with_the_same_bytes(inputs, tmp_path, flag):
    """From disk into a new folder, and in memory over an older model."""
    straight = shutil.copytree(inputs, tmp_path / "straight")
    assert run(straight, [flag], NEVER) == 0
    changes = (straight / "changes").stat().st_size
    moments = random.Random(0)
    kills = runs = 0
    while min(kills, runs) < KILLS / 2:
        folder = shutil.copytree(inputs, tmp_path / f"killed{runs}")
        if flag == "--overwrite":
            shutil.copytree(straight / "out", folder / "out")
            (folder / "out" / "README.md").write_text("an earlier model")
        runs += 1
        while run(folder, [flag], moments.randrange(changes)) != 0:
            kills += 1
            if flag != "--overwrite" and (folder / "out").exists():
                break  # killed after it had put its model in place
        assert bytes_in(folder / "out") == bytes_in(straight / "out")
        assert [path.name for path in folder.iterdir() if "out" in path.name] == ["out"]
        shutil.rmtree(folder)


def replace_a_model(folder: Path, kill_at: int) -> None:
    """Compress a tiny model over another one; the process is killed before the publication's so-many-th change."""
    torch.set_num_threads(1)
    publish = CheckpointSink.publish

    def publish_or_die(sink, model_card):
        kill_before_change(kill_at)
        publish(sink, model_card)

    CheckpointSink.publish = publish_or_die
    windows = torch.randint(96, (8, 16), generator=torch.Generator().manual_seed(0))
    compress_to(folder / "out", str(folder / "dense"), windows, overwrite=True)


def test_a_kill_at_any_step_of_the_publication_leaves_one_model_and_a_way_on(tmp_path):
    """The new model is whole under its working name; the old one is moved, the new one too, and the old one goes."""
    save_tiny_checkpoint(tmp_path / "dense")
    save_tiny_checkpoint(tmp_path / "old", "mistral", "1GB")  # in few files, each of which is a step
    write_json(tmp_path / "old" / MANIFEST, {"request": {}, "files": os.listdir(tmp_path / "old")})
    assert run_forked(replace_a_model, tmp_path, NEVER) == 0
    expected, old = bytes_in(tmp_path / "out"), bytes_in(tmp_path / "old")
    for kill_at in itertools.count():
        shutil.rmtree(tmp_path / "out")
        shutil.copytree(tmp_path / "old", tmp_path / "out")
        if run_forked(replace_a_model, tmp_path, kill_at) == 0:
            break
        places = [tmp_path / name for name in ("out", "out.partial/.replaced") if (tmp_path / name).exists()]
        left = {path.name: path.read_bytes() for path in places[0].iterdir() if path.is_file()}
        assert left in (expected, old)
        assert run_forked(replace_a_model, tmp_path, NEVER) == 0
        assert bytes_in(tmp_path / "out") == expected
        assert {path.name for path in tmp_path.iterdir()} == {"dense", "old", "out"}
    assert kill_at >= 6  # two renames, and three files and a folder deleted
