"""What compressed Llama-like models share, whatever their family.

Every decoder layer has its own value width (``value_head_dim``, per head), its own MLP width (``intermediate_size``)
and, where queries and keys are compressed too, their rank (``query_key_rank``, per head) or how many of their rotary
pairs are left (``query_key_pairs``, per head); all stand in the config's ``per_layer_config``. ``flat_models.py``
mixes these classes with each family's dense parents.

``save_pretrained`` puts all files named ``flat_*`` beside the weights, for ``trust_remote_code=True``. So they import
torch, transformers with what it is built on, and each other only.
"""

from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .flat_values import cached, one_token_attention, padded_values, unplanned, widened

_SAVED_AGAIN = "\nThese weights were saved again: what is said above is of those before.\n"


class HeadwiseFactoredLinear(nn.Module):
    """A linear layer to heads, each of whose outputs lies in a subspace of its own.

    It stands in for one from D to H·d: ``down`` to H·r, with the bias if there is one, then ``up``, (H, d, r), within
    each head. Rotary embeddings turn what comes out, so the factors of queries and keys cannot be merged.
    """

    def __init__(self, whole: nn.Linear, head_dim: int, rank: int) -> None:
        super().__init__()
        num_heads = whole.out_features // head_dim
        self.down = nn.Linear(whole.in_features, num_heads * rank, bias=whole.bias is not None)
        self.up = nn.Parameter(torch.eye(head_dim, rank).repeat(num_heads, 1, 1))  # orthonormal columns, as solved

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return (..., H·d) of (..., D)."""
        num_heads, _, rank = self.up.shape
        reduced = self.down(hidden_states).unflatten(-1, (num_heads, rank))  # (..., H, r)
        return torch.einsum("...hr,hdr->...hd", reduced, self.up).flatten(-2)  # (..., H·d)


class FlatAttention(nn.Module):
    """Attention whose value heads, and the value half of its cache, have ``value_head_dim`` entries."""

    dense: ClassVar[ModuleType]  # whose rotary and eager functions are the family's
    use_rope: bool | int = True  # layers of some families know no positions

    config: PreTrainedConfig
    layer_idx: int
    head_dim: int
    scaling: float
    attention_dropout: float
    q_proj: Any  # a linear layer, or a HeadwiseFactoredLinear
    k_proj: Any
    v_proj: nn.Linear
    o_proj: nn.Linear

    def __init__(self, config: PreTrainedConfig, layer_idx: int) -> None:
        # The whole model's config, not the layer's copy: set_attn_implementation changes the former.
        super().__init__(config, layer_idx)
        layer_config = config.per_layer_config[layer_idx]
        rank = self.value_head_dim = layer_config.value_head_dim or self.head_dim
        if not hasattr(self, "sliding_window"):  # the same in all layers, if it is a field of the family's config
            self.sliding_window = config.sliding_window if hasattr(type(config), "sliding_window") else None
        num_kv_heads = self.v_proj.out_features // self.head_dim
        num_heads = self.o_proj.in_features // self.head_dim
        self.v_proj = nn.Linear(self.v_proj.in_features, num_kv_heads * rank, bias=self.v_proj.bias is not None)
        self.o_proj = nn.Linear(num_heads * rank, self.o_proj.out_features, bias=self.o_proj.bias is not None)
        self.query_key_width = self.head_dim
        if layer_config.query_key_pairs is not None:
            self.query_key_width = width = 2 * layer_config.query_key_pairs
            bias = self.q_proj.bias is not None
            self.q_proj = nn.Linear(self.q_proj.in_features, num_heads * width, bias=bias)
            self.k_proj = nn.Linear(self.k_proj.in_features, num_kv_heads * width, bias=bias)
            self.rotary_places: torch.Tensor
            # Where the entries of each key/value head, (G, 2·pairs), stood in the dense one.
            self.register_buffer("rotary_places", torch.arange(width).repeat(num_kv_heads, 1))
        if layer_config.query_key_rank is not None:
            self.q_proj = HeadwiseFactoredLinear(self.q_proj, self.head_dim, layer_config.query_key_rank)
            self.k_proj = HeadwiseFactoredLinear(self.k_proj, self.head_dim, layer_config.query_key_rank)

    def project_queries_and_keys(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries (B, T, H, d) and keys (B, T, G, d) before their rotation; d is less where pairs are gone."""
        heads = (*hidden_states.shape[:-1], -1, self.query_key_width)
        return self.q_proj(hidden_states).view(heads), self.k_proj(hidden_states).view(heads)

    def rotated(self, query: Tensor, key: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return queries (B, H, T, d) and keys (B, G, T, d) turned by their positions, each by the pairs it has."""
        if not self.use_rope:
            return query, key
        if self.query_key_width == self.head_dim:
            return self.dense.apply_rotary_pos_emb(query, key, *position_embeddings)
        cos, sin = (part[..., self.rotary_places].transpose(1, 2) for part in position_embeddings)  # (B, G, T, d)
        key = key * cos + self.dense.rotate_half(key) * sin
        grouped = query.unflatten(1, (cos.shape[1], -1))  # (B, G, H/G, T, d)
        grouped = grouped * cos[:, :, None] + self.dense.rotate_half(grouped) * sin[:, :, None]
        return grouped.flatten(1, 2), key

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return what the parent's attention does: (B, T, D), and the weights of the heads where there are any.

        Transformers calls the cache ``past_key_values`` before 5.24, and ``cache`` from then on.
        """
        cache = past_key_values if cache is None else cache
        input_shape, rank = hidden_states.shape[:-1], self.value_head_dim
        query, key = self.project_queries_and_keys(hidden_states)
        value = self.v_proj(hidden_states).view(*input_shape, -1, rank)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)  # (B, H or G, T, d or r)
        query, key = self.rotated(query, key, position_embeddings)
        implementation, device_type = self.config._attn_implementation, query.device.type
        # Other programs' functions (flash, and those of vLLM, SGLang and TGI) know one width, that of the dense heads.
        widest = max(self.query_key_width, rank) if implementation in ("eager", "sdpa") else self.head_dim
        if cache is not None:
            if implementation == "sdpa":  # padded here once; padded when read, the cache is copied for every token
                value = padded_values(value, widest, 1, implementation, device_type)
            key, value = cached(cache, self.layer_idx, key, value, self.head_dim, kwargs)
        if self._takes_one_token_attention(query, attention_mask, implementation):
            return self.o_proj(one_token_attention(query, key, value, attention_mask, self.scaling)), None
        if implementation != "eager":
            query, key = widened(query, widest), widened(key, widest)
        value = padded_values(value, widest, query.shape[2], implementation, device_type)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, self.dense.eager_attention_forward)
        with unplanned(query):
            output, weights = attend(
                self,
                query,
                key,
                value,
                attention_mask,
                dropout=self.attention_dropout if self.training else 0.0,
                scaling=self.scaling,
                sliding_window=self.sliding_window,
                **kwargs,
            )
        output = output.reshape(*input_shape, -1, value.shape[-1])  # (B, T, H, d or r), or its heads came side by side
        return self.o_proj(output[..., :rank].reshape(*input_shape, -1)), weights

    def _takes_one_token_attention(self, query: Tensor, mask: Tensor | None, implementation: str) -> bool:
        return (
            implementation == "sdpa"
            and query.device.type == "cpu"
            and query.shape[2] == 1
            and self.value_head_dim != self.query_key_width  # a layer left whole decodes bit by bit as the dense one
            and not (self.training and self.attention_dropout)
            and (mask is None or mask.shape[1] == 1)
        )


class FlatDecoderLayer(nn.Module):
    """A dense parent's decoder layer at this layer's widths; takes the whole model's config."""

    attention_class: ClassVar[type[FlatAttention]]

    def __init__(self, config: PreTrainedConfig, layer_idx: int) -> None:
        super().__init__(config.per_layer_config[layer_idx], layer_idx)
        self.self_attn = self.attention_class(config, layer_idx)


class FlatModel(PreTrainedModel):
    """A dense parent's model, of any kind, over compressed layers."""

    decoder_layer_class: ClassVar[type[FlatDecoderLayer]]

    def __init__(self, config: PreTrainedConfig) -> None:
        # The parent builds its layers from one width for all, which a config of per-layer widths refuses to give. So it
        # builds everything else, as for a model of no layers.
        num_layers, config.num_hidden_layers = config.num_hidden_layers, 0
        try:
            super().__init__(config)
        finally:
            config.num_hidden_layers = num_layers
        self.base_model.layers = nn.ModuleList(self.decoder_layer_class(config, i) for i in range(num_layers))
        self.post_init()
        self._no_split_modules.add(self.decoder_layer_class.__name__)

    def save_pretrained(self, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any) -> None:
        """Save the model, with the card of the compressed folder that it was loaded from, unless there is another."""
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        card, copy = (Path(folder, "README.md") for folder in (self.name_or_path, save_directory))
        if not (is_main_process and self.name_or_path and card.is_file() and copy.parent.is_dir()):
            return
        text, is_free = card.read_text(encoding="utf-8", errors="replace"), not copy.exists() or copy.samefile(card)
        if is_free and "\nflat_llm:" in text:
            copy.write_text(text.removesuffix(_SAVED_AGAIN) + _SAVED_AGAIN, encoding="utf-8")


class FlatCausalLM(FlatModel):
    """A dense parent's causal language model over compressed layers."""

    _auto_class = "AutoModelForCausalLM"

    def _get_static_cache_init_shape(self) -> None:
        """Let a static cache take its shapes from the first keys and values: the latter are narrower."""
