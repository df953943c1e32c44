"""The sizes of a decoder-only model, and what a compressed layer keeps of them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ..errors import InputError

LARGEST_SIZE = 2**17  # twice the widest MLP there is; the moment of one this wide takes 128 GiB
MOST_LAYERS = 2**12  # of which transformers makes modules, and ranks are shared out, in seconds


@dataclass(frozen=True)
class Kept:
    """What one decoder layer keeps."""

    keep: float  # share of V, O and MLP allotted to it (of Q and K too where they are pruned), in (0, 1]
    value_rank: int  # directions per value head, 1..head_dim
    mlp_width: int  # channels, 1..intermediate_size
    query_key_rank: int | None = None  # rank per head in two factors; None where Q and K have none
    query_key_pairs: int | None = None  # rotary pairs per head; None for all


@dataclass(frozen=True, kw_only=True)
class LayerRecord(Kept):
    """What was done to one layer."""

    layer: int
    rank_at_tolerance: float | None = None  # would keep the monitored share of eigenvalue mass; None for a whole layer
    elapsed_s: float | None = None  # None for a layer that an earlier run finished


@dataclass(frozen=True)
class ModelDimensions:
    """Sizes of a decoder-only model; parameter counts are linear weights of one decoder layer, without biases."""

    architecture: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int

    def __post_init__(self) -> None:
        for name, size in asdict(self).items():
            most = MOST_LAYERS if name == "num_layers" else LARGEST_SIZE
            if isinstance(size, int) and not 1 <= size <= most:
                raise InputError(f"{name} is {size:,}; accepted: 1 to {most:,}")

    @property
    def qk_parameters(self) -> int:
        """Weights of Q and K, whole."""
        return self.hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)

    @property
    def factor_parameters(self) -> int:
        """Weights that one unit of rank costs in the two factors of Q, (r, D) and (d, r) per head, and of K."""
        return (self.hidden_size + self.head_dim) * (self.num_heads + self.num_kv_heads)

    @property
    def rank_parameters(self) -> int:
        """Weights of V and O that one direction per head costs."""
        return self.hidden_size * (self.num_heads + self.num_kv_heads)

    @property
    def width_parameters(self) -> int:
        """Weights of gate, up and down that one MLP channel costs."""
        return 3 * self.hidden_size

    @property
    def layer_parameters(self) -> int:
        """Weights of a whole layer."""
        return self.parameters_of(Kept(1.0, self.head_dim, self.intermediate_size))

    def parameters_of(self, kept: Kept) -> int:
        """Return the weights of a layer that keeps this much."""
        qk = self.qk_parameters
        if kept.query_key_rank is not None:
            qk = kept.query_key_rank * self.factor_parameters
        elif kept.query_key_pairs is not None:
            qk = 2 * kept.query_key_pairs * self.rank_parameters
        return qk + kept.value_rank * self.rank_parameters + kept.mlp_width * self.width_parameters

    def kept(self, keep: float, value_rank: int, mlp_width: int, prune_qk: bool) -> Kept:
        """Return what a layer keeps at these sizes; pruned Q and K stay whole where two factors would be no smaller."""
        is_factored = prune_qk and value_rank * self.factor_parameters < self.qk_parameters
        return Kept(keep, value_rank, mlp_width, value_rank if is_factored else None)

    def is_whole(self, kept: Kept) -> bool:
        """Tell whether a layer keeps all its values, its whole MLP and all rotary pairs."""
        sizes = (kept.value_rank, kept.mlp_width, kept.query_key_pairs)
        return sizes == (self.head_dim, self.intermediate_size, None)

    def differences_from(self, other: "ModelDimensions") -> str:
        """Return the sizes that are not equal, in words; nothing for equal dimensions."""
        ours, given = asdict(self), asdict(other)
        return "; ".join(f"{name} {ours[name]}, not {given[name]}" for name in ours if ours[name] != given[name])


def check_length(name: str, values: Sequence[object], num_layers: int) -> None:
    """Refuse a list that has not one entry per layer."""
    if len(values) != num_layers:
        raise InputError(f"'{name}' has {len(values)} entries; the model has {num_layers} layers")
