"""GGUF files of tiny models, written by the package gguf as llama.cpp's converter lays them out."""

from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from transformers import LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

from conftest import tiny_model

TOKENS = ["<|end|>", *bytes_to_unicode().values(), "Ġt"]
SIZES = {"vocab_size": len(TOKENS), "intermediate_size": 64, "head_dim": 8, "max_position_embeddings": 128}
TEMPLATE = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '<|end|>' }}{% endfor %}"
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    **{f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"} | {"self_attn.o_proj": "attn_output"},
    **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def tiny_llama(seed: int = 0, **overrides: int) -> LlamaForCausalLM:
    return tiny_model(seed=seed, **SIZES | overrides).float()


def write_gguf(
    path: Path,
    kind: str = "F32",
    *,
    model: LlamaForCausalLM | None = None,
    architecture: str = "llama",
    left_out: tuple[str, ...] = (),
    added: dict[str, np.ndarray] | None = None,
) -> dict[str, torch.Tensor]:
    """Write a model of heads 8 wide, with a tokenizer of bytes and a chat template; return its weights as rounded."""
    model = model or tiny_llama()
    config, writer = model.config, gguf.GGUFWriter(path, architecture)
    writer.add_name("a tiny model")
    writer.add_license("apache-2.0")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, *(1 for _ in TOKENS[1:])])
    writer.add_token_merges(["Ġ t"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_chat_template(TEMPLATE)
    rounded = {}
    for name, weight in model.state_dict().items():
        stored, (wanted, values) = name, (GGMLQuantizationType[kind], weight.numpy())
        for ours, theirs in NAMES.items():
            stored = stored.replace(ours, theirs)
        data = gguf.quantize(values, wanted if values.ndim > 1 else GGMLQuantizationType.F32)
        rounded[name] = torch.from_numpy(gguf.dequantize(data, wanted if values.ndim > 1 else GGMLQuantizationType.F32))
        if "attn_q" in stored or "attn_k" in stored:  # halves of a head become pairs of rows
            data = data.reshape(-1, 2, config.head_dim // 2, data.shape[-1]).swapaxes(1, 2).reshape(data.shape)
        if stored not in left_out:
            writer.add_tensor(stored, data, raw_dtype=wanted if values.ndim > 1 else GGMLQuantizationType.F32)
    for name, data in (added or {}).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return rounded
