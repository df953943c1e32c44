"""Where the hidden states of all windows live between two layers: on the device, in host memory or in a file."""

import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..utils.devices import GIB, free_device_memory, free_host_memory
from ..utils.files import check_disk_space, naming_full_disk
from ..utils.progress import progress

if TYPE_CHECKING:
    from .calibration import LayerSource

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


@dataclass
class Batch:
    """Some windows' hidden states on the device, and the place they came from."""

    states: Tensor  # (batch, S, D)
    stored: Tensor

    def replace(self, outputs: Tensor) -> None:
        """Store ``outputs`` as these windows' hidden states."""
        self.stored.copy_(outputs)


class HiddenStates:
    """The hidden states of all windows between two layers, (N, S, D)."""

    def __init__(self, states: Tensor, source: "LayerSource", batch_size: int) -> None:
        self.states = states
        self.batch_size = batch_size
        self._device = source.device
        self._arguments = source.layer_arguments(states.shape[1])

    @classmethod
    def embed(cls, source: "LayerSource", windows: Tensor, batch_size: int) -> "HiddenStates":
        """Return the hidden states that enter layer 0 for token ids (N, S)."""
        shape = (*windows.shape, source.config.hidden_size)
        states = source.storage.empty(shape, source.dtype, source.device)
        with source.embedding() as embed:
            for stored, ids in zip(states.split(batch_size), windows.split(batch_size), strict=True):
                stored.copy_(embed(ids))
        return cls(states, source, batch_size)

    def batches(self) -> Iterator[Batch]:
        """Yield the windows in order, ``batch_size`` at a time, on the device."""
        batches = self.states.split(self.batch_size) if len(self.states) else ()
        for stored in progress(batches, "windows", "batch"):
            yield Batch(stored.to(self._device, non_blocking=True), stored)

    def run(self, layer: nn.Module, index: int, batch: Batch) -> Tensor:
        """Return what ``layer``, at place ``index`` in the model, makes of a batch, (batch, S, D).

        Raises:
            InputError: If the result is not finite.
        """
        return checked(layer(batch.states, **self._arguments[index]), index)


def checked(outputs: Tensor, index: int) -> Tensor:
    """Return what layer ``index`` gave, if it is finite.

    Raises:
        InputError: If it is not.
    """
    if not torch.isfinite(outputs).all():
        raise InputError(
            f"layer {index} gives NaN or infinite activations in {outputs.dtype}; "
            "check the checkpoint, or use a wider --dtype (float32, bfloat16)"
        )
    return outputs
