"""Where the hidden states of all windows live between two layers: on the device, in host memory or in a file."""

import logging
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..utils.devices import GIB, free_device_memory, free_host_memory
from ..utils.files import check_disk_space, naming_full_disk

logger = logging.getLogger(__name__)

# The rest is for a layer and its solves: at the widths of a 70B model about 17 GiB beside 16 GiB of states.
_SHARE_OF_DEVICE = 0.25
_SHARE_OF_HOST = 0.5


def states_place(size: int, device_memory: float, host_memory: float) -> str:
    """Return where hidden states of ``size`` bytes live: ``device``, ``host`` or ``file``.

    The device takes them while they are no more than a quarter of its free memory, then the host while they are no
    more than half of what may be planned with there, and then a file.

    Args:
        size: Of the states.
        device_memory: Bytes free on the device; 0 for one that is the host.
        host_memory: Bytes that may be planned with.
    """
    if 0 < size <= _SHARE_OF_DEVICE * device_memory:
        return "device"
    return "host" if size <= _SHARE_OF_HOST * host_memory else "file"


@dataclass(frozen=True)
class StatesStorage:
    """Keeps hidden states where :func:`states_place` says; a file is mapped to memory, nameless, and ends with us.

    Attributes:
        host_memory_bytes: Host memory that may be planned with; ``None`` for what is free.
        folder: Where the file goes; the system's temporary folder for ``None``.
    """

    host_memory_bytes: int | None = None
    folder: Path | None = None

    def place(self, size: int, device: torch.device) -> str:
        """Return ``device``, ``host`` or ``file`` for states of ``size`` bytes.

        Raises:
            InputError: If only a file is large enough and the disk is not.
        """
        device_memory = 0 if device.type == "cpu" else free_device_memory(device)
        place = states_place(size, device_memory, self.host_memory())
        if place == "file":
            check_disk_space(self._folder(), size)
        return place

    def host_memory(self) -> int:
        """Return the bytes of host memory that may be planned with."""
        return free_host_memory() if self.host_memory_bytes is None else self.host_memory_bytes

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return an uninitialised tensor where hidden states of this shape belong.

        Raises:
            InputError: If that is a file and the disk is too small.
        """
        size = torch.Size(shape).numel() * dtype.itemsize
        place = self.place(size, device)
        where = {"device": device, "host": "host memory", "file": f"a file in {self._folder()}"}[place]
        logger.info("hidden states of %d windows: %.2f GiB on %s", shape[0], size / GIB, where)
        if place == "file":
            return self._mapped(shape, dtype, size)
        return torch.empty(*shape, dtype=dtype, device=device if place == "device" else "cpu")

    def _folder(self) -> Path:
        return self.folder or Path(tempfile.gettempdir())

    def _mapped(self, shape: Sequence[int], dtype: torch.dtype, size: int) -> Tensor:
        self._folder().mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix="hidden-states-", dir=self._folder()) as file:
            with naming_full_disk(self._folder()):
                os.posix_fallocate(file.fileno(), 0, size)  # a disk that fills up later would end us by SIGBUS
            flat = torch.from_file(file.name, shared=True, size=torch.Size(shape).numel(), dtype=dtype)
            return flat.view(*shape)
