"""What the documents say: their commands are taken, their links lead somewhere, their promises have tests."""

import ast
import re
import shlex
from dataclasses import MISSING
from functools import cache

import pytest

import compute_rank
import main
from conftest import ROOT
from flatllmbench import command_line, report, speed, zero_shot
from flatllmcore import export
from flatllmcore.utils.names import FAMILY_NAMES, PLAIN_FAMILIES
from markdown_tables import tables

DOCS = ("MEASUREMENTS", "SERVING", "RECOVER", "QUANTIZE", "FAMILIES", "CONTRIBUTING")
DOCUMENTS = ("README.md", "INSTALL.md", *(f"docs/{name}.md" for name in DOCS), "results/README.md")
PROGRAMS = ("main.py", "compute_rank.py", *(f"lib/flatllmbench/{name}.py" for name in ("report", "speed", "zero_shot")))
PROGRAMS += ("lib/flatllmcore/export.py",)
PROGRAM = r"(?:python|torchrun|accelerate launch)(?: --\w+ \d+)* (?:(main|compute_rank)\.py|-m flatllm\w+\.(\w+)) "
COMMANDS = (re.compile(rf"^\s*{PROGRAM}(.*)$", re.MULTILINE), re.compile(rf"`{PROGRAM}([^`]*)`"))  # in blocks, in lines
PARSERS = {
    "main": lambda words: command_line.parse_options(words, ""),
    "compute_rank": compute_rank.parse_arguments,
    "export": export.parse_arguments,
    "report": report.parse_arguments,
    "speed": speed.parse_arguments,
    "zero_shot": zero_shot.parse_arguments,
}
PROMISES = (ROOT / "docs" / "PROMISES.md").read_text()
CONTINUED = re.compile(r"\\+\n\s*")  # in a docstring the backslash is doubled


def commands() -> list[tuple[str, list[str]]]:
    found = []
    for document in (*DOCUMENTS, *PROGRAMS):
        text = CONTINUED.sub(" ", (ROOT / document).read_text())
        for program, module, arguments in (match for pattern in COMMANDS for match in pattern.findall(text)):
            words = shlex.split(arguments, comments=True)
            if "..." not in words and "--help" not in words:
                found.append((program or module, words))
    return found


@pytest.mark.parametrize(("program", "arguments"), commands())
def test_a_command_shown_is_taken(program, arguments):
    PARSERS[program](arguments)


def test_the_documents_show_commands_of_every_program():
    assert {program for program, _ in commands()} == PARSERS.keys()


@pytest.mark.parametrize("document", [*DOCUMENTS, "docs/PROMISES.md"])
def test_every_link_and_every_path_leads_to_a_file(document):
    """Links, and what stands in ticks or in a command and is in a folder of this repository."""
    path = ROOT / document
    text = path.read_text()
    links = [target for target in re.findall(r"\]\(([^)#]+)\)", text) if not target.startswith("https://")]
    assert [target for target in links if not (path.parent / target).exists()] == []
    named = re.findall(r"(?m)(?:(?<=[ `])|^)(?:scripts|benchmarks|docs|tests|lib|\.ci)/[\w./-]*\w(?![\w<])", text)
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_table_of_families_is_that_of_the_code():
    text = (ROOT / "docs" / "FAMILIES.md").read_text()
    rows = re.findall(r"(?m)^\| [^|]+ \| `(\w+)` \|[^|]*\| (yes|no) \|[^|]*\| (yes|no|one width) \|$", text)
    assert {family for family, _, _ in rows} == set(FAMILY_NAMES)
    assert {family for family, is_plain, _ in rows if is_plain == "yes"} == set(PLAIN_FAMILIES)
    assert {family for family, _, gguf in rows if gguf != "no"} == set(export._ARCHITECTURES)


def test_help_names_every_flag_and_shows_examples(capsys):
    with pytest.raises(SystemExit):
        main.main(["--help"])
    shown = capsys.readouterr().out
    promised = "model dataset cache_dir prune_method sparsity_ratio tol bi_score seed nsamples save save_model"
    for flag in {*promised.split(), *command_line.FLAGS.values()}:
        assert re.search(rf"--{flag}\s", shown), flag
    assert "python main.py --model models/pydocs-llama" in shown


def test_the_readme_is_one_page_with_the_flags_of_the_table_of_options():
    readme = (ROOT / "README.md").read_text()
    assert readme.count("\n") <= 200
    table = "| flag | default | meaning (in brackets: what holds without it) |\n|---|---|---|\n"
    for name, flag in command_line.FLAGS.items():
        default = command_line.ROWS[name].default
        shown = "required" if default is MISSING else "" if default in (None, False) else f"`{default}`"
        meaning = command_line.ROWS[name].metadata["help"].replace("<", "\\<")
        table += f"| `--{flag}` | {shown} | {meaning} |\n"
    assert readme.split("<!-- flags -->\n")[1].split("<!-- /flags -->")[0] == table


@cache
def found_in(file: str) -> set[str]:
    """Return what pytest would find in a file: ``file::Class::test`` and ``file::test``."""
    nodes = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
    classes = {f"{file}::{node.name}": node.body for node in nodes if isinstance(node, ast.ClassDef)} | {file: nodes}
    return {f"{of}::{node.name}" for of, body in classes.items() for node in body if isinstance(node, ast.FunctionDef)}


def test_every_test_named_exists():
    named = re.findall(r"`(tests/[^`]+)`", PROMISES)
    assert len(named) > 80
    assert [test for test in named if "::test_" not in test or test not in found_in(test.partition("::")[0])] == []


def test_every_promise_has_a_test_or_the_reason_why_it_was_not_run():
    proofs = {promise: proof for _header, *rows in tables(PROMISES) for promise, proof in rows}
    assert len(proofs) > 50
    assert [promise for promise, proof in proofs.items() if not re.search(r"tests/.*::test_|^not run: .", proof)] == []
