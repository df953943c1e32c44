"""What a machine reaches at its best: one large matrix product, one large copy, one large file."""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from flatllmcore.utils.devices import float32_product, synchronize

_REPEATS = 5
_BYTES = 2**28  # of a copy or a file
_ACCELERATOR_SIDE, _HOST_SIDE = 8192, 2048  # of a square matrix: enough for the rate to be steady


def peak_rates(dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Return operations per second of a large product as ``forward``, ``moments`` and ``solves`` compute it."""
    return {
        "forward": product_rate(dtype, device),
        "moments": product_rate(dtype, device, float32_product),
        "solves": product_rate(torch.float64, device),
    }


def product_rate(
    dtype: torch.dtype, device: torch.device, multiply: Callable[[Tensor, Tensor], object] = torch.matmul
) -> float:
    """Return operations per second of a square matrix product, the best of several."""
    size = _HOST_SIDE if device.type == "cpu" else _ACCELERATOR_SIDE
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / best_time(lambda: multiply(a, b), device)


def copy_rate(device: torch.device) -> float:
    """Return bytes per second of a large copy within the device, read and written ones counted, the best of several."""
    source = torch.ones(_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / best_time(lambda: target.copy_(source), device)


def upload_rate(device: torch.device) -> float:
    """Return bytes per second from page-locked host memory to an accelerator, the best of several."""
    source = torch.ones(_BYTES, dtype=torch.uint8).pin_memory()
    target = torch.empty_like(source, device=device)
    return source.numel() / best_time(lambda: target.copy_(source, non_blocking=True), device)


def disk_rate(folder: Path) -> float:
    """Return bytes per second of writing a file in ``folder`` to the disk and reading it from there, the slower one."""
    content = os.urandom(_BYTES)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        started = time.perf_counter()
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        write_s = time.perf_counter() - started
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # not from the page cache
        started = time.perf_counter()
        Path(file.name).read_bytes()
        read_s = time.perf_counter() - started
    return _BYTES / max(write_s, read_s)


def best_time(work: Callable[[], object], device: torch.device) -> float:
    best = float("inf")
    for _ in range(_REPEATS):
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best
