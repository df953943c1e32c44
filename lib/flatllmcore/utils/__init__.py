"""Model discovery and sizes, calibration data, loading and saving."""

from .calibration_windows import read_calibration_data, windows_of_rows
from .data_utils import (
    TextDataset,
    calibration_statistics,
    consecutive_windows,
    load_text,
    sample_documents,
    sample_windows,
)
from .layer_utils import (
    ModelDimensions,
    check_sparsity,
    detect_architecture,
    dimensions_from_config,
    find_decoder_layers,
    find_layers,
    get_layer_dimensions,
)

__all__ = [
    "ModelDimensions",
    "TextDataset",
    "calibration_statistics",
    "check_sparsity",
    "consecutive_windows",
    "detect_architecture",
    "dimensions_from_config",
    "find_decoder_layers",
    "find_layers",
    "get_layer_dimensions",
    "load_text",
    "read_calibration_data",
    "sample_documents",
    "sample_windows",
    "windows_of_rows",
]
