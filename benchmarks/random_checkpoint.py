"""A checkpoint of random weights at any shape, written shard by shard, to try what needs size and not sense.

    python benchmarks/random_checkpoint.py llama-2-70b out/70b --layers 2 --shard_gib 1 --tokenizer models/pydocs-llama
    python benchmarks/random_checkpoint.py models/pydocs-llama out/wide --layers 32 --dtype float32

The first argument is a published model's name, a model folder, a `config.json` or a hub id. Folder, shards and index
are as `save_pretrained` writes them; at most one shard is in memory.
"""

import argparse
import json
import math
import sys
import zlib
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from common import find_config
from flatllmcore.errors import run_program
from flatllmcore.utils.checkpoint import check_output_folder
from flatllmcore.utils.files import GIB, check_disk_space
from flatllmcore.utils.loading import load_tokenizer


def main(argv: list[str] | None = None) -> int:
    """Run the program; return its exit status: 0, or 2 after one line on stderr about unusable input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="name of a published model, folder, config.json or hub id; no weight is read")
    parser.add_argument("folder", type=Path, help="a new folder, or an empty one")
    parser.add_argument("--layers", type=int, help="decoder layers (default: the config's)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--shard_gib", type=float, default=1.0, help="size of a shard at most")
    parser.add_argument("--tokenizer", help="folder of a tokenizer to put beside the weights")
    args = parser.parse_args(argv)

    def work() -> None:
        config = find_config(args.config)
        if args.layers is not None:
            config = type(config).from_dict(config.to_dict() | {"num_hidden_layers": args.layers, "layer_types": None})
        write_random_checkpoint(config, args.folder, getattr(torch, args.dtype), int(args.shard_gib * GIB))
        if args.tokenizer is not None:
            load_tokenizer(args.tokenizer).save_pretrained(args.folder)

    return run_program(work, args.folder)


def write_random_checkpoint(
    config: PretrainedConfig, folder: Path, dtype: torch.dtype = torch.bfloat16, max_shard_bytes: int = GIB
) -> None:
    """Write a model with random weights, each by its name and shape alone, as a Hugging Face folder.

    Raises:
        InputError: If the folder is not empty, or the disk has too little room.
    """
    check_output_folder(folder, overwrite=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    weights = dict(model.named_parameters())  # a tied weight once
    check_disk_space(folder, sum(weight.nbytes for weight in weights.values()))
    folder.mkdir(parents=True, exist_ok=True)
    pattern = "model{suffix}.safetensors"
    shards = split_torch_state_dict_into_shards(weights, filename_pattern=pattern, max_shard_size=max_shard_bytes)
    for file_name, names in shards.filename_to_tensors.items():
        tensors = {name: _random(name, weights[name], "lm_head.weight" not in weights) for name in names}
        save_file(tensors, folder / file_name, {"format": "pt"})
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    model.generation_config.save_pretrained(folder)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)


def _random(name: str, like: Tensor, is_tied: bool) -> Tensor:
    """Return a weight: a matrix of variance 1 / inputs, so that each layer adds about as much as the one before it."""
    if like.ndim == 1:
        return torch.full(like.shape, 0.0 if name.endswith("bias") else 1.0, dtype=like.dtype)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    inputs = 1 if "embed_tokens" in name and not is_tied else like.shape[-1]
    return (torch.randn(like.shape, generator=generator) / math.sqrt(inputs)).to(like.dtype)


if __name__ == "__main__":
    sys.exit(main())
