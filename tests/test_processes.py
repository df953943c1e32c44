"""Several processes that share out the calibration windows, against one."""

import functools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import process_groups
from checkpoints import bytes_in
from flatllmcore.core import cholesky, hidden_states, prune
from flatllmcore.engine.checkpoint_source import CheckpointSource
from flatllmcore.errors import InputError
from test_main import save_checkpoint, save_text

ARGV = ["--model", "dense", "--dataset", "text", "--sparsity_ratio", "30", "--seqlen", "32", "--device", "cpu"]
OUT = [*ARGV, "--save_model", "out", "--bi_score", "scores", "--save", "logs"]
RECORD = "logs/dense_flatllm_30.json"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    save_checkpoint(folder / "dense", "llama", torch.float64)
    save_text(folder / "text")
    return folder


@pytest.fixture
def copied(inputs, tmp_path):
    """Copy the inputs to a folder of their own, which is returned."""
    return lambda name: Path(shutil.copytree(inputs, tmp_path / name))


@pytest.fixture
def run(copied):
    """Run `main.py` in a number of processes, in a folder of their own that is returned."""

    def run_in(name: str, count: int, *argv: str, patch: Callable[[], None] | None = None) -> Path:
        folder = copied(name)
        statuses, errors = process_groups.run_group(count, [*OUT, *argv], folder, patch)
        assert (statuses, errors) == ([0] * count, "")
        return folder

    return run_in


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {n: w for path in (folder / "out").glob("*.safetensors") for n, w in load_file(path).items()}


def assert_equal_up_to_rounding(found: Path, expected: Path) -> None:
    scores, expected_scores = (json.loads((f / "scores/importance.json").read_text()) for f in (found, expected))
    assert scores["scores"] == pytest.approx(expected_scores["scores"], rel=1e-9)
    record, expected_record = (json.loads((f / RECORD).read_text()) for f in (found, expected))
    for kind in ("dense", "compressed"):
        assert record["perplexity"][kind] == pytest.approx(expected_record["perplexity"][kind], rel=1e-6)
    found_weights, expected_weights = weights(found), weights(expected)
    assert found_weights.keys() == expected_weights.keys()
    for name, weight in found_weights.items():
        other = expected_weights[name]
        if "gate_proj" in name or "up_proj" in name:  # rows of the dense matrix: the same channels are kept
            assert torch.equal(weight, other), name
        # an eigenvector's sign is anybody's choice
        pair = (weight.abs(), other.abs()) if "self_attn" in name else (weight, other)
        torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


def solve_by_narrow_blocks():
    cholesky.BLOCK = 16  # five of 80 channels


@pytest.mark.parametrize(("count", "nsamples"), [(2, 6), (2, 7), (3, 7), (3, 2)], ids=str)
@pytest.mark.parametrize("flags", [(), ("--out_of_core", "--prune_qk")], ids=["memory", "disk"])
def test_a_group_gives_what_one_process_gives(run, count, nsamples, flags):
    """Even shares, uneven ones, and one that is empty."""
    flags = (*flags, "--nsamples", str(nsamples))
    group = run("group", count, *flags, patch=solve_by_narrow_blocks)
    assert_equal_up_to_rounding(group, run("alone", 1, *flags))


def before_layer_1(happen: Callable[[], None]) -> None:
    solve = prune.solve_layer
    calls = []

    def solve_or_stop(*args):
        calls.append(args)
        if len(calls) == 2:
            happen()
        return solve(*args)

    prune.solve_layer = solve_or_stop


def interrupt():
    raise KeyboardInterrupt


def kill_one(rank: str) -> None:
    if os.environ["RANK"] == rank:
        os.kill(os.getpid(), signal.SIGKILL)


stop_at_layer_1 = functools.partial(before_layer_1, interrupt)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_group_of_which_one_is_killed_ends_and_goes_on_to_the_same_bytes(run, copied, rank):
    argv = [*OUT, "--nsamples", "7", "--out_of_core"]
    straight = run("straight", 2, "--nsamples", "7", "--out_of_core")
    folder = copied("killed")
    kill = functools.partial(before_layer_1, functools.partial(kill_one, rank))
    statuses, errors = process_groups.run_group(2, argv, folder, kill)
    assert sorted(statuses) == [-signal.SIGKILL, 2]
    assert statuses[int(rank)] == -signal.SIGKILL
    assert rank == "0" or errors.startswith("error: another process ended")
    assert process_groups.run_group(2, argv, folder) == ([0, 0], "")
    assert bytes_in(folder / "out") == bytes_in(straight / "out")


@pytest.mark.parametrize("flags", [(), ("--out_of_core",)], ids=["memory", "disk"])
def test_a_stopped_group_goes_on_to_the_same_bytes(run, copied, flags):
    argv = [*OUT, "--nsamples", "7", *flags]
    straight = run("straight", 2, "--nsamples", "7", *flags)
    folder = copied("stopped")
    statuses, errors = process_groups.run_group(2, argv, folder, stop_at_layer_1)
    assert statuses == [2, 2]
    assert "interrupted" in errors
    assert f"go on with: torchrun --nproc_per_node 2 main.py {shlex.join(argv)}" in errors
    assert (folder / "out.partial").is_dir()
    assert process_groups.run_group(2, argv, folder) == ([0, 0], "")
    assert bytes_in(folder / "out") == bytes_in(straight / "out")
    assert process_groups.run_group(1, [*argv, "--overwrite"], folder) == ([0], "")


def test_another_number_of_processes_does_not_go_on_from_there(copied):
    folder = copied("stopped")
    argv = [*OUT, "--nsamples", "7"]
    process_groups.run_group(2, argv, folder, stop_at_layer_1)
    statuses, errors = process_groups.run_group(1, argv, folder)
    assert statuses == [2]
    assert "another request (processes 1, not 2)" in errors


def fail_in_the_second():
    checked = hidden_states.checked

    def fail(outputs, index):
        if os.environ["RANK"] == "1" and index == 1:
            raise InputError("layer 1 gives NaN or infinite activations")
        return checked(outputs, index)

    hidden_states.checked = fail


def test_one_failure_ends_all_and_is_told_once(copied):
    folder = copied("failing")
    statuses, errors = process_groups.run_group(3, [*OUT, "--nsamples", "7"], folder, fail_in_the_second)
    assert statuses == [2, 2, 2]
    assert errors == "error: layer 1 gives NaN or infinite activations\n"
    assert {path.name for path in folder.iterdir() if "stderr" not in path.name} <= {"dense", "text", "logs"}


def fail_to_solve_in_the_second():
    select = prune.select_channels

    def fail(*args):
        if os.environ["RANK"] == "1":
            raise ArithmeticError("the MLP moment is not finite")
        return select(*args)

    prune.select_channels = fail


def test_a_solve_that_fails_in_one_process_ends_all_and_is_told_once(copied):
    folder = copied("failing")
    statuses, errors = process_groups.run_group(2, [*OUT, "--nsamples", "7"], folder, fail_to_solve_in_the_second)
    assert statuses == [2, 2]
    assert errors == "error: layer 0 cannot be compressed: the MLP moment is not finite\n"


@pytest.mark.parametrize("device", ["moon", "cuda:0"])
def test_a_device_that_several_processes_cannot_use_is_told_once(copied, device):
    folder = copied("refused")
    statuses, errors = process_groups.run_group(2, [*OUT, "--device", device], folder)
    assert (statuses, errors.count("\n")) == ([2, 2], 1)
    assert device in errors


def other_weights_in_the_second():
    fingerprint = CheckpointSource.fingerprint
    CheckpointSource.fingerprint = lambda source: fingerprint(source) + os.environ["RANK"]


def test_processes_that_see_other_weights_are_refused(copied):
    folder = copied("refused")
    statuses, errors = process_groups.run_group(2, [*OUT, "--nsamples", "7"], folder, other_weights_in_the_second)
    assert statuses == [2, 2]
    assert errors == "error: dense has other weights here than where the first process runs\n"


def test_unusable_input_is_told_once(copied):
    folder = copied("refused")
    statuses, errors = process_groups.run_group(2, [*OUT, "--nsamples", "0"], folder)
    assert statuses == [2, 2]
    assert errors.startswith("error: --nsamples 0 is out of range")
    assert errors.count("\n") == 1


def test_the_launcher_of_accelerate_starts_a_group(copied):
    folder = copied("launched")
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    main = str(Path(__file__).parents[1] / "main.py")
    command = [sys.executable, "-m", *launch, main, *OUT, "--nsamples", "7"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "on cpu and 1 more" in done.stdout
    assert done.stdout.count("compressed model is in out") == 1
    assert (folder / "out/config.json").exists()
