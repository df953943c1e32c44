"""Several processes that share out windows and solves, each with a device of its own (torch.distributed).

Started by ``accelerate launch`` or ``torchrun``, which set the variables that :func:`process_group` reads. Outside its
block one process is all of them, and every function here leaves its argument as it is: a group that the caller of the
library has made for other work is not touched. Collectives raise OtherProcessError where another process has ended.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

_FAILURES = "failures"  # key in the store
# Longer than a process waits for another at any size, the solves of a layer included.
_PATIENCE = timedelta(hours=2)

_store: dist.Store | None = None  # the group's, inside the block of process_group
_has_failed = False  # whether this process has


class OtherProcessError(RuntimeError):
    """Another process of the group ended; it has said why."""


@contextmanager
def _naming_lost_processes() -> Iterator[None]:
    """For collectives alone, where backends raise RuntimeErrors of many kinds when they do not reach the others."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise OtherProcessError(f"another process ended, or cannot be reached: {error}") from error


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the group that the launcher describes, if it started more than one process; each computes on its ``device``.

    A process that has failed does not take leave on a GPU, where that waits for the others: its end tells them.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    global _store, _has_failed  # noqa: PLW0603 (torch.distributed's own group is as global)
    _store, rank, size = next(dist.rendezvous("env://"))
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=_store, rank=rank, world_size=size, timeout=_PATIENCE)
    _has_failed = False
    try:
        dist.barrier()  # none may leave, even by an error, while another is still joining
        yield
    except BaseException:
        _has_failed = True
        raise
    finally:
        if not _has_failed or device.type == "cpu":
            dist.destroy_process_group()
        _store = None


def world_size() -> int:
    """Return how many processes there are."""
    return dist.get_world_size() if _is_group() else 1


def local_world_size() -> int:
    """Return how many processes of the group share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if _is_group() else 1


def is_rank_0() -> bool:
    """Tell whether this is the process that writes and logs."""
    return not _is_group() or dist.get_rank() == 0


@_naming_lost_processes()
def is_first_failure() -> bool:
    """Note that this process has failed, and tell whether it is the first: one failure is reported, not all."""
    global _has_failed  # noqa: PLW0603
    _has_failed = True
    return _store is None or _store.add(_FAILURES, 1) == 1


def own_share(rows: Tensor) -> Tensor:
    """Return a view of the rows that this process takes; shares differ by one at most and may be empty."""
    return rows.tensor_split(world_size())[dist.get_rank()] if _is_group() else rows


def all_gather_shares(share: Tensor, length: int) -> Tensor:
    """Return the ``length`` rows of which :func:`own_share` gave each process its ``share``; the same in all."""
    if not _is_group():
        return share
    rows = share.new_zeros(length, *share.shape[1:])
    own_share(rows).copy_(share)
    return all_reduce(rows)


def own_turns(items: Sequence[T]) -> list[T]:
    """Return the items that are this process's turns, when they are dealt out there and back."""
    return [item for turn, item in enumerate(items) if is_own_turn(turn)]


def is_own_turn(turn: int) -> bool:
    """Tell whether this process takes an item by its place among those that are dealt out there and back."""
    return not _is_group() or _rank_of_turn(turn) == dist.get_rank()


@_naming_lost_processes()
def broadcast(tensor: Tensor, turn: int = 0) -> None:
    """Replace what a tensor holds, in place, by what it holds in the process whose turn it is: rank 0 at turn 0."""
    if _is_group():
        sent = tensor.contiguous()
        dist.broadcast(sent, src=_rank_of_turn(turn))
        tensor.copy_(sent)


def broadcast_object(make: Callable[[], T]) -> T:
    """Return what ``make`` gives in rank 0, the only process where it is called."""
    if not _is_group():
        return make()
    objects = [make() if is_rank_0() else None]
    with _naming_lost_processes():
        dist.broadcast_object_list(objects, device=torch.device("cpu"))
    return objects[0]  # type: ignore[return-value]


@_naming_lost_processes()
def all_reduce(total: Tensor) -> Tensor:
    """Add up ``total`` over the group in place, and return it."""
    if _is_group():
        dist.all_reduce(total)
    return total


def all_reduce_numbers(*numbers: float, device: torch.device) -> list[float]:
    """Return each number summed over the group, in float64."""
    return all_reduce(torch.tensor(numbers, dtype=torch.float64, device=device)).tolist()


@_naming_lost_processes()
def barrier() -> None:
    """Wait until every process of the group has come here."""
    if _is_group():
        dist.barrier()


def _is_group() -> bool:
    return _store is not None


def _rank_of_turn(turn: int) -> int:
    place = turn % (2 * world_size())
    return min(place, 2 * world_size() - 1 - place)
