"""``flatllm+``: values by what the output makes of them, channels by damage, fits towards the dense model's stream.

A layer's attention is done before its MLP is looked at: rotary pairs of Q and K go, then what each part writes to the
stream with is narrowed and fitted. ``docs/FLATLLM_PLUS.md`` has the equations.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeAlias

from torch import Tensor

from ..core.attention_pca import heads_projected, output_bases, project_output
from ..core.mlp_nystrom import channels_kept
from ..core.moments import add_moment, inverse_length, mirror_lower_triangle
from ..core.refit import channels_by_damage, led_towards
from ..core.rotary_pairs import pair_energies, without_pairs
from ..engine.protocols import DENSE, HELD_OUT, KEYS, METRIC, QUERIES, STREAM, TOKENS, Method, Solution, Step, Sums
from ..utils.devices import float32_product
from ..utils.dimensions import Kept, ModelDimensions
from ..utils.layer_utils import WRITERS, DecoderModule

Narrowing: TypeAlias = Callable[[Tensor], Tensor]  # from columns for what is read now to those for what is read then
SHARE = 0.25  # of the way to the dense model's stream: more of it does better on text like the calibration's alone


class FlatLLMPlus(Method):
    """As accurate as closed forms get at equal size; Q and K lose rotary pairs where the allocation says so."""

    name = "flatllm+"
    importance_method = "damage"
    follows_dense = True
    prunes_pairs = True
    weighs_errors = True

    def words(self, prune_qk: bool) -> str:
        """Return what is done to a layer, for the model card."""
        pairs = "rotary pairs of queries and keys, " if prune_qk else ""
        return f"{pairs}directions of values and channels of MLPs, those that cost least; what is left was refitted"

    def steps(self, dimensions: ModelDimensions, kept: Kept) -> list[Step]:
        """Return a step for each part, before them one for pairs if some go; none for a layer that stays whole."""
        if dimensions.is_whole(kept):
            return []
        behind = replace(kept, mlp_width=dimensions.intermediate_size)
        paired = replace(behind, value_rank=dimensions.head_dim)
        return [
            *([] if kept.query_key_pairs is None else [PairStep(dimensions, paired, "self_attn")]),
            OutputStep(dimensions, behind, "self_attn"),
            OutputStep(dimensions, kept, "mlp"),
        ]


class PairStep(Step):
    """Rotary pairs of Q and K go."""

    taps = (QUERIES, KEYS)

    def shapes(self, layer: DecoderModule) -> dict[str, tuple[int, ...]]:
        """Return those of the energies of the pairs of each head."""
        sizes = self.dimensions
        heads = {QUERIES: sizes.num_heads, KEYS: sizes.num_kv_heads}
        return {tap: (count, sizes.head_dim // 2) for tap, count in heads.items()}

    def add(self, _: DecoderModule, sums: Sums, seen: Mapping[str, Tensor]) -> None:
        """Add a batch."""
        for tap in self.taps:
            sums[tap] += pair_energies(seen[tap], self.dimensions.head_dim)

    def solve(self, layer: DecoderModule, sums: Sums) -> Solution:
        """Return the weights of Q and K without the pairs that tell least, and where those that stay stood."""
        left = self.leaves.query_key_pairs
        assert left is not None
        return Solution(without_pairs(layer.self_attn, sums[QUERIES], sums[KEYS], left))


class OutputStep(Step):
    """What writes to the stream is narrowed, and fitted to its own dense output and towards the dense stream."""

    @property
    def taps(self) -> list[str]:
        """What it reads."""
        return [f"{WRITERS[self.part]}.input"]

    def shapes(self, layer: DecoderModule) -> dict[str, tuple[int, ...]]:
        """Return those of the moments ``C = Σ z zᵀ`` of what it reads and ``R = Σ t zᵀ`` with what it should write.

        Each is there twice, of tokens to fit and of those held out.
        """
        writer = layer.get_submodule(WRITERS[self.part])
        shapes = {"C": (writer.in_features, writer.in_features), "R": (writer.out_features, writer.in_features)}
        moments = {f"{of} {moment}": shape for of in ("fit", "held") for moment, shape in shapes.items()}
        return {TOKENS: (), **moments}

    def add(self, layer: DecoderModule, sums: Sums, seen: Mapping[str, Tensor]) -> None:
        """Add a batch: what is missing of the dense stream, each token by that stream's length."""
        bias = layer.get_submodule(WRITERS[self.part]).bias
        weight = inverse_length(seen[DENSE])
        features = seen[self.taps[0]] * weight
        targets = (seen[DENSE] - seen[STREAM] - (0 if bias is None else bias)) * weight
        for of, chosen in (("fit", ~seen[HELD_OUT]), ("held", seen[HELD_OUT])):
            if chosen.any():
                add_moment(sums[f"{of} C"], features[chosen])
                sums[f"{of} R"] += float32_product(targets[chosen].T, features[chosen])
        sums[TOKENS] += len(features)

    def solve(self, layer: DecoderModule, sums: Sums) -> Solution:
        """Return the weights of the whole part, narrowed."""
        for name in ("fit C", "held C"):
            mirror_lower_triangle(sums[name])
        narrow = self._narrowed_values if self.part == "self_attn" else self._narrowed_channels
        name = f"{WRITERS[self.part]}.weight"
        weight = layer.get_parameter(name).double()
        weighed = sums[METRIC] @ weight if METRIC in sums else weight  # (D, in)
        narrowed, weights = narrow(layer, weighed, sums["fit C"] + sums["held C"], int(sums[TOKENS]))
        moments = []
        own, stream = [], []  # crossed with its own output, and with what is missing of the dense stream
        for of in ("fit", "held"):
            reads = narrowed(sums[f"{of} C"])
            moments.append(narrowed(reads.T).T)
            own.append(weight @ reads)
            stream.append(narrowed(sums[f"{of} R"]))
        fitted = led_towards(narrowed(weight), moments, own, 1.0)
        return Solution(weights | {name: led_towards(fitted, moments, stream, SHARE)})

    def _narrowed_values(
        self, layer: DecoderModule, weight: Tensor, moment: Tensor, _: int
    ) -> tuple[Narrowing, dict[str, Tensor]]:
        sizes, attention = self.dimensions, layer.self_attn
        bases = output_bases(moment, weight, sizes.num_kv_heads, sizes.head_dim)
        bases = bases[..., : self.leaves.value_rank]
        values = heads_projected(attention.v_proj, "self_attn.v_proj", bases)
        return (lambda matrix: project_output(matrix, bases)), values

    def _narrowed_channels(
        self, layer: DecoderModule, weight: Tensor, moment: Tensor, tokens: int
    ) -> tuple[Narrowing, dict[str, Tensor]]:
        sizes, mlp = self.dimensions, layer.mlp
        removed = sizes.intermediate_size - self.leaves.mlp_width
        stay, _ = channels_by_damage(weight, moment, removed, tokens)
        return (lambda matrix: matrix[:, stay]), channels_kept(mlp, stay)
