"""The loop that compresses, whatever the method: statistics, solve, replace, and on with the compressed output."""

import logging
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PretrainedConfig

from ..core.attention_pca import rank_for_mass
from ..core.rank_allocation import RankAllocation
from ..errors import InputError
from ..layers import replacement
from ..utils.layer_utils import DecoderModule
from ..utils.processes import all_reduce, broadcast
from ..utils.progress import progress
from ..utils.stopwatch import stage
from .protocols import LayerRecord, LayerSink, LayerSource, Method, Step, Sums
from .walk import Walk, check_finite, lent_layer, tapped

logger = logging.getLogger(__name__)


@torch.no_grad()
def compress_layers(
    source: LayerSource,
    sink: LayerSink,
    windows: Tensor,
    method: Method,
    allocation: RankAllocation,
    *,
    batch_size: int,
    tolerance: float,
) -> tuple[PretrainedConfig, list[LayerRecord]]:
    """Compress every decoder layer of ``source`` into ``sink``; return the compressed config and a record per layer.

    Each layer sees what left the already compressed ones before it; its statistics come from its own dense weights. It
    costs one forward pass per step of the method and one compressed; one that the sink has from an earlier run costs
    the latter alone. The result depends on ``batch_size``, windows of ``windows``, (N, S), run at a time, only by
    rounding, and not on ``tolerance``, the share of eigenvalue mass that is monitored. Stages counted: ``read``,
    ``forward``, ``moments``, ``reduce``, ``solves`` and ``write``.

    Raises:
        InputError: If a layer's activations are not finite, or a layer cannot be solved.
    """
    method.check_calibration(allocation.dimensions, windows.numel())
    flat_config = replacement.compressed_config(source.config, allocation.layers)
    unfinished = [index for index in range(source.num_layers) if index not in sink.finished]
    if unfinished:
        loop = _Loop(Walk(source, windows, batch_size), sink, method, allocation, flat_config, tolerance)
        for index in progress(range(unfinished[-1] + 1), "compress", "layer"):
            if index in sink.finished:
                loop.skip(index)
            else:
                loop.compress(index)
    return flat_config, [sink.finished[index] for index in range(source.num_layers)]


@dataclass(frozen=True)
class _Loop:
    walk: Walk
    sink: LayerSink
    method: Method
    allocation: RankAllocation
    flat_config: PretrainedConfig
    tolerance: float

    def skip(self, index: int) -> None:
        """Lead the hidden states through a layer that is finished."""
        layer = replacement.empty_decoder_layer(self.flat_config, index).eval()
        weights = {name: weight.to(self.walk.source.device) for name, weight in self.sink.weights(index).items()}
        replacement.fill_parameters(layer, weights)
        self.walk.advance(layer, index)

    def compress(self, index: int) -> None:
        """Compress one layer into the sink, and lead the hidden states through it."""
        started = time.perf_counter()
        with lent_layer(self.walk.source, index) as dense:
            weights, eigenvalues = self._solved(index, dense)
            compressed = replacement.compress_decoder_layer(dense, self.flat_config, index, weights)
            for name in weights:  # one solution for all: the signs of eigenvectors are anybody's choice
                broadcast(compressed.get_parameter(name))
            del weights  # the layer has copies
            self.walk.advance(compressed, index)
        kept, sizes = self.allocation.layers[index], self.allocation.dimensions
        rank = None if eigenvalues is None else rank_for_mass(eigenvalues, self.tolerance)
        elapsed_s = round(time.perf_counter() - started, 3)
        record = LayerRecord(**asdict(kept), layer=index, rank_at_tolerance=rank, elapsed_s=elapsed_s)
        with stage("write"):
            self.sink.put(index, compressed, record)
        monitored = "" if rank is None else f" ({rank:.1f} would keep {self.tolerance:g} of the mass)"
        query_key = "" if kept.query_key_rank is None else f", Q and K {kept.query_key_rank}"
        parts = f"rank {kept.value_rank}/{sizes.head_dim}{monitored}{query_key}"
        parts += f", mlp {kept.mlp_width}/{sizes.intermediate_size}"
        logger.info("layer %d: keep %.3f, %s, %.1f s", index, kept.keep, parts, elapsed_s)

    def _solved(self, index: int, dense: DecoderModule) -> tuple[dict[str, Tensor], Tensor | None]:
        """Return a layer's new weights by name, and the eigenvalues that are monitored."""
        weights: dict[str, Tensor] = {}
        eigenvalues = None
        steps = self.method.steps(self.allocation.dimensions, self.allocation.layers[index])
        with ExitStack() as parts:
            for step in steps:
                sums = self._summed(index, dense, step)
                try:
                    with stage("solves"):
                        solution = step.solve(dense, sums)
                except (ArithmeticError, torch.linalg.LinAlgError) as error:
                    raise InputError(f"layer {index} cannot be compressed: {error}") from error
                weights |= solution.weights
                eigenvalues = eigenvalues if solution.eigenvalues is None else solution.eigenvalues
                if step is not steps[-1]:  # later ones look at what this one leaves
                    part = replacement.compress_decoder_layer(
                        dense, self.flat_config, index, solution.weights, step.part
                    )
                    for parameter in part.parameters():
                        broadcast(parameter)
                    parts.callback(dense.set_submodule, step.part, dense.get_submodule(step.part))
                    dense.set_submodule(step.part, part)
        return weights, eigenvalues

    def _summed(self, index: int, layer: DecoderModule, step: Step) -> Sums:
        """Return the sums of a step over the windows of all processes."""
        sums = step.zeros(layer)
        with tapped(layer, step.taps) as look:
            for states, _ in self.walk.batches():
                seen = look(partial(self.walk.run, layer, index, states))
                with stage("moments"):
                    step.add(sums, seen)
        with stage("reduce"):
            for total in sums.values():
                all_reduce(total)
                check_finite(index, total)
        return sums
