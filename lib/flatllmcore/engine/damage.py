"""What removing weights of a dense layer does to the model's output, as curves that ranks are allocated by.

Damage to the stream ``y`` behind a part of a layer is the mean over tokens of ``‖y' - y‖² / ‖y‖²``: token by token,
since all that reads the stream sees it at one length. What it costs at the output is tried on a few tokens, for the MLP
of each layer, and taken for what damage of V and O and of rotary pairs costs there too.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from ..core.channel_obs import channels_by_damage
from ..core.curve_allocation import MLP, MLP_SHARE, PAIR_SHARES, PAIRS, VALUE_SHARES, VALUES, Curves
from ..core.moments import add_moment, inverse_length, mirror_lower_triangle
from ..core.output_pca import lost_by_rank
from ..core.rotary_pairs import has_free_pairs, pair_energies, without_pairs
from ..layers import replacement
from ..utils.dimensions import Kept
from ..utils.layer_utils import DecoderModule, dimensions_from_config
from ..utils.processes import all_reduce, own_share
from ..utils.stopwatch import stage
from .perplexity import LOGIT_ROWS
from .protocols import zero_sums
from .walk import Walk, forward_of

QUERIES, KEYS = "self_attn.q_proj.output", "self_attn.k_proj.output"
ATTENDED, CHANNELS = "self_attn.o_proj.input", "mlp.down_proj.input"
MIDDLE = "post_attention_layernorm.input"  # the stream between attention and MLP
TRIED_TOKENS = 1024  # that is tried on what has no closed form
SILENCED = 0.25  # of the MLP's channels: what a layer loses for its cost at the output to be tried
SHRINKAGE = 0.01  # of the means over layers, added to cost and damage: their ratio tells little where both are small


class LayerDamage:
    """The curves of one layer at its place in a walk, from what passes its taps."""

    taps = (QUERIES, KEYS, ATTENDED, MIDDLE, CHANNELS)

    def __init__(self, walk: Walk, layer: DecoderModule, index: int) -> None:
        self.walk, self.layer, self.index = walk, layer, index
        self.dimensions = sizes = dimensions_from_config(walk.source.config)
        self._tried = walk.states[_is_tried(walk)]
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
        with stage("solves"):
            ranks = dict.fromkeys(max(1, int(share * sizes.head_dim)) for share in VALUE_SHARES)
            heads = (sizes.num_kv_heads, sizes.head_dim)
            lost = lost_by_rank(self._sums[ATTENDED], layer.self_attn.o_proj.weight, *heads, ranks)
            removed = round(MLP_SHARE * sizes.intermediate_size)
            _, damages = channels_by_damage(layer.mlp.down_proj.weight, self._sums[CHANNELS], removed, tokens)
        left = dict.fromkeys(max(1, int(share * sizes.head_dim / 2)) for share in PAIR_SHARES)
        if not has_free_pairs(layer.self_attn):
            left = {}
        tried = [((sizes.head_dim - 2 * n) * sizes.rank_parameters, self._damage_of_pairs(n)) for n in left]
        return {
            VALUES: [((sizes.head_dim - rank) * sizes.rank_parameters, of / energy) for rank, of in lost.items()],
            MLP: [(count * sizes.width_parameters, of / energy) for count, of in damages],
            PAIRS: [(0, 0.0), *tried],
        }

    def _damage_of_pairs(self, left: int) -> float:
        """Return the damage of an attention with so many rotary pairs per head, on a few tokens."""
        walk, layer, sizes = self.walk, self.layer, self.dimensions
        kept = Kept(1.0, sizes.head_dim, sizes.intermediate_size, None, left)
        config = replacement.compressed_config(walk.source.config, [kept] * sizes.num_layers)
        weights = without_pairs(layer.self_attn, self._sums[QUERIES], self._sums[KEYS], left)
        changed = replacement.compress_decoder_layer(layer, config, self.index, weights, "self_attn")
        dense = layer.self_attn
        total = torch.zeros(2, dtype=torch.float64, device=walk.source.device)
        for states, _ in _batches(walk, self._tried):
            streams = []
            try:
                for layer.self_attn in (dense, changed):
                    streams.append(walk.run(forward_of(layer, "self_attn"), self.index, states))
            finally:
                layer.self_attn = dense
            total += _damage_to(*streams)
        all_reduce(total)
        return (total[0] / total[1]).item()

    def silence(self, streams: Tensor) -> Tensor:
        """Write to ``streams``, (n, S, D), what the layer makes of the tried windows without a quarter of its channels.

        Those of the least energy in its output, ``C_jj ‖W_:j‖²``, by the sums over all processes that :meth:`curves`
        makes. Return the damage's sum over this process's tokens, and their number, (2,).
        """
        walk, down = self.walk, self.layer.mlp.down_proj
        energies = self._sums[CHANNELS].diagonal() * down.weight.double().square().sum(0)
        mask = torch.ones_like(energies, dtype=down.weight.dtype)
        mask[energies.argsort(stable=True)[: round(SILENCED * len(energies))]] = 0
        total = torch.zeros(2, dtype=torch.float64, device=walk.source.device)
        for (states, _), (_, stored) in zip(_batches(walk, self._tried), _batches(walk, streams), strict=True):
            dense = walk.run(self.layer, self.index, states)
            hook = down.register_forward_pre_hook(lambda _, inputs: (inputs[0] * mask,))
            try:
                changed = walk.run(self.layer, self.index, states)
            finally:
                hook.remove()
            total += _damage_to(dense, changed)
            stored.copy_(changed)
        return total


class OutputCost:
    """What damage to each layer's stream costs: how far the next tokens' distributions are from the dense model's.

    The tried windows are led on, in a stream for each layer that lost some of its channels, through the dense layers
    behind: L (L - 1) / 2 passes of so many tokens through a layer, and L through the head.
    """

    def __init__(self, walk: Walk) -> None:
        self.walk = walk
        windows, shape = int(_is_tried(walk).sum()), (walk.windows.shape[1], walk.source.config.hidden_size)
        layers = walk.source.num_layers
        room = walk.source.storage.empty((layers * windows, *shape), walk.source.dtype, walk.source.device)
        self._streams = room.view(layers, windows, *shape)
        self._damages = torch.zeros(layers, 2, dtype=torch.float64, device=walk.source.device)

    def lead_on(self, damage: LayerDamage) -> None:
        """Lead the streams of the layers before one through it, and begin its own."""
        for stream in self._streams[: damage.index]:
            for states, stored in _batches(self.walk, stream):
                stored.copy_(self.walk.run(damage.layer, damage.index, states))
        self._damages[damage.index] = damage.silence(self._streams[damage.index])

    def per_damage(self) -> list[float]:
        """Return each layer's Kullback-Leibler divergence, in nats per token, by its damage, once all are behind.

        Both have a hundredth of their mean over layers added: one that does next to nothing has the ratio of all.
        """
        walk, costs = self.walk, torch.zeros(len(self._streams), dtype=torch.float64, device=self._damages.device)
        with stage("forward"), walk.source.head() as logits_of:

            def log_probabilities(states: Tensor) -> Tensor:
                logits = logits_of(states.to(walk.source.device))
                return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)

            dense = walk.states[_is_tried(walk)].flatten(0, 1).split(LOGIT_ROWS)
            for rows, changed in zip(dense, self._streams.flatten(1, 2).split(LOGIT_ROWS, 1), strict=True):
                expected = log_probabilities(rows)
                for index, stream in enumerate(changed):
                    costs[index] += kl_div(log_probabilities(stream), expected, reduction="sum", log_target=True)
        sums = torch.stack([costs, *self._damages.T])
        all_reduce(sums)
        means = (sums[:2] / sums[2]).clamp(min=0)  # rounding may make a divergence of nearly nothing negative
        costs, damages = means + SHRINKAGE * means.mean(1, keepdim=True)
        return (costs / damages.clamp(min=torch.finfo(damages.dtype).tiny)).tolist()


def _is_tried(walk: Walk) -> Tensor:
    """Tell which of this process's windows are tried: of all windows the first."""
    return own_share(torch.arange(walk.count) * walk.windows.shape[1] < TRIED_TOKENS, walk.batch_size)


def _batches(walk: Walk, states: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of what is tried, (n, S, D), on the device, each with its place."""
    for stored in states.split(walk.batch_size) if len(states) else ():
        yield stored.to(walk.source.device), stored


def _damage_to(dense: Tensor, changed: Tensor) -> Tensor:
    """Return the damage to a stream (..., D), summed over its tokens, and their number, (2,), in float64."""
    dense, changed = dense.double(), changed.double()
    of_tokens = (changed - dense).square().sum(-1) / dense.square().sum(-1).clamp(min=torch.finfo(dense.dtype).tiny)
    return torch.stack([of_tokens.sum(), torch.ones_like(of_tokens).sum()])
