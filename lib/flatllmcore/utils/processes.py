"""Several processes that share out windows and solves, each with a device of its own (torch.distributed).

Started by ``accelerate launch`` or ``torchrun``, which set the variables that :func:`process_group` reads. Outside its
block one process is all of them, and every function here leaves its argument as it is: a group that the caller of the
library has made for other work is not touched. Collectives raise OtherProcessError where another process has ended.
"""

import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import wraps
from threading import Thread, current_thread, main_thread
from typing import ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import InputError, door

P = ParamSpec("P")
T = TypeVar("T")
PATIENCE_S = 10  # for a process to end by itself when it is told to
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_store: dist.Store | None = None  # the group's, inside the block of process_group, until this process fails


class OtherProcessError(RuntimeError):
    """Another process of the group ended; it has said why."""


def _collective(communicate: Callable[P, object]) -> Callable[P, None]:
    """Have a collective do nothing outside of a group, and say what the RuntimeErrors of all backends mean."""

    @wraps(communicate)
    def communicate_in_group(*args: P.args, **kwargs: P.kwargs) -> None:
        if _store is not None:
            try:
                communicate(*args, **kwargs)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise OtherProcessError(f"another process ended, or cannot be reached: {error}") from error

    return communicate_in_group


def launch_number(name: str, allowed: range, default: str = "") -> int:
    """Return the number in one of the launcher's variables; an InputError names one that is not allowed."""
    value = os.environ.get(name, default)
    if not re.fullmatch("[0-9]{1,9}", value) or int(value) not in allowed:
        remedy = "torchrun and accelerate launch set it; for one process WORLD_SIZE and LOCAL_RANK are unset"
        raise InputError(f"the variable {name} is {value[:80]!r}, not {allowed[0]} to {allowed[-1]}; {remedy}")
    return int(value)


def check_launch() -> None:
    """Refuse a launcher's variables that are malformed, or left over without the others."""
    count = launch_number("WORLD_SIZE", range(1, 2**16), "1")
    if count > 1:
        launch_number("RANK", range(count))
        launch_number("LOCAL_WORLD_SIZE", range(1, count + 1), "1")
        launch_number("MASTER_PORT", range(2**16))
        if not os.environ.get("MASTER_ADDR"):
            raise InputError("WORLD_SIZE is set and MASTER_ADDR is not; unset WORLD_SIZE for one process")


def check_alone() -> None:
    """Refuse to be one of several processes."""
    if launch_number("WORLD_SIZE", range(1, 2**16), "1") > 1:
        raise InputError("this program runs in one process; unset WORLD_SIZE")


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the group that the launcher describes, if it started more than one process; each computes on its ``device``.

    A process that has failed takes no leave, which on a GPU would wait for the others: its end tells them.
    """
    check_launch()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    global _store  # noqa: PLW0603 (torch.distributed's own group is as global)
    place = ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    patience = timedelta(hours=2)  # longer than a process waits for another at any size, a layer's solves included
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    with _signals_end_waits():
        with door(f"the processes cannot meet at {place}", "give a free MASTER_PORT, or unset WORLD_SIZE"):
            _store, rank, size = next(dist.rendezvous("env://"))
            dist.init_process_group(backend, store=_store, rank=rank, world_size=size, timeout=patience)
        barrier()  # none may leave, even by an error, while another is still joining
        yield
        if _store is not None:
            dist.destroy_process_group()
            _store = None


@contextmanager
def _signals_end_waits() -> Iterator[None]:
    """Let a signal end this process where it waits for another too: torch runs no handlers of Python's meanwhile."""
    if current_thread() is not main_thread():  # the only one that may ask to be told
        yield
        return
    read, write = os.pipe()
    os.set_blocking(write, False)
    before = signal.set_wakeup_fd(write)

    def end() -> None:
        while number := os.read(read, 1):  # nothing when the other end is closed
            main_thread().join(PATIENCE_S if number[0] in _ENDING else 0)  # which a handler's exception ends
            if number[0] in _ENDING and main_thread().is_alive():
                os.write(2, b"error: interrupted; run it again\n")
                os._exit(128 + number[0])
        os.close(read)

    Thread(target=end, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(write)


def world_size() -> int:
    """Return how many processes there are."""
    return 1 if _store is None else dist.get_world_size()


def local_world_size() -> int:
    """Return how many processes of the group share this machine."""
    return 1 if _store is None else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_rank_0() -> bool:
    """Tell whether this is the process that writes and logs."""
    return _rank() == 0


def is_first_failure(is_own: bool) -> bool:
    """Leave the group as a failed process, and tell whether it is the first: one failure is reported, not all.

    Where the process that counts has ended, the first is taken to be one that ``is_own``, no other process's end, or
    rank 1: whatever ended rank 0 may have left it no time to say so.
    """
    global _store
    store, _store = _store, None
    terminal = os.dup(2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # a store that ends would fill it with where in its C++ it found that
    try:
        return store is None or store.add("failures", 1) == 1
    except RuntimeError:
        return is_own or dist.get_rank() == 1
    finally:
        os.dup2(terminal, 2)


def own_share(rows: Tensor, batch_size: int = 1) -> Tensor:
    """Return a view of the rows that this process takes: whole batches, or less than one if there are too few."""
    count = world_size()
    if len(rows) <= batch_size * (count - 1):
        return rows.tensor_split(count)[_rank()]
    own = torch.arange(0, len(rows), batch_size).tensor_split(count)[_rank()]
    return rows[own[0] : own[-1] + batch_size]


def is_own_turn(turn: int) -> bool:
    """Tell whether this process takes an item by its place among those that are dealt out there and back."""
    return _rank_of_turn(turn) == _rank()


all_reduce = _collective(dist.all_reduce)  # adds up a tensor over the group, in place
barrier = _collective(dist.barrier)


@_collective
def broadcast(tensor: Tensor, turn: int = 0) -> None:
    """Replace what a tensor holds, in place, by what it holds in the process whose turn it is: rank 0 at turn 0."""
    sent = tensor.contiguous()
    dist.broadcast(sent, src=_rank_of_turn(turn))
    tensor.copy_(sent)


def broadcast_object(make: Callable[[], T]) -> T:
    """Return what ``make`` gives in rank 0, the only process where it is called."""
    objects = [make() if is_rank_0() else None]
    _collective(dist.broadcast_object_list)(objects, device=torch.device("cpu"))
    return objects[0]  # type: ignore[return-value]


def _rank() -> int:
    return 0 if _store is None else dist.get_rank()


def _rank_of_turn(turn: int) -> int:
    place = turn % (2 * world_size())
    return min(place, 2 * world_size() - 1 - place)
