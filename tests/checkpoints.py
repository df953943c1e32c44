"""Tiny models compressed in memory, tiny checkpoints in folders, and their compression into other folders."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from conftest import tiny_model
from flatllmcore.core.rank_allocation import ImportancePreservingRankSelector, RankAllocation
from flatllmcore.engine.checkpoint_sink import CheckpointSink
from flatllmcore.engine.checkpoint_source import CheckpointSource
from flatllmcore.engine.compress import compress_layers
from flatllmcore.engine.importance import layer_importance
from flatllmcore.engine.memory import ModelInMemory
from flatllmcore.engine.protocols import LayerRecord, LayerSource
from flatllmcore.methods import METHODS
from flatllmcore.utils.layer_utils import dimensions_from_config
from flatllmcore.utils.loading import load_model
from tiny_text import documents, word_tokenizer, write_texts

CPU = torch.device("cpu")
SCORES = (0.3, 0.2, 0.4, 0.25)

VARIANTS = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    ("llama", {"num_key_value_heads": 1}),
    ("mistral", {"sliding_window": 5}),
]


def compressed(
    model: PreTrainedModel,
    windows: Tensor,
    keep_ratio: float = 0.6,
    *,
    prune_qk: bool = False,
    batch_size: int = 5,
    device: torch.device = CPU,
) -> tuple[PreTrainedModel, RankAllocation, list[LayerRecord]]:
    """Compress ``model`` in place; its first layer counts most, so the last is compressed most."""
    dimensions = dimensions_from_config(model.config)
    scores = [0.5 - 0.1 * layer for layer in range(dimensions.num_layers)]
    selector = ImportancePreservingRankSelector(dimensions, rank_multiple=1, prune_qk=prune_qk)
    allocation = selector.allocate(scores, keep_ratio)
    source = ModelInMemory(model, device)
    flat_config, records = compress_layers(
        source, source, windows, METHODS["flatllm"], allocation, batch_size=batch_size, tolerance=0.96
    )
    return source.adopt(flat_config), allocation, records


def assert_same_up_to_sign(model: PreTrainedModel, other: PreTrainedModel) -> None:
    """Compare weights; bases are fixed only up to sign, and so magnitudes are."""
    for (name, a), (_, b) in zip(model.state_dict().items(), other.state_dict().items(), strict=True):
        torch.testing.assert_close(a.abs(), b.abs(), rtol=1e-6, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


def save_tiny_checkpoint(folder: Path, family: str = "llama", shard_size: str = "20KB", **overrides: object) -> str:
    """Write a random model of four layers, sharded unless it is small, and return the folder."""
    model = tiny_model(family, num_hidden_layers=len(SCORES), **overrides)
    model.save_pretrained(folder, max_shard_size=shard_size)
    return str(folder)


def save_inputs(folder: Path, dtype: torch.dtype) -> Path:
    """Write a model and a text, as a run of main.py takes them; return their folder."""
    tiny_model(num_hidden_layers=3).to(dtype).save_pretrained(folder / "dense")
    word_tokenizer().save_pretrained(folder / "dense")
    write_texts(folder / "text")
    (folder / "text" / "test.txt").write_text("\n".join(documents(5, seed=1)))  # perplexity takes the whole of it
    return folder


def in_memory(folder: str, dtype: str = "auto") -> ModelInMemory:
    return ModelInMemory(load_model(folder, dtype=dtype), CPU)


def on_disk(folder: str, dtype: str = "auto") -> CheckpointSource:
    return CheckpointSource(folder, CPU, dtype)


def compress_to(
    folder: Path,
    dense: str,
    windows: Tensor,
    *,
    source: LayerSource | None = None,
    method: str = "flatllm",
    prune_qk: bool = False,
    overwrite: bool = False,
    before_layers: Callable[[CheckpointSink], None] = lambda sink: None,
) -> None:
    """Compress the checkpoint ``dense`` at 40 % to a folder; ``source`` gives its layers, the disk by default."""
    checkpoint = on_disk(dense)
    selector = ImportancePreservingRankSelector(dimensions_from_config(checkpoint.config), prune_qk=prune_qk)
    is_by_damage = METHODS[method].importance_method == "damage"
    curves = layer_importance(on_disk(dense), windows, 5, "damage").curves_in_nats if is_by_damage else None
    allocation = METHODS[method].allocate(selector, SCORES[: checkpoint.num_layers], curves, 0.6)
    with CheckpointSink(folder, checkpoint.num_layers, {"seed": 42}, overwrite).opened() as sink:
        before_layers(sink)
        config, _ = compress_layers(
            source or checkpoint, sink, windows, METHODS[method], allocation, batch_size=5, tolerance=0.96
        )
        sink.complete(checkpoint, config, None, word_tokenizer())
        sink.publish("# card\n")


def stop_at(
    patch: pytest.MonkeyPatch, step: type, number: int | None = None, error: type[BaseException] = KeyboardInterrupt
) -> list[tuple]:
    """Return a list that notes every solve of a method's step; once it has so many of them, the next is an error."""
    solve, solved = step.solve, []

    def solve_or_stop(*args: object) -> object:
        if len(solved) == number:
            raise error
        solved.append(args)
        return solve(*args)

    patch.setattr(step, "solve", solve_or_stop)
    return solved


def room(patch: pytest.MonkeyPatch, size: float) -> None:
    """Leave so many bytes on the disk."""
    usage = shutil.disk_usage("/")
    patch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=int(size)))


def read(path: Path | str) -> dict[str, Any]:
    return json.loads(Path(path).read_text())


def edit(path: Path | str, **fields: object) -> None:
    Path(path).write_text(json.dumps(read(path) | fields))


def hub_cache(cache: Path, repository: str) -> Path:
    """Lay out the hub's cache for a repository, such as ``models--someone--tiny``; return where its files belong."""
    (cache / repository / "refs").mkdir(parents=True)
    (cache / repository / "refs" / "main").write_text("0" * 40)
    (cache / repository / "snapshots").mkdir()
    return cache / repository / "snapshots" / ("0" * 40)


def weights_in(folder: Path | str) -> dict[str, Tensor]:
    return {name: weight for path in Path(folder).glob("*.safetensors") for name, weight in load_file(path).items()}


def bytes_in(folder: Path | str, pattern: str = "*") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).glob(pattern)}


def shards(folder: Path | str) -> dict[str, bytes]:
    return bytes_in(folder, "*.safetensors")
