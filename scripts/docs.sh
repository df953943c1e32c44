#!/usr/bin/env bash
# Builds the API reference from the docstrings: open docs/api/index.html.
#
#   bash scripts/docs.sh
#
# Variables: VENV, PYTHON, SKIP_INSTALL (see scripts/environment.sh), and
#   OUT  folder to write to (default: docs/api)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
pip_install docs -e ".[docs]"
"$PYTHON" docs/build.py "${OUT:-docs/api}"
printf 'API reference: %s/index.html\n' "${OUT:-docs/api}"
