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
from flatllmcore import core, utils

# Config classes inherit their fields from transformers, annotated with names that only its modules import.
INHERITED_ANNOTATION = r"Error parsing type annotation .* for flatllmcore\..*Config\.__init__"


def build(folder: Path) -> None:
    """Write the site to ``folder``, one page per module, beginning with ``index.html``."""
    # Made when it is first asked for; pdoc looks only at what is there.
    vars(flatllmcore)["FlatLLMReassembler"] = flatllmcore.FlatLLMReassembler
    for names in map(vars, (flatllmcore, core, utils)):
        # pdoc leads only to the modules that __all__ has.
        names["__all__"] += [module.name for module in pkgutil.iter_modules(names["__path__"])]
    render.configure(docformat="google", footer_text=f"flatllmcore {version('flatllmcore')}", show_source=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", INHERITED_ANNOTATION)
        pdoc("flatllmcore", output_directory=folder)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
