# Sourced, not run: leaves PYTHON naming an interpreter that has the pinned requirements, and the
# working folder at the repository's root. Variables it takes:
#   VENV          virtual environment, made if it is not there (default: .venv)
#   PYTHON        interpreter that makes it, 3.11 or later (default: python3)
#   SKIP_INSTALL  1 makes and installs nothing and uses PYTHON as it is
# shellcheck shell=bash

# pip_install NAME ARGUMENT...: installs, unless the same was done before with the same requirements. Byte code is made
# when a module is first imported: in half the time.
pip_install() {
    local stamp="${VENV:-}/installed-$1"
    shift
    if [[ "${SKIP_INSTALL:-}" != 1 ]] && ! requirements | cmp --silent - "$stamp"; then
        "$PYTHON" -m pip install --disable-pip-version-check --no-compile "$@"
        requirements >"$stamp"
    fi
}

requirements() {
    pwd # an editable installation breaks when the repository moves
    cat requirements.txt pyproject.toml
}

cd "$(dirname "${BASH_SOURCE[0]}")/.." || return
PYTHON="${PYTHON:-python3}"
if [[ "${SKIP_INSTALL:-}" != 1 ]]; then
    VENV="${VENV:-.venv}"
    [[ -x "$VENV/bin/python" ]] || "$PYTHON" -m venv "$VENV"
    PYTHON="$VENV/bin/python"
fi
pip_install requirements -r requirements.txt
