"""Published models of every family, scaled down: the keys of their ``config.json``, old spellings included."""

from typing import Any

from conftest import shape

COMMON = {
    "vocab_size": 97,
    "num_hidden_layers": 3,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-5,
    "use_cache": True,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA_3 = {
    "model_type": "llama",
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 16,
        "rope_type": "llama3",
    },
}
QWEN_2 = {"model_type": "qwen2", "rope_theta": 1000000.0}
QWEN_3 = {"model_type": "qwen3", "attention_bias": False, "rope_theta": 1000000, "rope_scaling": None}

TIED = {"tie_word_embeddings": True}


def qwen_windows(is_used: bool, size: int | None, whole_layers: int) -> dict[str, Any]:
    return {"use_sliding_window": is_used, "sliding_window": size, "max_window_layers": whole_layers}


def windows(*kinds: str) -> dict[str, Any]:
    return {"sliding_window": 5, "layer_types": [f"{kind}_attention" for kind in kinds]}


YARN = {"rope_type": "yarn", "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0}
GEMMA = {
    **TIED,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 12,
    "query_pre_attn_scalar": 10,
    **shape(4, 2, 32, 56),
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "Llama-2-7b": {"model_type": "llama", "pretraining_tp": 1, "rope_scaling": None, **shape(4, 4, 32, 56)},
    "Llama-3.1-8B": {**LLAMA_3, "attention_bias": False, "eos_token_id": [2, 3], **shape(4, 1, 48, 72)},
    "Llama-3.2-1B": {**LLAMA_3, "head_dim": 8, "tie_word_embeddings": True, **shape(4, 2, 32, 56)},
    "Llama with biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True, **shape(4, 2, 32, 56)},
    "SmolLM2-135M": {"model_type": "llama", "is_llama_config": True, "rope_theta": 100000, **shape(9, 3, 72, 96)},
    "Mistral-7B-v0.1": {"model_type": "mistral", "sliding_window": 5, "rope_theta": 10000.0, **shape(4, 1, 32, 56)},
    "Qwen2-7B": {**QWEN_2, "tie_word_embeddings": False, **qwen_windows(False, 128, 3), **shape(7, 1, 56, 72)},
    "Qwen2 with windows": {**QWEN_2, **qwen_windows(True, 5, 1), **shape(4, 2, 32, 56)},
    "Qwen3-0.6B": {**QWEN_3, "head_dim": 16, "tie_word_embeddings": True, **shape(4, 2, 32, 56)},
    "Qwen3 with biases and windows": {
        **QWEN_3,
        "attention_bias": True,
        "head_dim": 12,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        **qwen_windows(True, 5, 3),
        **shape(4, 1, 32, 56),
    },
    "Ministral-8B": {
        "model_type": "ministral",
        "head_dim": 12,
        **windows("full", "sliding", "sliding"),
        **shape(4, 1, 32, 56),
    },
    "Helium-1-2b": {"model_type": "helium", "head_dim": 8, "rope_theta": 100000.0, **shape(4, 2, 32, 56)},
    "ERNIE-4.5-0.3B": {**TIED, "model_type": "ernie4_5", "head_dim": 8, "use_bias": False, **shape(4, 1, 24, 56)},
    "SmolLM3-3B": {
        **TIED,
        "model_type": "smollm3",
        "rope_theta": 5000000.0,
        "no_rope_layers": [1, 0, 1],
        "use_sliding_window": False,
        **shape(4, 1, 32, 56),
    },
    "Seed-OSS-36B": {
        "model_type": "seed_oss",
        "attention_bias": True,
        "attention_dropout": 0.1,
        "residual_dropout": 0.1,
        "head_dim": 8,
        **shape(6, 2, 40, 56),
    },
    "Hunyuan-1.8B": {
        **TIED,
        "model_type": "hunyuan_v1_dense",
        "rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0, "beta_fast": 32, "beta_slow": 1},
        "head_dim": 12,
        **shape(4, 2, 32, 56),
    },
    "OLMo-2-1B": {"model_type": "olmo2", "attention_bias": False, "rope_theta": 500000, **shape(4, 2, 32, 56)},
    "Olmo-3-7B": {
        "model_type": "olmo3",
        "rope_scaling": {**YARN, "attention_factor": 1.2079441541679836, "original_max_position_embeddings": 16},
        "rope_theta": 500000,
        **windows("sliding", "full", "sliding"),
        **shape(4, 4, 32, 56),
    },
    "EXAONE-4.0-32B": {
        "model_type": "exaone4",
        "head_dim": 8,
        "sliding_window_pattern": "LLLG",
        "rope_theta": 1000000,
        **windows("sliding", "full", "sliding"),
        **shape(4, 1, 40, 56),
    },
    "EXAONE-4.0-1.2B": {
        **TIED,
        "model_type": "exaone4",
        "sliding_window": None,
        "rope_theta": 1000000,
        "layer_types": ["full_attention"] * 3,
        **shape(4, 2, 32, 56),
    },
    "Command-R7B": {
        **TIED,
        "model_type": "cohere2",
        "layer_norm_eps": 1e-5,
        "logit_scale": 0.25,
        "rope_theta": 50000.0,
        **windows("sliding", "full", "sliding"),
        **shape(4, 1, 32, 56),
    },
    "Gemma-2-2b": {
        **GEMMA,
        "model_type": "gemma2",
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 20.0,
        **windows("sliding", "full", "sliding"),
    },
    "Gemma-3-1b": {
        **GEMMA,
        "model_type": "gemma3_text",
        "rope_local_base_freq": 10000.0,
        "rope_theta": 1000000.0,
        **windows("sliding", "sliding", "full"),
    },
    "Granite-3.1-2b": {
        **TIED,
        "model_type": "granite",
        "attention_multiplier": 0.25,
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.5,
        "rope_theta": 5000000.0,
        **shape(4, 2, 32, 56),
    },
}
