"""Step 7 of the method: perplexity over non-overlapping windows, layer by layer."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..utils.processes import all_reduce
from ..utils.progress import progress
from ..utils.stopwatch import stage
from .protocols import LayerSource
from .walk import Walk, lent_layer

LOGIT_ROWS = 1024  # a vocabulary of 128,256 makes half a gigabyte of float32 of them


@torch.no_grad()
def perplexity(source: LayerSource, windows: Tensor, batch_size: int) -> float:
    """Return the perplexity of ``source``, dense or compressed, on token ids (N, S), each window's but its first.

    Losses are summed in float32 over 1024 of them, in float64 beyond; one too large for ``exp`` gives infinity.
    """
    with stage("perplexity", is_whole=True):
        walk = Walk(source, windows, batch_size)
        for index in progress(range(source.num_layers), "perplexity", "layer"):
            with lent_layer(source, index) as layer:
                walk.advance(layer, index)
        nll = torch.zeros((), dtype=torch.float64, device=source.device)
        with source.head() as logits_of:
            for (states, _), ids in zip(walk.batches(), walk.windows.split(batch_size), strict=False):
                rows = states[:, :-1].flatten(0, 1).split(LOGIT_ROWS)
                targets = ids[:, 1:].flatten().to(source.device).split(LOGIT_ROWS)
                for inputs, target in zip(rows, targets, strict=True):
                    nll += cross_entropy(logits_of(inputs), target, reduction="sum")
        all_reduce(nll)
    return (nll.cpu() / windows[:, 1:].numel()).exp().item()
