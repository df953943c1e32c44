"""A folder as sink: each compressed layer goes to its final shard, and a run that was stopped goes on from there."""

import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from ..utils import checkpoint
from ..utils.dimensions import LayerRecord
from ..utils.files import file_digest, naming_place, replacing, write_atomically, write_json
from ..utils.layer_utils import DecoderModule, stored_tensors
from ..utils.loading import empty_causal_lm
from ..utils.processes import barrier, broadcast_object, is_rank_0
from .checkpoint_source import CheckpointSource
from .protocols import LAYERS

logger = logging.getLogger(__name__)


class CheckpointSink:
    """Writes a compressed model beside ``folder``, in ``<folder>.partial``, which takes its place at the end.

    What is there already, of the same ``request`` (all that the result depends on, as JSON takes it), is kept: the
    finished layers are in :attr:`finished`, results that were worth remembering in :attr:`results`. ``overwrite`` says
    whether a model at ``folder`` may be replaced.

    In a group of processes rank 0 writes; the others must see the same file system.
    """

    def __init__(self, folder: Path, num_layers: int, request: Mapping[str, Any], overwrite: bool = False) -> None:
        self.folder = Path(os.path.realpath(folder))  # a link stays one
        self.partial = checkpoint.partial_folder(folder)
        self.num_layers, self.overwrite = num_layers, overwrite
        self.request = dict(request)
        self.results: dict[str, Any] = {}
        self.finished: dict[int, LayerRecord] = {}
        self._shards: dict[str, str] = {}
        shards = [self._shard(number).name for number in range(num_layers + 2)]
        self._files = {*shards, SAFE_WEIGHTS_INDEX_NAME, CONFIG_NAME, checkpoint.MODEL_CARD}  # that are written

    @contextmanager
    def opened(self) -> Iterator["CheckpointSink"]:
        """Lock the partial folder inside the block; InputError if it is another run's, or holds another request.

        Where the block ends by an error, the folder stays to go on from, unless there is nothing in it worth that.
        """
        with ExitStack() as stack:
            self.results, self.finished = broadcast_object(lambda: self._open(stack))
            if self.finished:
                logger.info("%d of %d layers are finished in %s", len(self.finished), self.num_layers, self.partial)
            yield self

    def put(self, index: int, layer: DecoderModule, record: LayerRecord) -> None:
        """Write compressed layer ``index`` to its shard, and then that it is there."""
        finished = dict(sorted((self.finished | {index: record}).items()))
        if is_rank_0():
            weights = {f"{LAYERS}{index}.{name}": weight for name, weight in stored_tensors(layer).items()}
            self._write_shard(1 + index, weights)
            self._shards[self._shard(1 + index).name] = file_digest(self._shard(1 + index))
            self._write_manifest(finished)
        self.finished = finished

    def weights(self, index: int) -> dict[str, Tensor]:
        """Return the parameters of a finished layer."""
        weights = load_file(self._shard(1 + index))
        return {name.removeprefix(f"{LAYERS}{index}."): weight for name, weight in weights.items()}

    def remember(self, name: str, result: Any) -> None:
        """Keep a result, as JSON takes it, for a run that goes on from here."""
        self.results[name] = result
        if is_rank_0():
            self._write_manifest(self.finished)

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
            with naming_place(self.partial):
                self._write_index()
                # The config, and the modelling files beside it, as ``save_pretrained`` of the model would.
                model = empty_causal_lm(flat_config)
                saved = custom_object_save(model, self.partial, config=flat_config) if model._auto_class else []
                flat_config.architectures = [type(model).__name__]
                flat_config.dtype = source.weights_dtype
                flat_config.save_pretrained(self.partial)
                if generation_config is not None:
                    saved.append(shutil.copyfile(generation_config, self.partial / generation_config.name))
                saved += tokenizer.save_pretrained(self.partial)
            self._files |= {Path(path).relative_to(self.partial).as_posix() for path in saved}
            self._write_manifest(self.finished)
        barrier()
        return str(self.partial)

    def publish(self, model_card: str) -> None:
        """Put the finished model in its place."""
        if is_rank_0():
            write_atomically(self.partial / checkpoint.MODEL_CARD, model_card.encode())
            checkpoint.put_in_place(self.partial, self.folder, self.overwrite)

    def _open(self, stack: ExitStack) -> tuple[dict[str, Any], dict[int, LayerRecord]]:
        """Lock the partial folder and return results and layers, without those whose shards are damaged."""
        checkpoint.check_output_folder(self.folder, self.overwrite)
        stack.enter_context(checkpoint.locked(self.folder))
        checkpoint.check_output_folder(self.folder, self.overwrite)  # which a run may have published just before
        self.partial.mkdir(exist_ok=True)
        manifest = checkpoint.read_manifest(self.partial, self.request) or checkpoint.Manifest(self.request)
        self._shards = manifest.shards
        layers = {record.layer: record for record in manifest.layers if self._is_whole(record.layer)}
        self.results, self.finished = manifest.results, layers
        stack.push(self._discard_if_useless)
        for left_over in filter(Path.is_file, self.partial.glob(".tmp*")):
            left_over.unlink()
        self._write_manifest(layers)
        return manifest.results, layers

    def _discard_if_useless(self, error: type[BaseException] | None, *_: object) -> None:
        """Remove the partial folder, its manifest last: what a kill leaves of it is still known as ours."""
        if error is not None and not self.finished and not self.results and not checkpoint.find_other(self.partial):
            for path in sorted(self.partial.iterdir(), key=lambda path: path.name == checkpoint.MANIFEST):
                path.unlink()
            self.partial.rmdir()

    def _is_whole(self, index: int) -> bool:
        path, problem = self._shard(1 + index), "its bytes are not those that were written"
        try:
            if file_digest(path) == self._shards.get(path.name):
                return True
        except OSError as error:
            problem = str(error)
        logger.warning("%s is damaged and its layer is done again: %s", path, problem)
        return False

    def _shard(self, number: int) -> Path:
        return self.partial / f"model-{number + 1:05d}-of-{self.num_layers + 2:05d}.safetensors"

    def _write_shard(self, number: int, weights: Mapping[str, Tensor]) -> None:
        on_host = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
        with replacing(self._shard(number)) as file:
            save_file(on_host, Path(file.name), metadata={"format": "pt"})

    def _write_manifest(self, finished: Mapping[int, LayerRecord]) -> None:
        # Without seconds: all that is written is the same in every run of the request.
        layers = [replace(record, elapsed_s=None) for record in finished.values()]
        manifest = checkpoint.Manifest(self.request, self.results, layers, self._shards, sorted(self._files))
        write_json(self.partial / checkpoint.MANIFEST, manifest)

    def _write_index(self) -> None:
        weight_map, total_size = {}, 0
        for number in range(self.num_layers + 2):
            with safe_open(self._shard(number), "pt") as shard:
                for name in shard.keys():  # noqa: SIM118 (not a mapping)
                    weight_map[name] = self._shard(number).name
                    total_size += shard.get_tensor(name).nbytes
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        write_json(self.partial / SAFE_WEIGHTS_INDEX_NAME, index)
