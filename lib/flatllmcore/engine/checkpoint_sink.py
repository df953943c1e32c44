"""A folder as sink: each compressed layer goes to its final shard, and a run that was stopped goes on from there."""

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from ..errors import InputError
from ..layers.flat_attention import FlatDecoderLayer
from ..utils.checkpoint import check_output_folder, put_in_place
from ..utils.files import flush_to_disk, naming_full_disk, read_json, write_atomically, write_json
from ..utils.loading import empty_causal_lm
from ..utils.processes import barrier, broadcast_object, is_rank_0
from .checkpoint_source import CheckpointSource
from .protocols import LayerRecord

logger = logging.getLogger(__name__)

MANIFEST = "flat_llm.json"
_LOCK = ".lock"
_LAYERS_PREFIX = "model.layers."  # as the model classes of all families name them


@dataclass
class Manifest:
    """What was asked, what is worth remembering, and which layers are done: the whole state of a run."""

    request: dict[str, Any]
    results: dict[str, Any] = field(default_factory=dict)
    layers: list[LayerRecord] = field(default_factory=list)


def partial_folder(folder: Path) -> Path:
    """Return where a model is written until it is whole."""
    folder = folder.resolve()
    return folder.with_name(f"{folder.name}.partial")


class CheckpointSink:
    """Writes a compressed model beside ``folder``, in ``<folder>.partial``, which takes its place at the end.

    Used as a context manager, that locks the partial folder: another run's is refused, and a dead run holds nothing.
    What is there already, of the same ``request`` (all that the result depends on, as JSON takes it), is kept: the
    finished layers are in :attr:`finished`, results that were worth remembering in :attr:`results`. Where the block
    ends by an error, the partial folder stays to go on from, unless there is nothing in it worth that. ``overwrite``
    says whether a model at ``folder`` may be replaced.

    In a group of processes rank 0 writes; the others must see the same file system.
    """

    def __init__(self, folder: Path, num_layers: int, request: Mapping[str, Any], overwrite: bool = False) -> None:
        self.folder = folder.resolve()  # a link stays one
        self.partial = partial_folder(self.folder)
        self.num_layers = num_layers
        self.overwrite = overwrite
        self.finished: dict[int, LayerRecord] = {}
        self._manifest = Manifest(dict(request))
        self._lock = FileLock(self.partial / _LOCK)

    @property
    def results(self) -> dict[str, Any]:
        """Results that this run or an earlier one has remembered."""
        return self._manifest.results

    def __enter__(self) -> "CheckpointSink":
        """Open the partial folder; InputError if it is another run's, or holds another request."""
        try:
            self._manifest = broadcast_object(self._open)
        except BaseException:
            self._lock.release()
            raise
        self.finished = {record.layer: record for record in self._manifest.layers}
        if self.finished:
            self._log_finished()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._lock.is_locked:  # not rank 0
            return
        if error is not None and not self.finished and not self.results:
            self._discard()
        elif error is not None:
            self._log_finished()
        self._lock.release()

    def put(self, index: int, layer: FlatDecoderLayer, record: LayerRecord) -> None:
        """Write compressed layer ``index`` to its shard, and then that it is there."""
        finished = dict(sorted((self.finished | {index: record}).items()))
        # Without seconds: all that is written is the same in every run of the request.
        self._manifest.layers = [replace(other, elapsed_s=None) for other in finished.values()]
        if is_rank_0():
            weights = {f"{_LAYERS_PREFIX}{index}.{name}": weight for name, weight in layer.named_parameters()}
            self._write_shard(1 + index, weights)
            write_json(self.partial / MANIFEST, self._manifest)
        self.finished = finished

    def weights(self, index: int) -> dict[str, Tensor]:
        """Return the parameters of a finished layer."""
        with safe_open(self._shard(1 + index), "pt") as shard:
            prefix = f"{_LAYERS_PREFIX}{index}."
            return {name.removeprefix(prefix): shard.get_tensor(name).clone() for name in shard.keys()}  # noqa: SIM118

    def remember(self, name: str, result: Any) -> None:
        """Keep a result, as JSON takes it, for a run that goes on from here."""
        self.results[name] = result
        if is_rank_0():
            write_json(self.partial / MANIFEST, self._manifest)

    def complete(
        self,
        source: CheckpointSource,
        flat_config: PretrainedConfig,
        generation_config: Path | None,
        tokenizer: PreTrainedTokenizerBase,
    ) -> str:
        """Write all that is not a layer; return the partial folder, which can be loaded from now on.

        Embeddings, final norm and head are those of ``source``, the dense model; ``generation_config`` is to be copied.
        """
        if is_rank_0():
            for number, weights in zip((0, 1 + self.num_layers), source.weights_beside_layers(), strict=True):
                self._write_shard(number, weights)
            with naming_full_disk(self.partial):
                self._write_index()
                _save_config(flat_config, source.dtype, self.partial)
                if generation_config is not None:
                    shutil.copyfile(generation_config, self.partial / generation_config.name)
                tokenizer.save_pretrained(self.partial)
        barrier()
        return str(self.partial)

    def publish(self, model_card: str) -> None:
        """Put the finished model in its place."""
        if is_rank_0():
            write_atomically(self.partial / "README.md", model_card.encode())
            put_in_place(self.partial, self.folder)
            (self.folder / _LOCK).unlink()  # held until here, so that no other run begins in between

    def _open(self) -> Manifest:
        """Lock the partial folder and return its manifest, without layers whose shards are damaged."""
        check_output_folder(self.folder, self.overwrite)
        self.partial.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except (Timeout, FileNotFoundError) as error:  # the latter: it has just been published
            raise InputError(f"another run is writing {self.partial}; wait for it, or give another folder") from error
        check_output_folder(self.folder, self.overwrite)  # which a run may have published just before
        path = self.partial / MANIFEST
        if not path.exists():
            if any(not _is_temporary(other) for other in self.partial.iterdir()):
                raise InputError(f"{self.partial} is in the way: it holds no unfinished run; delete it")
            try:
                write_json(path, self._manifest)
            except OSError:
                self._discard()
                raise
        manifest = read_json(path, Manifest)
        self._check_request(manifest.request)
        for left_over in filter(_is_temporary, self.partial.iterdir()):
            if left_over.name != _LOCK:
                left_over.unlink()
        manifest.layers = [record for record in manifest.layers if self._is_whole(record.layer)]
        return manifest

    def _discard(self) -> None:
        """Remove the partial folder, its manifest last: what a kill leaves of it is still known as ours."""
        for path in sorted(self.partial.iterdir(), key=lambda path: path.name == MANIFEST):
            path.unlink()
        self.partial.rmdir()

    def _log_finished(self) -> None:
        logger.info("%d of %d layers are finished in %s", len(self.finished), self.num_layers, self.partial)

    def _check_request(self, earlier: Mapping[str, Any]) -> None:
        asked = self._manifest.request
        changed = [
            f"{name} {asked.get(name)}, not {earlier.get(name)}"
            for name in sorted(earlier.keys() | asked.keys())
            if asked.get(name) != earlier.get(name)
        ]
        if changed:
            raise InputError(
                f"{self.partial} holds an unfinished run of another request ({'; '.join(changed)}); "
                "finish that one, delete the folder, or save to another"
            )

    def _is_whole(self, index: int) -> bool:
        path = self._shard(1 + index)
        try:
            with safe_open(path, "pt"):  # checks the header against the length of the file
                return True
        except (OSError, SafetensorError) as error:
            logger.warning("%s is damaged and its layer is done again: %s", path, error)
            return False

    def _shard(self, number: int) -> Path:
        return self.partial / f"model-{number + 1:05d}-of-{self.num_layers + 2:05d}.safetensors"

    def _write_shard(self, number: int, weights: Mapping[str, Tensor]) -> None:
        path = self._shard(number)
        temporary = path.with_name(f".{path.name}.tmp")
        on_host = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
        try:
            with naming_full_disk(path):
                save_file(on_host, temporary, metadata={"format": "pt"})
                flush_to_disk(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def _write_index(self) -> None:
        weight_map, total_size = {}, 0
        for number in range(self.num_layers + 2):
            with safe_open(self._shard(number), "pt") as shard:
                for name in shard.keys():  # noqa: SIM118 (not a mapping)
                    weight_map[name] = self._shard(number).name
                    total_size += shard.get_tensor(name).nbytes
        content = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        write_json(self.partial / SAFE_WEIGHTS_INDEX_NAME, content)


def _is_temporary(path: Path) -> bool:
    """Tell whether a file is only there while a run lives: its lock, and what we or a library were writing."""
    is_ours = path.name == _LOCK or (path.name.startswith(".") and path.name.endswith(".tmp"))
    return is_ours or path.name.startswith(".tmp")


def _save_config(flat_config: PretrainedConfig, dtype: torch.dtype, folder: Path) -> None:
    """Write the config, and the modelling files beside it, as ``save_pretrained`` of the model would."""
    model = empty_causal_lm(flat_config)
    custom_object_save(model, folder, config=flat_config)
    flat_config.architectures = [type(model).__name__]
    flat_config.dtype = dtype
    flat_config.save_pretrained(folder)
