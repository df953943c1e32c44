"""What a machine can do at most: a table of GPUs, and this machine, measured."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from flatllmcore.utils.devices import GIB, device_name

from .rates import copy_rate, disk_rate, peak_rates, upload_rate


@dataclass(frozen=True)
class Machine:
    """Peak rates of one device and of the host around it.

    Attributes:
        tflops: 10¹² operations per second of dense bf16 products with float32 sums.
        moments_tflops: The same of the products that the moments are made of.
        float64_tflops: Of float64 products.
        bandwidth_gbytes_per_s: Of the device's memory.
        memory_gib: The device's memory; ``None`` if the host's is all there is.
        host_link_gbytes_per_s: Between host and device, one way.
        link_gbytes_per_s: Between two processes' devices, one way.
        disk_gbytes_per_s: Of reading or writing files.
    """

    name: str
    tflops: float
    moments_tflops: float
    float64_tflops: float
    bandwidth_gbytes_per_s: float
    memory_gib: float | None
    host_link_gbytes_per_s: float
    link_gbytes_per_s: float
    disk_gbytes_per_s: float
    host_memory_gib: float


# Host and disk that are assumed beside a GPU from the table; the command line changes them.
HOST_MEMORY_GIB = 64.0
DISK_GBYTES_PER_S = 2.0
_PCIE_4, _PCIE_5 = 31.5, 63.0  # 16 lanes, one way: 16 and 32 GT/s per lane, 128b/130b coding (PCI-SIG)


def _gpu(
    name: str, tflops: float, float64_tflops: float, bandwidth: float, memory_gib: float, host_link: float
) -> Machine:
    return Machine(
        name=name,
        tflops=tflops,
        moments_tflops=tflops,  # bf16 operands, float32 sums: the same matrix units
        float64_tflops=float64_tflops,
        bandwidth_gbytes_per_s=bandwidth,
        memory_gib=memory_gib,
        host_link_gbytes_per_s=host_link,
        link_gbytes_per_s=host_link,  # without NVLink, whichever way NCCL goes
        disk_gbytes_per_s=DISK_GBYTES_PER_S,
        host_memory_gib=HOST_MEMORY_GIB,
    )


# Rates from NVIDIA's data sheets, dense (without sparsity), float64 on tensor cores where there are any; memory is
# what CUDA reports as total, a little less than the name says.
DEVICES = {
    machine.name: machine
    for machine in (
        _gpu("a100-40gb", 312, 19.5, 1555, 39.4, _PCIE_4),  # A100 data sheet, 40 GB SXM
        _gpu("a100-80gb", 312, 19.5, 2039, 79.2, _PCIE_4),  # A100 data sheet, 80 GB SXM
        _gpu("h100-80gb", 989.4, 66.9, 3350, 79.2, _PCIE_5),  # H100 data sheet and architecture white paper, SXM
        _gpu("h200", 989.4, 66.9, 4800, 139.8, _PCIE_5),  # H200 data sheet, SXM
        _gpu("rtx-4090", 165.2, 1.29, 1008, 23.6, _PCIE_4),  # Ada architecture white paper, float32 accumulation
    )
}


def measured_machine(device: torch.device, folder: Path) -> Machine:
    """Return what this machine reaches on large products, copies and files, measured in about ten seconds.

    Args:
        device: Where products and copies run.
        folder: Where a file of 256 MiB is written, read and deleted.
    """
    rates = peak_rates(torch.bfloat16, device)
    bandwidth = copy_rate(device) / 1e9
    is_host = device.type == "cpu"
    host_link = bandwidth if is_host else upload_rate(device) / 1e9
    return Machine(
        name=device_name(device),
        tflops=rates["forward"] / 1e12,
        moments_tflops=rates["moments"] / 1e12,
        float64_tflops=rates["solves"] / 1e12,
        bandwidth_gbytes_per_s=bandwidth,
        memory_gib=None if is_host else torch.cuda.mem_get_info(device)[1] / GIB,
        host_link_gbytes_per_s=host_link,
        link_gbytes_per_s=host_link,
        disk_gbytes_per_s=disk_rate(folder) / 1e9,
        host_memory_gib=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB,
    )
