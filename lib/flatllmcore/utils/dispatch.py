"""Models that accelerate has spread over devices (``device_map``)."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel


def is_spread_over_devices(model: PreTrainedModel) -> bool:
    """Tell whether a device map put parts of the model on different devices."""
    return len(set(getattr(model, "hf_device_map", {}).values())) > 1


@contextmanager
def dispatch_hooks_lifted(model: PreTrainedModel) -> Iterator[None]:
    """Take accelerate's hooks off the decoder layers inside the block; the layers there at its end get them back.

    The hooks would send a layer's input to the layer's home while the layer itself is on loan elsewhere.
    """
    layers = model.get_decoder().layers
    hooks = {name: module._hf_hook for name, module in layers.named_modules() if hasattr(module, "_hf_hook")}
    if not hooks:
        yield
        return
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    for name in hooks:
        remove_hook_from_module(layers.get_submodule(name))
    try:
        yield
    finally:
        layers = model.get_decoder().layers
        for name, hook in hooks.items():
            for part in getattr(hook, "hooks", (hook,)):
                # Knows tied weights by address, and new weights may lie where old ones were. Layers tie none.
                part.tied_params_map = None
            add_hook_to_module(layers.get_submodule(name), hook)
