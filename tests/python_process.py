"""Runs Python code in a process of its own, for what must not happen to the modules of this one.

A server process imports libraries once, and nothing of ours; each run is a fork of it.
"""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

LIBRARY = Path(__file__).resolve().parents[1] / "lib"
TESTS = Path(__file__).resolve().parent
BLOCKED = "import sys; sys.modules['flatllmcore'] = None  # as where it is not installed\n"
SERVER = multiprocessing.get_context("forkserver")
LIBRARIES = [f"transformers.models.{name}.modeling_{name}" for name in ("auto", "llama", "mistral")]
SERVER.set_forkserver_preload([*LIBRARIES, "hypothesis", "pytest", "safetensors.torch"])


def run_python(code: str, paths: Sequence[Path] = (LIBRARY,), **environment: str) -> str:
    """Return what ``code`` prints, with ``paths`` and the folder of the tests on its path."""
    with TemporaryDirectory() as folder:
        out, error = Path(folder, "out"), Path(folder, "error")
        status = run_forked(_run, code, [*paths, TESTS], out, error, environment)
        assert status == 0, out.read_text() + error.read_text()
        return out.read_text()


def run_forked(function: Callable[..., None], *args: object) -> int | None:
    """Call a function in a fork of the server; return the exit status."""
    process = SERVER.Process(target=function, args=args, daemon=True)
    process.start()
    process.join()
    return process.exitcode


def _run(code: str, paths: list[Path], out: Path, error: Path, environment: dict[str, str]) -> None:
    redirect(out, error)
    os.environ.update(environment)
    sys.path[:0] = map(str, paths)
    exec(code, {"__name__": "__main__"})


def redirect(out: Path | str, error: Path) -> None:
    """Have this process write to two files what it would write to stdout and stderr."""
    for descriptor, path in ((1, out), (2, error)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.stdout, sys.stderr = (open(descriptor, "w", buffering=1, closefd=False) for descriptor in (1, 2))  # noqa: SIM115


def run_python_anew(code: str, paths: Sequence[Path] = (LIBRARY,), **environment: str) -> str:
    """Do the same in an interpreter that starts anew: libraries see the environment when they are imported."""
    path = os.pathsep.join(map(str, [*paths, TESTS]))
    environment = os.environ | {"PYTHONPATH": path} | environment
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
