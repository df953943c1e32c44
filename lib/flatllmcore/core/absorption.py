"""``AbsorptionCompressor`` and ``ActivationCollector``, under the name by which FedCore loads them.

FedCore puts this folder on ``sys.path`` and imports this file as a module without a package, where relative
imports fail; what it needs is then imported through the package's folder.
"""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

__all__ = ["AbsorptionCompressor", "ActivationCollector"]


def _import_from_this_package(name: str) -> ModuleType:
    """Return a module of the package that this file lies in, under the package folder's own name.

    Raises:
        ImportError: If another copy of the package has been imported under that name.
    """
    folder = Path(__file__).resolve().parents[1]
    spec = importlib.util.find_spec(folder.name)
    if spec is None or spec.origin is None or Path(spec.origin).resolve().parent != folder:
        sys.path.insert(0, str(folder.parent))
    package = importlib.import_module(folder.name)
    imported = Path(str(package.__file__)).resolve().parent
    if imported != folder:
        raise ImportError(f"{folder.name} has been imported from {imported} already; {folder} is another copy of it")
    return importlib.import_module(f"{folder.name}.{name}")


_module = (
    importlib.import_module(".absorption_compressor", __package__)
    if __package__
    else _import_from_this_package("core.absorption_compressor")
)
AbsorptionCompressor = _module.AbsorptionCompressor
ActivationCollector = _module.ActivationCollector
