"""A checkpoint of random weights at any shape, written one tensor after another, to try what needs size and not sense.

    python benchmarks/random_checkpoint.py llama-2-70b out/70b --layers 2 --shard_gib 1 --tokenizer models/pydocs-llama
    python benchmarks/random_checkpoint.py models/pydocs-llama out/wide --layers 32 --dtype float32

The first argument is a published model's name, a model folder, a `config.json` or a hub id. Folder, shards and index
are as `save_pretrained` writes them; at most one shard is in memory.
"""

import argparse
import sys
from pathlib import Path

import torch

from flatllmbench.command_line import complain
from flatllmbench.published_models import find_config
from flatllmbench.random_checkpoint import with_layers, write_random_checkpoint
from flatllmcore.errors import InputError
from flatllmcore.utils.devices import GIB


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="name of a published model, folder, config.json or hub id; no weight is read")
    parser.add_argument("folder", type=Path, help="a new folder, or an empty one")
    parser.add_argument("--layers", type=int, help="decoder layers, if not as many as the config says")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--shard_gib", type=float, default=1.0, help="size of a shard at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", type=Path, help="folder of a tokenizer to put beside the weights")
    args = parser.parse_args(argv)
    try:
        config = find_config(args.config)
        if args.layers is not None:
            config = with_layers(config, args.layers)
        write_random_checkpoint(
            config,
            args.folder,
            dtype=getattr(torch, args.dtype),
            max_shard_bytes=int(args.shard_gib * GIB),
            seed=args.seed,
            tokenizer_from=args.tokenizer,
        )
    except InputError as error:
        return complain(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
