"""The peer of the comparison: structured OBS with refit, uniform over layers, in whole key/value groups and channels.

Its rule is that of ZipLM (arXiv 2302.04089): what costs the output least goes, ``‖ΔW z‖²`` with the others' weights
making up for it, and the projection that reads is refitted to the dense one. A group's queries, keys, values and output
go together. Removed groups stay in place as zeros: its models are made to be measured.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from flatllmcore.core.moments import add_moment, mirror_lower_triangle
from flatllmcore.core.rank_allocation import RankAllocation
from flatllmcore.core.refit import channels_by_damage, ridge_for, solved_from_right, with_ridge
from flatllmcore.engine.protocols import Method, Solution, Sums
from flatllmcore.utils.dimensions import Kept, ModelDimensions
from flatllmcore.utils.layer_utils import DecoderModule


@dataclass(frozen=True)
class ObsPeer(Method):
    """Structured OBS that removes the same number of groups from every layer; the widths are the allocation's."""

    groups_removed: int

    name = "obs"
    importance_method = "angular"
    follows_dense = False

    def check(self, allocation: RankAllocation, tokens: int) -> None:
        """Make no demands."""

    def steps(self, dimensions: ModelDimensions, kept: Kept) -> list["GroupStep | ChannelStep"]:
        """Return a step for the attention and one for the MLP."""
        whole = replace(kept, mlp_width=dimensions.intermediate_size)
        return [GroupStep(dimensions, whole, self.groups_removed), ChannelStep(dimensions, kept)]


def uniform_allocation(dimensions: ModelDimensions, keep_ratio: float) -> tuple[int, RankAllocation]:
    """Return how many groups each layer loses, and the widths that leave ``keep_ratio`` of all linear weights."""
    groups = min(round((1 - keep_ratio) * dimensions.num_kv_heads), dimensions.num_kv_heads - 1)
    return groups, _widths(dimensions, keep_ratio, groups)


def channels_only(dimensions: ModelDimensions, keep_ratio: float) -> tuple[int, RankAllocation]:
    """Return no groups, and the widths that leave ``keep_ratio`` of all linear weights."""
    return 0, _widths(dimensions, keep_ratio, 0)


def _widths(dimensions: ModelDimensions, keep_ratio: float, groups: int) -> RankAllocation:
    attention = dimensions.qk_parameters + dimensions.head_dim * dimensions.rank_parameters
    to_remove = (1 - keep_ratio) * dimensions.layer_parameters - groups * attention / dimensions.num_kv_heads
    removed = to_remove * dimensions.num_layers / dimensions.width_parameters  # channels, of all layers
    spread = [round(removed * (n + 1) / dimensions.num_layers) for n in range(dimensions.num_layers)]
    counts = [after - before for before, after in pairwise((0, *spread))]  # the same in all, but for one
    layers = tuple(Kept(keep_ratio, dimensions.head_dim, dimensions.intermediate_size - count) for count in counts)
    return RankAllocation(round(100 * (1 - keep_ratio), 9), False, 1, dimensions, layers)


@dataclass(frozen=True)
class _Step:
    dimensions: ModelDimensions
    leaves: Kept

    part = ""
    writer = ""

    @property
    def taps(self) -> list[str]:
        return [f"{self.writer}.input"]

    def zeros(self, layer: DecoderModule) -> Sums:
        weight = layer.get_parameter(f"{self.writer}.weight")
        shapes = {"C": (weight.shape[1],) * 2, "tokens": ()}
        return {name: torch.zeros(of, dtype=torch.float64, device=weight.device) for name, of in shapes.items()}

    def add(self, layer: DecoderModule, sums: Sums, seen: Mapping[str, Tensor]) -> None:
        add_moment(sums["C"], seen[self.taps[0]])
        sums["tokens"] += len(seen[self.taps[0]])

    def refitted(self, layer: DecoderModule, sums: Sums, stay: Tensor) -> Tensor:
        weight = layer.get_parameter(f"{self.writer}.weight").double()
        own, cross = sums["C"][stay][:, stay], (weight @ sums["C"])[:, stay]
        ridge = ridge_for(int(sums["tokens"]), weight.shape[1])
        left = weight[:, stay]
        return left + solved_from_right(with_ridge(own, ridge), cross - left @ own)


@dataclass(frozen=True)
class GroupStep(_Step):
    """The attention with fewer key/value groups."""

    groups_removed: int

    part = "self_attn"
    writer = "self_attn.o_proj"

    def solve(self, layer: DecoderModule, sums: Sums) -> Solution:
        mirror_lower_triangle(sums["C"])
        weight = layer.self_attn.o_proj.weight.double()
        columns = torch.arange(weight.shape[1], device=weight.device).view(self.dimensions.num_kv_heads, -1)
        left = list(range(len(columns)))
        ridge = ridge_for(int(sums["tokens"]), weight.shape[1])
        for _ in range(self.groups_removed):
            stay = columns[left].flatten()
            inverse = torch.linalg.inv(with_ridge(sums["C"][stay][:, stay], ridge)).view(
                len(left), columns.shape[1], len(left), -1
            )
            fitted = self.refitted(layer, sums, stay).view(len(weight), len(left), -1)
            damage = [
                (solved_from_right(inverse[n, :, n], fitted[:, n]) * fitted[:, n]).sum().item()
                for n in range(len(left))
            ]
            left.pop(damage.index(min(damage)))
        stay = columns[left].flatten()
        new = torch.zeros_like(weight)
        new[:, stay] = self.refitted(layer, sums, stay)
        return Solution({"self_attn.o_proj.weight": new})


@dataclass(frozen=True)
class ChannelStep(_Step):
    """The MLP with fewer channels."""

    part = "mlp"
    writer = "mlp.down_proj"

    def solve(self, layer: DecoderModule, sums: Sums) -> Solution:
        mirror_lower_triangle(sums["C"])
        removed = self.dimensions.intermediate_size - self.leaves.mlp_width
        stay, _ = channels_by_damage(layer.mlp.down_proj.weight, sums["C"], removed, int(sums["tokens"]))
        weights = {
            f"mlp.{name}.weight": layer.get_parameter(f"mlp.{name}.weight")[stay] for name in ("gate_proj", "up_proj")
        }
        return Solution(weights | {"mlp.down_proj.weight": self.refitted(layer, sums, stay)})
