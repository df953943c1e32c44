"""Runs Python code in a process of its own, for what must not happen to the modules of this one."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

LIBRARY = Path(__file__).resolve().parents[1] / "lib"
TESTS = Path(__file__).resolve().parent
BLOCKED = "import sys; sys.modules['flatllmcore'] = None  # as where it is not installed\n"


def run_python(code: str, paths: Sequence[Path] = (LIBRARY,), **environment: str) -> str:
    """Return what ``code`` prints, with ``paths`` and the folder of the tests on its path."""
    path = os.pathsep.join(map(str, [*paths, TESTS]))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
