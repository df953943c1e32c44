"""Runs of `main.py` in processes of their own, alone or in groups, without paying for the imports each time."""

import os
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from torch.distributed import TCPStore

from python_process import SERVER, redirect


def start(
    argv: list[str], folder: Path, error: Path, patch: Callable[[], None] | None = None, **environment: str
) -> ForkServerProcess:
    """Start `main.py` in ``folder`` with its stderr going to a file; ``patch`` is called before it."""
    process = SERVER.Process(target=_run, args=(argv, folder, error, patch, environment), daemon=True)
    process.start()
    return process


def run_group(
    count: int, argv: list[str], folder: Path, patch: Callable[[], None] | None = None, *, has_agent: bool = True
) -> tuple[list[int | None], str]:
    """Run `main.py` in ``count`` processes that share out the windows; return exit statuses and all of stderr.

    As under torchrun, the store they meet at is this process's, and so is its port: nobody else can have taken it.
    Without an agent it is rank 0's, and ends with it.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True)
    group = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    if not has_agent:
        del store, group["TORCHELASTIC_USE_AGENT_STORE"]
    errors = [folder / f"stderr-{rank}" for rank in range(count)]
    processes = [
        start(argv, folder, error, patch, RANK=str(rank), LOCAL_RANK=str(rank), **group)
        for rank, error in enumerate(errors)
    ]
    for process in processes:
        process.join()
    return [process.exitcode for process in processes], "".join(error.read_text() for error in errors)


def _run(
    argv: list[str], folder: Path, error: Path, patch: Callable[[], None] | None, environment: dict[str, str]
) -> None:
    import torch

    import main

    torch.set_num_threads(1)
    os.environ.update(environment)
    os.chdir(folder)
    redirect(os.devnull, error)
    if patch is not None:
        patch()
    sys.exit(main.main(argv))
