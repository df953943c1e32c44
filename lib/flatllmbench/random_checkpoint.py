"""Checkpoints of random weights at any shape, to try what needs size and not sense."""

import hashlib
import json
import math
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from flatllmcore.errors import InputError
from flatllmcore.utils.checkpoint import check_output_folder
from flatllmcore.utils.devices import GIB
from flatllmcore.utils.files import check_disk_space, write_atomically
from flatllmcore.utils.loading import load_tokenizer

_BLOCK = 2**22  # numbers drawn at a time, in float32: what a tensor costs beside itself


def with_layers(config: PretrainedConfig, num_layers: int) -> PretrainedConfig:
    """Return ``config`` for another number of decoder layers; kinds of attention per layer are repeated or cut."""
    fields = config.to_dict() | {"num_hidden_layers": num_layers}
    if fields.get("layer_types"):
        fields["layer_types"] = (fields["layer_types"] * num_layers)[:num_layers]
    return type(config).from_dict(fields)


def write_random_checkpoint(
    config: PretrainedConfig,
    folder: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: int = GIB,
    seed: int = 0,
    tokenizer_from: Path | None = None,
) -> None:
    """Write a causal language model with random weights as a Hugging Face folder.

    A weight depends on the seed and on its own name and shape alone, not on the other weights, their order or the
    shards. ``config.json`` is written last: without it the folder is not whole.

    Args:
        config: Of any causal language model in transformers.
        folder: New or empty.
        dtype: Of the weights; the values are drawn in float32 and rounded.
        max_shard_bytes: Size of a shard, and nearly all the memory this takes; a larger tensor has a shard to itself.
        seed: Another one gives other weights.
        tokenizer_from: Folder of a tokenizer whose files are written too.

    Raises:
        InputError: If the folder is not empty, the disk has too little room, or the tokenizer has more tokens than
            the model.
    """
    check_output_folder(folder, overwrite=False)
    tokenizer = None if tokenizer_from is None else load_tokenizer(str(tokenizer_from))
    if tokenizer is not None and len(tokenizer) > config.vocab_size:
        raise InputError(
            f"the tokenizer in {tokenizer_from} has {len(tokenizer)} tokens and the model {config.vocab_size}; "
            "give a tokenizer of no more"
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    weights = dict(model.named_parameters())  # a tied weight once
    total_bytes = sum(weight.nbytes for weight in weights.values())
    check_disk_space(folder, total_bytes)
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)

    shards = split_torch_state_dict_into_shards(
        weights, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_bytes
    )
    for file_name, names in shards.filename_to_tensors.items():
        tensors = {name: random_weight(name, weights[name], config, seed) for name in names}
        save_file(tensors, folder / file_name, metadata={"format": "pt"})
    if shards.is_sharded:
        parameters = sum(weight.numel() for weight in weights.values())
        metadata = {"total_parameters": parameters, "total_size": total_bytes}
        index = {"metadata": metadata, "weight_map": shards.tensor_to_filename}
        content = json.dumps(index, indent=2, sort_keys=True) + "\n"
        write_atomically(folder / "model.safetensors.index.json", content.encode())
    model.generation_config.save_pretrained(folder)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)


def random_weight(name: str, like: Tensor, config: PretrainedConfig, seed: int) -> Tensor:
    """Return the weight ``name`` of a random model, of the shape and dtype of ``like``.

    A matrix has variance 1 / inputs, so that every projection gives numbers about 1 and each layer adds about as much
    as the one before it; an embedding that is not the head too has variance 1, having one input. Norms are 1, and
    biases as small as the config's ``initializer_range``.
    """
    if like.ndim == 1 and not name.endswith("bias"):
        return torch.ones(like.shape, dtype=like.dtype)
    if like.ndim == 1:
        deviation = config.initializer_range
    else:
        is_embedding = "embed_tokens" in name and not config.tie_word_embeddings
        deviation = 1.0 if is_embedding else 1 / math.sqrt(like.shape[-1])
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
    weight = torch.empty(like.shape, dtype=like.dtype)
    for part in weight.view(-1).split(_BLOCK):
        part.copy_(torch.randn(part.shape, generator=generator).mul_(deviation))
    return weight
