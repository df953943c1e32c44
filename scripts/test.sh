#!/usr/bin/env bash
# Installs into a virtual environment, where that is still to do, and runs the tests.
#
#   bash scripts/test.sh                    # those that take a few seconds at most
#   bash scripts/test.sh -m "not index"     # the slow ones too, as .ci/run does; arguments go to pytest
#
# Variables: VENV, PYTHON, SKIP_INSTALL (see scripts/environment.sh).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
pip_install dev -e ".[dev]"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # of each worker: there are as many of them as cores
exec "$PYTHON" -m pytest -n auto --dist worksteal "$@" # neighbours share fixtures
