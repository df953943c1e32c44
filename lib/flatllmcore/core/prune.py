"""Steps 3 to 6 of the method, layer by layer: statistics, solve, replace, and on with the compressed output."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig

from ..errors import InputError
from ..layers.flat_attention import FlatDecoderLayer
from ..layers.replacement import compress_decoder_layer, compressed_config, empty_decoder_layer, fill_parameters
from ..utils.layer_utils import DecoderModule
from ..utils.processes import is_first_process, joined_shares, own_share, tensors_of_first
from ..utils.progress import progress
from .attention_pca import headwise_pca, project_heads, project_output, rank_for_mass
from .calibration import LayerSink, LayerSource, lent_layer
from .hidden_states import HiddenStates
from .mlp_nystrom import few_tokens_jitter, reconstruct_down_projection, select_channels
from .moments import LayerMoments, collect_moments, sum_moments
from .rank_allocation import RankAllocation
from .stopwatch import Stopwatch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerRecord:
    """What was done to one layer.

    Attributes:
        query_key_rank: Rank per head of Q and K; ``None`` where they stay whole.
        rank_at_tolerance: Mean over heads of the rank that would keep the monitored share of eigenvalue
            mass; ``None`` for a layer that was left whole, whose moments nobody needs.
        elapsed_s: ``None`` for a layer that an earlier run finished.
    """

    layer: int
    keep: float
    value_rank: int
    mlp_width: int
    query_key_rank: int | None
    rank_at_tolerance: float | None
    elapsed_s: float | None


@torch.no_grad()
def compress_layers(
    source: LayerSource,
    sink: LayerSink,
    windows: Tensor,
    allocation: RankAllocation,
    *,
    batch_size: int,
    tolerance: float,
    stopwatch: Stopwatch,
) -> tuple[PretrainedConfig, list[LayerRecord]]:
    """Compress every decoder layer of ``source`` into ``sink``.

    Layer ``l`` sees what left the already compressed layers before it; its statistics come from its own
    dense weights. Each layer costs one forward pass for the statistics and one of the compressed layer;
    one that the sink has from an earlier run costs the latter alone.

    Args:
        source: The dense model.
        sink: Takes each layer when it is done.
        windows: Calibration token ids, (N, S).
        allocation: Ranks and widths per layer, and whether Q and K are pruned too.
        batch_size: Windows run at a time; the result depends on it only by rounding.
        tolerance: Share of eigenvalue mass to monitor, in (0, 1]; changes nothing.
        stopwatch: Counts the stages ``read``, ``forward``, ``moments``, ``reduce``, ``solves`` and ``write``.

    Returns:
        The compressed model's config, and one record per layer.

    Raises:
        InputError: If a layer's activations are not finite.
    """
    check_calibration_tokens(windows, allocation)
    flat_config = compressed_config(
        source.config, allocation.value_rank, allocation.mlp_width, allocation.query_key_rank
    )
    unfinished = [index for index in range(source.num_layers) if index not in sink.finished]
    if not unfinished:
        return flat_config, [sink.finished[index] for index in range(source.num_layers)]
    hidden = HiddenStates.embed(source, own_share(windows), batch_size)
    for index in progress(range(unfinished[-1] + 1), "compress", "layer"):
        if index in sink.finished:
            _advance(hidden, _finished_layer(flat_config, index, sink, source.device), index, stopwatch)
        else:
            _compress_layer(source, sink, hidden, index, flat_config, allocation, tolerance, stopwatch)
    return flat_config, [sink.finished[index] for index in range(source.num_layers)]


def check_calibration_tokens(windows: Tensor, allocation: RankAllocation) -> None:
    """Warn where the calibration tokens are too few for the MLP to be solved exactly."""
    width = allocation.dimensions.intermediate_size
    jitter = few_tokens_jitter(windows.numel(), width)
    if jitter:
        logger.warning(
            "%d calibration tokens are few for %d MLP channels: the MLP is solved with %.3f of each channel's "
            "energy added; give more tokens",
            windows.numel(),
            width,
            jitter,
        )


def _compress_layer(
    source: LayerSource,
    sink: LayerSink,
    hidden: HiddenStates,
    index: int,
    flat_config: PretrainedConfig,
    allocation: RankAllocation,
    tolerance: float,
    stopwatch: Stopwatch,
) -> None:
    """Compress one layer into ``sink``; a function of its own, so that no layer outlives its turn."""
    started = time.perf_counter()
    with lent_layer(source, index, stopwatch) as dense:
        weights, rank_at_tolerance = _solve(dense, hidden, index, allocation, tolerance, stopwatch)
        compressed = compress_decoder_layer(dense, flat_config, index, weights)
        del weights  # the layer has copies
        _advance(hidden, compressed, index, stopwatch)
    record = LayerRecord(
        layer=index,
        keep=allocation.keep[index],
        value_rank=allocation.value_rank[index],
        mlp_width=allocation.mlp_width[index],
        query_key_rank=allocation.query_key_rank[index],
        rank_at_tolerance=rank_at_tolerance,
        elapsed_s=round(time.perf_counter() - started, 3),
    )
    with stopwatch.stage("write"):
        sink.put(index, compressed, record)
    _log(record, allocation, tolerance)


def _solve(
    dense: DecoderModule,
    hidden: HiddenStates,
    index: int,
    allocation: RankAllocation,
    tolerance: float,
    stopwatch: Stopwatch,
) -> tuple[dict[str, Tensor], float | None]:
    """Return what :func:`solve_layer` makes of all processes' hidden states; nothing for a layer that stays whole."""
    dimensions = allocation.dimensions
    rank, width = allocation.value_rank[index], allocation.mlp_width[index]
    query_key_rank = allocation.query_key_rank[index]
    if rank == dimensions.head_dim and width == dimensions.intermediate_size:
        return {}, None
    with collect_moments(dense, dimensions, stopwatch, with_queries_and_keys=query_key_rank is not None) as moments:
        for batch in hidden.batches():
            with stopwatch.stage("forward"):
                hidden.run(dense, index, batch)
    with stopwatch.stage("reduce"):
        sum_moments(moments)
    with stopwatch.stage("solves"), _naming_layer(index):
        return solve_layer(dense, moments, rank, width, query_key_rank, tolerance)


def _advance(hidden: HiddenStates, layer: FlatDecoderLayer, index: int, stopwatch: Stopwatch) -> None:
    """Run all hidden states through compressed layer ``index``."""
    for batch in hidden.batches():
        with stopwatch.stage("forward"):
            batch.replace(hidden.run(layer, index, batch))


def _finished_layer(
    flat_config: PretrainedConfig, index: int, sink: LayerSink, device: torch.device
) -> FlatDecoderLayer:
    layer = empty_decoder_layer(flat_config, index).eval()
    fill_parameters(layer, {name: weight.to(device) for name, weight in sink.weights(index).items()})
    return layer


def solve_layer(
    layer: DecoderModule, moments: LayerMoments, rank: int, width: int, query_key_rank: int | None, tolerance: float
) -> tuple[dict[str, Tensor], float | None]:
    """Return the weights that change, and the mean rank that would keep ``tolerance`` of the eigenvalue mass.

    A rank equal to the head width leaves V and O as they are, a full width the MLP, and no rank Q and K.
    The weights are in the layer's dtype, under their names within the layer, and the same in all processes. The first
    process solves the attention, little beside the MLP, since the signs of eigenvectors are anybody's choice; the mean
    rank is its alone, None in the others.
    """
    weights: dict[str, Tensor] = {}
    rank_at_tolerance = None
    if is_first_process():
        eigenvalues, directions = headwise_pca(moments.value)
        rank_at_tolerance = rank_for_mass(eigenvalues, tolerance)
        if rank < directions.shape[-1]:
            weights |= _compress_values(layer.self_attn, directions[..., :rank])
        if query_key_rank is not None:
            weights |= _factor_queries_and_keys(layer.self_attn, moments, query_key_rank)
    dtype = layer.mlp.down_proj.weight.dtype
    weights = tensors_of_first({name: weight.to(dtype) for name, weight in weights.items()}, moments.mlp.device)
    if width < len(moments.mlp):
        weights |= _compress_mlp(layer.mlp, moments, width)
    return weights, rank_at_tolerance


def _compress_values(attention: DecoderModule, bases: Tensor) -> dict[str, Tensor]:
    v_proj, o_proj = attention.v_proj, attention.o_proj
    weights = {
        "self_attn.v_proj.weight": project_heads(v_proj.weight, bases),
        "self_attn.o_proj.weight": project_output(o_proj.weight, bases),
    }
    if v_proj.bias is not None:
        weights["self_attn.v_proj.bias"] = project_heads(v_proj.bias, bases)
    return weights


def _factor_queries_and_keys(attention: DecoderModule, moments: LayerMoments, rank: int) -> dict[str, Tensor]:
    weights = {}
    for name, moment in moments.query_key.items():
        bases = headwise_pca(moment, name)[1][..., :rank]  # (H or G, d, r)
        projection = attention.get_submodule(name)
        weights[f"self_attn.{name}.up"] = bases
        weights[f"self_attn.{name}.down.weight"] = project_heads(projection.weight, bases)
        if projection.bias is not None:
            weights[f"self_attn.{name}.down.bias"] = project_heads(projection.bias, bases)
    return weights


def _compress_mlp(mlp: DecoderModule, moments: LayerMoments, width: int) -> dict[str, Tensor]:
    down_weight = mlp.down_proj.weight
    kept = select_channels(moments.mlp, width)
    rows = reconstruct_down_projection(
        own_share(down_weight), moments.mlp, kept, jitter=few_tokens_jitter(moments.tokens, len(moments.mlp))
    )
    weights = {"mlp.down_proj.weight": joined_shares(rows.to(down_weight.dtype), len(down_weight))}
    for name, projection in (("gate_proj", mlp.gate_proj), ("up_proj", mlp.up_proj)):
        weights[f"mlp.{name}.weight"] = projection.weight[kept]
        if projection.bias is not None:
            weights[f"mlp.{name}.bias"] = projection.bias[kept]
    return weights


@contextmanager
def _naming_layer(index: int) -> Iterator[None]:
    """Turn numerical trouble inside the block into an error that names the layer."""
    try:
        yield
    except (ArithmeticError, torch.linalg.LinAlgError) as error:
        raise InputError(f"layer {index} cannot be compressed: {error}") from error


def _log(record: LayerRecord, allocation: RankAllocation, tolerance: float) -> None:
    dimensions = allocation.dimensions
    queries_and_keys = ""
    if allocation.prune_qk:
        queries_and_keys = f", Q and K {'whole' if record.query_key_rank is None else 'too'}"
    monitored = ""
    if record.rank_at_tolerance is not None:
        monitored = f" ({record.rank_at_tolerance:.1f} would keep {tolerance:g} of the mass)"
    logger.info(
        "layer %d: keep %.3f, rank %d/%d%s%s, mlp %d/%d, %.1f s",
        record.layer,
        record.keep,
        record.value_rank,
        dimensions.head_dim,
        monitored,
        queries_and_keys,
        record.mlp_width,
        dimensions.intermediate_size,
        record.elapsed_s,
    )
