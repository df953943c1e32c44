"""A checkpoint's files as source of the walk: layers are read as they are needed, and kept where memory allows."""

import copy
import json
from collections.abc import Callable, Iterator
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
from ..utils.loading import EMBEDDINGS, HEAD, open_checkpoint, tokenizer_digest
from .memory import entering, logits_of
from .storage import StatesStorage

LAYERS = "model.layers."  # as the model classes of all families name them
_NOT_OF_THE_MODEL = ("_name_or_path", "transformers_version", "architectures", "auto_map", "dtype")


class CheckpointSource:
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
        self.device = device
        self.storage = storage or StatesStorage()
        self.is_kept = False
        self._cache_dir = cache_dir
        self.skeleton, self._files, stored = open_checkpoint(model, cache_dir)
        self.config = self.skeleton.config
        self._names = list(stored_tensors(self.skeleton))  # tied ones once
        self.weights_dtype = self.config.dtype = stored if dtype == "auto" else getattr(torch, dtype)
        self.dtype = computed_in(self.weights_dtype, device)
        self.decoder = self.skeleton.get_decoder()
        self.num_layers = len(self.decoder.layers)
        self.decoder.rotary_emb = type(self.decoder.rotary_emb)(config=self.config)  # computed, not read
        fill_parameters(self.decoder.norm, {"weight": self._read("model.norm.weight")})
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
    def embedding(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Lend the embedding, read for the block."""
        embedding = copy.deepcopy(self.decoder.embed_tokens)
        for name, scale in embedding.named_buffers():  # computed, not read
            embedding.register_buffer(name, torch.empty_like(scale, device=self.device), persistent=False)
        self.skeleton._init_weights(embedding)  # the weight is on the meta device still
        fill_parameters(embedding, {"weight": self._brought(self._read(EMBEDDINGS))})
        yield lambda ids: entering(self.decoder, embedding(ids.to(self.device)))

    @contextmanager
    def layer(self, index: int) -> Iterator[DecoderModule]:
        """Lend decoder layer ``index``, and begin to read the next."""
        weights = self._take(index)
        with torch.device("meta"):
            layer = type(self.decoder.layers[index])(self.config, index)
        fill_parameters(layer, {name: self._brought(weight) for name, weight in weights.items()})
        del weights  # on the device now, or the layer's own
        try:
            with torch.no_grad():
                yield layer.eval()
        finally:
            for module in layer.modules():  # whoever still holds the layer holds no weights
                module._parameters.clear()

    @contextmanager
    def head(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Lend the function from hidden states to logits, its weight read for the block."""
        lm_head = copy.deepcopy(self.skeleton.lm_head)
        name = HEAD if HEAD in self._names else EMBEDDINGS
        fill_parameters(lm_head, {"weight": self._brought(self._read(name))})
        norm = copy.deepcopy(self.decoder.norm).to(self.device, self.dtype)
        with torch.no_grad():
            yield logits_of(self.skeleton, norm, lm_head)

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
        """Return the parameters of a layer by their names within it."""
        prefix = f"{LAYERS}{index}."
        weights = {name.removeprefix(prefix): self._read(name) for name in self._names if name.startswith(prefix)}
        if self.device.type != "cpu":  # which fetches pinned memory while it computes
            return {name: weight.pin_memory() for name, weight in weights.items()}
        return weights

    def _read(self, name: str) -> Tensor:
        return self._files.read(name, self.weights_dtype)

    def _brought(self, weight: Tensor) -> Tensor:
        return retyped(weight.to(self.device, non_blocking=True), self.weights_dtype, self.dtype)
