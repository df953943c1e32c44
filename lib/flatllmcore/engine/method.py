"""What a compression method is to the engine.

The engine owns *how*: order of layers, batches, hooks, sums over processes, timing, naming the layer in errors, resume.
A method never sees a file, a device choice or a process group, and the engine never looks at a method's name.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, TypeAlias

from torch import Tensor

from ..core.rank_allocation import ImportancePreservingRankSelector, RankAllocation
from ..utils.dimensions import Kept, ModelDimensions
from ..utils.layer_utils import DecoderModule

Sums: TypeAlias = dict[str, Tensor]


class Solution(NamedTuple):
    """New weights of a layer or of a part of it."""

    weights: dict[str, Tensor]  # by name within the layer, self_attn.v_proj.weight; what is not named stays
    eigenvalues: Tensor | None = None  # of the value heads, falling, (G, d), to be monitored


class Step(Protocol):
    """One pass of the calibration tokens through a layer, and the weights that follow from it."""

    @property
    def part(self) -> str:
        """What is compressed for later steps to look at, ``self_attn`` or ``mlp``, or "" for the whole layer."""

    @property
    def taps(self) -> Sequence[str]:
        """What is looked at, ``mlp.down_proj.input`` or ``self_attn.v_proj.output``; the pass ends at the last."""

    def zeros(self, layer: DecoderModule) -> Sums:
        """Return the sums before any token; the engine adds them up over batches and processes."""

    def add(self, sums: Sums, seen: Mapping[str, Tensor]) -> None:
        """Add a batch in place: what passed each tap, (tokens, width)."""

    def solve(self, layer: DecoderModule, sums: Sums) -> Solution:
        """Return the layer's new weights; an ArithmeticError, to which the engine adds the layer, if there are none."""


class Method(Protocol):
    """How much each layer keeps, and how it is brought there."""

    name: str

    def allocate(
        self, selector: ImportancePreservingRankSelector, scores: Sequence[float], keep_ratio: float
    ) -> RankAllocation:
        """Return what each layer keeps, so that ``keep_ratio``, in (0, 1], of their linear weights stays."""

    def check_calibration(self, dimensions: ModelDimensions, tokens: int) -> None:
        """Warn where the calibration tokens are too few to solve layers of these sizes well."""

    def steps(self, dimensions: ModelDimensions, kept: Kept) -> Sequence[Step]:
        """Return the passes that bring one layer to what it keeps; none for a layer that stays whole."""
