"""The shell scripts: what they run by default, read off a stand-in for Python, and real runs on tiny models.

The interpreter is given as PYTHON, so that nothing is installed.
"""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from flatllmcore.utils.loading import load_model
from layers.tiny_models import compress

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(ROOT.glob("scripts/*.sh"))
EMBEDDED = ROOT / "models" / "pydocs-llama"
WORDS = [f"w{index}" for index in range(97)]
PUBLISHED_MODELS = {
    "llama_7b.sh": "meta-llama/Llama-2-7b-hf",
    "llama_13b.sh": "meta-llama/Llama-2-13b-hf",
    "llama_70b.sh": "meta-llama/Llama-2-70b-hf",
    "llama_3_8b.sh": "meta-llama/Meta-Llama-3-8B",
    "mistral.sh": "mistralai/Mistral-7B-v0.1",
}
EXPECTED_PERPLEXITIES = {  # dense and FLAT-LLM at 20 %, Table 1
    "llama_7b.sh": ("5.11", "6.70"),
    "llama_13b.sh": ("4.57", "5.55"),
    "llama_70b.sh": ("3.12", "4.33"),
    "llama_3_8b.sh": ("5.75", "8.15"),
    "mistral.sh": ("4.92", "6.11"),
}
SETTINGS = {
    *("BATCH_SIZE", "BI_NSAMPLES", "BI_SCORE", "CACHE_DIR", "DATASET", "DATASET_ROOT", "DEVICE", "DTYPE"),
    *("INCLUDE_PATH", "LIMIT", "MODEL", "MODELS", "NEW_TOKENS", "NSAMPLES", "NUM_FEWSHOT", "OUT", "OVERWRITE"),
    *("PROCESSES", "PROMPT", "PROMPT_LENGTH", "PROTOCOL", "PRUNE_QK", "PYTHON", "RANK_MULTIPLE", "RATIOS"),
    *("REPEATS", "SEED", "SEQLEN", "SKIP_INSTALL", "TASKS", "THREADS", "VENV"),
}


def shell(script: str, *arguments: str | Path, **settings: str | Path) -> subprocess.CompletedProcess:
    """Run a script under ``scripts/`` from another folder, with these variables and none of the caller's."""
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    environment |= {name: str(value) for name, value in settings.items()} | {"HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / script), *map(str, arguments)],
        env=environment,
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )


def run(script: str, *arguments: str | Path, **settings: str | Path) -> str:
    """Run a script, check that it succeeds, and return its output."""
    done = shell(script, *arguments, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A folder with a train and a test split of random words."""
    folder = tmp_path_factory.mktemp("text")
    generator = torch.Generator().manual_seed(0)
    for split, lines in (("train", 200), ("test", 40)):
        ids = torch.randint(len(WORDS), (lines, 12), generator=generator).tolist()
        (folder / f"{split}.txt").write_text("\n".join(" ".join(WORDS[index] for index in line) for line in ids))
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict[str, Path]:
    """A random model with its tokenizer, by family."""
    vocabulary = {word: index for index, word in enumerate([*WORDS, "<unk>"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<unk>")
    sizes = {
        "vocab_size": len(vocabulary),
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    folders = {}
    for family, config, model in (
        ("llama", LlamaConfig, LlamaForCausalLM),
        ("mistral", MistralConfig, MistralForCausalLM),
    ):
        torch.manual_seed(0)
        folders[family] = tmp_path_factory.mktemp(family) / f"tiny-{family}"
        model(config(**sizes)).save_pretrained(folders[family])
        tokenizer.save_pretrained(folders[family])
    return folders


@pytest.fixture(scope="module")
def ranks(tiny, text, tmp_path_factory) -> Path:
    """The folder that `llama_bi.sh` leaves after scoring both tiny models."""
    out = tmp_path_factory.mktemp("ranks")
    both = f"{tiny['llama']} {tiny['mistral']}"
    run("llama_bi.sh", MODELS=both, DATASET=text, SEQLEN="32", BI_NSAMPLES="4", OUT=out, PYTHON=sys.executable)
    return out


@pytest.fixture
def commands(tmp_path):
    """Run a script with a stand-in for Python, and return the arguments of every call it got."""
    calls = tmp_path / "calls"
    stand_in = tmp_path / "python"
    stand_in.write_text(f'#!/bin/sh\nprintf "%s\\t" "$@" >>"{calls}"\necho >>"{calls}"\n')
    stand_in.chmod(0o755)

    def commands_of(script: str, *arguments: str, **settings: str | Path) -> list[list[str]]:
        run(script, *arguments, PYTHON=stand_in, **settings)
        return [line.split("\t")[:-1] for line in calls.read_text().splitlines()]

    return commands_of


def value_of(flag: str, command: list[str]) -> str:
    return command[command.index(flag) + 1]


@pytest.mark.parametrize("script", [*SCRIPTS, ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_bash_parses_every_script_and_every_script_stops_at_an_error(script):
    subprocess.run(["bash", "-n", script], check=True)
    is_sourced = script.name in ("environment.sh", "settings.sh")
    assert os.access(script, os.X_OK) != is_sourced
    assert is_sourced or "\nset -euo pipefail\n" in script.read_text()


@pytest.mark.parametrize("script", [*SCRIPTS, ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_every_path_a_script_names_exists(script):
    named = script.read_text()
    paths = re.findall(r"(?<![\w/$.])(?:(?:scripts|models|lib|tests)/[\w./-]*\w|\w+\.(?:py|toml|txt))", named)
    assert [path for path in paths if not (ROOT / path).exists()] == []
    for module in re.findall(r"-m (flatllm\w+\.\w+)", named):
        assert find_spec(module)


@pytest.mark.parametrize("script", PUBLISHED_MODELS)
def test_the_published_settings_are_the_defaults(commands, script, tmp_path):
    scoring, ranking, *compressing, reporting = commands(script, BI_SCORE=tmp_path)
    assert all(value_of("--model", command) == PUBLISHED_MODELS[script] for command in (scoring, *compressing))
    for command in (scoring, *compressing):
        settings = [value_of(flag, command) for flag in ("--dataset", "--seqlen", "--seed")]
        assert settings == ["wikitext2", "4096", "42"]
    assert [value_of("--prune_method", c) for c in (scoring, *compressing)] == ["bi"] + 5 * ["flatllm"]
    assert value_of("--nsamples", scoring) == "128"
    assert {value_of("--nsamples", command) for command in compressing} == {"256"}
    percents = ["10", "20", "30", "40", "50"]
    floors = ["--rank_multiple", "1"]
    assert ranking == ["compute_rank.py", "--bi_score", str(tmp_path), "--sparsity_ratio", *percents, *floors]
    assert [value_of("--sparsity_ratio", command) for command in compressing] == percents
    name = PUBLISHED_MODELS[script].split("/")[1]
    assert {value_of("--save", command) for command in (scoring, *compressing)} == {f"results/records/{name}"}
    assert reporting == ["-m", "flatllmbench.report", "results/records", "--out", "results"]


@pytest.mark.parametrize("script", EXPECTED_PERPLEXITIES)
def test_the_header_states_the_perplexities_to_expect(script):
    dense, compressed = EXPECTED_PERPLEXITIES[script]
    expected = f"# Expected at 20 %, perplexity at length 4096: dense {dense}, FLAT-LLM {compressed}.\n"
    assert expected in (ROOT / "scripts" / script).read_text()


def test_llama_bi_scores_llama_2_7b_by_default(commands):
    (scoring,) = commands("llama_bi.sh")
    assert value_of("--model", scoring) == "meta-llama/Llama-2-7b-hf"
    assert value_of("--bi_score", scoring) == "ranks/Llama-2-7b-hf"
    assert value_of("--nsamples", scoring) == "128"


def test_processes_are_started_by_accelerate(commands, tmp_path):
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--num_processes"]
    alone, by_default = (
        [c[: len(launcher) + 1] for c in commands("llama_70b.sh", BI_SCORE=tmp_path, **settings) if "main.py" in c]
        for settings in ({"PROCESSES": "1"}, {})
    )
    assert all(command[0] == "main.py" for command in alone)
    assert by_default[len(alone) :] == [[*launcher, "4"]] * 6


def test_variables_and_arguments_reach_the_programs(commands, tmp_path):
    places = {"CACHE_DIR": "a cache", "DATASET_ROOT": "data", "DEVICE": "cpu"}
    scoring, ranking, compressing, _ = commands(
        "compress.sh", "--batch_size", "3", MODEL="m", RATIOS="30", RANK_MULTIPLE="1", BI_SCORE=tmp_path, **places
    )
    for command in (scoring, compressing):
        assert {name: value_of(f"--{name.lower()}", command) for name in places} == places
        assert command[-2:] == ["--batch_size", "3"]
    assert ranking[-2:] == ["--rank_multiple", "1"]


def test_scores_that_exist_are_not_made_again(commands, tmp_path):
    (tmp_path / "importance.json").write_text("{}")
    ranking, *_ = commands("compress.sh", MODEL="m", RATIOS="30", BI_SCORE=tmp_path)
    assert ranking[0] == "compute_rank.py"


def test_pruning_q_and_k_reaches_the_ranks_and_the_compression(commands, tmp_path):
    _, ranking, compressing, _ = commands("compress.sh", MODEL="m", RATIOS="30", BI_SCORE=tmp_path, PRUNE_QK="1")
    assert "--prune_qk" in ranking
    assert "--prune_qk" in compressing


def test_ratios_that_are_done_are_left_alone_unless_asked(commands, tmp_path):
    (tmp_path / "importance.json").write_text("{}")
    for place in (tmp_path / "out" / "records" / "m" / "m_flatllm_30.json", tmp_path / "out" / "m-30" / "config.json"):
        place.parent.mkdir(parents=True)
        place.write_text("{}")
    settings = {"MODEL": "m", "RATIOS": "20 30", "BI_SCORE": tmp_path, "OUT": tmp_path / "out"}
    again = [value_of("--sparsity_ratio", c) for c in commands("compress.sh", **settings) if c[0] == "main.py"]
    assert again == ["20"]
    all_calls = commands("compress.sh", **settings, OVERWRITE="1")
    assert [value_of("--sparsity_ratio", c) for c in all_calls if c[0] == "main.py"][-2:] == ["20", "30"]


def test_compress_asks_for_a_model(tmp_path):
    done = shell("compress.sh", PYTHON=tmp_path / "none")
    assert done.returncode != 0
    assert "MODEL: is not set" in done.stderr


def test_a_failing_step_ends_the_script(tmp_path):
    done = shell("compress.sh", MODEL=tmp_path / "none", PYTHON="false", RATIOS="30", BI_SCORE=tmp_path)
    assert done.returncode == 1
    assert "compute_rank" not in done.stdout


def test_llama_bi_leaves_scores_for_every_model_with_the_record_beside(ranks):
    for family in ("llama", "mistral"):
        folder = ranks / f"tiny-{family}"
        assert len(json.loads((folder / "importance.json").read_text())["scores"]) == 2
        assert json.loads((folder / f"tiny-{family}_bi.json").read_text())["request"]["nsamples"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("script", PUBLISHED_MODELS)
def test_each_experiment_compresses_the_embedded_model_by_its_variables(script, text, tmp_path):
    settings = {"MODEL": EMBEDDED, "DATASET": text, "BI_NSAMPLES": "4", "BI_SCORE": tmp_path / "scores"}
    settings |= {"PYTHON": sys.executable, "PROCESSES": "2" if "70b" in script else "1"}
    printed = run(script, SEQLEN="32", NSAMPLES="4", RATIOS="20", OUT=tmp_path / "out", **settings)
    name = EMBEDDED.name
    record = json.loads((tmp_path / "out" / "records" / name / f"{name}_flatllm_20.json").read_text())
    compressed = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / f"{name}-20")
    assert compressed.num_parameters() == record["parameters_after"]["total"] < record["parameters_before"]["total"]
    assert f"{record['perplexity']['compressed']:.3f}" in printed
    report = {path.name for path in (tmp_path / "out").iterdir()}
    assert report >= {"README.md", "perplexity.png"}


@pytest.mark.slow
def test_the_demo_ends_with_a_table_a_picture_and_a_sentence_of_each_model(tiny, text, tmp_path):
    out = tmp_path / "demo"
    (out / "ranks").mkdir(parents=True)
    (out / "ranks" / "importance.json").write_text("left by a demo of another model")
    settings = {"MODEL": tiny["llama"], "DATASET": text, "SEQLEN": "32", "NSAMPLES": "4", "BI_NSAMPLES": "4"}
    settings |= {"RATIOS": "20 50", "PROMPT": "w1 w2", "OUT": out, "SKIP_INSTALL": "1", "PYTHON": sys.executable}
    printed = run("demo.sh", **settings)
    assert (out / "perplexity.png").read_bytes().startswith(b"\x89PNG")
    assert "| 50 " in (out / "README.md").read_text()
    for model in (tiny["llama"], out / "tiny-llama-20", out / "tiny-llama-50"):
        assert f"{model}: w1 w2 w" in printed


def test_eval_runs_the_paper_s_tasks_by_default(commands):
    assert commands("eval.sh", "some/model") == [["-m", "flatllmbench.zero_shot", "some/model", "--save", "logs"]]


def test_variables_and_arguments_reach_the_evaluation(commands):
    values = {"TASKS": "a,b", "NUM_FEWSHOT": "3", "LIMIT": "9", "BATCH_SIZE": "2", "INCLUDE_PATH": "my tasks"}
    values |= {"DEVICE": "cpu", "CACHE_DIR": "cache"}
    (command,) = commands("eval.sh", "m", "--dtype", "float32", OUT="out", **values)
    assert {name: value_of(f"--{name.lower()}", command) for name in values} == values
    assert value_of("--save", command) == "out"
    assert command[-2:] == ["--dtype", "float32"]


def test_eval_asks_for_a_model(tmp_path):
    done = shell("eval.sh", PYTHON=tmp_path / "none")
    assert done.returncode != 0
    assert "is missing; name a local folder or a hub id" in done.stderr


def test_eval_of_the_embedded_model_ends_with_a_record(tmp_path):
    settings = {"TASKS": "pydocs_endings,pydocs_text", "INCLUDE_PATH": "tests/tasks", "LIMIT": "12", "OUT": tmp_path}
    printed = run("eval.sh", "models/pydocs-llama", PYTHON=sys.executable, DEVICE="cpu", **settings)
    record = json.loads((tmp_path / "pydocs-llama_zero_shot_pydocs_endings+pydocs_text_limit-12.json").read_text())
    assert record["model"]["model"] == "pydocs-llama"
    found = record["zero_shot"]["tasks"]
    assert list(found) == ["pydocs_endings", "pydocs_text"]
    assert all(f"{row['metric']} {row['value']:.4f} on 12 samples" in printed for row in found.values())
    assert found["pydocs_endings"]["metrics"]["acc"] > 0.5  # of four endings


def test_speed_is_measured_by_slicegpt_s_protocol_by_default(commands):
    (measuring,) = commands("test_speedup.sh", "dense", "a", "b")
    expected = ["-m", "flatllmbench.speed", "dense", "a", "b", "--protocol", "slicegpt", "--repeats", "7"]
    assert measuring == [*expected, "--save", "logs"]


def test_what_test_speedup_measures_is_set_by_variables(commands):
    sizes = {"BATCH_SIZE": "1,8", "PROMPT_LENGTH": "16", "NEW_TOKENS": "4", "REPEATS": "2", "PROTOCOL": "grid"}
    places = {"DTYPE": "float32", "DEVICE": "cpu", "THREADS": "1", "CACHE_DIR": "a cache"}
    (measuring,) = commands("test_speedup.sh", "dense", OUT="out", **sizes, **places)
    assert value_of("--save", measuring) == "out"
    assert {name: value_of(f"--{name.lower()}", measuring) for name in sizes | places} == sizes | places


def test_embedded_makes_every_record_of_the_results_page(commands):
    called = commands("embedded.sh", OUT="out", SKIP_INSTALL="1")
    kinds = [command[command[0] == "-m"] for command in called]
    evaluated = ["flatllmbench.zero_shot"] * 6
    timed = ["flatllmbench.speed"] * 2
    report = ["flatllmbench.report"]
    assert kinds == ["main.py", "compute_rank.py", *["main.py"] * 5, *report, *evaluated, *timed, *report]
    assert value_of("--prune_method", called[0]) == "bi"
    assert {value_of("--save", command) for command in called if "--save" in command} == {"out/records/pydocs-llama"}
    assert [value_of("--protocol", command) for command in called[-3:-1]] == ["slicegpt", "grid"]


def test_test_speedup_asks_for_models(tmp_path):
    done = shell("test_speedup.sh", PYTHON=tmp_path / "none")
    assert done.returncode != 0
    assert "name the dense model" in done.stderr


@pytest.mark.slow
def test_test_speedup_measures_the_embedded_model(tmp_path):
    model = load_model(str(EMBEDDED))
    count = model.config.num_hidden_layers
    compress(model, ranks=(16,) * count, widths=(224,) * count).save_pretrained(tmp_path / "half")
    sizes = {"BATCH_SIZE": "4", "NEW_TOKENS": "8", "REPEATS": "2", "DEVICE": "cpu"}
    printed = run("test_speedup.sh", EMBEDDED, tmp_path / "half", OUT=tmp_path, PYTHON=sys.executable, **sizes)
    record = json.loads((tmp_path / f"{EMBEDDED.name}_speed_slicegpt.json").read_text())
    dense, flat = record["cells"]
    assert flat["kv_cache_bytes"] / dense["kv_cache_bytes"] == (32 + 16) / (32 + 32)
    assert f"{dense['decode_ms_per_token']['median']:,.2f}" in printed


def test_test_sh_installs_once_and_passes_its_arguments_to_pytest(commands, tmp_path):
    """The stand-in makes no virtual environment, so this puts one there: a link to the stand-in itself."""
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to(tmp_path / "python")
    pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pytest_command = ["-m", "pytest", "-n", "auto", "-k", "some name"]
    first = commands("test.sh", "-k", "some name", VENV=venv)
    assert first == [[*pip, "-r", "requirements.txt"], [*pip, "-e", ".[dev]"], pytest_command]
    assert commands("test.sh", "-k", "some name", VENV=venv) == [*first, pytest_command]


def test_skip_install_runs_the_given_python_alone(commands):
    assert commands("test.sh", SKIP_INSTALL="1") == [["-m", "pytest", "-n", "auto"]]


def test_generate_refuses_what_is_no_model_in_one_line(tmp_path):
    command = [sys.executable, "scripts/generate.py", str(tmp_path), "--prompt", "w1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert str(tmp_path) in done.stderr


def test_requirements_are_pinned_to_what_is_tested_and_end_in_the_package_itself():
    *pins, package = (line for line in (ROOT / "requirements.txt").read_text().splitlines() if line[0] != "#")
    assert package == "-e ."
    assert all(re.fullmatch(r"\w+==[\d.]+", pin) for pin in pins)
