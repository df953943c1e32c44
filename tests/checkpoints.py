"""Tiny checkpoints in folders, and their compression into other folders."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from conftest import tiny_model
from flatllmcore.core.rank_allocation import ImportancePreservingRankSelector
from flatllmcore.engine.checkpoint_sink import CheckpointSink
from flatllmcore.engine.checkpoint_source import CheckpointSource
from flatllmcore.engine.compress import compress_layers
from flatllmcore.methods import METHODS
from flatllmcore.utils.layer_utils import dimensions_from_config

CPU = torch.device("cpu")
SCORES = (0.3, 0.2, 0.4, 0.25)
REQUEST = {"seed": 42}


def save_tiny_checkpoint(folder: Path, family: str = "llama", shard_size: str = "20KB", **overrides: object) -> str:
    """Write a random model of four layers, sharded unless it is small, and return the folder."""
    model = tiny_model(family, num_hidden_layers=len(SCORES), **overrides)
    model.save_pretrained(folder, max_shard_size=shard_size)
    return str(folder)


def in_memory(folder: str, dtype: str = "auto") -> CheckpointSource:
    source = on_disk(folder, dtype)
    source.is_kept = True
    return source


def on_disk(folder: str, dtype: str = "auto") -> CheckpointSource:
    return CheckpointSource(folder, CPU, dtype)


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"[UNK]": 0, "a": 1, "b": 2}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="[UNK]")))


def compress_to(
    folder: Path,
    source: CheckpointSource,
    windows: Tensor,
    *,
    request: dict[str, object] = REQUEST,
    prune_qk: bool = False,
    overwrite: bool = False,
    before_layers: Callable[[CheckpointSink], None] = lambda sink: None,
) -> CheckpointSink:
    """Compress ``source`` at 40 % to a folder; return the sink, closed."""
    selector = ImportancePreservingRankSelector(dimensions_from_config(source.config), prune_qk=prune_qk)
    allocation = selector.allocate(SCORES[: source.num_layers], 0.6)
    with CheckpointSink(folder, source.num_layers, request, overwrite) as sink:
        before_layers(sink)
        config, _ = compress_layers(source, sink, windows, METHODS["flatllm"], allocation, batch_size=5, tolerance=0.96)
        sink.complete(source, config, None, tokenizer())
        sink.publish("# card\n")
    return sink


def weights_in(folder: Path | str) -> dict[str, Tensor]:
    return {name: weight for path in Path(folder).glob("*.safetensors") for name, weight in load_file(path).items()}


def bytes_in(folder: Path | str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}
