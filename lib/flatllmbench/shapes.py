"""Models with random weights, dense and compressed, from a config alone: what they cost does not depend on weights."""

from collections.abc import Iterator, Sequence

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from flatllmcore.core.rank_allocation import ImportancePreservingRankSelector
from flatllmcore.layers import compressed_config
from flatllmcore.utils.layer_utils import dimensions_from_config


def compressed_shapes(
    config: PretrainedConfig, name: str, ratios: Sequence[int], rank_multiples: Sequence[int | None]
) -> Iterator[tuple[str, PretrainedConfig]]:
    """Yield a name and a compressed config for each ratio and, within it, each multiple of ranks and widths.

    Importance falls from both ends of the model to its middle, by less than a quarter, about as it does in trained
    ones: ranks then differ from layer to layer, where equal scores would give all layers one rank, which
    might happen to suit the hardware or not.

    Args:
        config: Of the dense model.
        name: Of the dense model.
        ratios: Percentages of decoder-layer linear weights to remove.
        rank_multiples: 1 for the published floors, None for the default.

    Raises:
        InputError: If the model is not a dense one of a supported family, or a ratio cannot be met.
    """
    dimensions = dimensions_from_config(config)
    last = max(dimensions.num_layers - 1, 1)
    scores = [1 + 0.3 * abs(2 * index / last - 1) for index in range(dimensions.num_layers)]
    for percent in ratios:
        for multiple in rank_multiples:
            selector = ImportancePreservingRankSelector(dimensions, rank_multiple=multiple)
            allocation = selector.allocate(scores, percent)
            suffix = f"-m{multiple}" if len(rank_multiples) > 1 else ""
            flat_config = compressed_config(config, allocation.value_rank, allocation.mlp_width)
            yield f"{name}-{percent}{suffix}", flat_config


def random_model(config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Return a model of ``config`` on ``device``, its weights drawn as before training."""
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)
