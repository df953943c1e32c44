"""Runs that are killed at random moments, again and again, end with the bytes of a run that was left in peace.

KILLS=100 pytest tests/test_kills.py
"""

import itertools
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

import process_groups
from checkpoints import bytes_in, compress_to, on_disk, save_tiny_checkpoint
from flatllmcore.core import checkpoint_sink
from flatllmcore.engine.checkpoint_sink import CheckpointSink
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


def finished_layers(folder: Path) -> set[int]:
    """Return the layers that the manifest of an unfinished run says are there."""
    manifest = folder / "out.partial" / "flat_llm.json"
    return {layer["layer"] for layer in json.loads(manifest.read_text())["layers"]} if manifest.exists() else set()


def layers_not_computed(folder: Path) -> set[int]:
    """Return the layers that the last run took over from an earlier one, as its record says."""
    record = json.loads((folder / "logs" / "dense_flatllm_30.json").read_text())
    return {layer["layer"] for layer in record["layers"] if layer["elapsed_s"] is None}


def is_published(folder: Path, flags: tuple[str, ...]) -> bool:
    """Tell whether a killed run had put its model in place, where nothing was there before."""
    return "--overwrite" not in flags and (folder / "out").exists()


@pytest.mark.parametrize("flags", [(), ("--out_of_core",), ("--overwrite",)], ids=["memory", "disk", "overwrite"])
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
    while min(kills, runs) < KILLS / 3:
        folder = shutil.copytree(inputs, tmp_path / f"killed{runs}")
        if "--overwrite" in flags:
            save_checkpoint(folder / "out", "mistral", torch.float32)
        runs += 1
        process = None
        while process is None or not (process.exitcode == 0 or is_published(folder, flags)):
            finished = finished_layers(folder)
            process = start(folder, flags)
            process.join(moments.uniform(0, whole_run_s))
            if process.exitcode is None:
                process.kill()
                process.join()
                kills += 1
            assert process.exitcode in (0, -signal.SIGKILL), (folder / "stderr").read_text()
        assert layers_not_computed(folder) == finished
        assert contents(folder) == contents(straight)
        assert not list(folder.glob("*out.*"))
        shutil.rmtree(folder)


def replace_a_model(folder: Path, kill_at: int) -> None:
    """Compress a tiny model over another one; the process is killed before the publication's so-many-th change."""
    torch.set_num_threads(1)
    publish = CheckpointSink.publish
    changes = itertools.count()

    def or_kill(change):
        def changed(*args, **options):
            if next(changes) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*args, **options)

        return changed

    def publish_or_die(sink, model_card):
        for name in ("rename", "replace", "unlink", "rmdir"):
            setattr(os, name, or_kill(getattr(os, name)))
        publish(sink, model_card)

    CheckpointSink.publish = publish_or_die
    windows = torch.randint(96, (8, 16), generator=torch.Generator().manual_seed(0))
    compress_to(folder / "out", on_disk(str(folder / "dense")), windows, overwrite=True)


def run_to_its_end(folder: Path, kill_at: int) -> int | None:
    process = process_groups.SERVER.Process(target=replace_a_model, args=(folder, kill_at))
    process.start()
    process.join()
    return process.exitcode


def test_a_kill_at_any_step_of_the_publication_leaves_one_model_and_a_way_on(tmp_path):
    """The new model is whole under its working name; the old one is moved, the new one too, and the old one goes."""
    save_tiny_checkpoint(tmp_path / "dense")
    save_tiny_checkpoint(tmp_path / "old", "mistral")
    never = 10**6
    assert run_to_its_end(tmp_path, never) == 0
    expected = contents(tmp_path)
    for kill_at in itertools.count():
        shutil.rmtree(tmp_path / "out")
        shutil.copytree(tmp_path / "old", tmp_path / "out")
        if run_to_its_end(tmp_path, kill_at) == 0:
            break
        places = [tmp_path / name for name in ("out", ".out.replaced") if (tmp_path / name).exists()]
        assert bytes_in(places[0]) in (expected, bytes_in(tmp_path / "old"))
        assert run_to_its_end(tmp_path, never) == 0
        assert contents(tmp_path) == expected
        assert {path.name for path in tmp_path.iterdir()} == {"dense", "old", "out"}
    assert kill_at > 6
