"""Step 7 of the method: perplexity over non-overlapping windows, layer by layer."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from flatllmcore.core.calibration import LayerSource
from flatllmcore.core.hidden_states import HiddenStates
from flatllmcore.core.stopwatch import Stopwatch
from flatllmcore.utils.processes import own_share, sum_of_numbers
from flatllmcore.utils.progress import progress

LOGIT_ROWS = 1024  # a vocabulary of 128,256 makes half a gigabyte of float32 of them


@dataclass(frozen=True)
class Perplexity:
    """Perplexity and what it was measured on.

    Attributes:
        value: ``exp(Σ nll / predicted tokens)``.
        predicted_tokens: Every token of a window but its first.
    """

    value: float
    windows: int
    seqlen: int
    predicted_tokens: int


@torch.no_grad()
def perplexity(source: LayerSource, windows: Tensor, batch_size: int, stopwatch: Stopwatch) -> Perplexity:
    """Return the perplexity of ``source``, dense or compressed, on token ids (N, S).

    Predictions are shifted inside each window. Losses are summed in float32 over 1024 of them, in float64 beyond;
    one too large for ``exp`` gives infinity.

    Raises:
        InputError: If a layer's activations are not finite.
    """
    with stopwatch.stage("perplexity"):
        own_windows = own_share(windows)
        hidden = HiddenStates.embed(source, own_windows, batch_size)
        for index in progress(range(source.num_layers), "perplexity", "layer"):
            with source.layer(index) as layer:
                for batch in hidden.batches():
                    batch.replace(hidden.run(layer, index, batch))
        nll = 0.0
        with source.head() as logits_of:
            for batch, ids in zip(hidden.batches(), own_windows.split(batch_size), strict=False):
                rows = batch.states[:, :-1].flatten(0, 1).split(LOGIT_ROWS)
                targets = ids[:, 1:].flatten().to(source.device).split(LOGIT_ROWS)
                for states, target in zip(rows, targets, strict=True):
                    logits = logits_of(states)
                    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                    nll += cross_entropy(logits, target, reduction="sum").item()
        (nll,) = sum_of_numbers(nll, device=source.device)
    count, seqlen = windows.shape
    predicted = count * (seqlen - 1)
    return Perplexity(torch.tensor(nll / predicted, dtype=torch.float64).exp().item(), count, seqlen, predicted)
