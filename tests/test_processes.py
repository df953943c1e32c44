"""Several processes that share out the calibration windows, against one."""

import functools
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch

import main
import process_groups
from checkpoints import read, save_inputs, shards, weights_in
from conftest import one_line
from flatllmcore.core import cholesky
from flatllmcore.errors import InputError
from flatllmcore.methods import METHODS, flatllm
from python_process import LIBRARY

pytestmark = pytest.mark.slow

ARGV = ["--model", "dense", "--dataset", "text", "--sparsity_ratio", "30", "--seqlen", "32", "--device", "cpu"]
OUT = [*ARGV, "--save_model", "out", "--save", "logs", "--nsamples", "7"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return save_inputs(tmp_path_factory.mktemp("inputs"), torch.float64)


@pytest.fixture
def copied(inputs, tmp_path):
    """Copy the inputs to a folder of their own, which is returned."""
    return lambda name: Path(shutil.copytree(inputs, tmp_path / name))


@pytest.fixture(scope="module")
def straight(inputs, tmp_path_factory):
    """Return the weights' files of a model that two processes made in one go, in memory."""
    folder = Path(shutil.copytree(inputs, tmp_path_factory.mktemp("straight") / "run"))
    assert process_groups.run_group(2, OUT, folder) == ([0, 0], "")
    return shards(folder / "out")


def solve_by_narrow_blocks():
    cholesky.BLOCK = 16  # four of 56 channels


PLUS = ["--prune_method", "flatllm+", "--gradient_nsamples", "2"]


@pytest.mark.parametrize(
    ("count", "flags"),
    [(2, ["--out_of_core", "--prune_qk"]), (3, ["--nsamples", "6"]), (3, ["--nsamples", "2", *PLUS])],
    ids=["uneven", "even", "empty"],
)
def test_a_group_gives_what_one_process_gives(copied, count, flags):
    """Up to rounding, with shares of all kinds."""
    group, alone = copied("group"), copied("alone")
    for folder, processes in ((group, count), (alone, 1)):
        done = process_groups.run_group(processes, [*OUT, *flags], folder, solve_by_narrow_blocks)
        assert done == ([0] * processes, "")
    found, expected = (read(folder / "ranks/dense/importance.json")["scores"] for folder in (group, alone))
    assert found == pytest.approx(expected, rel=1e-9)
    found, expected = (
        read(next(folder.glob("logs/dense_flatllm*_30.json")))["perplexity"][0] for folder in (group, alone)
    )
    for kind in ("dense", "compressed"):
        assert found[kind] == pytest.approx(expected[kind], rel=1e-6)
    found, expected = weights_in(group / "out"), weights_in(alone / "out")
    atol = 1e-6 if "--gradient_nsamples" in flags else 1e-8  # they are float32, of batches of one window here
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        if "gate_proj" in name or "up_proj" in name:  # rows of the dense matrix: the same channels are kept
            assert torch.equal(weight, expected[name]), name
        # an eigenvector's sign is anybody's choice
        pair = [w.abs() if "self_attn" in name else w for w in (weight, expected[name])]
        torch.testing.assert_close(*pair, rtol=1e-5, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    "flags",
    [*(["--prune_method", name] for name in METHODS), [*PLUS[:-1], "4"], ["--shape", "stock", "--width_multiple", "8"]],
)
def test_a_group_with_whole_batches_gives_the_bytes_of_one_process(tmp_path, flags):
    """In bf16, where a sum over other batches may round a weight otherwise."""
    written = []
    for count in (1, 2):
        folder = save_inputs(tmp_path / str(count), torch.bfloat16)
        argv = [*OUT, "--nsamples", "10", "--batch_size", "2", *flags]  # one is held out
        assert process_groups.run_group(count, argv, folder) == ([0] * count, "")
        written.append(shards(folder / "out"))
    assert written[0] == written[1]


LAUNCHES = [
    ("WORLD_SIZE=2", "RANK is ''"),
    ("WORLD_SIZE=2 LOCAL_WORLD_SIZE=2 RANK=0 MASTER_PORT=1", "MASTER_ADDR is not; unset WORLD_SIZE"),
    ("WORLD_SIZE=2 RANK=0 MASTER_ADDR=h MASTER_PORT=70000", "MASTER_PORT is '70000', not 0 to 65535"),
    ("WORLD_SIZE=2 RANK=1 LOCAL_WORLD_SIZE=0", "LOCAL_WORLD_SIZE is '0', not 1 to 2"),
    ("WORLD_SIZE=2.0", "WORLD_SIZE is '2.0', not 1 to"),
]


@pytest.mark.parametrize(
    ("variables", "complaint", "flags"), [(*LAUNCHES[0], ["--nsamples", "0"]), *((*launch, []) for launch in LAUNCHES)]
)
def test_variables_of_no_launcher_are_one_line(monkeypatch, tmp_path, capsys, variables, complaint, flags):
    monkeypatch.chdir(tmp_path)
    for variable in variables.split():
        monkeypatch.setenv(*variable.split("="))
    assert complaint in one_line(capsys, main.main, [*OUT, *flags])
    assert list(tmp_path.iterdir()) == []


def test_a_port_that_is_taken_is_one_line(monkeypatch, tmp_path, capsys):
    """What can be refused without the others is refused before they meet."""
    monkeypatch.chdir(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        for name, value in ({"WORLD_SIZE": "2", "RANK": "0"} | place).items():
            monkeypatch.setenv(name, value)
        assert "the processes cannot meet at 127.0.0.1:" in one_line(capsys, main.main, OUT)
        assert "--nsamples is 0" in one_line(capsys, main.main, [*OUT, "--nsamples", "0"])


def test_a_signal_ends_a_process_that_waits_for_the_others():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = f"""
import os, signal, socket, threading
import main
from flatllmcore.utils import processes
processes.PATIENCE_S = 0.1
def signal_when_it_waits():
    while True:
        try:
            socket.create_connection(("127.0.0.1", {port})).close()
            break
        except OSError:
            pass
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=signal_when_it_waits, daemon=True).start()
main.main({OUT!r})
"""
    place = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment = os.environ | place | {"PYTHONPATH": os.pathsep.join(map(str, (LIBRARY, LIBRARY.parent)))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=False, timeout=600)
    assert done.returncode == 128 + signal.SIGTERM


def before_layer_1(happen: Callable[[], None]) -> None:
    solve, calls = flatllm.FlatLLMStep.solve, []

    def solve_or_stop(*args):
        calls.append(args)
        if len(calls) == 2:
            happen()
        return solve(*args)

    flatllm.FlatLLMStep.solve = solve_or_stop


def interrupt():
    raise KeyboardInterrupt


def kill_one(rank: str) -> None:
    if os.environ["RANK"] == rank:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_group_of_which_one_is_killed_ends_and_goes_on_to_the_same_bytes(straight, copied, rank):
    folder, argv = copied("killed"), [*OUT, *["--out_of_core"] * int(rank)]
    kill = functools.partial(before_layer_1, functools.partial(kill_one, rank))
    statuses, errors = process_groups.run_group(2, argv, folder, kill)
    assert statuses == ([-signal.SIGKILL, 2] if rank == "0" else [2, -signal.SIGKILL])
    assert errors.startswith("error: another process ended")
    assert process_groups.run_group(2, argv, folder) == ([0, 0], "")
    assert shards(folder / "out") == straight


def test_the_death_of_the_process_that_all_meet_at_is_told_in_one_line(copied):
    kill = functools.partial(before_layer_1, functools.partial(kill_one, "0"))
    statuses, errors = process_groups.run_group(3, OUT, copied("killed"), kill, has_agent=False)
    assert statuses == [-signal.SIGKILL, 2, 2]
    assert errors.startswith("error: another process ended")
    assert errors.count("\n") == 1


def test_a_stopped_group_goes_on_to_the_same_bytes(straight, copied):
    """As many processes do; another number of them is another request."""
    folder = copied("stopped")
    statuses, errors = process_groups.run_group(2, OUT, folder, functools.partial(before_layer_1, interrupt))
    assert statuses == [2, 2]
    assert "interrupted" in errors
    assert f"go on with: torchrun --nproc_per_node 2 main.py {shlex.join(OUT)}" in errors
    statuses, errors = process_groups.run_group(1, OUT, folder)
    assert statuses == [2]
    assert "another request (processes 1, not 2)" in errors
    assert process_groups.run_group(2, OUT, folder) == ([0, 0], "")
    assert shards(folder / "out") == straight


def patch_in_rank_1(target: str, **behaviour: object) -> None:
    if os.environ["RANK"] == "1":
        mock.patch(f"flatllmcore.{target}", **behaviour).start()


SPOILED = functools.partial(patch_in_rank_1, "engine.walk.check_finite", side_effect=InputError("layer 0 gives NaN"))
FINGERPRINT = "engine.checkpoint_source.CheckpointSource.fingerprint"
OTHER = functools.partial(patch_in_rank_1, FINGERPRINT, return_value="other")


@pytest.mark.parametrize(
    ("patch", "flags", "reason"),
    [
        (SPOILED, [], "layer 0 gives NaN\n"),
        (OTHER, [], "dense has other weights here than where the first process runs\n"),
        (None, ["--device", "cuda:0"], "device 'cuda:0' is not usable here"),
        (None, ["--nsamples", "0"], "--nsamples is 0; accepted"),
    ],
)
def test_one_failure_ends_all_and_is_told_once(copied, patch, flags, reason):
    if "cuda:0" in flags and torch.cuda.is_available():
        reason = "one GPU"
    folder = copied("failing")
    statuses, errors = process_groups.run_group(2, [*OUT, *flags], folder, patch)
    assert statuses == [2, 2]
    assert errors.startswith(f"error: {reason}")
    assert errors.count("\n") == 1
    assert not (folder / "out").exists()


def test_the_launcher_of_accelerate_starts_a_group(copied):
    folder = copied("launched")
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]  # as scripts/settings.sh has it
    launch += ["--main_process_port", "0"]  # one that is free
    command = [sys.executable, "-m", *launch, str(Path(__file__).parents[1] / "main.py"), *OUT]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "on 2 x cpu" in done.stdout
    assert done.stdout.count("compressed model is in out") == 1
    assert (folder / "out/config.json").exists()
