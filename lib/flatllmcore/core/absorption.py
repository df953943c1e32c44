"""``AbsorptionCompressor`` and ``ActivationCollector``, under the name by which FedCore loads them.

FedCore puts this folder on ``sys.path`` and imports this file as a module without a package, where relative imports
fail; the rest is then imported under the name of the package's own folder.
"""

import sys
from importlib import import_module
from pathlib import Path

_package = Path(__file__).resolve().parents[1]
if not __package__ and _package.name not in sys.modules:
    sys.path.append(str(_package.parent))
_module = import_module(f"{__package__.rpartition('.')[0] if __package__ else _package.name}.absorption_compressor")

AbsorptionCompressor = _module.AbsorptionCompressor
ActivationCollector = _module.ActivationCollector
__all__ = ["AbsorptionCompressor", "ActivationCollector"]
