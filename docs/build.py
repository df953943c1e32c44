"""Build the API reference, a static site, from the docstrings of flatllmcore.

python docs/build.py docs/api
"""

import pkgutil
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

from pdoc import pdoc, render

import flatllmcore
from flatllmcore import core, layers, utils

# Config classes inherit their fields from transformers, annotated with names that only its modules import.
INHERITED_ANNOTATION = r"Error parsing type annotation .* for flatllmcore\..*Config\.__init__"


def build(folder: Path) -> None:
    """Write the site to ``folder``, one page per module, beginning with ``index.html``."""
    for package in (flatllmcore, core, layers, utils):
        # Imported when they are first asked for; pdoc looks only at what is there, and leads only to what __all__ has.
        vars(package).update({name: getattr(package, name) for name in package.__all__})
        package.__all__ += [module.name for module in pkgutil.iter_modules(package.__path__)]
    render.configure(docformat="google", footer_text=f"flatllmcore {version('flatllmcore')}", show_source=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", INHERITED_ANNOTATION)
        pdoc("flatllmcore", output_directory=folder)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
