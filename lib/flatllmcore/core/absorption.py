"""``AbsorptionCompressor`` and ``ActivationCollector``, under the name by which FedCore loads them.

FedCore puts this folder on ``sys.path`` and imports this file as a module without a package, where relative
imports fail; what it needs is then imported through the package's folder. That is the folder FedCore chose, also
where another copy of the package has been imported.
"""

import importlib
import sys
from hashlib import sha256
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

__all__ = ["AbsorptionCompressor", "ActivationCollector"]


def _import_from_this_package(name: str) -> ModuleType:
    """Return a module of the package that this file lies in, which may have been imported under any name."""
    folder = Path(__file__).resolve().parents[1]
    return importlib.import_module(f"{_name_of_loaded(folder) or _load(folder)}.{name}")


def _name_of_loaded(folder: Path) -> str | None:
    """Return the name under which the package in ``folder`` has been imported, if it has."""
    for name, module in list(sys.modules.items()):
        file = vars(module).get("__file__") if isinstance(module, ModuleType) else None
        if file and Path(file).name == "__init__.py" and Path(file).resolve().parent == folder:
            return name
    return None


def _load(folder: Path) -> str:
    """Import the package in ``folder``, and return its name: the folder's own, or one made up if another has that."""
    name = folder.name if _is_free(folder.name, folder) else f"flatllmcore_{sha256(bytes(folder)).hexdigest()[:8]}"
    spec = spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])
    assert spec is not None  # of a source file
    assert spec.loader is not None
    sys.modules[name] = package = module_from_spec(spec)
    try:
        spec.loader.exec_module(package)
    except BaseException:
        del sys.modules[name]
        raise
    return name


def _is_free(name: str, folder: Path) -> bool:
    """Tell whether nothing that is imported or can be has ``name``, other than the package in ``folder``."""
    if not name.isidentifier() or name in sys.modules:
        return False
    spec = find_spec(name)
    return spec is None or (spec.origin is not None and Path(spec.origin).resolve().parent == folder)


_module = (
    importlib.import_module("..absorption_compressor", __package__)
    if __package__
    else _import_from_this_package("absorption_compressor")
)
AbsorptionCompressor = _module.AbsorptionCompressor
ActivationCollector = _module.ActivationCollector
