"""Looking at what passes places inside a layer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn


class _AllSeenError(Exception):
    """Ends a forward pass whose rest nobody needs."""


@contextmanager
def tapped(layer: nn.Module, taps: Sequence[str]) -> Iterator[Callable[[Callable[[], Any]], Mapping[str, Tensor]]]:
    """Lend a function that runs a forward pass of ``layer`` as far as the last tap, and returns what passed the taps.

    The layer is as it was when the block ends.

    Args:
        layer: A decoder layer.
        taps: A submodule's name and what of it, ``mlp.down_proj.input`` or ``self_attn.v_proj.output``.

    Returns:
        Takes the pass, as a call without arguments, and gives the tensors by tap, (tokens, width).
    """
    seen: dict[str, Tensor] = {}

    def look(tap: str, tensor: Tensor) -> None:
        seen[tap] = tensor.flatten(0, -2)
        if len(seen) == len(taps):
            raise _AllSeenError

    def run(forward: Callable[[], Any]) -> Mapping[str, Tensor]:
        seen.clear()
        try:
            forward()
        except _AllSeenError:
            return seen
        raise RuntimeError(f"the layer's forward pass does not come by {', '.join(set(taps) - seen.keys())}")

    with ExitStack() as stack:
        for tap in taps:
            name, _, side = tap.rpartition(".")
            module, note = layer.get_submodule(name), partial(look, tap)
            if side == "input":
                hook = module.register_forward_pre_hook(lambda _, inputs, note=note: note(inputs[0]))
            else:
                hook = module.register_forward_hook(lambda _, __, output, note=note: note(output))
            stack.callback(hook.remove)
        yield run
