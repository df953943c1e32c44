"""``flatllm+``: values by what the output makes of them, channels by damage, fits towards the dense model's stream.

A layer's attention is done before its MLP is looked at, and each in two passes: first the projections that read the
stream are led towards what they would read in the dense model, then the one that writes to it is narrowed and fitted.
``docs/FLATLLM_PLUS.md`` has the equations.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core.attention_pca import project_heads
from ..core.channel_obs import channels_by_damage
from ..core.mlp_nystrom import ENOUGH_TOKENS_PER_CHANNEL
from ..core.moments import add_cross_moment, add_moment, inverse_length, mirror_lower_triangle
from ..core.output_pca import output_bases, spread_over_queries
from ..core.rank_allocation import RankAllocation
from ..core.refit import led_towards
from ..core.rotary_pairs import pair_energies, without_pairs
from ..engine.protocols import DENSE, HELD_OUT, STREAM, Method, Solution, Sums, zero_sums
from ..errors import InputError
from ..utils.dimensions import Kept, ModelDimensions
from ..utils.layer_utils import DecoderModule

logger = logging.getLogger(__name__)

QUERIES, KEYS = "self_attn.q_proj.output", "self_attn.k_proj.output"
TOKENS = "tokens"
SHARE = 0.25  # of the way to the dense model's stream: more of it does better on text like the calibration's alone


class FlatLLMPlus(Method):
    """As accurate as closed forms get at equal size; Q and K lose rotary pairs where the allocation says so."""

    name = "flatllm+"
    importance_method = "damage"
    follows_dense = True

    def check(self, allocation: RankAllocation, tokens: int) -> None:
        """Refuse factors of Q and K; warn where the tokens are too few to fit the MLP to."""
        if any(kept.query_key_rank is not None for kept in allocation.layers):
            raise InputError(
                f"{self.name} prunes rotary pairs of Q and K and leaves no factors of them; allocate by damage"
            )
        channels = allocation.dimensions.intermediate_size
        if tokens < ENOUGH_TOKENS_PER_CHANNEL * channels:
            logger.warning(f"{tokens} calibration tokens are few for {channels} MLP channels; give more tokens")

    def steps(self, dimensions: ModelDimensions, kept: Kept) -> list["InputStep | OutputStep"]:
        """Return two steps for the attention and two for the MLP; none for a layer that stays whole."""
        if dimensions.is_whole(kept):
            return []
        turned = replace(kept, value_rank=dimensions.head_dim, mlp_width=dimensions.intermediate_size)
        behind = replace(turned, value_rank=kept.value_rank)
        return [
            InputStep(dimensions, turned, "self_attn", "input_layernorm", ("q_proj", "k_proj", "v_proj")),
            OutputStep(dimensions, behind, "self_attn", "o_proj"),
            InputStep(dimensions, behind, "mlp", "post_attention_layernorm", ("gate_proj", "up_proj")),
            OutputStep(dimensions, kept, "mlp", "down_proj"),
        ]


@dataclass(frozen=True)
class FittedStep:
    """Moments ``C = Σ f fᵀ`` of features and ``R = Σ t fᵀ`` with a target, of tokens to fit and of those held out."""

    dimensions: ModelDimensions
    leaves: Kept
    part: str

    def shapes_of(self, features: int, targets: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the moments, by name."""
        shapes = {"C": (features, features), "R": (targets, features)}
        return {f"{of} {moment}": shape for of in ("fit", "held") for moment, shape in shapes.items()}

    def add_rows(self, sums: Sums, features: Tensor, targets: Tensor, is_held_out: Tensor) -> None:
        """Add tokens, (tokens, width), in place."""
        for of, chosen in (("fit", ~is_held_out), ("held", is_held_out)):
            if chosen.any():
                add_moment(sums[f"{of} C"], features[chosen])
                add_cross_moment(sums[f"{of} R"], targets[chosen], features[chosen])

    def moments(self, sums: Sums) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return ``C`` and ``R`` of the tokens to fit, and of those held out."""
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
    def prunes_pairs(self) -> bool:
        """Whether rotary pairs of Q and K go in this step."""
        return self.part == "self_attn" and self.leaves.query_key_pairs is not None

    @property
    def taps(self) -> list[str]:
        """What the norm gives; queries and keys where pairs go."""
        return [f"{self.norm}.output", *((QUERIES, KEYS) if self.prunes_pairs else ())]

    def zeros(self, layer: DecoderModule) -> Sums:
        """Return moments of width D, and the energies of rotary pairs."""
        sizes = self.dimensions
        shapes = self.shapes_of(sizes.hidden_size, sizes.hidden_size)
        return zero_sums(layer, shapes | (_pair_shapes(sizes) if self.prunes_pairs else {}))

    def add(self, layer: DecoderModule, sums: Sums, seen: Mapping[str, Tensor]) -> None:
        """Add a batch."""
        dense = layer.get_submodule(self.norm).forward(seen[DENSE])  # not called: its hooks look at it
        self.add_rows(sums, seen[self.taps[0]], dense, seen[HELD_OUT])
        for tap in self.taps[1:]:
            sums[tap] += pair_energies(seen[tap], self.dimensions.head_dim)

    def solve(self, layer: DecoderModule, sums: Sums) -> Solution:
        """Return the readers' weights behind the map ``M`` with ``M f ≈ t``."""
        identity = torch.eye(self.dimensions.hidden_size, dtype=torch.float64, device=sums["fit C"].device)
        mapped = led_towards(identity, *self.moments(sums), SHARE)
        names = [f"{self.part}.{reader}.weight" for reader in self.readers]
        weights = {name: layer.get_parameter(name).double() @ mapped for name in names}
        left = self.leaves.query_key_pairs
        if self.prunes_pairs and left is not None:
            weights |= without_pairs(layer.self_attn, weights, sums[QUERIES], sums[KEYS], left)
        return Solution(weights)


@dataclass(frozen=True)
class OutputStep(FittedStep):
    """What writes to the stream is narrowed, and fitted to its own dense output and towards the dense stream."""

    writer: str

    target = "output"

    @property
    def name(self) -> str:
        """Of the projection that writes."""
        return f"{self.part}.{self.writer}"

    @property
    def taps(self) -> list[str]:
        """What it reads."""
        return [f"{self.name}.input"]

    def zeros(self, layer: DecoderModule) -> Sums:
        """Return moments of what it reads and, crossed with it, of what it should write."""
        writer = layer.get_submodule(self.name)
        return zero_sums(layer, {TOKENS: ()} | self.shapes_of(writer.in_features, writer.out_features))

    def add(self, layer: DecoderModule, sums: Sums, seen: Mapping[str, Tensor]) -> None:
        """Add a batch: what is missing of the dense stream, each token by that stream's length."""
        bias = layer.get_submodule(self.name).bias
        missing = seen[DENSE] - seen[STREAM] - (0 if bias is None else bias)
        weight = inverse_length(seen[DENSE])
        self.add_rows(sums, seen[self.taps[0]] * weight, missing * weight, seen[HELD_OUT])
        sums[TOKENS] += len(missing)

    def solve(self, layer: DecoderModule, sums: Sums) -> Solution:
        """Return the weights of the whole part, narrowed."""
        fit, held_out = self.moments(sums)
        moment = fit[0] + held_out[0]
        weight = layer.get_parameter(f"{self.name}.weight").double()
        narrow = self._narrowed_values if self.part == "self_attn" else self._narrowed_channels
        # Columns of the map: what is read then, in terms of what is read now.
        reduced, weights = narrow(layer, moment, int(sums[TOKENS]))
        narrowed = [(reduced.T @ C @ reduced, weight @ C @ reduced, R @ reduced) for C, R in (fit, held_out)]
        (fit_own, held_own), (fit_stream, held_stream) = ([(of[0], of[n]) for of in narrowed] for n in (1, 2))
        fitted = led_towards(weight @ reduced, fit_own, held_own, 1.0)
        return Solution(weights | {f"{self.name}.weight": led_towards(fitted, fit_stream, held_stream, SHARE)})

    def _narrowed_values(self, layer: DecoderModule, moment: Tensor, _: int) -> tuple[Tensor, dict[str, Tensor]]:
        sizes, attention = self.dimensions, layer.self_attn
        bases = output_bases(moment, attention.o_proj.weight, sizes.num_kv_heads, sizes.head_dim)
        bases = bases[..., : self.leaves.value_rank]
        weights = {f"self_attn.v_proj.{of}": project_heads(p, bases) for of, p in attention.v_proj.named_parameters()}
        return spread_over_queries(bases, sizes.num_heads), weights

    def _narrowed_channels(self, layer: DecoderModule, moment: Tensor, tokens: int) -> tuple[Tensor, dict[str, Tensor]]:
        sizes, mlp = self.dimensions, layer.mlp
        removed = sizes.intermediate_size - self.leaves.mlp_width
        stay, _ = channels_by_damage(mlp.down_proj.weight, moment, removed, tokens)
        readers = {f"mlp.{name}": mlp.get_submodule(name) for name in ("gate_proj", "up_proj")}
        weights = {f"{name}.{of}": part[stay] for name, it in readers.items() for of, part in it.named_parameters()}
        return torch.eye(len(moment), dtype=moment.dtype, device=moment.device)[:, stay], weights


def _pair_shapes(sizes: ModelDimensions) -> dict[str, tuple[int, ...]]:
    return {QUERIES: (sizes.num_heads, sizes.head_dim // 2), KEYS: (sizes.num_kv_heads, sizes.head_dim // 2)}
