"""What ties the engine's parts together: where layers come from, where they go, and what a method does to them.

The engine owns *how*: order of layers, batches, hooks, sums over processes, timing, naming the layer in errors, resume.
A method never sees a file, a device choice or a process group, and the engine never looks at a method's name.
"""

import copy
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..core.curve_allocation import Curves
from ..core.mlp_nystrom import ENOUGH_TOKENS_PER_CHANNEL
from ..core.rank_allocation import ImportancePreservingRankSelector, RankAllocation
from ..errors import InputError
from ..utils.devices import at_least_float32
from ..utils.dimensions import Kept, LayerRecord, ModelDimensions
from ..utils.layer_utils import DecoderModule
from .storage import StatesStorage

logger = logging.getLogger(__name__)

Sums: TypeAlias = dict[str, Tensor]
QUERIES, KEYS = "self_attn.q_proj.output", "self_attn.k_proj.output"  # taps
CHANNELS = "mlp.down_proj.input"
STREAM, DENSE, HELD_OUT = "stream", "dense", "held out"  # what steps see beside taps if the method asks
TOKENS = "tokens"  # a sum: how many there were
LAYERS = "model.layers."  # as the model classes of all families name them
METRIC = "metric"  # beside sums, where measured: U, (D, D), so that ‖U e‖² is what an error e of the output costs


def zero_sums(layer: DecoderModule, shapes: Mapping[str, tuple[int, ...]]) -> Sums:
    """Return zeros of these shapes, float64, on the device of a layer."""
    device = layer.mlp.down_proj.weight.device
    return {name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in shapes.items()}


class Solution(NamedTuple):
    """New weights of a layer or of a part of it."""

    weights: dict[str, Tensor]  # by name within the layer, self_attn.v_proj.weight; what is not named stays
    eigenvalues: Tensor | None = None  # of the value heads, falling, (G, d), to be monitored


@dataclass(frozen=True)
class Step(ABC):
    """One pass of the calibration tokens through a layer or a part of it, and the weights that follow from it."""

    dimensions: ModelDimensions
    leaves: Kept  # what the layer keeps when this step is done; later steps look at that
    part: str = ""  # the pass goes through it, self_attn or mlp, norm and residual included; "": the whole layer

    @property
    @abstractmethod
    def taps(self) -> Sequence[str]:
        """What is looked at, ``mlp.down_proj.input`` or ``self_attn.v_proj.output``; the pass ends at the last."""

    @abstractmethod
    def shapes(self, layer: DecoderModule) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the sums over tokens, by name; the engine adds these up over batches and processes."""

    def zeros(self, layer: DecoderModule) -> Sums:
        """Return the sums before any token."""
        return zero_sums(layer, self.shapes(layer))

    @abstractmethod
    def add(self, layer: DecoderModule, sums: Sums, seen: Mapping[str, Tensor]) -> None:
        """Add a batch in place: what passed each tap, (tokens, width).

        If the method follows the dense model there are also ``STREAM``, what enters the part, and ``DENSE``, what
        leaves it in the dense model, (tokens, D), and ``HELD_OUT``, whether a token is to check a fit with, (tokens,).
        """

    @abstractmethod
    def solve(self, layer: DecoderModule, sums: Sums) -> Solution:
        """Return the layer's new weights; an ArithmeticError, to which the engine adds the layer, if there are none."""


class Method(Protocol):
    """How a layer is brought to what it keeps."""

    name: str
    importance_method: str  # what ranks are allocated by unless something else is asked for
    follows_dense: bool  # whether the dense model's stream is led on beside the compressed one
    prunes_pairs: bool = False  # Q and K are pruned by pairs, by damage, and not by factors, by scores
    weighs_errors: bool = False  # by ``METRIC``, where that is asked for

    def allocate(
        self,
        selector: ImportancePreservingRankSelector,
        scores: Sequence[float],
        curves: Sequence[Curves] | None,
        keep_ratio: float,
    ) -> RankAllocation:
        """Return what each layer keeps, so that ``keep_ratio``, in (0, 1], of their linear weights stays.

        There are curves of damage where ranks are to be allocated by them; else it is Importance-Preserving Rank
        Selection, unless a method has another.
        """
        return selector.allocate(scores, keep_ratio, curves)

    def words(self, prune_qk: bool) -> str:
        """Return what is done to a layer, for the model card."""
        return self.name

    def check(self, allocation: RankAllocation, tokens: int) -> None:
        """Refuse Q and K pruned in another way than the method's; warn where the tokens are too few for the MLP."""
        other = "query_key_rank" if self.prunes_pairs else "query_key_pairs"
        if any(allocation.per_layer(other)):
            kind = "two factors" if self.prunes_pairs else "rotary pairs"
            raise InputError(f"{self.name} does not prune Q and K by {kind}; allocate anew, or leave them whole")
        channels = allocation.dimensions.intermediate_size
        if tokens < ENOUGH_TOKENS_PER_CHANNEL * channels:
            logger.warning("%d calibration tokens are few for %d MLP channels; give more tokens", tokens, channels)

    def steps(self, dimensions: ModelDimensions, kept: Kept) -> Sequence[Step]:
        """Return the passes that bring one layer to what it keeps; none for a layer that stays whole."""


class LayerSource(ABC):
    """Where the walk gets a model's parts from; each is lent ready to run on ``device``."""

    dtype: torch.dtype  # of hidden states and of weights that are lent
    weights_dtype: torch.dtype  # of the weights at home, and of the compressed ones there
    home: torch.device  # of the embeddings: the rows that are looked up are less to move

    def __init__(self, model: PreTrainedModel, device: torch.device, storage: StatesStorage | None = None) -> None:
        self.model, self.config = model, model.config  # weights of the model may be missing
        self.decoder: Any = model.get_decoder()  # knows what it passes to its layers
        self.num_layers = len(self.decoder.layers)
        self.device, self.storage = device, storage or StatesStorage()

    @abstractmethod
    def lent(self, part: str, device: torch.device) -> AbstractContextManager[DecoderModule]:
        """Lend a part of the model by its name, for evaluation on ``device``."""

    @contextmanager
    def embedding(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Lend the function from ids, (batch, S), to the hidden states that enter layer 0, (batch, S, D)."""
        scale = getattr(self.decoder, "embedding_multiplier", 1)  # Granite's
        with self.lent("model.embed_tokens", self.home) as embedding:
            yield lambda ids: (embedding(ids.to(self.home)) * scale).to(self.device)

    def layer(self, index: int) -> AbstractContextManager[DecoderModule]:
        """Lend decoder layer ``index``."""
        return self.lent(f"{LAYERS}{index}", self.device)

    @contextmanager
    def head(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Lend the function from the last layer's output to logits, final norm included."""
        with self.lent("model.norm", self.device) as norm, self.lent("lm_head", self.device) as lm_head:
            yield logits_of(self.model, norm, lm_head)


def logits_of(model: PreTrainedModel, norm: nn.Module, lm_head: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return the model's own function from the last layer's output, (rows, D), to logits: some scale or cap these.

    They are in float32 at least.
    """
    head: Any = copy.copy(model)  # without its modules
    head._modules = {"lm_head": lm_head}
    head.model = lambda inputs_embeds, **_: BaseModelOutputWithPast(last_hidden_state=norm(inputs_embeds))
    forward = partial(type(model).forward, head, return_dict=True)
    return lambda states: at_least_float32(forward(inputs_embeds=states[None]).logits[0])


class LayerSink(Protocol):
    """Where compressed layers go."""

    @property
    def finished(self) -> Mapping[int, LayerRecord]:
        """Layers that are there, the same in every process; an earlier run may have put them."""

    def put(self, index: int, layer: DecoderModule, record: LayerRecord) -> None:
        """Take compressed layer ``index``."""

    def weights(self, index: int) -> dict[str, Tensor]:
        """Return the parameters of a finished layer."""
