"""The door for the next method: two throw-away ones, no line of which is known outside this file."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from checkpoints import CPU, bytes_in, compress_to, in_memory, save_tiny_checkpoint, weights_in
from conftest import tiny_model
from flatllmcore import FlatLLMPruner, InputError
from flatllmcore.engine.compress import compress_layers
from flatllmcore.engine.memory import ModelInMemory
from flatllmcore.engine.method import Solution
from flatllmcore.methods import METHODS
from flatllmcore.utils.dimensions import Kept, ModelDimensions


@dataclass(frozen=True)
class FirstChannels:
    """A step that keeps the first channels of the MLP, the first directions of each value head, or both."""

    sizes: ModelDimensions
    kept: Kept
    part: str = ""
    taps: tuple[str, ...] = ("mlp.down_proj.input",)
    note: Callable[[Tensor], None] = lambda total: None

    def zeros(self, layer):
        return {"total": torch.zeros(layer.mlp.down_proj.in_features, dtype=torch.float64)}

    def add(self, sums, seen):
        sums["total"] += seen["mlp.down_proj.input"].double().sum(0) if self.part != "self_attn" else 0

    def solve(self, layer, sums):
        self.note(sums["total"])
        k, r, d = self.kept.mlp_width, self.kept.value_rank, self.sizes.head_dim
        mlp = {f"mlp.{name}.weight": getattr(layer.mlp, name).weight[:k] for name in ("gate_proj", "up_proj")}
        mlp["mlp.down_proj.weight"] = layer.mlp.down_proj.weight[:, :k]
        if self.part != "mlp":
            v, o = layer.self_attn.v_proj.weight, layer.self_attn.o_proj.weight
            values = {"self_attn.v_proj.weight": v.unflatten(0, (-1, d))[:, :r].flatten(0, 1)}
            values["self_attn.o_proj.weight"] = o.unflatten(1, (-1, d))[:, :, :r].flatten(1)
        return Solution({"": lambda: values | mlp, "self_attn": lambda: values, "mlp": lambda: mlp}[self.part]())


class First:
    """Keeps whole heads, and the first channels of MLPs that are all equally wide."""

    name = "first"

    def __init__(self, *steps: FirstChannels) -> None:
        self.fixed = steps

    def allocate(self, selector, scores, keep_ratio):
        return selector.allocate([1.0] * len(scores), keep_ratio)

    def check_calibration(self, dimensions, tokens):
        pass

    def steps(self, dimensions, kept):
        return [FirstChannels(dimensions, kept)]
