"""What removing weights of a dense layer does to the model's output, as curves that ranks are allocated by.

Damage to the stream ``y`` behind a part of a layer is the mean over tokens of ``‖y' - y‖² / ‖y‖²``: token by token,
since all that reads the stream sees it at one length. What it costs at the output is tried on few windows, for the MLP
of each layer, and taken for what damage of V and O and of rotary pairs costs there too.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..core.attention_pca import lost_by_rank
from ..core.curve_allocation import MLP, PAIRS, VALUES, Curves, measured_at
from ..core.moments import add_moment, inverse_length, mirror_lower_triangle
from ..core.refit import channels_by_damage
from ..core.rotary_pairs import has_free_pairs, pair_energies, without_pairs
from ..errors import InputError
from ..layers import replacement
from ..utils.dimensions import Kept
from ..utils.layer_utils import DecoderModule, dimensions_from_config
from ..utils.processes import all_reduce
from ..utils.stopwatch import stage
from .perplexity import LOGIT_ROWS
from .protocols import CHANNELS, KEYS, QUERIES, LayerSource, zero_sums
from .reuse import with_part
from .walk import Walk, forward_of, solves, spread

ATTENDED = "self_attn.o_proj.input"
MIDDLE = "post_attention_layernorm.input"  # the stream between attention and MLP
PROBE_WINDOWS, PROBE_LENGTH = 8, 256  # windows, and tokens of each, for what has no closed form and is tried
ABLATED_SHARE = 0.25  # of the MLP's channels, that a layer loses for its cost at the output to be tried
SHRINKAGE = 0.01  # of the means over layers, added to cost and damage: their ratio tells little where both are small


class LayerDamage:
    """The curves of one layer at its place in a walk, from what passes its taps; of pairs from the tokens tried."""

    taps = (QUERIES, KEYS, ATTENDED, MIDDLE, CHANNELS)

    def __init__(self, walk: Walk, probe: Walk, layer: DecoderModule, index: int) -> None:
        self.walk, self.probe, self.layer, self.index = walk, probe, layer, index
        self.dimensions = sizes = dimensions_from_config(walk.source.config)
        shapes = {ATTENDED: (sizes.num_heads * sizes.head_dim,) * 2, CHANNELS: (sizes.intermediate_size,) * 2}
        shapes |= {QUERIES: (sizes.num_heads, sizes.head_dim // 2), KEYS: (sizes.num_kv_heads, sizes.head_dim // 2)}
        self._sums = zero_sums(layer, shapes)

    def add(self, seen: Mapping[str, Tensor]) -> None:
        """Add a batch: what passed each tap, (tokens, width)."""
        with stage("moments"):
            output = seen[MIDDLE] + self.layer.mlp.down_proj.forward(seen[CHANNELS])  # not called: it may be looked at
            for features, stream in ((ATTENDED, seen[MIDDLE]), (CHANNELS, output)):
                add_moment(self._sums[features], seen[features] * inverse_length(stream))
            for tap in (QUERIES, KEYS):
                self._sums[tap] += pair_energies(seen[tap], self.dimensions.head_dim)

    def curves(self) -> Curves:
        """Return the curves of damage to the stream: of values and MLP from the moments, of pairs by trying them."""
        sizes, layer = self.dimensions, self.layer
        tokens = self.walk.count * self.walk.windows.shape[1]
        energy = tokens * sizes.hidden_size
        with stage("reduce"):
            for total in self._sums.values():
                all_reduce(total)
        for name in (ATTENDED, CHANNELS):
            mirror_lower_triangle(self._sums[name])
        with solves(self.index):
            ranks, left, removed = measured_at(sizes)
            heads = (sizes.num_kv_heads, sizes.head_dim)
            lost = lost_by_rank(self._sums[ATTENDED], layer.self_attn.o_proj.weight, *heads, ranks)
            _, damages = channels_by_damage(layer.mlp.down_proj.weight, self._sums[CHANNELS], removed, tokens)
        left = left if has_free_pairs(layer.self_attn) else []
        tried = [((sizes.head_dim - 2 * n) * sizes.rank_parameters, self._damage_of_pairs(n)) for n in left]
        return {
            VALUES: [((sizes.head_dim - rank) * sizes.rank_parameters, of / energy) for rank, of in lost.items()],
            MLP: [(count * sizes.width_parameters, of / energy) for count, of in damages],
            PAIRS: [(0, 0.0), *tried],
        }

    def _damage_of_pairs(self, left: int) -> float:
        """Return the damage of an attention with so many rotary pairs per head, on the windows tried."""
        walk, layer, sizes = self.probe, self.layer, self.dimensions
        kept = Kept(1.0, sizes.head_dim, sizes.intermediate_size, None, left)
        config = replacement.compressed_config(walk.source.config, [kept] * sizes.num_layers)
        weights = without_pairs(layer.self_attn, self._sums[QUERIES], self._sums[KEYS], left)
        changed = replacement.compress_decoder_layer(layer, config, self.index, weights, "self_attn")
        layers = (layer, with_part(layer, "self_attn", changed))
        total = torch.zeros(2, dtype=torch.float64, device=walk.source.device)
        for states, _ in walk.batches():
            total += _damage_to(*(walk.run(forward_of(of, "self_attn"), self.index, states) for of in layers))
        all_reduce(total)
        return (total[0] / total[1]).item()

    def ablation_mask(self) -> Tensor:
        """Return 0 for each channel of the quarter of least energy in the MLP's output, else 1, (F,).

        The energy of channel ``j`` is ``C_jj ‖W_:j‖²``, by the sums over all processes that :meth:`curves` makes.
        """
        weight = self.layer.mlp.down_proj.weight
        energies = self._sums[CHANNELS].diagonal() * weight.double().square().sum(0)
        mask = torch.ones_like(energies, dtype=weight.dtype)
        mask[energies.argsort(stable=True)[: round(ABLATED_SHARE * len(energies))]] = 0
        return mask


class OutputCost:
    """What damage to each layer's stream costs: how far the next tokens' distributions are from the dense model's.

    The beginnings of a few of all ``windows`` (N, S), evenly spread since windows stand text by text, walk
    through the dense layers. What each layer makes of them without its quiet channels is led on, in a stream of its
    own, through the layers behind: L (L - 1) / 2 + 2 L passes of these tokens through a layer, L + 1 through the head.
    """

    def __init__(self, source: LayerSource, windows: Tensor, batch_size: int) -> None:
        layers = source.num_layers
        self.walk = walk = Walk(source, spread(windows, PROBE_WINDOWS)[:, :PROBE_LENGTH], batch_size)
        room = source.storage.empty((layers * len(walk.states), *walk.states.shape[1:]), source.dtype, source.device)
        self._streams = room.view(layers, *walk.states.shape)
        self._damages = torch.zeros(layers, 2, dtype=torch.float64, device=source.device)

    def advance(self, layer: DecoderModule, index: int, ablation_mask: Tensor) -> None:
        """Lead all streams through a dense layer, and begin its own."""
        walk, down = self.walk, layer.mlp.down_proj
        for stream in self._streams[:index]:
            for states, stored in walk.batches(stream):
                stored.copy_(walk.run(layer, index, states))
        for (states, stored), begun in zip(walk.batches(), self._streams[index].split(walk.batch_size), strict=False):
            dense = walk.run(layer, index, states)
            with down.register_forward_pre_hook(lambda _, inputs: (inputs[0] * ablation_mask,)):
                changed = walk.run(layer, index, states)
            self._damages[index] += _damage_to(dense, changed)
            begun.copy_(changed)
            stored.copy_(dense)

    def per_damage(self) -> list[float]:
        """Return each layer's Kullback-Leibler divergence, in nats per token, by its damage, once all are behind.

        Both have a hundredth of their mean over layers added: one that does next to nothing has the ratio of all.
        """
        walk, costs = self.walk, torch.zeros(len(self._streams), dtype=torch.float64, device=self._damages.device)
        with stage("forward"), walk.source.head() as logits_of:
            dense = walk.states.flatten(0, 1).split(LOGIT_ROWS)
            for rows, changed in zip(dense, self._streams.flatten(1, 2).split(LOGIT_ROWS, 1), strict=True):
                logits = logits_of(rows.to(walk.source.device))
                expected = logits.softmax(-1)
                least = cross_entropy(logits, expected, reduction="none")  # of the dense model with itself, (rows,)
                for index, stream in enumerate(changed):
                    found = cross_entropy(logits_of(stream.to(walk.source.device)), expected, reduction="none")
                    costs[index] += (found - least).double().sum()
        sums = torch.stack([costs, *self._damages.T])
        all_reduce(sums)
        if not sums.isfinite().all():
            raise InputError("the last norm or the head gives NaN or infinite logits; a wider dtype may help")
        means = (sums[:2] / sums[2]).clamp(min=0)  # rounding may make a divergence of nearly nothing negative
        costs, damages = means + SHRINKAGE * means.mean(1, keepdim=True)
        return (costs / damages.clamp(min=torch.finfo(damages.dtype).tiny)).tolist()


def _damage_to(dense: Tensor, changed: Tensor) -> Tensor:
    """Return the damage to a stream (..., D), summed over its tokens, and their number, (2,), in float64."""
    dense, changed = dense.double(), changed.double()
    of_tokens = (changed - dense).square().sum(-1) / dense.square().sum(-1).clamp(min=torch.finfo(dense.dtype).tiny)
    return torch.stack([of_tokens.sum(), torch.ones_like(of_tokens).sum()])
