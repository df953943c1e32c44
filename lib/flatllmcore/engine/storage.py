"""Where the hidden states of all windows live between two layers: on the device, in host memory or in a file."""

import logging
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..utils.devices import free_device_memory, free_host_memory
from ..utils.files import GIB, check_disk_space, naming_place

logger = logging.getLogger(__name__)

# The rest is for a layer and its solves: at the widths of a 70B model about 17 GiB beside 16 GiB of states.
_SHARE_OF_DEVICE = 0.25
_SHARE_OF_HOST = 0.5


@dataclass(frozen=True)
class StatesStorage:
    """Keeps hidden states where :meth:`place` says; a file is mapped to memory, nameless, and ends with us."""

    host_memory_bytes: int = field(default_factory=free_host_memory)  # that may be planned with
    folder: Path = field(default_factory=lambda: Path(tempfile.gettempdir()))  # of the file

    def place(self, size: int, device: torch.device) -> str:
        """Return where states of ``size`` bytes live, ``device``, ``host`` or ``file``: the first with room for them.

        That is a quarter of the device's free memory, and half of the host's; InputError if the disk has none either.
        """
        if device.type != "cpu" and 0 < size <= _SHARE_OF_DEVICE * free_device_memory(device):
            return "device"
        if size <= _SHARE_OF_HOST * self.host_memory_bytes:
            return "host"
        check_disk_space(self.folder, size)
        return "file"

    def spare(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, beside: int) -> Tensor | None:
        """Return an uninitialised tensor where ``device`` computes, if there is room beside so many bytes of states.

        None if not: what a GPU would have to fetch is sooner computed again.
        """
        size = torch.Size(shape).numel() * dtype.itemsize
        share, free = _SHARE_OF_HOST, self.host_memory_bytes - beside
        if device.type != "cpu":
            share, free = _SHARE_OF_DEVICE, free_device_memory(device)
        return torch.empty(*shape, dtype=dtype, device=device) if size <= share * free else None

    def empty(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, what: str = "hidden states"
    ) -> Tensor:
        """Return an uninitialised tensor where hidden states of this shape belong, or ``what`` else is said to."""
        size = torch.Size(shape).numel() * dtype.itemsize
        place, folder = self.place(size, device), self.folder
        where = {"device": device, "host": "host memory", "file": f"a file in {folder}"}[place]
        of = f"{what} of {shape[0]} {'windows' if what == 'hidden states' else 'layers'}"
        logger.info("%s: %.2f GiB on %s", of, size / GIB, where)
        if place != "file":
            return torch.empty(*shape, dtype=dtype, device=device if place == "device" else "cpu")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix="hidden-states-", dir=folder) as file:
            with naming_place(folder):
                os.posix_fallocate(file.fileno(), 0, size)  # a disk that fills up later would end us by SIGBUS
            flat = torch.from_file(file.name, shared=True, size=torch.Size(shape).numel(), dtype=dtype)
        return flat.view(*shape)
