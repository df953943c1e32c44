"""Refuses in one line a transformers that is too old or cannot run; imported before anything that such a one lacks."""

import sys
from importlib.metadata import version

NEEDED = "5.15"  # the first with per-layer configs; pyproject.toml says so too

# Asked of the package where it is imported: that may be another one than what is installed.
found = getattr(sys.modules.get("transformers"), "__version__", None) or version("transformers")
if tuple(map(int, found.split(".")[:2])) < tuple(map(int, NEEDED.split("."))):
    raise ImportError(f"flatllmcore needs transformers {NEEDED} or later; here it is {found}")
if sys.flags.optimize > 1:
    raise ImportError("transformers reads docstrings, which -OO and PYTHONOPTIMIZE=2 leave out; run Python without")
