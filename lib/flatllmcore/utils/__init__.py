"""Model discovery and sizes, calibration data, loading and saving."""

from typing import TYPE_CHECKING

from .._lazy import attach

if TYPE_CHECKING:  # for editors
    from .layer_utils import check_sparsity, detect_architecture, find_decoder_layers, find_layers, get_layer_dimensions

_OFFERED = ("check_sparsity", "detect_architecture", "find_decoder_layers", "find_layers", "get_layer_dimensions")

__getattr__, __dir__, __all__ = attach(__name__, {".layer_utils": _OFFERED})
