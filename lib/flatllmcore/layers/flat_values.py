"""Values that are narrower than queries and keys: padded for attention functions and caches, or read as they are."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache

# Numbers in the keys up to which one fused kernel call, values padded, is faster on a CPU than three plain ones.
_FEW_KEYS = 2**16
_cudnn_is_off = Lock()


def padded_values(value: Tensor, head_dim: int, query_length: int, implementation: str, device_type: str) -> Tensor:
    """Return values (..., r), padded with zeros up to ``head_dim`` at most, as the attention function takes them."""
    rank = value.shape[-1]
    # Fused kernels restrict the width, and what they refuse falls to the path that writes out the whole score matrix.
    if implementation == "eager":
        width = rank
    elif implementation == "sdpa" and query_length == 1:
        # A token reads the whole cache, and padding to head_dim would cost what the compression saves: so the next
        # multiple of 8, for the memory-efficient kernel; nothing on a CPU, which has one_token_attention.
        width = rank if device_type == "cpu" else min(-(-rank // 8) * 8, head_dim)
    else:
        # A prompt, for flash: zeros cost little beside the scores, and transformers shares key/value heads among
        # queries without copying them only at equal widths. flash_attention_* and flex ask for these.
        width = head_dim
    return widened(value, width)


def widened(part: Tensor, width: int) -> Tensor:
    """Return queries, keys or values (..., d) with zeros up to ``width``; scores and outputs are the same."""
    return F.pad(part, (0, width - part.shape[-1])) if width > part.shape[-1] else part


def unplanned(query: Tensor) -> AbstractContextManager[None]:
    """Return a context that keeps one token's attention, query (B, H, 1, d), on a GPU off cuDNN, or one without effect.

    cuDNN makes a plan for every length of the cache and width of its values, which takes tens of milliseconds, and the
    next token's cache is longer. The switch is the process's: other threads are kept off cuDNN meanwhile.
    """
    is_planned = query.shape[2] == 1 and query.is_cuda and not torch.compiler.is_compiling()
    return _without_cudnn() if is_planned else nullcontext()


@contextmanager
def _without_cudnn() -> Iterator[None]:
    switch = torch.backends.cuda.enable_cudnn_sdp
    with _cudnn_is_off:  # one thread at a time, or the last would put back what another had put
        was_on = torch.backends.cuda.cudnn_sdp_enabled()
        switch(False)
        try:
            yield
        finally:
            switch(was_on)


def one_token_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Return the attention of each sequence's newest token on a CPU, whatever the width of the values.

    ``scaled_dot_product_attention`` answers unequal widths there by copies of keys and values in float32. Here one
    fused call takes padded values where they are few, and in half precision, whose scores it has in float32: plain
    products would round scores to it, or overflow. In other cases they read the cache as it is.

    Of ``query`` (B, H, 1, d), ``key`` (B, G, T, d) and ``value`` (B, G, T, r) it gives the outputs of all heads side by
    side, (B, 1, H·r); ``mask`` (B or 1, 1, 1, T) is True where a key counts, or numbers to add to the scores.
    """
    batch_size, num_heads, _, head_dim = query.shape
    num_kv_heads, rank = value.shape[1], value.shape[-1]
    query = query.reshape(batch_size, num_kv_heads, num_heads // num_kv_heads, head_dim)
    # Compiled, the plain products are fused anyway, and a choice by length would compile twice.
    is_short = not torch.compiler.is_compiling() and key.numel() <= _FEW_KEYS
    if is_short or query.dtype.itemsize < 4:
        query, key, padded = (widened(part, max(head_dim, rank)) for part in (query, key, value))
        output = F.scaled_dot_product_attention(query, key, padded, attn_mask=mask, scale=scaling)[..., :rank]
    else:
        scores = query @ key.mT * scaling  # (B, G, H/G, T)
        if mask is not None:  # by the least number, not infinity: a row of padding alone has no softmax by that
            least = torch.finfo(scores.dtype).min
            scores = scores.masked_fill(~mask, least) if mask.dtype == torch.bool else scores + mask
        output = scores.softmax(-1) @ value
    return output.reshape(batch_size, 1, num_heads * rank)


def cached(
    cache: Cache, layer_idx: int, key: Tensor, value: Tensor, head_dim: int, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Return the keys (B, G, T, d) and values (B, G, T, r) of a layer, new ones included, each at its own width.

    Zeros fill them up to the width of the dense heads, ``head_dim``, in a cache that was allocated before it held any,
    as for export, in one that quantises in groups, which divide that width, and in the pages of continuous batching,
    which changes the attention's ``kwargs``. What a cache was begun with, as by prefix tuning, may be wider too.
    """
    widths = key.shape[-1], value.shape[-1]
    if not hasattr(cache, "layers"):  # pages, as of transformers 5.24
        keys, values = cache.update(widened(key, head_dim), widened(value, head_dim), layer_idx, kwargs=kwargs)
    else:
        layer = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
        width = head_dim if hasattr(layer, "q_group_size") else 0
        held = [getattr(layer, name, None) for name in ("keys", "values")]
        room = [width if part is None else max(width, part.shape[-1]) for part in held]
        keys, values = cache.update(widened(key, room[0]), widened(value, room[1]), layer_idx)
    return keys[..., : widths[0]], values[..., : widths[1]]
