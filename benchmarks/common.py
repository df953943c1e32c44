"""What the benchmarks share: shapes, the operations of a compression, the rates of the machine, and its three steps."""

import argparse
import copy
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, MistralConfig, PretrainedConfig, PreTrainedModel

from flatllmbench.provenance import hardware, versions
from flatllmcore.core.rank_allocation import RankAllocation
from flatllmcore.engine import perplexity as measuring
from flatllmcore.engine.compress import compress_layers
from flatllmcore.engine.importance import layer_importance
from flatllmcore.engine.memory import ModelInMemory
from flatllmcore.errors import InputError
from flatllmcore.methods import METHODS
from flatllmcore.utils.data_utils import consecutive_windows, sample_documents
from flatllmcore.utils.devices import float32_product, synchronize
from flatllmcore.utils.dimensions import ModelDimensions
from flatllmcore.utils.layer_utils import dimensions_from_config
from flatllmcore.utils.loading import load_config, load_tokenizer
from flatllmcore.utils.text_sources import load_text

ROOT = Path(__file__).resolve().parents[1]
_GQA = {"intermediate_size": 14336, "num_key_value_heads": 8}
PUBLISHED: dict[str, Callable[[], PretrainedConfig]] = {  # as their publishers state them
    "llama-2-7b": lambda: LlamaConfig(intermediate_size=11008, max_position_embeddings=4096),
    "llama-2-13b": lambda: LlamaConfig(
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=40,
        num_attention_heads=40,
        max_position_embeddings=4096,
    ),
    "llama-2-70b": lambda: LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        max_position_embeddings=4096,
    ),
    "llama-3-8b": lambda: LlamaConfig(**_GQA, vocab_size=128256, max_position_embeddings=8192, rope_theta=500000.0),
    "mistral-7b": lambda: MistralConfig(**_GQA, vocab_size=32000, max_position_embeddings=32768, sliding_window=4096),
}

SHAPES = PUBLISHED | {  # and smaller ones
    "1024x8": lambda: LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16
    ),
    "64x2": lambda: LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=512
    ),
    "llama-2-7b-4-layers": lambda: LlamaConfig(
        intermediate_size=11008, num_hidden_layers=4, max_position_embeddings=4096
    ),
}


def find_config(model: str) -> PretrainedConfig:
    """Return the config of a published model by name, or that of a local folder, ``config.json`` or hub id.

    Raises:
        InputError: If there is none, or it cannot be read; with the names there are.
    """
    if model in PUBLISHED:
        return PUBLISHED[model]()
    try:
        return load_config(model)
    except InputError as error:
        raise InputError(f"{error}; or one of the names {', '.join(PUBLISHED)}") from error


def one_layer(config: PretrainedConfig) -> PretrainedConfig:
    """Return the config of a model of one layer of ``config``, which all have the same sizes."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = 1
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    return config


def operations(
    config: PretrainedConfig, allocation: RankAllocation, windows: int, seqlen: int, method: str = "flatllm"
) -> dict[str, float]:
    """Return the least operations of a compression that cuts every layer, by stage; a product and a sum are two.

    ``forward`` is each stream's attention once, without the half of the square that looks ahead: of ``flatllm`` the
    dense layers up to the input of ``down_proj``, then ``o_proj`` on what it read and the narrower MLP; of ``flatllm+``
    the dense stream, and the other one up to ``o_proj`` and ``down_proj``, then these. Behind the last layer nothing.
    ``moments`` are one triangle of each and the whole of those with a target. ``solves``, of ``flatllm`` alone, are two
    Cholesky factors, the inverse of one, the products with ``down_proj``, and those of V and O.
    """
    dims, tokens = dimensions_from_config(config), windows * seqlen
    D, F, d, G, H = dims.hidden_size, dims.intermediate_size, dims.head_dim, dims.num_kv_heads, dims.num_heads
    layers, A = allocation.layers, dims.num_heads * dims.head_dim
    dense = D * (A + 2 * G * d) + seqlen * A + A * D + 2 * D * F  # up to the input of down_proj
    if method == "flatllm":
        forward = len(layers) * dense + sum(A * D + 3 * D * kept.mlp_width for kept in layers[:-1])
        moments, solves = len(layers) * (F**2 + 2 * G * d**2), 0.0
        for r, k in ((kept.value_rank, kept.mlp_width) for kept in layers):
            solves += 2 * F**3 / 3 + k**3 / 3 + 2 * D * (F - k) * k + 2 * D * k**2 + 2 * d * r * dims.rank_parameters
        return {"forward": 2 * tokens * forward, "moments": tokens * moments, "solves": solves}
    pruned = sum(d - 2 * kept.query_key_pairs for kept in layers if kept.query_key_pairs is not None)
    forward = len(layers) * (2 * dense + D * F) + (len(layers) - 1) * D * F
    forward -= pruned * (D * (H + G) + seqlen * H / 2)
    moments = len(layers) * (A**2 + 2 * D * A + F**2 + 2 * D * F)
    return {"forward": 2 * tokens * forward, "moments": tokens * moments}


def moment_bytes(dims: ModelDimensions) -> int:
    """Return the bytes of a layer's second moments."""
    return 8 * (dims.intermediate_size**2 + dims.num_kv_heads * dims.head_dim**2)


def solve_bytes(dims: ModelDimensions, width: int) -> int:
    """Return the most memory that the solves of a layer of ``width`` kept channels take at once, its moments included.

    Beside the moment: its shifted copy, factorised in place, and a panel twice; then the kept channels' moment
    and its factor; then this factor, the moment of dropped with kept channels, ``down_proj`` and some rows at work.
    """
    D, F, k = dims.hidden_size, dims.intermediate_size, width
    fit = k * F + D * k + min(D, 1024) * (F + 3 * k)
    return moment_bytes(dims) + 8 * max(F * F + min(F, 256) * max(2 * (F - 256), F), 2 * k * k, fit)


def peak_rates(dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Return operations per second, the best of five large products, as each stage computes them."""
    size = 1024 if device.type == "cpu" else 8192

    def rate(dtype: torch.dtype, multiply: Callable[[Tensor, Tensor], Tensor] = torch.matmul) -> float:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        best = float("inf")
        for _ in range(5):
            synchronize(device)
            started = time.perf_counter()
            multiply(a, b)
            synchronize(device)
            best = min(best, time.perf_counter() - started)
        return 2 * size**3 / best

    return {"forward": rate(dtype), "moments": rate(dtype, float32_product), "solves": rate(torch.float64)}


def falling_scores(num_layers: int) -> list[float]:
    """Return scores as trained models have them: lowest in the middle, by less than a quarter."""
    return [1 + 0.3 * abs(2 * index / max(num_layers - 1, 1) - 1) for index in range(num_layers)]


def text_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the flags of a benchmark that compresses a model on text."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="local folder or hub id")
    parser.add_argument("--dataset", required=True, help="text to calibrate on")
    parser.add_argument("--eval_dataset", help="text to measure perplexity on (default: the test split of --dataset)")
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--eval_windows", type=int, default=100, help="most test windows used")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device")
    parser.add_argument("--out", type=Path, help="write the record here, as JSON")
    return parser


def token_windows(args: argparse.Namespace, importance_seed: int = 42) -> tuple[Tensor, Tensor, Tensor]:
    """Return the windows to calibrate on, those for importance, and those for perplexity."""
    tokenizer, text = load_tokenizer(args.model), load_text(args.dataset, "train")
    test = consecutive_windows(load_text(args.eval_dataset or args.dataset, "test"), tokenizer, args.seqlen)
    return (
        sample_documents(text, tokenizer, args.nsamples, args.seqlen, seed=42),
        sample_documents(text, tokenizer, args.nsamples, args.seqlen, seed=importance_seed),
        test[: args.eval_windows],
    )


def importance(model: PreTrainedModel, windows: Tensor, device: torch.device, batch_size: int = 32) -> Sequence[float]:
    """Return the importance of every layer."""
    return layer_importance(ModelInMemory(model, device), windows, batch_size).scores


def compressed(
    model: PreTrainedModel, windows: Tensor, allocation: RankAllocation, device: torch.device, batch_size: int = 32
) -> PreTrainedModel:
    """Return a compressed copy of ``model``."""
    source = ModelInMemory(copy.deepcopy(model), device)
    method = METHODS["flatllm"]
    config, _ = compress_layers(source, source, windows, method, allocation, batch_size=batch_size, tolerance=0.96)
    return source.adopt(config)


def perplexity(model: PreTrainedModel, windows: Tensor, device: torch.device, batch_size: int = 32) -> float:
    """Return the perplexity of a model on token windows."""
    return measuring.perplexity(ModelInMemory(model, device), windows, batch_size)


def write(args: argparse.Namespace, device: torch.device, found: dict) -> None:
    """Write what was found to ``--out``, if it is given, with what it was found on."""
    if args.out is not None:
        facts = {"request": {name: str(value) for name, value in vars(args).items()}}
        facts |= {"hardware": hardware(device), "versions": versions()}
        args.out.write_text(json.dumps(facts | found, indent=1) + "\n")
