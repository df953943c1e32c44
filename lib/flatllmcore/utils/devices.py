"""What differs between devices."""

import logging
import math
import os
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError
from .files import GIB
from .names import DEVICE_NAMES
from .processes import launch_number

logger = logging.getLogger(__name__)

_LOW_PRECISION = {  # with the instructions, as torch names them, by which CPUs multiply such numbers
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16_arith"),
}


def best_device() -> torch.device:
    """Return this process's GPU if there is one, else the CPU (float64 solves rule out devices without it)."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    index, count = launch_number("LOCAL_RANK", range(2**16), "0"), torch.cuda.device_count()
    if index >= count:
        raise InputError(f"process {index} of this machine has no GPU of its own: there are {count}; start fewer")
    return torch.device("cuda", index)


def parse_device(name: str | None) -> torch.device:
    """Return the named device if it is there, or the best one for ``None``; ``cuda`` is this process's GPU."""
    if name is None or (name == "cuda" and torch.cuda.is_available()):
        return best_device()
    with suppress(RuntimeError, AssertionError):  # what torch raises where there is no such device
        device = torch.empty(0, device=name).device
        if device.type in ("cpu", "cuda"):
            return device
    raise InputError(f"device {name!r} is not usable here; use {DEVICE_NAMES}")


@contextmanager
def usual_torch() -> Iterator[None]:
    """Compute as torch does by itself inside the block: no inference mode, autocast or default device of the caller's.

    Under inference mode gradients are refused, and weights that are made could never be trained.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        for kind in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


@cache
def has_instructions_for(dtype: torch.dtype) -> bool:
    """Tell whether this CPU has instructions for a half-precision type; the log says so, once, if it has none."""
    known: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # which older versions of torch lack
    has_units = any(known.get(name) for name in _LOW_PRECISION[dtype])
    if not has_units:
        logger.info("torch knows no instructions of this CPU for %s: weights keep it, float32 is computed in", dtype)
    return has_units


def computed_in(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the type that weights of ``dtype`` are computed with: float32 for halves a CPU has no instructions for.

    There these take ten times as long or more; every half is a float32 too, so that weights are the same numbers.
    """
    is_slow = device.type == "cpu" and dtype in _LOW_PRECISION and not has_instructions_for(dtype)
    return torch.float32 if is_slow else dtype


def retyped(tensor: Tensor, given: torch.dtype, wanted: torch.dtype) -> Tensor:
    """Return a tensor of the type ``given`` in the type ``wanted``, and of others, whole numbers say, as it is."""
    return tensor.to(wanted) if tensor.dtype == given else tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return a tensor in float32, or in its own type if that is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def product_operand(x: Tensor) -> Tensor:
    """Return ``x`` widened as :func:`float32_product` needs it: once, for an operand of several products."""
    return x.float() if x.dtype in _LOW_PRECISION and not x.is_cuda else x


def float32_product(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b`` accumulated in at least float32; leading batch dimensions allowed.

    bf16 and fp16 operands multiply exactly in float32. CUDA's matrix units take them as they are and give the float32
    sums out; elsewhere they are widened first. float32 and float64 stay (torch.set_float32_matmul_precision counts).
    """
    a, b = product_operand(a), product_operand(b)
    if a.dtype not in _LOW_PRECISION:
        return a @ b
    multiply = torch.mm if a.ndim == 2 else torch.bmm
    return multiply(a, b, out_dtype=torch.float32)


def synchronize(device: torch.device) -> None:
    """Wait until the work queued on ``device`` is done, so that a clock read next is honest."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_device_memory(device: torch.device) -> int:
    """Return the bytes that can still be allocated on a GPU, what PyTorch holds in reserve included."""
    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reserve


def free_host_memory() -> int:
    """Return the bytes of memory that this process may still take, page cache that can be dropped included."""
    free = _linux_bytes("meminfo", "MemAvailable") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return int(min(free, _free_in_container()))


def _free_in_container() -> float:
    """Return what the control groups around this process leave of their limits, droppable file pages included."""
    free = math.inf
    with suppress(FileNotFoundError):  # not Linux
        own = Path("/sys/fs/cgroup", Path("/proc/self/cgroup").read_text().strip().rpartition("::/")[2])
        for limit in (folder / "memory.max" for folder in (own, *own.parents)):
            if limit.exists() and (most := limit.read_text().strip()) != "max":
                statistics = dict(line.split() for line in limit.with_name("memory.stat").read_text().splitlines())
                used = int(limit.with_name("memory.current").read_text()) - int(statistics["inactive_file"])
                free = min(free, int(most) - used)
    return free


def restart_peak(device: torch.device) -> tuple[int, int]:
    """Return the bytes allocated now, and the most since this was last called; zeros on a CPU, where nobody counts."""
    if device.type != "cuda":
        return 0, 0
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device), peak


def peak_memory_gib(device: torch.device) -> dict[str, float]:
    """Return the process's peak resident memory and, on a GPU, the peak allocated there, in GiB."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, else in KiB
    # It begins with the peak of the program that started this one, which the kernel's own figure leaves out.
    host = _linux_bytes("self/status", "VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    peaks = {"host": host / GIB}
    if device.type == "cuda":
        peaks["device"] = torch.cuda.max_memory_allocated(device) / GIB
    return {name: round(gib, 3) for name, gib in peaks.items()}


def _linux_bytes(file: str, field: str) -> int | None:
    """Return a field, kept in KiB, of a file below /proc; None where there is none."""
    with suppress(FileNotFoundError):
        found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc", file).read_text(), re.MULTILINE)
        return int(found[1]) * 1024 if found else None
    return None


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or of the processor and the threads used on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.backends.cpu.get_cpu_capability()} CPU, {torch.get_num_threads()} threads"
