"""Model discovery and sizes, calibration data, loading and saving."""

from .layer_utils import check_sparsity, detect_architecture, find_decoder_layers, find_layers, get_layer_dimensions

__all__ = ["check_sparsity", "detect_architecture", "find_decoder_layers", "find_layers", "get_layer_dimensions"]
