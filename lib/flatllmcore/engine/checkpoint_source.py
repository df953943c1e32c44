"""A checkpoint's files as source of the walk: layers are read as they are needed, and kept where memory allows."""

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError
from ..layers.replacement import fill_parameters
from ..utils.layer_utils import DecoderModule, load_config
from ..utils.loading import FINGERPRINT_ROWS, WeightFiles, check_weights, empty_causal_lm, weights_fingerprint
from .memory import layer_arguments
from .storage import StatesStorage

_COMPUTED = re.compile(r"rotary_emb\.inv_freq$")  # in old checkpoints, and never read


class CheckpointSource:
    """The checkpoint of a dense or compressed model, its weights read from safetensors when they are needed.

    Host memory holds one decoder layer (a second one while it is read ahead), or the embeddings, or the head; or, where
    ``is_kept``, all layers that have been read so far. Weights are cast to ``dtype`` as they are read; ``auto`` is the
    checkpoint's own.

    Raises:
        InputError: If weights are missing, damaged or of other shapes than the config says.
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
        config = load_config(model, cache_dir)
        self._files = WeightFiles(model, cache_dir)
        self.dtype = (config.dtype or self._files.dtype) if dtype == "auto" else getattr(torch, dtype)
        config.dtype = self.dtype
        self.skeleton = empty_causal_lm(config)
        self.config = self.skeleton.config
        self._decoder = self.skeleton.get_decoder()
        self.num_layers = len(self._decoder.layers)
        self._prefix = f"{self.skeleton.base_model_prefix}."
        self._names = [name for name, _ in self.skeleton.named_parameters()]  # tied ones once
        self._check_weights(model)
        self._decoder.rotary_emb = type(self._decoder.rotary_emb)(config=self.config)  # computed, not read
        fill_parameters(self._decoder.norm, self._read_part(f"{self._prefix}norm."))
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="layer-reader")
        self._ahead: tuple[int, Future[dict[str, Tensor]]] | None = None
        self._kept: dict[int, dict[str, Tensor]] = {}

    def _check_weights(self, model: str) -> None:
        """Refuse weights that are not the config's, and a head of its own where the config says there is none."""
        expected = {name: tuple(parameter.shape) for name, parameter in self.skeleton.named_parameters()}
        found = self._files.shapes
        known = expected.keys() | self.skeleton.state_dict().keys()
        loading_info = {
            "missing_keys": [name for name in expected if name not in found],
            "unexpected_keys": [name for name in found if name not in known and not _COMPUTED.search(name)],
            "mismatched_keys": [name for name, shape in expected.items() if found.get(name, shape) != shape],
        }
        check_weights(model, loading_info)
        embeddings, head = f"{self._prefix}embed_tokens.weight", "lm_head.weight"
        if head in self._names or head not in self._files.shapes:
            return
        weights = self._files.read([embeddings, head])
        if not torch.equal(weights[embeddings], weights[head]):
            raise InputError(
                f"checkpoint {model!r} has an {head} that differs from its embeddings, but tie_word_embeddings is true "
                "in config.json; set it to false, or remove the weight"
            )

    def fingerprint(self) -> str:
        """Return what :func:`weights_fingerprint` says of the decoder's matrices; reads their first rows alone."""
        names = [n for n, p in self.skeleton.named_parameters() if p.ndim == 2 and n.startswith(self._prefix)]
        return weights_fingerprint(self._files.leading_rows(names, FINGERPRINT_ROWS))

    def weights_beside_layers(self) -> Iterator[dict[str, Tensor]]:
        """Yield the embeddings, then the final norm and the head, by name, in the run's dtype; a tied head once."""
        beside = [name for name in self._names if not name.startswith(f"{self._prefix}layers.")]
        yield self._read(beside[:1])
        yield self._read(beside[1:])

    @contextmanager
    def embedding(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Lend the embedding, read for the block."""
        weight = next(iter(self._read([f"{self._prefix}embed_tokens.weight"]).values())).to(self.device)
        yield lambda ids: F.embedding(ids.to(self.device), weight)

    def layer_arguments(self, seqlen: int) -> list[dict[str, Any]]:
        """Return what the model passes to each layer."""
        return layer_arguments(self._decoder, seqlen, self.device)

    @contextmanager
    def layer(self, index: int) -> Iterator[DecoderModule]:
        """Lend decoder layer ``index``, and begin to read the next."""
        weights = self._take(index)
        with torch.device("meta"):
            layer = type(self._decoder.layers[index])(self.config, index)
        fill_parameters(layer, {name: weight.to(self.device, non_blocking=True) for name, weight in weights.items()})
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
        is_tied = "lm_head.weight" not in self._names
        name = f"{self._prefix}embed_tokens.weight" if is_tied else "lm_head.weight"
        weight = self._read([name])[name].to(self.device)
        norm = copy.deepcopy(self._decoder.norm).to(self.device)
        with torch.no_grad():
            yield lambda states: F.linear(norm(states), weight)

    def _take(self, index: int) -> dict[str, Tensor]:
        """Return the parameters of layer ``index``, and begin to read those of the next."""
        if index in self._kept:
            return self._kept[index]
        if self._ahead is None or self._ahead[0] != index:
            self._ahead = index, self._reader.submit(self._read_layer, index)
        weights = self._ahead[1].result()
        self._ahead = None
        if self.is_kept:
            self._kept[index] = weights
        if index + 1 < self.num_layers and index + 1 not in self._kept:
            self._ahead = index + 1, self._reader.submit(self._read_layer, index + 1)
        return weights

    def _read_layer(self, index: int) -> dict[str, Tensor]:
        weights = self._read_part(f"{self._prefix}layers.{index}.")
        if self.device.type == "cuda":  # which fetches pinned memory while it computes
            return {name: weight.pin_memory() for name, weight in weights.items()}
        return weights

    def _read_part(self, prefix: str) -> dict[str, Tensor]:
        """Return the parameters of a part of the model by their names within it."""
        read = self._read([name for name in self._names if name.startswith(prefix)])
        return {name.removeprefix(prefix): weight for name, weight in read.items()}

    def _read(self, names: Sequence[str]) -> dict[str, Tensor]:
        return {name: weight.to(self.dtype) for name, weight in self._files.read(names).items()}
