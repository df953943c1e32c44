"""Models that accelerate has spread over devices (``device_map``)."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel

from ..errors import InputError


def is_spread_over_devices(model: PreTrainedModel) -> bool:
    """Tell whether a device map put parts of the model on different devices."""
    return len(set(getattr(model, "hf_device_map", {}).values())) > 1


def check_weights_present(model: nn.Module) -> None:
    """Refuse a model whose weights are not in memory, or not plain floating-point numbers.

    Raises:
        InputError: Naming the first such weight.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise InputError(
                f"the weight {name} is offloaded and not in memory; load the model without offloading to CPU or disk, "
                "or on the CPU: layers are sent to the GPU one at a time"
            )
        if not parameter.is_floating_point():
            raise InputError(f"the weight {name} is {parameter.dtype}; accepted: models that are not quantised")


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
