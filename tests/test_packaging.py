"""Source distribution, wheel and API reference: built, looked into, and the wheel installed and used."""

import ast
import email
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from transformers import AutoConfig

import flatllmcore
from conftest import ROOT
from flatllmcore import core, utils
from python_process import LIBRARY, run_python

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SOURCES = ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "lib", "tests", "models", "scripts", "docs")


def checked_output(*command: str | Path, **options) -> str:
    """Run a command, check that it succeeds, and return what it says on both streams."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, made of the source distribution that is made of a copy of the sources."""
    copy = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
        else:
            shutil.copy(ROOT / name, copy)
    said = checked_output(sys.executable, "-m", "build", "--no-isolation", cwd=copy)
    assert "deprecat" not in said.lower()
    (wheel,) = copy.glob("dist/*.whl")
    return wheel


def test_the_wheel_holds_both_packages_the_licence_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {path.relative_to(LIBRARY).as_posix() for path in LIBRARY.rglob("*.py")}
    information = f"flatllmcore-{PROJECT['version']}.dist-info"
    assert {name for name in names if not name.startswith(information)} == modules | {"flatllmcore/py.typed"}
    assert f"{information}/licenses/LICENSE" in names


def test_what_vllm_loads_as_a_plugin_can_be_called_again():
    """By the name in the wheel's metadata, which no installed copy need have."""
    entry = EntryPoint("flatllmcore", PROJECT["entry-points"]["vllm.general_plugins"]["flatllmcore"], "")
    entry.load()()
    assert AutoConfig.for_model("flat_qwen3").model_type == "flat_qwen3"


def test_the_wheel_states_what_it_needs(wheel):
    with zipfile.ZipFile(wheel) as file:
        (name,) = (name for name in file.namelist() if name.endswith("/METADATA"))
        metadata = email.message_from_bytes(file.read(name))
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Requires-Python"] == PROJECT["requires-python"]
    needed = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert needed == PROJECT["dependencies"]


def imported_packages(package: str, top_level_only: bool) -> set[str]:
    """Return the names of other packages than the standard library's that the files of a package import."""
    names = set()
    for path in (LIBRARY / package).rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body if top_level_only else ast.walk(tree):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names) - {"flatllmcore", package}


def declared(requirements: list[str]) -> set[str]:
    """Return the modules that required packages are imported as."""
    return {re.match(r"\w+", requirement)[0].removesuffix("_py") for requirement in requirements}


def test_dependencies_are_the_packages_that_the_code_imports():
    extras = PROJECT["optional-dependencies"]
    dependencies, programs, evaluation = map(declared, (PROJECT["dependencies"], extras["programs"], extras["eval"]))
    assert imported_packages("flatllmcore", top_level_only=True) <= dependencies
    assert imported_packages("flatllmbench", top_level_only=True) <= dependencies
    everywhere = imported_packages("flatllmcore", False) | imported_packages("flatllmbench", False)
    of_transformers = {"protobuf", "sentencepiece"}  # which reads a tokenizer.model by them
    assert (
        everywhere
        == (dependencies | programs | evaluation | declared(extras["recover"])) - {"flatllmcore"} - of_transformers
    )
    pinned = declared((ROOT / "requirements.txt").read_text().splitlines()[1:-1])
    assert (dependencies | programs) <= pinned


@pytest.mark.slow
def test_the_api_reference_builds_without_warnings_and_has_every_public_name(tmp_path):
    code = (
        "import runpy, sys; sys.stderr = sys.stdout; sys.argv = {0!r}; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    assert run_python(code.format([str(ROOT / "docs" / "build.py"), str(tmp_path)])) == ""
    assert (tmp_path / "index.html").is_file()
    for package in (flatllmcore, core, utils):
        page = tmp_path.joinpath(*package.__name__.split(".")).with_suffix(".html").read_text()
        assert [name for name in package.__all__ if f'id="{name}"' not in page] == []
    # Made when it is first asked for, so that an inspection could miss it.
    assert 'id="FlatLLMReassembler.reassemble"' in (tmp_path / "flatllmcore.html").read_text()
