"""Runs that are killed at random moments, again and again, end with the bytes of a run that was left in peace.

KILLS=100 pytest tests/test_kills.py
"""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

import process_groups
from flatllmcore.core import checkpoint_sink
from test_main import save_checkpoint, save_text

KILLS = int(os.environ.get("KILLS", "12"))
OUT = [
    *("--model", "dense", "--dataset", "text", "--sparsity_ratio", "30", "--seqlen", "32", "--device", "cpu"),
    *("--nsamples", "6", "--save_model", "out", "--bi_score", "scores", "--save", "logs"),
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    save_checkpoint(folder / "dense", "llama", torch.bfloat16)
    save_text(folder / "text")
    return folder


def slow_disk():
    """Make writing a shard take about as long as computing it, so that many kills come in the midst of it."""
    save_file, flush = checkpoint_sink.save_file, checkpoint_sink.flush_to_disk

    def save_in_two_parts(tensors, path, metadata):
        save_file(tensors, path, metadata)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        time.sleep(0.02)
        path.write_bytes(whole)

    def flush_slowly(path):
        time.sleep(0.02)
        flush(path)

    checkpoint_sink.save_file, checkpoint_sink.flush_to_disk = save_in_two_parts, flush_slowly


def start(folder: Path, flags: tuple[str, ...]):
    return process_groups.start([*OUT, *flags], folder, folder / "stderr", slow_disk)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "out").iterdir()}


@pytest.mark.parametrize("flags", [(), ("--out_of_core",)], ids=["memory", "disk"])
def test_a_run_killed_at_random_moments_ends_with_the_same_bytes(inputs, tmp_path, flags):
    for name in ("warm", "straight"):  # the first one waits for the server's imports
        straight = shutil.copytree(inputs, tmp_path / name)
        began = time.perf_counter()
        process = start(straight, flags)
        process.join()
        whole_run_s = time.perf_counter() - began
        assert process.exitcode == 0, (straight / "stderr").read_text()
    moments = random.Random(0)
    kills = runs = 0
    while kills < KILLS / 2:
        folder = shutil.copytree(inputs, tmp_path / f"killed{runs}")
        runs += 1
        while not (folder / "out").exists():
            process = start(folder, flags)
            process.join(moments.uniform(0, whole_run_s))
            if process.exitcode is None:
                process.kill()
                process.join()
                kills += 1
            assert process.exitcode in (0, -signal.SIGKILL), (folder / "stderr").read_text()
        assert contents(folder) == contents(straight)
        assert not (folder / "out.partial").exists()
        shutil.rmtree(folder)
