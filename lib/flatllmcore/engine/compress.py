"""The loop that compresses, whatever the method: statistics, solve, replace, and on with the compressed output."""

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PretrainedConfig

from ..core.attention_pca import rank_for_mass
from ..core.rank_allocation import RankAllocation
from ..layers import replacement
from ..utils.devices import retyped
from ..utils.layer_utils import WRITERS, DecoderModule, stored_tensors
from ..utils.processes import all_reduce, broadcast
from ..utils.progress import progress
from ..utils.stopwatch import stage
from .protocols import DENSE, HELD_OUT, METRIC, STREAM, LayerRecord, LayerSink, LayerSource, Method, Solution, Step
from .reuse import with_part, written
from .walk import Walk, check_finite, forward_of, lent_layer, solves, tapped

logger = logging.getLogger(__name__)

PARTS = ("self_attn", "mlp")  # of a layer, in order


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
    metrics: Tensor | None = None,
) -> tuple[PretrainedConfig, list[LayerRecord]]:
    """Compress every decoder layer of ``source`` into ``sink``; return the compressed config and a record per layer.

    Each layer sees what left the already compressed ones before it; its statistics come from its own dense weights. It
    costs one forward pass per step of the method, and what these leave of one compressed (see ``reuse.py``); one that
    the sink has from an earlier run costs no more, and no solve of what it holds. The result depends on ``batch_size``,
    windows of ``windows``, (N, S), run at a time, only by rounding, and not on ``tolerance``, the share of eigenvalue
    mass that is monitored. ``metrics``, (L, D, D), where there are some, say what errors of a layer's output cost:
    steps find theirs as ``METRIC`` beside their sums. Stages counted: ``read``, ``forward``, ``moments``,
    ``reduce``, ``solves`` and ``write``.
    InputError if a layer's activations are not finite, or a layer cannot be solved.
    """
    method.check(allocation, windows.numel())
    flat_config = replacement.compressed_config(source.config, allocation.layers, allocation.shape)
    unfinished = [index for index in range(source.num_layers) if index not in sink.finished]
    if unfinished:
        dense_walk = Walk(source, windows, batch_size) if method.follows_dense else None
        walk, last = Walk(source, windows, batch_size), unfinished[-1]
        loop = _Loop(walk, dense_walk, sink, method, allocation, flat_config, tolerance, last, metrics)
        for index in progress(range(last + 1), "compress", "layer"):
            if index in sink.finished:
                loop.skip(index)
            else:
                loop.compress(index)
    return flat_config, [sink.finished[index] for index in range(source.num_layers)]


@dataclass(frozen=True)
class _Loop:
    walk: Walk
    dense_walk: Walk | None  # the dense model's stream, where the method follows it
    sink: LayerSink
    method: Method
    allocation: RankAllocation
    flat_config: PretrainedConfig
    tolerance: float
    last: int  # layer to do, behind which nobody asks for hidden states
    metrics: Tensor | None

    def skip(self, index: int) -> None:
        """Lead the hidden states through a layer that is finished, as they were led when it was."""
        weights = {name: weight.to(self.walk.source.device) for name, weight in self.sink.weights(index).items()}
        with lent_layer(self.walk.source, index) as dense:
            self._compressed(index, dense, weights)

    def compress(self, index: int) -> None:
        """Compress one layer into the sink, and lead the hidden states through it."""
        started = time.perf_counter()
        with lent_layer(self.walk.source, index) as dense:
            compressed, eigenvalues = self._compressed(index, dense)
        kept, sizes = self.allocation.layers[index], self.allocation.dimensions
        rank = None if eigenvalues is None else rank_for_mass(eigenvalues, self.tolerance)
        elapsed_s = round(time.perf_counter() - started, 3)
        record = LayerRecord(**asdict(kept), layer=index, rank_at_tolerance=rank, elapsed_s=elapsed_s)
        with stage("write"):
            for weight in stored_tensors(compressed).values():
                weight.data = self._at_home(weight.data)
            self.sink.put(index, compressed, record)
        monitored = "" if rank is None else f" ({rank:.1f} would keep {self.tolerance:g} of the mass)"
        query_key = "" if kept.query_key_rank is None else f", Q and K {kept.query_key_rank}"
        if kept.query_key_pairs is not None:
            query_key = f", Q and K {2 * kept.query_key_pairs}/{sizes.head_dim}"
        parts = f"rank {kept.value_rank}/{sizes.head_dim}{monitored}{query_key}"
        parts += f", mlp {kept.mlp_width}/{sizes.intermediate_size}"
        logger.info("layer %d: keep %.3f, %s, %.1f s", index, kept.keep, parts, elapsed_s)

    def _compressed(
        self, index: int, dense: DecoderModule, finished: Mapping[str, Tensor] | None = None
    ) -> tuple[DecoderModule, Tensor | None]:
        """Return a compressed layer, behind which the hidden states are then, and the monitored eigenvalues.

        Those of the last layer to do stay where they are: nobody asks for them. Of a layer that is ``finished``, what
        leaves a part is not solved for again.
        """
        steps = self.method.steps(self.allocation.dimensions, self.allocation.layers[index])
        layer = before = dense
        eigenvalues = None
        for part in PARTS if any(step.part for step in steps) else ("",):
            if self.dense_walk is not None and (steps or index != self.last):
                self.dense_walk.advance(dense, index, part)
            read = None
            for step in (of_part := [step for step in steps if step.part == part]):
                before, is_last = layer, step is of_part[-1]
                if is_last and finished is not None:
                    solution = Solution({name: weight for name, weight in finished.items() if name.startswith(part)})
                else:
                    read = self.walk.room(layer.get_submodule(WRITERS[part]).in_features) if is_last else None
                    solution = self._solved(index, layer, step, read)
                eigenvalues = eigenvalues if solution.eigenvalues is None else solution.eigenvalues
                layer = self._with_solution(index, layer, step, solution)
                del solution  # the layer has copies
            if index == self.last and part != "self_attn":
                break
            self._advance(index, before, layer, part, read)
        return replacement.compress_decoder_layer(layer, self.flat_config, index, {}), eigenvalues

    def _advance(self, index: int, before: DecoderModule, after: DecoderModule, part: str, read: Tensor | None) -> None:
        """Lead the hidden states through a part: a product of what its writer ``read`` before, where it is one."""
        rounded_to = self._at_home(after.self_attn.v_proj.weight[:0]).dtype
        stand_in = None if before is after else written(before, after, part, rounded_to)
        if stand_in is None:
            if before is not after:
                logger.info("layer %d: %s is computed again", index, WRITERS[part].partition(".")[0])
            self.walk.advance(after, index, part)
            return
        tap = f"{WRITERS[part]}.input"
        layer = with_part(after, tap.partition(".")[0], stand_in)
        forward, anew = forward_of(layer, part), forward_of(before, part)
        with tapped(before, [tap]) as look:
            for (states, stored), kept in zip(self.walk.batches(), self.walk.split(read), strict=False):
                found = look(partial(self.walk.run, anew, index, states))[tap] if kept is None else kept
                stand_in.read = found.view(*states.shape[:2], -1)
                stored.copy_(self.walk.run(forward, index, states))

    def _with_solution(self, index: int, layer: DecoderModule, step: Step, solution: Solution) -> DecoderModule:
        """Return the layer as a step leaves it: a compressed one, or the same with another part."""
        layers = list(self.allocation.layers)
        layers[index] = step.leaves
        config = replacement.compressed_config(self.walk.source.config, layers)
        part = replacement.compress_decoder_layer(layer, config, index, solution.weights, step.part)
        stored = stored_tensors(part)
        for name in solution.weights:
            weight = stored[name.removeprefix(f"{step.part}.")]
            home = self._at_home(weight)
            broadcast(home)  # one for all: the signs of eigenvectors are anybody's choice
            check_finite(index, home, f"{name} in {home.dtype}")
            weight.copy_(home)  # as it is going to be read, whatever is computed in
        return with_part(layer, step.part, part) if step.part else part

    def _at_home(self, weight: Tensor) -> Tensor:
        """Return a weight in the type of the source's own ones."""
        return retyped(weight, self.walk.source.dtype, self.walk.source.weights_dtype)

    def _solved(self, index: int, layer: DecoderModule, step: Step, read: Tensor | None) -> Solution:
        """Return the solution of a step, by its sums over the windows of all processes.

        Where there is room for it, ``read`` is then what the part's writer reads.
        """
        sums, tap = step.zeros(layer), f"{WRITERS[step.part]}.input"
        forward = forward_of(layer, "mlp") if step.part == "mlp" else layer  # as far as the last tap
        with tapped(layer, step.taps if read is None else {*step.taps, tap}) as look:
            for (states, beside), stored in zip(self._batches(), self.walk.split(read), strict=False):
                seen = look(partial(self.walk.run, forward, index, states))
                if stored is not None:
                    stored.copy_(seen[tap].view_as(stored))
                with stage("moments"):
                    step.add(layer, sums, {**seen, **beside})
        with stage("reduce"):
            for total in sums.values():
                all_reduce(total)
                check_finite(index, total)
        if self.metrics is not None:
            sums[METRIC] = self.metrics[index].to(self.walk.source.device)
        with solves(index):
            return step.solve(layer, sums)

    def _batches(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Yield the hidden states of each batch, and what steps see beside their taps if the method asks."""
        if self.dense_walk is None:
            yield from ((states, {}) for states, _ in self.walk.batches())
            return
        batches = self.walk.batches(), self.dense_walk.batches(), self.walk.is_held_out.split(self.walk.batch_size)
        for (states, _), (dense, _), is_held_out in zip(*batches, strict=False):
            rows = is_held_out.repeat_interleave(states.shape[1])  # on the host, which need not wait for the device
            yield states, {STREAM: states.flatten(0, 1), DENSE: dense.flatten(0, 1), HELD_OUT: rows}
