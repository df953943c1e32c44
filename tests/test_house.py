"""The house's own rules, read off its sources: who may import whom, how long a function is, what explains it."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from python_process import LIBRARY, run_python, run_python_anew

PACKAGE = LIBRARY / "flatllmcore"
FILES = sorted(LIBRARY.rglob("*.py"))
# From the ground up: a file imports from its own floor and from those below.
FLOORS = (
    {"errors", "_versions", "_lazy"},
    {"utils"},
    {"core", "layers"},
    {"engine"},
    {"methods"},
    {"config", "pipeline", "checkpoint_run"},
    {"api", "export", "reassembler", "absorption_compressor"},
    {"flatllmcore"},  # the package's own file
)
# The user document has `core` offer FlatLLMPruner, and FedCore finds its adapter there: both look up what stands above.
UPWARDS = {("core", "api")}


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def module_of(path: Path) -> str:
    parts = path.relative_to(LIBRARY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def imports_of(module: str, nodes: Iterator[ast.AST]) -> set[str]:
    """Return the modules of flatllmcore that import statements of one module name, wherever they stand."""
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            name = ".".join(part for part in (base, node.module) if part)
            found |= {full if (full := f"{name}.{alias.name}") in MODULES else name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.partition(".")[0] == "flatllmcore"}


def floor_of(module: str) -> int:
    room = module.split(".")[1] if "." in module else module
    return next(height for height, rooms in enumerate(FLOORS) if room in rooms)


CORE = [module for module in MODULES if module.startswith("flatllmcore")]


@pytest.mark.parametrize("module", CORE)
def test_imports_point_downwards_or_to_the_same_floor(module):
    """Those for type checkers alone and those inside functions count as well."""
    for imported in imports_of(module, ast.walk(tree_of(MODULES[module]))):
        rooms = tuple(name.split(".")[1] if "." in name else name for name in (module, imported))
        assert floor_of(imported) <= floor_of(module) or rooms in UPWARDS, f"{module} imports {imported}"


def test_no_module_is_imported_by_what_it_imports():
    graph = {module: imports_of(module, ast.walk(tree_of(MODULES[module]))) - {module} for module in CORE}
    TopologicalSorter(graph).prepare()  # a CycleError says what is wrong


def definitions(path: Path) -> Iterator[tuple[str, ast.AST]]:
    """Give every class and function of a file with its name, `Class.method`; not those inside functions."""
    pending = [("", node) for node in tree_of(path).body]
    while pending:
        prefix, node = pending.pop()
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix + node.name, node
        if isinstance(node, ast.ClassDef):
            pending += [(f"{prefix}{node.name}.", part) for part in node.body]


def is_explained(node: ast.AST) -> bool:
    """Tell whether a definition has a docstring, or is a family's variant of a class that has one."""
    is_variant = isinstance(node, ast.ClassDef) and any(ast.unparse(base).startswith("Flat") for base in node.bases)
    return is_variant or ast.get_docstring(node) is not None


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_what_is_public_is_explained_and_nothing_is_long(path):
    """Every file, public class, function and method has a docstring; a file has 300 lines, a function 60 at most."""
    source = path.read_text(encoding="utf-8")
    # Imports inside the package are relative, so that a copy works under any name.
    assert not path.is_relative_to(PACKAGE) or not re.search(r"(?m)^ *(?:from|import) (?:flatllm|lib\b)", source)
    public = [(name, node) for name, node in definitions(path) if not re.search(r"(^|\.)_", name)]
    assert [name for name, node in public if not is_explained(node)] == []
    assert not source or ast.get_docstring(tree_of(path))
    functions = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.FunctionDef)]
    assert [node.name for node in functions if node.end_lineno - node.lineno >= 60] == []
    assert len(source.splitlines()) <= 300


def test_code_of_others_is_not_run():
    """Where nothing is said, transformers asks on stdin whether to run the code of a model's folder."""
    calls = [(path, node) for path in FILES for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)]
    loads = re.compile(r"Auto\w+\.from_(pretrained|config)").fullmatch
    loading = [(path, node) for path, node in calls if loads(ast.unparse(node.func))]
    assert len(loading) >= 3
    for path, node in loading:
        assert "trust_remote_code=False" in map(ast.unparse, node.keywords), path


LOADED = """
import sys
def loaded():
    return {name.partition(".")[0] for name in sys.modules} & set(HEAVY)
from transformers import LlamaForCausalLM
by_the_ground = loaded()
from flatllmcore import FlatLLMPruner
print(*loaded() - by_the_ground)
"""


def test_using_the_package_loads_nothing_heavy(tmp_path):
    """No more than what it is built on loads by itself, and not FedCore, which may not even be importable."""
    heavy = ("accelerate", "datasets", "fedcore", "hypothesis", "lm_eval", "matplotlib", "msgspec", "pandas", "pyarrow")
    (tmp_path / "fedcore.py").write_text("raise SystemExit('imported too early')")
    assert run_python(LOADED.replace("HEAVY", str(heavy)), [tmp_path, LIBRARY]) == "\n"
    assert (PACKAGE / "py.typed").is_file()


SLOW = "print(*{'numpy', 'torch', 'transformers'} & sys.modules.keys())"
AT_ONCE = """
import runpy, sys
sys.path.insert(0, {root!r})
sys.argv = ["main.py", *{flags!r}]
try:
    runpy.run_path({root!r} + "/main.py", run_name="__main__")
except SystemExit as end:
    print(end.code)
"""


@pytest.mark.parametrize("program", ["main.py", "compute_rank.py"])
def test_a_program_that_is_not_installed_says_in_one_line_what_to_do(program):
    command = [sys.executable, "-I", "-S", LIBRARY.parent / program]  # sees the standard library alone
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert re.fullmatch(r"error: No module named '\w+'; install first: pip install .*\n", done.stderr)


@pytest.mark.parametrize("module", ["flatllmcore", "compute_rank", "flatllmbench.report"])
def test_what_needs_no_tensors_loads_nothing_that_takes_seconds(module):
    root = str(LIBRARY.parent)
    assert run_python_anew(f"import sys; sys.path.insert(0, {root!r}); import {module}; {SLOW}") == "\n"


@pytest.mark.parametrize(
    ("flags", "status"), [(["--help"], 0), (["--modle", "x"], 2), (["--model", "x", "--sparsity_ratio", "200"], 2)]
)
def test_help_and_unusable_flags_are_answered_before_what_takes_seconds_is_loaded(flags, status):
    said = run_python_anew(AT_ONCE.format(root=str(LIBRARY.parent), flags=flags) + SLOW)
    assert said.endswith(f"{status}\n\n")


@pytest.mark.parametrize(
    ("run", "imports"),  # the server of run_python has imported transformers
    [(run_python_anew, "import flatllmcore; from transformers import {}"), (run_python, "from transformers import {}")],
)
def test_compressed_models_are_known_whichever_package_is_imported_first(run, imports):
    """The module of Gemma 3's config itself imports the auto classes."""
    names = imports.format("Gemma3TextConfig, AutoConfig, AutoModelForCausalLM")
    config = 'config = AutoConfig.for_model("flat_gemma3_text", num_hidden_layers=0, hidden_size=8, vocab_size=8)'
    classes = "print(type(config).__name__, type(AutoModelForCausalLM.from_config(config)).__name__)"
    said = run(f"{names}; import flatllmcore\n{config}\n{classes}")
    assert said == "FlatGemma3TextConfig FlatGemma3ForCausalLM\n"


INTERRUPTED = """
import builtins, importlib.util, sys
import flatllmcore
found = importlib.util.find_spec("transformers.models.auto.configuration_auto")
name = "transformers.models.auto.auto_mappings"  # imported at the top of it
sys.modules[name] = None
try:
    from transformers import AutoConfig
except ImportError:
    del sys.modules[name]
from transformers import CONFIG_MAPPING
print("flat_llama" in CONFIG_MAPPING)
"""


def test_compressed_models_are_known_when_the_first_import_was_looked_for_or_failed():
    assert run_python_anew(INTERRUPTED) == "True\n"
