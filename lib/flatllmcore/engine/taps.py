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
    """Lend a function that runs a forward pass, a call, as far as the last tap, and returns what passed them.

    Taps are a submodule's name and what of it, ``mlp.down_proj.input``, ``self_attn.v_proj.output``: (tokens, width).
    """
    seen: dict[str, Tensor] = {}

    def look(tap: str, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | None = None) -> None:
        seen[tap] = (inputs[0] if output is None else output).flatten(0, -2)
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
            module: Any = layer.get_submodule(name)
            register = module.register_forward_pre_hook if side == "input" else module.register_forward_hook
            stack.callback(register(partial(look, tap)).remove)
        yield run
