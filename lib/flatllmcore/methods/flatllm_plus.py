"""``flatllm+``: bases by what the output makes of them, channels by damage, and fits towards the dense model's stream.

A layer's attention is done before its MLP is looked at, and each in two passes: first the projections that read the
stream are led towards what they would read in the dense model, then those that write to it are fitted.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core.attention_pca import project_heads
from ..core.channel_obs import channels_by_damage
from ..core.moments import add_moment, mirror_lower_triangle
from ..core.output_pca import output_bases
from ..core.rank_allocation import ImportancePreservingRankSelector, RankAllocation
from ..core.refit import change_towards, led_towards, solved_from_right, with_ridge
from ..engine.protocols import DENSE, HELD_OUT, STREAM, Solution, Sums, Trial
from ..engine.walk import MIDDLE
from ..utils.devices import float32_product
from ..utils.dimensions import Kept, ModelDimensions
from ..utils.layer_utils import DecoderModule

QUERIES, KEYS = "self_attn.q_proj.output", "self_attn.k_proj.output"
VALUE_SHARES = (15 / 16, 7 / 8, 3 / 4, 5 / 8, 1 / 2, 3 / 8, 1 / 4)
PAIR_SHARES = (7 / 8, 3 / 4, 5 / 8, 1 / 2)
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
        turned = replace(kept, value_rank=dimensions.head_dim, mlp_width=dimensions.intermediate_size)
        behind = replace(turned, value_rank=kept.value_rank)
        return [
            InputStep(dimensions, turned, "self_attn", "input_layernorm", ("q_proj", "k_proj", "v_proj")),
            OutputStep(dimensions, behind, "self_attn", "o_proj"),
            InputStep(dimensions, behind, "mlp", "post_attention_layernorm", ("gate_proj", "up_proj")),
            OutputStep(dimensions, kept, "mlp", "down_proj"),
        ]


@dataclass(frozen=True)
class DamageEvidence:
    """Damage of narrower values, MLPs and Q and K, as a share of the stream's energy, token by token."""

    dimensions: ModelDimensions

    taps = (QUERIES, KEYS, "self_attn.o_proj.input", MIDDLE, "mlp.down_proj.input")

    def zeros(self, layer: DecoderModule) -> Sums:
        sizes, device = self.dimensions, layer.mlp.down_proj.weight.device
        shapes = {
            "values": (sizes.num_heads * sizes.head_dim,) * 2,
            "mlp": (sizes.intermediate_size,) * 2,
            "tokens": (),
            QUERIES: (sizes.num_heads, sizes.head_dim // 2),
            KEYS: (sizes.num_kv_heads, sizes.head_dim // 2),
        }
        return {name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in shapes.items()}

    def add(self, layer: DecoderModule, sums: Sums, seen: Mapping[str, Tensor]) -> None:
        middle = seen[MIDDLE].float()
        output = middle + layer.mlp.down_proj.forward(seen["mlp.down_proj.input"]).float()
        for name, features, stream in (("values", "self_attn.o_proj.input", middle), ("mlp", "mlp.down_proj.input", output)):
            add_moment(sums[name], seen[features].float() * stream.square().sum(-1, keepdim=True).rsqrt())
        for tap in (QUERIES, KEYS):
            sums[tap] += pair_energies(seen[tap], self.dimensions.head_dim)
        sums["tokens"] += len(middle)

    def curves(self, layer: DecoderModule, sums: Sums) -> dict[str, list[tuple[float, float]]]:
        sizes, tokens = self.dimensions, sums["tokens"].item()
        for name in ("values", "mlp"):
            mirror_lower_triangle(sums[name])
        weight, moment = layer.self_attn.o_proj.weight.double(), sums["values"]
        values = [(0.0, 0.0)]
        energy = ((weight @ moment) * weight).sum()
        for rank in dict.fromkeys(int(share * sizes.head_dim) for share in VALUE_SHARES):
            bases = output_bases(moment, weight, sizes.num_kv_heads, sizes.head_dim, rank)
            reduced = torch.block_diag(*bases.repeat_interleave(sizes.num_heads // sizes.num_kv_heads, 0))
            cross = weight @ moment @ reduced
            explained = (solved_from_right(with_ridge(reduced.T @ moment @ reduced, 1e-9), cross) * cross).sum()
            lost = max(0.0, (energy - explained).item()) / tokens
            values.append(((sizes.head_dim - rank) * sizes.rank_parameters, lost))
        _, damage = channels_by_damage(layer.mlp.down_proj.weight, sums["mlp"], round(0.9 * sizes.intermediate_size))
        return {"values": values, "mlp": [(n * sizes.width_parameters, lost / tokens) for n, lost in damage]}

    def trials(self, layer: DecoderModule, sums: Sums) -> Iterable[Trial]:
        sizes = self.dimensions
        for pairs in dict.fromkeys(int(share * sizes.head_dim / 2) for share in PAIR_SHARES):
            kept = Kept(1.0, sizes.head_dim, sizes.intermediate_size, None, pairs)
            weights = without_pairs(sizes, layer, {}, sums[QUERIES], sums[KEYS], pairs)
            removed = (sizes.head_dim - 2 * pairs) * sizes.rank_parameters
            yield Trial("pairs", removed, "self_attn", kept, weights)


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
    def prunes_pairs(self) -> bool:
        """Whether rotary pairs of Q and K go in this step."""
        return self.part == "self_attn" and self.leaves.query_key_pairs is not None

    @property
    def taps(self) -> list[str]:
        return [f"{self.norm}.output", *((QUERIES, KEYS) if self.prunes_pairs else ())]

    def zeros(self, layer: DecoderModule) -> Sums:
        sizes, device = self.dimensions, layer.mlp.down_proj.weight.device
        sums = self.zeros_of(sizes.hidden_size, sizes.hidden_size, device)
        if self.prunes_pairs:
            for tap, heads in ((QUERIES, sizes.num_heads), (KEYS, sizes.num_kv_heads)):
                sums[tap] = torch.zeros(heads, sizes.head_dim // 2, dtype=torch.float64, device=device)
        return sums

    def add(self, layer: DecoderModule, sums: Sums, seen: Mapping[str, Tensor]) -> None:
        dense = layer.get_submodule(self.norm).forward(seen[DENSE])  # not called: its hooks look at it
        self.add_rows(sums, seen[self.taps[0]], dense, seen[HELD_OUT])
        for tap in self.taps[1:]:
            sums[tap] += pair_energies(seen[tap], self.dimensions.head_dim)

    def solve(self, layer: DecoderModule, sums: Sums) -> Solution:
        identity = torch.eye(self.dimensions.hidden_size, dtype=torch.float64, device=sums["fit C"].device)
        mapped = led_towards(identity, *self.moments(sums), SHARE)
        projections = {name: f"{self.part}.{name}.weight" for name in self.readers}
        weights = {full: layer.get_parameter(full).double() @ mapped for full in projections.values()}
        if self.prunes_pairs:
            pairs = self.leaves.query_key_pairs
            weights |= without_pairs(self.dimensions, layer, weights, sums[QUERIES], sums[KEYS], pairs)
        return Solution(weights)


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


def pair_energies(outputs: Tensor, head_dim: int) -> Tensor:
    """Return the energy of each rotary pair of each head, (heads, d / 2), in queries or keys (tokens, heads·d)."""
    pairs = outputs.view(len(outputs), -1, 2, head_dim // 2)  # the two of a pair stand half a head apart
    return pairs.float().square().sum((0, 2))


def without_pairs(
    sizes: ModelDimensions, layer: DecoderModule, weights: Mapping[str, Tensor], queries: Tensor, keys: Tensor, left: int
) -> dict[str, Tensor]:
    """Return Q and K, ``weights`` where given, with the ``left`` rotary pairs of most energy in each key/value head.

    That is the product of the energies, ``queries`` (H, d / 2), summed over a group, and ``keys`` (G, d / 2).
    """
    energies = queries.unflatten(0, (sizes.num_kv_heads, -1)).sum(1) * keys
    pairs = energies.argsort(descending=True, stable=True)[:, :left].sort().values
    places = torch.cat([pairs, pairs + sizes.head_dim // 2], 1)  # (G, 2·left)
    kept = {"self_attn.rotary_places": places}
    for name, heads in (("q_proj", sizes.num_heads), ("k_proj", sizes.num_kv_heads)):
        of_head = places.repeat_interleave(heads // sizes.num_kv_heads, 0)
        rows = (of_head + sizes.head_dim * torch.arange(heads, device=places.device)[:, None]).flatten()
        kept |= {
            f"self_attn.{name}.{of}": weights.get(f"self_attn.{name}.{of}", part)[rows]
            for of, part in layer.self_attn.get_submodule(name).named_parameters()
        }
    return kept
