"""The attention of vLLM, SGLang and TGI as a model sees it, emulated: what is given, what comes back."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from flatllmcore.engine.protocols import logits_of


def served_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    attention_instances: dict[int, int] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as they do: to one prompt, with one width for all parts, no mask, and the heads side by side, (T, H·d)."""
    assert attention_mask is None
    assert attention_instances is not None, "the model did not pass on a keyword it does not know"
    assert {part.shape[-1] for part in (query, key, value)} == {attention_instances[module.layer_idx]}
    assert kwargs.get("sliding_window") == getattr(module, "sliding_window", None)
    if softcap is None:
        output, _ = sdpa_attention_forward(module, query, key, value, None, scaling=scaling, is_causal=True)
        return output.reshape(query.shape[2], -1), None
    key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], 1) for part in (key, value))
    scores = softcap * (scaling * query @ key.mT / softcap).tanh()  # (1, H, T, T)
    is_later = torch.ones_like(scores, dtype=torch.bool).triu(1)
    output = scores.masked_fill(is_later, -torch.inf).softmax(-1) @ value
    return output.transpose(1, 2).reshape(query.shape[2], -1), None


@torch.no_grad()
def served_logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Return the logits of one prompt (1, T), run as vLLM runs a model: its decoder alone, no cache, with positions."""
    AttentionInterface.register("served", served_attention)
    before = model.config._attn_implementation
    model.set_attn_implementation("served")
    instances = dict.fromkeys(range(model.config.num_hidden_layers), model.config.head_dim)
    given = {"input_ids": tokens, "position_ids": torch.arange(tokens.shape[1])[None]}
    decoder = model.get_decoder()
    (states,) = decoder(**given, use_cache=False, return_dict=False, attention_instances=instances)[0]
    model.set_attn_implementation(before)
    return logits_of(model, nn.Identity(), model.lm_head)(states)[None]
