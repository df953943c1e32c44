"""The method written out in float64, window by window, from its formulas. It shares no code with the package.

A model is a dict of float64 tensors under the usual checkpoint names and a plain dict of sizes. Nothing
is batched, streamed or factorised cleverly: moments are one product of all rows, inverses are inverses.
"""

import math

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def weights_and_sizes(model) -> tuple[Weights, dict]:
    """Return float64 copies of a dense transformers model's tensors, and its sizes; lists have one entry per layer."""
    c = model.config
    family = c.model_type
    L, d = c.num_hidden_layers, getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    kinds = getattr(c, "layer_types", None) or ["sliding_attention"] * L
    window = getattr(c, "sliding_window", None)
    windows = [window if kind == "sliding_attention" else None for kind in kinds]
    sizes = {
        "L": L,
        "H": c.num_attention_heads,
        "G": c.num_key_value_heads,
        "d": d,
        "eps": c.layer_norm_eps if family == "cohere2" else c.rms_norm_eps,
        "norm": {"cohere2": layer_norm, "gemma2": gemma_norm, "gemma3_text": gemma_norm}.get(family, rms_norm),
        "activation": gelu_tanh if family.startswith("gemma") else silu,
        "frequencies": [rope_frequencies(c.rope_parameters.get(kind, c.rope_parameters), d) for kind in kinds],
        "lengths": [c.rope_parameters.get(kind, {}).get("attention_factor", 1.0) for kind in kinds],
        "pairs": "neighbours" if family in ("cohere2", "ernie4_5", "helium") else "halves",
        "windows": windows,
        "scaling": d**-0.5,
        "residual": 1.0,
        "embedding": 1.0,
        "logits": 1.0,
        "cap": None,  # of scores
        "final_cap": None,  # of logits
    }
    if family == "granite":
        sizes |= {"scaling": c.attention_multiplier, "residual": c.residual_multiplier}
        sizes |= {"embedding": c.embedding_multiplier, "logits": 1 / c.logits_scaling}
    if family == "cohere2":
        sizes["logits"] = c.logit_scale
    if family.startswith("gemma"):
        sizes |= {"scaling": c.query_pre_attn_scalar**-0.5, "embedding": c.hidden_size**0.5}
    if family == "gemma2":
        sizes |= {"cap": c.attn_logit_softcapping, "final_cap": c.final_logit_softcapping}
    if family == "cohere2" or (family == "exaone4" and window is not None):
        sizes["frequencies"] = [f if has else None for f, has in zip(sizes["frequencies"], windows, strict=True)]
    if family == "smollm3":
        sizes["frequencies"] = [
            f if has else None for f, has in zip(sizes["frequencies"], c.no_rope_layers, strict=True)
        ]
    weights = {name: tensor.detach().double().clone() for name, tensor in model.state_dict().items()}
    return weights, sizes


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def gemma_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return rms_norm(x, 1 + weight, eps)


def layer_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return rms_norm(x - x.mean(-1, keepdim=True), weight, eps)


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def capped(x: Tensor, cap: float | None) -> Tensor:
    return x if cap is None else cap * torch.tanh(x / cap)


def normed(x: Tensor, weights: Weights, name: str, sizes: dict) -> Tensor:
    """Return ``x`` behind the norm of this name, or ``x`` where the model has none."""
    return sizes["norm"](x, weights[name + ".weight"], sizes["eps"]) if name + ".weight" in weights else x


def linear(x: Tensor, weights: Weights, name: str) -> Tensor:
    y = x @ weights[name + ".weight"].T
    return y + weights[name + ".bias"] if name + ".bias" in weights else y


def rope_frequencies(rope: dict, d: int) -> Tensor:
    """Angle per position of each pair, (d/2,); Llama 3.1 and YaRN slow those that turn little in the first context."""
    theta = rope["rope_theta"] * rope.get("alpha", 1.0) ** (d / (d - 2))
    frequencies = theta ** (-torch.arange(0, d, 2).double() / d)
    if rope["rope_type"] == "llama3":
        turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return frequencies * (kept + (1 - kept) / rope["factor"])
    if rope["rope_type"] == "yarn":  # as far as 32 turns within the first context, and from 1 on
        first = rope["original_max_position_embeddings"]
        low, high = (d * math.log(first / (2 * math.pi * turns)) / (2 * math.log(theta)) for turns in (32, 1))
        low, high = max(math.floor(low), 0), min(math.ceil(high), d - 1)
        slowed = ((torch.arange(d // 2).double() - low) / (high - low)).clamp(0, 1)
        return frequencies * (1 - slowed + slowed / rope["factor"])
    return frequencies


def rotate(x: Tensor, frequencies: Tensor, pairs: str) -> Tensor:
    """Rotary embedding of (S, heads, d); pairs are entries half a head apart, as in Llama, or neighbours."""
    S, _, d = x.shape
    angle = torch.arange(S).double()[:, None] * frequencies
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    first, second = (slice(0, d // 2), slice(d // 2, d)) if pairs == "halves" else (slice(0, d, 2), slice(1, d, 2))
    turned = torch.empty_like(x)
    turned[..., first] = x[..., first] * cos - x[..., second] * sin
    turned[..., second] = x[..., second] * cos + x[..., first] * sin
    return turned


def queries_or_keys(h: Tensor, weights: Weights, sizes: dict, layer: int, name: str, norm_behind: str) -> Tensor:
    """Return queries or keys (S, heads, d) as scores are made of them."""
    p = f"model.layers.{layer}.self_attn."
    x = linear(h, weights, f"{p}{name}_proj").unflatten(-1, (-1, sizes["d"]))
    if len(weights.get(f"{p}{name}_norm.weight", [])) == x[0].numel():  # one norm for all heads together
        x = normed(x.flatten(1), weights, f"{p}{name}_norm", sizes).view_as(x)
    else:
        x = normed(x, weights, f"{p}{name}_norm", sizes)
    if sizes["frequencies"][layer] is not None:
        x = sizes["lengths"][layer] * rotate(x, sizes["frequencies"][layer], sizes["pairs"])
    return normed(x, weights, p + norm_behind, sizes)


def run_layer(weights: Weights, sizes: dict, layer: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return output (S, D), values (S, G, r) and MLP activations (S, k) of one layer for one window."""
    p = f"model.layers.{layer}."
    S, H, G = len(x), sizes["H"], sizes["G"]
    h = normed(x, weights, p + "input_layernorm", sizes)
    q = queries_or_keys(h, weights, sizes, layer, "q", "query_layernorm")
    k = queries_or_keys(h, weights, sizes, layer, "k", "key_layernorm")
    v = linear(h, weights, p + "self_attn.v_proj").view(S, G, -1)
    distance = torch.arange(S)[:, None] - torch.arange(S)
    allowed = distance >= 0
    if sizes["windows"][layer] is not None:
        allowed &= distance < sizes["windows"][layer]
    heads = []
    for head in range(H):
        g = head // (H // G)
        scores = capped(q[:, head] @ k[:, g].T * sizes["scaling"], sizes["cap"]).masked_fill(~allowed, -math.inf)
        heads.append(scores.softmax(-1) @ v[:, g])
    attended = linear(torch.cat(heads, dim=-1), weights, p + "self_attn.o_proj")
    if p + "post_feedforward_layernorm.weight" in weights:  # norms stand behind attention and MLP
        attended = normed(attended, weights, p + "post_attention_layernorm", sizes)
        before_mlp = "pre_feedforward_layernorm"
    else:
        before_mlp = "post_attention_layernorm"
    x = x + sizes["residual"] * attended
    if sizes["norm"] is not layer_norm:  # else the MLP reads what the attention reads
        h = normed(x, weights, p + before_mlp, sizes)
    z = sizes["activation"](linear(h, weights, p + "mlp.gate_proj")) * linear(h, weights, p + "mlp.up_proj")
    output = normed(linear(z, weights, p + "mlp.down_proj"), weights, p + "post_feedforward_layernorm", sizes)
    return x + sizes["residual"] * output, v, z


def embedded(weights: Weights, sizes: dict, windows: Tensor) -> list[Tensor]:
    return [sizes["embedding"] * weights["model.embed_tokens.weight"][ids] for ids in windows]


def importance(weights: Weights, sizes: dict, windows: Tensor) -> list[float]:
    """Mean over tokens of arccos(clamp(cos, 0, 1)) / π per layer."""
    states = embedded(weights, sizes, windows)
    scores = []
    for layer in range(sizes["L"]):
        outputs = [run_layer(weights, sizes, layer, x)[0] for x in states]
        x, y = torch.cat(states), torch.cat(outputs)
        cosine = (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))
        scores.append((cosine.clamp(0, 1).arccos() / math.pi).mean().item())
        states = outputs
    return scores


def project_to_principal_subspaces(weights: Weights, name: str, rows: Tensor, d: int, rank: int) -> None:
    """Replace W by Q Qᵀ W and b by Q Qᵀ b in every head, at full width; Q spans the head's top directions."""
    outputs = linear(rows, weights, name)
    for tensor in (weights[name + ".weight"], weights.get(name + ".bias")):
        if tensor is None:
            continue
        projected = []
        for start in range(0, len(tensor), d):
            y = outputs[:, start : start + d]
            _, vectors = torch.linalg.eigh(y.T @ y)
            Q = vectors[:, d - rank :]
            projected.append(Q @ Q.T @ tensor[start : start + d])
        tensor.copy_(torch.cat(projected))


def compress(
    weights: Weights, sizes: dict, windows: Tensor, ranks: list[int], widths: list[int], prune_qk: bool = False
) -> Weights:
    """Return the compressed weights; layer l sees what leaves the compressed layers before it.

    Pruned Q and K stay whole where the two factors that they stand for would not be smaller.
    """
    weights = {name: tensor.clone() for name, tensor in weights.items()}
    H, G, d = sizes["H"], sizes["G"], sizes["d"]
    states = embedded(weights, sizes, windows)
    for layer in range(sizes["L"]):
        p = f"model.layers.{layer}."
        seen = [run_layer(weights, sizes, layer, x) for x in states]
        values = torch.cat([v for _, v, _ in seen])  # (T, G, d)
        z = torch.cat([z for _, _, z in seen])  # (T, F)

        D = states[0].shape[1]
        if prune_qk and ranks[layer] * D + d * ranks[layer] < d * D:
            rows = normed(torch.cat(states), weights, p + "input_layernorm", sizes)
            for name in ("q_proj", "k_proj"):
                project_to_principal_subspaces(weights, p + "self_attn." + name, rows, d, ranks[layer])

        if ranks[layer] < d:
            W_v = weights[p + "self_attn.v_proj.weight"].view(G, d, -1)
            W_o = weights[p + "self_attn.o_proj.weight"]
            new_v, new_bias = [], []
            bases = []
            for g in range(G):
                _, vectors = torch.linalg.eigh(values[:, g].T @ values[:, g])
                Q = vectors.flip(-1)[:, : ranks[layer]]
                bases.append(Q)
                new_v.append(Q.T @ W_v[g])
                if p + "self_attn.v_proj.bias" in weights:
                    new_bias.append(Q.T @ weights[p + "self_attn.v_proj.bias"].view(G, d)[g])
            new_o = [W_o[:, head * d : (head + 1) * d] @ bases[head // (H // G)] for head in range(H)]
            weights[p + "self_attn.v_proj.weight"] = torch.cat(new_v)
            weights[p + "self_attn.o_proj.weight"] = torch.cat(new_o, dim=1)
            if new_bias:
                weights[p + "self_attn.v_proj.bias"] = torch.cat(new_bias)

        F, k = z.shape[1], widths[layer]
        if k < F:
            C = z.T @ z
            scores = torch.diagonal(C @ torch.linalg.inv(C + torch.eye(F).double()))
            kept = scores.argsort(descending=True)[:k].sort().values
            for name in ("gate_proj", "up_proj"):
                weights[p + f"mlp.{name}.weight"] = weights[p + f"mlp.{name}.weight"][kept]
                if p + f"mlp.{name}.bias" in weights:
                    weights[p + f"mlp.{name}.bias"] = weights[p + f"mlp.{name}.bias"][kept]
            W_down = weights[p + "mlp.down_proj.weight"]
            weights[p + "mlp.down_proj.weight"] = W_down @ C[:, kept] @ torch.linalg.inv(C[kept][:, kept])

        states = [run_layer(weights, sizes, layer, x)[0] for x in states]
    return weights


def perplexity(weights: Weights, sizes: dict, windows: Tensor) -> float:
    nll, predicted = 0.0, 0
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    for ids in windows:
        x = embedded(weights, sizes, ids[None])[0]
        for layer in range(sizes["L"]):
            x = run_layer(weights, sizes, layer, x)[0]
        logits = capped(normed(x, weights, "model.norm", sizes) @ head.T * sizes["logits"], sizes["final_cap"])
        losses = -logits[:-1].log_softmax(-1).gather(1, ids[1:, None])
        nll, predicted = nll + losses.sum().item(), predicted + len(losses)
    return math.exp(nll / predicted)
