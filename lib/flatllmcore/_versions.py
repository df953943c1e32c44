"""Refuses in one line a transformers that is too old; imported before anything that such a one lacks."""

import transformers

NEEDED = "5.15"  # the first with per-layer configs; pyproject.toml says so too

if tuple(map(int, transformers.__version__.split(".")[:2])) < tuple(map(int, NEEDED.split("."))):
    raise ImportError(f"flatllmcore needs transformers {NEEDED} or later; here it is {transformers.__version__}")
