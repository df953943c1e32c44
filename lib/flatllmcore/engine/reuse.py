"""What a compressed part of a layer gives, from what its last projection read before: attention is computed once.

Where values are narrowed by a linear map within each head and queries and keys stay, ``o_proj`` reads that map of what
it read; channels of an MLP that stay are read as they were. The map is found in the weights alone, so the engine need
not know the method, and a run that goes on finds the same one in a finished layer. It is folded into the last
projection, whose product the part gives whether what was read is still there or is computed anew from the weights
before: what fits into memory changes no byte of a result. Weights in half precision are a map of those before up to
their rounding: the part's output is then right to 1e-3 to 3e-3 of what it writes, about as activations are rounded.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..utils.layer_utils import WRITERS, DecoderModule, stored_tensors


class Written(nn.Module):
    """Stands for the part of a layer whose last projection, ``weight`` and ``bias``, reads what is in ``read``."""

    read: Tensor  # (batch, S, width)

    def __init__(self, weight: Tensor, bias: Tensor | None, is_attention: bool) -> None:
        super().__init__()
        self.weight, self.bias, self.is_attention = weight, bias, is_attention

    def forward(self, *_: Any, **__: Any) -> Any:
        """Return what the part would."""
        output = F.linear(self.read, self.weight, self.bias)
        return (output, None) if self.is_attention else output


def written(before: DecoderModule, after: DecoderModule, part: str, dtype: torch.dtype) -> Written | None:
    """Return what stands for the attention, or for a ``part`` "mlp", of a compressed layer; None where nothing can.

    Its weights have been rounded to ``dtype``, whatever they are computed with in.
    """
    of = WRITERS[part].partition(".")[0]
    parts = before.get_submodule(of), after.get_submodule(of)
    weight = _folded_channels(*parts) if of == "mlp" else _folded_values(*parts, torch.finfo(dtype).eps)
    if weight is None:
        return None
    projection = after.get_submodule(WRITERS[part])
    return Written(weight.to(projection.weight.dtype), projection.bias, of == "self_attn")


def with_part(layer: DecoderModule, name: str, part: nn.Module) -> DecoderModule:
    """Return a copy of a layer that has another part of this name, and else the same ones."""
    layer = copy.copy(layer)
    layer._modules = layer._modules | {name: part}
    return layer


def _folded_values(before: DecoderModule, after: DecoderModule, precision: float) -> Tensor | None:
    """Return ``o_proj``'s weight, (D, H·d), for what it read before, if the values are narrowed and that is all.

    The map of each head is found by least squares on the rows of ``v_proj``, the bias a column. Directions in which a
    head has nothing but rounding, of relative ``precision``, are left out: the pseudoinverse would make much of it.
    """
    others = [
        {name: part for name, part in stored_tensors(module).items() if not name.startswith(("v_proj.", "o_proj."))}
        for module in (before, after)
    ]
    is_same = others[0].keys() == others[1].keys() and all(map(torch.equal, *(of.values() for of in others)))
    if not is_same:
        return None
    if all(map(torch.equal, before.v_proj.parameters(), after.v_proj.parameters())):
        return after.o_proj.weight
    num_kv_heads = before.v_proj.out_features // before.head_dim
    wide, narrow = (
        torch.cat([part.view(num_kv_heads, -1, part[0].numel()) for part in of.v_proj.parameters()], 2).double()
        for of in (before, after)
    )  # (G, d or r, D), or D + 1 with a bias
    q, r = torch.linalg.qr(wide.mT)
    maps = narrow @ q @ torch.linalg.pinv(r.mT, rtol=precision)  # (G, r, d)
    missed, size = ((of**2).sum((1, 2)).sqrt() for of in (narrow - maps @ wide, narrow))
    if (missed > max(precision, 1e-9) * size).any():
        return None
    output = after.o_proj.weight.double().unflatten(1, (num_kv_heads, -1, maps.shape[1]))  # (D, G, H/G, r)
    return torch.einsum("DGnr,Grd->DGnd", output, maps).flatten(1)


def _folded_channels(before: DecoderModule, after: DecoderModule) -> Tensor | None:
    """Return ``down_proj``'s weight, (D, F), for what it read before, if some channels stay and these as they were."""
    places = {row.tobytes(): place for place, row in enumerate(_beginnings(before.gate_proj.weight))}
    stay = [places.get(row.tobytes(), 0) for row in _beginnings(after.gate_proj.weight)]
    for name, part in after.named_parameters():
        if not name.startswith("down_proj") and not torch.equal(before.get_parameter(name)[stay], part):
            return None
    weight = after.down_proj.weight.new_zeros(before.down_proj.weight.shape)
    places_of = torch.tensor(stay, device=weight.device)
    return weight.index_add(1, places_of, after.down_proj.weight)  # not assigned: equal channels are one


def _beginnings(weight: Tensor) -> Any:
    """Return the first 64 entries of each row, in bytes, which tell trained rows apart; else no map is found."""
    return weight.detach()[:, :64].contiguous().view(torch.uint8).cpu().numpy()
