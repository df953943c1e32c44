"""``flatllm+``: bases by what the output makes of them, channels by damage, and fits towards the dense model's stream.

A layer's attention is done before its MLP is looked at, and each in two passes: first the projections that read the
stream are led towards what they would read in the dense model, then those that write to it are fitted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core.attention_pca import project_heads
from ..core.channel_obs import channels_by_damage
from ..core.moments import add_moment, mirror_lower_triangle
from ..core.output_pca import output_bases
from ..core.rank_allocation import ImportancePreservingRankSelector, RankAllocation
from ..core.refit import change_towards, led_towards
from ..engine.protocols import DENSE, HELD_OUT, STREAM, Solution, Sums
from ..utils.devices import float32_product
from ..utils.dimensions import Kept, ModelDimensions
from ..utils.layer_utils import DecoderModule

SHARE = 0.5  # of the way to the dense model's stream
OWN_RIDGE = 1e-2  # of the fit to a layer's own dense output


class FlatLLMPlus:
    """The second method."""

    name = "flatllm+"
    follows_dense = True

    def allocate(
        self, selector: ImportancePreservingRankSelector, scores: Sequence[float], keep_ratio: float
    ) -> RankAllocation:
        return selector.allocate(scores, keep_ratio)

    def check_calibration(self, dimensions: ModelDimensions, tokens: int) -> None:
        pass

    def steps(self, dimensions: ModelDimensions, kept: Kept) -> list["FittedStep"]:
        whole = replace(kept, value_rank=dimensions.head_dim, mlp_width=dimensions.intermediate_size)
        behind = replace(whole, value_rank=kept.value_rank)
        return [
            InputStep(dimensions, whole, "self_attn", "input_layernorm", ("q_proj", "k_proj", "v_proj")),
            OutputStep(dimensions, behind, "self_attn", "o_proj"),
            InputStep(dimensions, behind, "mlp", "post_attention_layernorm", ("gate_proj", "up_proj")),
            OutputStep(dimensions, kept, "mlp", "down_proj"),
        ]


@dataclass(frozen=True)
class FittedStep:
    """Moments of features and a target, of the tokens to fit and of those held out."""

    dimensions: ModelDimensions
    leaves: Kept
    part: str

    def zeros_of(self, features: int, targets: int, device: torch.device) -> Sums:
        shapes = {"C": (features, features), "R": (targets, features)}
        return {
            f"{of} {moment}": torch.zeros(shape, dtype=torch.float64, device=device)
            for of in ("fit", "held")
            for moment, shape in shapes.items()
        }

    def add_rows(self, sums: Sums, features: Tensor, targets: Tensor, is_held_out: Tensor) -> None:
        for of, chosen in (("fit", ~is_held_out), ("held", is_held_out)):
            if chosen.any():
                add_moment(sums[f"{of} C"], features[chosen])
                sums[f"{of} R"] += float32_product(targets[chosen].T, features[chosen])

    def moments(self, sums: Sums) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        for name in ("fit C", "held C"):
            mirror_lower_triangle(sums[name])
        return (sums["fit C"], sums["fit R"]), (sums["held C"], sums["held R"])


@dataclass(frozen=True)
class InputStep(FittedStep):
    """What reads the stream through a norm is led towards reading what the dense model's norm gives."""

    norm: str
    readers: tuple[str, ...]

    target = "input"

    @property
    def taps(self) -> list[str]:
        return [f"{self.norm}.output"]

    def zeros(self, layer: DecoderModule) -> Sums:
        size = self.dimensions.hidden_size
        return self.zeros_of(size, size, layer.mlp.down_proj.weight.device)

    def add(self, layer: DecoderModule, sums: Sums, seen: Mapping[str, Tensor]) -> None:
        dense = layer.get_submodule(self.norm).forward(seen[DENSE])  # not called: its hooks look at it
        self.add_rows(sums, seen[self.taps[0]], dense, seen[HELD_OUT])

    def solve(self, layer: DecoderModule, sums: Sums) -> Solution:
        identity = torch.eye(self.dimensions.hidden_size, dtype=torch.float64, device=sums["fit C"].device)
        mapped = led_towards(identity, *self.moments(sums), SHARE)
        projections = {name: f"{self.part}.{name}.weight" for name in self.readers}
        return Solution({full: layer.get_parameter(full).double() @ mapped for full in projections.values()})


@dataclass(frozen=True)
class OutputStep(FittedStep):
    """What writes to the stream is narrowed and fitted, to its own dense output and towards the dense model's stream."""

    writer: str

    target = "output"

    @property
    def taps(self) -> list[str]:
        return [f"{self.part}.{self.writer}.input"]

    def zeros(self, layer: DecoderModule) -> Sums:
        weight = layer.get_parameter(f"{self.part}.{self.writer}.weight")
        return self.zeros_of(weight.shape[1], weight.shape[0], weight.device)

    def add(self, layer: DecoderModule, sums: Sums, seen: Mapping[str, Tensor]) -> None:
        missing = seen[DENSE].float() - seen[STREAM].float()
        bias = layer.get_submodule(f"{self.part}.{self.writer}").bias
        self.add_rows(sums, seen[self.taps[0]], missing if bias is None else missing - bias, seen[HELD_OUT])

    def solve(self, layer: DecoderModule, sums: Sums) -> Solution:
        fit, held = self.moments(sums)
        if self.part == "self_attn":
            reduced, weights = self._values(layer, fit[0] + held[0])
        else:
            reduced, weights = self._channels(layer, fit[0] + held[0])
        weight = layer.get_parameter(f"{self.part}.{self.writer}.weight").double()
        moment = fit[0] + held[0]
        own, own_cross = reduced.T @ moment @ reduced, weight @ moment @ reduced
        start = weight @ reduced
        start = start + change_towards(start, own, own_cross, OWN_RIDGE)
        narrowed = [(reduced.T @ c @ reduced, r @ reduced) for c, r in (fit, held)]
        weights[f"{self.part}.{self.writer}.weight"] = led_towards(start, *narrowed, SHARE)
        return Solution(weights)

    def _values(self, layer, moment):
        sizes = self.dimensions
        attention = layer.self_attn
        bases = output_bases(moment, attention.o_proj.weight, sizes.num_kv_heads, sizes.head_dim, self.leaves.value_rank)
        weights = {f"self_attn.v_proj.{of}": project_heads(p, bases) for of, p in attention.v_proj.named_parameters()}
        repeats = sizes.num_heads // sizes.num_kv_heads
        return torch.block_diag(*bases.repeat_interleave(repeats, 0)), weights

    def _channels(self, layer, moment):
        sizes, mlp = self.dimensions, layer.mlp
        stay, _ = channels_by_damage(mlp.down_proj.weight, moment, sizes.intermediate_size - self.leaves.mlp_width)
        weights = {
            f"mlp.{name}.{of}": p[stay] for name in ("gate_proj", "up_proj") for of, p in mlp.get_submodule(name).named_parameters()
        }
        return torch.eye(len(moment), dtype=moment.dtype, device=moment.device)[:, stay], weights
