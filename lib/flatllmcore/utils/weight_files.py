"""The safetensors files of a checkpoint, read by name and no more than asked for."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from ..errors import InputError


class WeightFiles:
    """Names, shapes and values of the weights of a checkpoint, one file or sharded.

    Args:
        model: Local folder, or hub id whose files are downloaded to the cache first.
        cache_dir: Where hub downloads are kept; the hub's own default for ``None``.

    Raises:
        InputError: If there are no safetensors files, or one is missing or damaged.
    """

    def __init__(self, model: str, cache_dir: Path | None = None) -> None:
        self.model = model
        with self._naming_checkpoint():
            self._files = _weight_files(model, cache_dir)
            self._file_of: dict[str, str] = {}
            self.shapes: dict[str, tuple[int, ...]] = {}
            for file in self._files:
                with safe_open(file, "pt") as weights:
                    for name in weights.keys():  # noqa: SIM118 (not a mapping)
                        self._file_of[name] = file
                        self.shapes[name] = tuple(weights.get_slice(name).get_shape())

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype of the first weight of floating-point numbers."""
        for name in self._file_of:
            (rows,) = self.leading_rows([name], 0)
            if rows.is_floating_point():
                return rows.dtype
        raise InputError(f"checkpoint {self.model!r} has no floating-point weights")

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return weights by name, in memory of their own: the files are closed again."""
        with self._open(names) as found:
            return {name: weights.get_tensor(name).clone() for name, weights in found.items()}

    def leading_rows(self, names: Iterable[str], count: int) -> Iterator[Tensor]:
        """Yield the first ``count`` rows of each weight."""
        with self._open(names) as found:
            for name, weights in found.items():
                yield weights.get_slice(name)[:count].clone()

    @contextmanager
    def _open(self, names: Iterable[str]) -> Iterator[Mapping[str, Any]]:
        """Lend the open file of each name."""
        with self._naming_checkpoint(), ExitStack() as stack:
            names = list(names)
            files = {file: stack.enter_context(safe_open(file, "pt")) for file in {self._file_of[n] for n in names}}
            yield {name: files[self._file_of[name]] for name in names}

    @contextmanager
    def _naming_checkpoint(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError, ValueError, KeyError) as error:  # the latter two: of a damaged index
            reason = str(error).splitlines()[0]
            raise InputError(
                f"checkpoint {self.model!r} is missing or damaged ({reason}); expected safetensors files"
            ) from error


def _weight_files(model: str, cache_dir: Path | None) -> list[str]:
    """Return the one file, or else the shards: in the order in which transformers looks for them."""
    single = cached_file(model, SAFE_WEIGHTS_NAME, cache_dir=cache_dir, _raise_exceptions_for_missing_entries=False)
    if single is not None:
        return [single]
    index = cached_file(model, SAFE_WEIGHTS_INDEX_NAME, cache_dir=cache_dir)
    return get_checkpoint_shard_files(model, index, cache_dir=cache_dir)[0]
