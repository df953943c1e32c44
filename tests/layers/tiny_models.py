"""Tiny random models, dense and compressed, and an oracle for the latter made of dense classes alone."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from conftest import shape
from flatllmcore.layers import adopt_compressed_layers, compress_decoder_layer, compressed_config
from flatllmcore.utils.dimensions import Kept

RANKS, WIDTHS = (5, 16, 11), (96, 40, 33)
# For what does not depend on the family itself.
KINDS = ("llama", "mistral", "qwen3", "smollm3", "cohere2", "gemma3_text")
SIZES: dict[str, Any] = shape(4, 2, 64, 96) | {"num_hidden_layers": 3, "head_dim": 16, "vocab_size": 97}
SIZES |= {"max_position_embeddings": 64, "pad_token_id": 0}
SIZES |= {"initializer_range": 0.2}  # large enough for attention to be far from uniform


def kept(ranks: Sequence[int] = RANKS, widths: Sequence[int] = WIDTHS, qk: Sequence[int | None] | None = None) -> Any:
    """Return what each layer keeps."""
    return [Kept(0.5, *sizes) for sizes in zip(ranks, widths, qk or [None] * len(ranks), strict=True)]


def random_windows(count: int, seed: int) -> Tensor:
    return torch.randint(1, 97, (count, 16), generator=torch.Generator().manual_seed(seed))


def dense_model_of(family: str, **fields: object) -> PreTrainedModel:
    """Return a random dense model; ``fields`` replace those of its config."""
    return random_model(CONFIG_MAPPING[family](**SIZES | fields))


@torch.no_grad()
def random_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Return a random dense model of ``config``, which loses its end-of-text token."""
    torch.manual_seed(0)
    config.eos_token_id = None  # greedy decoding that never ends early compares the most tokens
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):  # transformers starts them as constants: one left out would hide
            parameter.add_(0.5 * torch.randn_like(parameter))
    return model


def projected_weights(layer: nn.Module, rank: int, width: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return one layer's weights compressed, and the same function as weights of full size.

    The oracle needs no compressed class: values projected onto a subspace and back, and MLP channels set to zero.
    """
    generator = torch.Generator().manual_seed(rank)
    attention, mlp = layer.self_attn, layer.mlp
    W_v, W_o, d = attention.v_proj.weight, attention.o_proj.weight, attention.head_dim
    D, G, H = W_v.shape[1], W_v.shape[0] // d, W_o.shape[1] // d
    Q = torch.linalg.qr(torch.randn(G, d, d, generator=generator))[0][..., :rank].to(W_v.dtype)  # (G, d, r)
    Q_o = Q.repeat_interleave(H // G, dim=0)  # (H, d, r)
    chosen = torch.randperm(mlp.gate_proj.out_features, generator=generator)[:width].sort().values

    small = {
        "self_attn.v_proj.weight": (Q.mT @ W_v.view(G, d, D)).reshape(G * rank, D),
        "self_attn.o_proj.weight": torch.einsum("ohd,hdr->ohr", W_o.view(-1, H, d), Q_o).reshape(-1, H * rank),
        "mlp.gate_proj.weight": mlp.gate_proj.weight[chosen],
        "mlp.up_proj.weight": mlp.up_proj.weight[chosen],
        "mlp.down_proj.weight": mlp.down_proj.weight[:, chosen],
    }
    full = {"self_attn.v_proj.weight": (Q @ (Q.mT @ W_v.view(G, d, D))).reshape(G * d, D)}
    dropped = torch.ones(mlp.gate_proj.out_features, dtype=torch.bool)
    dropped[chosen] = False
    full["mlp.down_proj.weight"] = mlp.down_proj.weight.masked_fill(dropped, 0.0)
    if attention.v_proj.bias is not None:
        b_v = attention.v_proj.bias.view(G, d, 1)
        small["self_attn.v_proj.bias"] = (Q.mT @ b_v).reshape(-1)
        full["self_attn.v_proj.bias"] = (Q @ (Q.mT @ b_v)).reshape(-1)
    if mlp.gate_proj.bias is not None:
        small |= {f"mlp.{name}.bias": getattr(mlp, name).bias[chosen] for name in ("gate_proj", "up_proj")}
    return small, full


@torch.no_grad()
def compress(model: PreTrainedModel, ranks: Sequence[int] = RANKS, widths: Sequence[int] = WIDTHS) -> PreTrainedModel:
    """Compress ``model`` in place, and return it."""
    config, layers = compressed_config(model.config, kept(ranks, widths)), []
    for i, layer in enumerate(model.model.layers):
        layers.append(compress_decoder_layer(layer, config, i, projected_weights(layer, ranks[i], widths[i])[0]))
    return adopt_compressed_layers(model, config, layers)


@torch.no_grad()
def project_in_full_size(
    model: PreTrainedModel, ranks: Sequence[int] = RANKS, widths: Sequence[int] = WIDTHS
) -> PreTrainedModel:
    """Give the dense ``model`` weights of the same function as :func:`compress` would, and return it."""
    for layer, rank, width in zip(model.model.layers, ranks, widths, strict=True):
        for name, weight in projected_weights(layer, rank, width)[1].items():
            layer.get_parameter(name).copy_(weight)
    return model


def generate(model: PreTrainedModel, tokens: Tensor, **options: Any) -> Tensor:
    """Return the tokens and eight more, decoded greedily."""
    options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 8, "do_sample": False} | options
    return model.generate(tokens, **options)
