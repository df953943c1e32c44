"""A checkpoint's files as source of the walk: layers are read as they are needed, and kept where memory allows."""

import copy
import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ..layers.replacement import fill_parameters
from ..utils.devices import computed_in, retyped
from ..utils.files import digest, to_json_bytes
from ..utils.layer_utils import DecoderModule, stored_tensors
from ..utils.loading import EMBEDDINGS, open_checkpoint, tokenizer_digest
from .protocols import LAYERS, LayerSource
from .storage import StatesStorage

_NOT_OF_THE_MODEL = ("_name_or_path", "transformers_version", "architectures", "auto_map", "dtype")


class CheckpointSource(LayerSource):
    """The checkpoint of a dense or compressed model, its weights read from safetensors when they are needed.

    Host memory holds one decoder layer (a second one while it is read ahead), or the embeddings, or the head; or, where
    ``is_kept``, all layers that have been read so far. Weights are cast to ``dtype`` as they are read, ``auto`` is the
    checkpoint's own, and lent in the type that the device computes in. InputError if they are missing, damaged or of
    other shapes than the config says.
    """

    def __init__(
        self,
        model: str,
        device: torch.device,
        dtype: str = "auto",
        cache_dir: Path | None = None,
        storage: StatesStorage | None = None,
    ) -> None:
        skeleton, self._files, stored = open_checkpoint(model, cache_dir)
        super().__init__(skeleton, device, storage)
        self.home, self.is_kept, self._cache_dir = torch.device("cpu"), False, cache_dir
        self._names = list(stored_tensors(skeleton))  # tied ones once
        self.weights_dtype = self.config.dtype = stored if dtype == "auto" else getattr(torch, dtype)
        self.dtype = computed_in(self.weights_dtype, device)
        # What the decoder itself takes: the former is computed, not read.
        self.decoder.rotary_emb = type(self.decoder.rotary_emb)(config=self.config)
        fill_parameters(self.decoder.norm, self._weights_of("model.norm"))
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="layer-reader")
        self._layers: dict[int, Future[dict[str, Tensor]]] = {}  # read ahead, or kept

    @cached_property
    def identity(self) -> dict[str, str]:
        """Digests of the weights, of the config and of the tokenizer, 16 hexadecimal digits each.

        Weights count by name, type, shape and bytes, however they are spread over files, which are all read for it once
        (a second for a gigabyte or two); a config by what differs from its class's, however it is spelled, but for
        names, versions and the type of the weights.
        """
        with ThreadPoolExecutor(max_workers=4, thread_name_prefix="digest") as pool:
            weights = dict(zip(self._names, pool.map(self._files.digest, self._names), strict=True))
        config, default = self.config.to_dict(), type(self.config)().to_dict()
        own = {n: value for n, value in config.items() if n not in _NOT_OF_THE_MODEL and value != default.get(n)}
        digests = {
            "weights": digest(to_json_bytes(weights)),
            "config": digest(json.dumps(own, sort_keys=True).encode()),
            "tokenizer": tokenizer_digest(self._files.model, self._cache_dir),
        }
        return {name: sha256[:16] for name, sha256 in digests.items()}

    def fingerprint(self) -> str:
        """Return the parts of :attr:`identity` in one word."""
        return "-".join(self.identity.values())

    def weights_beside_layers(self) -> Iterator[dict[str, Tensor]]:
        """Yield the embeddings, then the final norm and the head, by name, in the run's dtype; a tied head once."""
        beside = [name for name in self._names if not name.startswith(LAYERS)]
        for names in (beside[:1], beside[1:]):
            yield {name: self._read(name) for name in names}

    @contextmanager
    def lent(self, part: str, device: torch.device) -> Iterator[DecoderModule]:
        """Lend a copy of the part with its weights, read for the block; behind a layer the next is read ahead."""
        is_layer, number = part.startswith(LAYERS), part.rpartition(".")[2]
        weights = self._take(int(number)) if is_layer else self._weights_of(part)
        lent = copy.deepcopy(self.model.get_submodule(part), {id(self.config): self.config})
        for name, scale in lent.named_buffers(recurse=False):  # of Gemma's embeddings: computed, not read
            lent.register_buffer(name, torch.empty_like(scale, device=device), persistent=False)
            self.model._init_weights(lent)  # the weight is on the meta device still
        types = self.weights_dtype, self.dtype
        brought = {name: retyped(of.to(device, non_blocking=True), *types) for name, of in weights.items()}
        fill_parameters(lent, brought)
        del weights, brought  # on the device now, or the part's own
        try:
            with torch.no_grad():
                yield lent.eval()
        finally:
            for module in lent.modules():  # whoever still holds the part holds no weights
                module._parameters.clear()

    def _take(self, index: int) -> dict[str, Tensor]:
        """Return the parameters of layer ``index``, and begin to read those of the next."""
        wanted = range(index, min(index + 2, self.num_layers))
        if not self.is_kept:
            self._layers = {other: self._layers[other] for other in wanted if other in self._layers}
        for other in wanted:
            if other not in self._layers:
                self._layers[other] = self._reader.submit(self._read_layer, other)
        return (self._layers[index] if self.is_kept else self._layers.pop(index)).result()

    def _read_layer(self, index: int) -> dict[str, Tensor]:
        weights = self._weights_of(f"{LAYERS}{index}")
        if self.device.type != "cpu":  # which fetches pinned memory while it computes
            return {name: weight.pin_memory() for name, weight in weights.items()}
        return weights

    def _weights_of(self, part: str) -> dict[str, Tensor]:
        """Return the parameters of a part of the model by their names within it."""
        prefix = f"{part}."
        found = {name.removeprefix(prefix): self._read(name) for name in self._names if name.startswith(prefix)}
        is_tied = part == "lm_head" and not found
        return {"weight": self._read(EMBEDDINGS)} if is_tied else found

    def _read(self, name: str) -> Tensor:
        return self._files.read(name, self.weights_dtype)
