"""Zero-shot results: the released harness on small local tasks, by the embedded model, dense and compressed."""

import json
import math
import re
import shutil
import socket
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import lm_eval
import pytest
import torch
from datasets import Dataset
from lm_eval.tasks import TaskManager
from transformers import PreTrainedTokenizerFast

import main
from checkpoints import CPU
from conftest import EMBEDDED, ROOT, one_line, tiny_model
from flatllmbench import zero_shot as program
from flatllmbench.provenance import describe_model
from flatllmbench.zero_shot import PAPER_TASKS, evaluate_saved, load_tasks
from flatllmcore import FlatLLMPruner, InputError
from flatllmcore.engine.memory import ModelInMemory
from flatllmcore.engine.perplexity import perplexity
from flatllmcore.utils import devices
from flatllmcore.utils.loading import load_model, load_tokenizer
from python_process import BLOCKED, run_python

LOCAL_TASKS = ROOT / "tests" / "tasks"
QUESTIONS = [json.loads(line) for line in (LOCAL_TASKS / "pydocs.jsonl").read_text().splitlines()]
PASSAGES = [f"{question['beginning']} {question['endings'][question['label']]}" for question in QUESTIONS]
BOTH = ["pydocs_endings", "pydocs_text"]
LOCAL = ["--tasks", ",".join(BOTH), "--include_path", str(LOCAL_TASKS), "--device", "cpu"]


@cache
def paper_tasks() -> TaskManager:
    """Return the harness's own definitions of the paper's tasks: reading all its 15,000 takes seconds."""
    folders = ("mmlu", "piqa", "winogrande", "hellaswag", "arc", "openbookqa")
    place = Path(lm_eval.__file__).parent / "tasks"
    return TaskManager(include_path=[place / folder for folder in folders], include_defaults=False)


def task_manager(include_path: Path | None = None, include_defaults: bool = True) -> TaskManager:
    """Return local tasks alone, where there are any."""
    is_local = include_path or not include_defaults
    return TaskManager(include_path=include_path, include_defaults=False) if is_local else paper_tasks()


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """At the repository's root, where the tasks' data are found; nobody may use the network."""

    connect = socket.socket.connect

    def connect_here(self: socket.socket, address: object) -> None:
        assert self.family == socket.AF_UNIX, "the network was used"
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(socket.socket, "connect", connect_here)
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.setattr("lm_eval.tasks.TaskManager", task_manager)
        patch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # seconds of asking the system
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """The embedded model, and half of its decoder layers' weights, in a folder as main.py leaves it; both bf16."""
    model, tokenizer = load_model(EMBEDDED), load_tokenizer(EMBEDDED)
    pruner = FlatLLMPruner(model, tokenizer, target_sparsity=0.5, cal_dataset=PASSAGES, cal_nsamples=4, seqlen=256)
    pruner.prune_model()
    folder = tmp_path_factory.mktemp("compressed") / "half"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text("---\nflat_llm:\n  base_model: pydocs-llama\n---\n")
    return {"dense": EMBEDDED, "compressed": str(folder)}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """A random model with the embedded one's tokenizer, for what does not depend on the answers."""
    folder, tokenizer = tmp_path_factory.mktemp("random") / "tiny", load_tokenizer(EMBEDDED)
    tiny_model(vocab_size=len(tokenizer), max_position_embeddings=512).float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def results_of(folder: str, names: list[str], include_path: Path = LOCAL_TASKS, **options: int) -> dict:
    limit, shots = options.get("limit"), options.get("num_fewshot")
    return evaluate_saved(folder, load_tasks(names, shots, include_path), CPU, 8, limit, dtype="float32")


# Figures


def own_log_likelihood(model, tokenizer, context: str, ending: str) -> float:
    start, ids = len(tokenizer(context)["input_ids"]), tokenizer(f"{context} {ending}")["input_ids"]
    with torch.no_grad():
        log_probabilities = model(torch.tensor([ids[:-1]])).logits[0].double().log_softmax(-1)
    return sum(log_probabilities[place - 1, ids[place]].item() for place in range(start, len(ids)))


def test_accuracies_equal_those_counted_by_hand(folders):
    """Oracle: the log-probabilities of each ending after the question, summed one text at a time."""
    folder = folders["compressed"]
    model, tokenizer = load_model(folder, dtype="float32"), load_tokenizer(folder)
    hits = {"acc": 0, "acc_norm": 0}
    for question in QUESTIONS[:8]:
        endings = question["endings"]
        sums = [own_log_likelihood(model, tokenizer, question["beginning"], ending) for ending in endings]
        means = [total / len(ending) for total, ending in zip(sums, endings, strict=True)]
        hits["acc"] += sums.index(max(sums)) == question["label"]
        hits["acc_norm"] += means.index(max(means)) == question["label"]
    shares = {name: number / 8 for name, number in hits.items()}
    errors = {f"{name}_stderr": math.sqrt(p * (1 - p) / 7) for name, p in shares.items()}
    assert 0.5 < shares["acc_norm"] < 1
    row = results_of(folder, ["pydocs_endings"], limit=8)["tasks"]["pydocs_endings"]
    assert row.pop("metrics") == pytest.approx(shares | errors)
    assert row.pop("stderr") == pytest.approx(errors["acc_norm_stderr"])
    facts = {"samples": 8, "num_fewshot": 0, "version": 1.0}
    assert row == {"metric": "acc_norm", "value": shares["acc_norm"]} | facts


@pytest.mark.parametrize(
    ("which", "dtype", "has_units", "error"),
    [
        ("compressed", "float32", True, 1e-4),
        ("compressed", "bfloat16", True, 1e-3),
        ("compressed", "bfloat16", False, 1e-4),
        ("dense", "bfloat16", True, 1e-3),
    ],
)
def test_log_likelihoods_are_those_of_our_perplexity_in_float32(folders, which, dtype, has_units, error, monkeypatch):
    """Of documents, each predicted whole from a BOS token; log-probabilities rounded to bf16 would be off by more."""
    monkeypatch.setattr(devices, "has_instructions_for", lambda _: has_units)
    folder = folders[which]
    source = ModelInMemory(load_model(folder, dtype=dtype), CPU)
    tokenizer, nll = load_tokenizer(folder), 0.0
    for text in PASSAGES[:6]:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]])
        nll += math.log(perplexity(source, ids, 1)) * (ids.numel() - 1)
    tasks = load_tasks(["pydocs_text"], include_path=LOCAL_TASKS)
    loaded = load_model(folder, dtype=dtype)
    monkeypatch.setattr(program, "load_model", lambda *_, **__: loaded)
    row = evaluate_saved(folder, tasks, CPU, 1, 6, dtype=dtype)["tasks"]["pydocs_text"]
    assert loaded.base_model.rotary_emb.inv_freq.dtype == torch.float32  # in half precision places would be rounded
    assert (row["metric"], row["stderr"], row["samples"]) == ("word_perplexity", None, 6)
    words, size = (sum(map(len, map(split, PASSAGES[:6]))) for split in (str.split, str.encode))
    assert math.log(row["value"]) == pytest.approx(nll / words, rel=error)
    assert math.log(row["metrics"]["byte_perplexity"]) == pytest.approx(nll / size, rel=error)


# Without the 13,000 tasks of the harness itself, which take half a minute to read.
PLAIN_HARNESS = """
import functools, os
import huggingface_hub.constants, lm_eval.tasks
from lm_eval.__main__ import cli_evaluate
os.chdir({root!r})
huggingface_hub.constants.HF_HUB_OFFLINE = True
lm_eval.tasks.TaskManager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
sys.argv[1:] = {arguments}
cli_evaluate()
"""


@pytest.mark.slow
def test_the_plain_harness_gives_the_same_figures_without_this_package(folders, tmp_path):
    """The folder's own modelling files, by the harness's command line where flatllmcore cannot be imported."""
    model = f"pretrained={folders['compressed']},trust_remote_code=True,softmax_dtype=float32,dtype=float32"
    arguments = ["run", "--model", "hf", "--device", "cpu", "--batch_size", "8", "--output_path", str(tmp_path / "out")]
    arguments += ["--model_args", model, "--tasks", "pydocs_endings", "--include_path", str(LOCAL_TASKS)]
    arguments += ["--num_fewshot", "2", "--limit", "8"]
    code = BLOCKED + PLAIN_HARNESS.format(root=str(ROOT), arguments=arguments)
    run_python(code, [], HF_DATASETS_CACHE=str(tmp_path / "datasets"))
    (place,) = (tmp_path / "out").rglob("results_*.json")
    plain = json.loads(place.read_text())["results"]["pydocs_endings"]
    ours = results_of(folders["compressed"], ["pydocs_endings"], num_fewshot=2, limit=8)["tasks"]["pydocs_endings"]
    assert (ours["num_fewshot"], ours["samples"]) == (2, 8)
    assert ours["metrics"] == {name: pytest.approx(plain[f"{name},none"]) for name in ours["metrics"]}


def test_every_filter_of_a_metric_is_kept():
    row = {"alias": "a task", "exact_match,strict": 0.25, "exact_match_stderr,strict": 0.125, "sample_len": 4}
    row |= {"exact_match,flexible": 0.5, "exact_match_stderr,flexible": "N/A"}
    task = SimpleNamespace(get_config=lambda name: 0)
    result = program._result("a", task, {"results": {"a": row}, "versions": {"a": 1}})
    assert (result["metric"], result["value"], result["stderr"]) == ("exact_match,strict", 0.25, 0.125)
    assert result["metrics"]["exact_match,flexible"] == 0.5


# Tasks


def write_endings(folder: Path, name: str, documents: list[dict] = QUESTIONS[:8], **fields: object) -> None:
    data = folder / f"{name}.jsonl"
    data.write_text("\n".join(map(json.dumps, documents)))
    definition = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        **dict.fromkeys(("test_split", "fewshot_split"), "test"),
        "output_type": "multiple_choice",
        "doc_to_text": "beginning",
        "doc_to_choice": "endings",
        "doc_to_target": "label",
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")],
    }
    (folder / f"{name}.yaml").write_text(json.dumps(definition | fields))  # JSON is YAML


def test_the_paper_s_tasks_are_run_by_its_protocol_unless_asked_otherwise(tiny, tmp_path):
    """On local questions under the seven names, MMLU being a group with groups in it."""
    expected = dict.fromkeys(PAPER_TASKS, (0, "acc_norm")) | {"winogrande": (0, "acc"), "mmlu": (5, "acc")}
    for name in (*PAPER_TASKS, "law"):
        if name != "mmlu":
            write_endings(tmp_path, name)
    for group, member in (("mmlu", "mmlu_other"), ("mmlu_other", "law")):
        score = {"aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}
        (tmp_path / f"{group}.yaml").write_text(json.dumps({"group": group, "task": [member]} | score))
    tasks = load_tasks(include_path=tmp_path)
    found = evaluate_saved(tiny, tasks, CPU, 32, None, dtype="float32")
    order = ("mmlu", "piqa", "winogrande", "hellaswag", "arc_easy", "arc_challenge", "openbookqa")
    assert tuple(found["tasks"]) == order
    assert {name: (row["num_fewshot"], row["metric"]) for name, row in found["tasks"].items()} == expected
    values = [row["metrics"][expected[name][1]] for name, row in found["tasks"].items()]
    assert found["mean_accuracy"] == pytest.approx(100 * sum(values) / 7)
    assert evaluate_saved(tiny, tasks, CPU, 32, 1, dtype="float32")["mean_accuracy"] is None
    other_shots = load_tasks(num_fewshot=0, include_path=tmp_path)
    assert evaluate_saved(tiny, other_shots, CPU, 32, None, dtype="float32")["mean_accuracy"] is None


def test_the_harness_defines_the_paper_s_tasks_with_the_metrics_reported():
    for name, (_, metric) in PAPER_TASKS.items():
        definition = paper_tasks().task_index[name].cfg
        metrics = {entry["metric"] for entry in definition.get("metric_list") or definition["aggregate_metric_list"]}
        assert metrics - {"acc"} == {metric} - {"acc"}, name


def test_a_group_with_a_score_is_reported_as_one_and_others_by_their_tasks(tiny, tmp_path):
    """Oracle: the tasks' own results, weighted by their questions, as MMLU's."""
    write_endings(tmp_path, "few", QUESTIONS[:4], num_fewshot=1)
    write_endings(tmp_path, "many", QUESTIONS[4:16], num_fewshot=0, tag="tagged")  # keeps to none
    score = {"aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}
    (tmp_path / "scored.yaml").write_text(json.dumps({"group": "scored", "task": ["few", "many"]} | score))
    (tmp_path / "plain.yaml").write_text(json.dumps({"group": "plain", "task": ["few", "many"]}))
    each, both = (results_of(tiny, [name], tmp_path, num_fewshot=2)["tasks"] for name in ("plain", "scored"))
    assert {name: row["num_fewshot"] for name, row in each.items()} == {"few": 2, "many": 0}
    pooled = (4 * each["few"]["metrics"]["acc"] + 12 * each["many"]["metrics"]["acc"]) / 16
    (row,) = both.values()
    assert (row["metric"], row["samples"], row["num_fewshot"]) == ("acc", 16, None)
    assert row["value"] == pytest.approx(pooled)
    with pytest.raises(InputError, match=r"task 'tagged' cannot be set up .* 'many': found in both"):
        load_tasks(["scored", "tagged"], include_path=tmp_path)


def test_a_definition_that_does_not_work_is_refused_by_name(tmp_path):
    write_endings(tmp_path, "broken", doc_to_target="{{nosuch.upper()}}")
    with pytest.raises(InputError, match=r"task 'broken' cannot be set up \(UndefinedError: 'nosuch'"):
        load_tasks(["broken"], include_path=tmp_path)


def write_copy(root: Path, include_path: Path, **fields: object) -> None:
    """Write a task whose data are on the hub, and below ``root`` a copy of them that has no train split."""
    (root / "user" / "questions").mkdir(parents=True)
    Dataset.from_list(QUESTIONS[:8]).to_parquet(root / "user" / "questions" / "test.parquet")
    published = {"dataset_path": "user/questions", "dataset_kwargs": None, "training_split": "train"}
    write_endings(include_path, "copied", **published | {"fewshot_split": None} | fields)


def test_tasks_find_their_data_below_dataset_root(tiny, tmp_path):
    """Oracle: the same questions by a task that names their file."""
    write_endings(tmp_path, "named")
    write_copy(tmp_path / "root", tmp_path)
    argv = ["--tasks", "named,copied", "--include_path", str(tmp_path), "--dataset_root", str(tmp_path / "root")]
    assert program.main([tiny, *argv, "--device", "cpu", "--save", str(tmp_path / "logs")]) == 0
    (place,) = (tmp_path / "logs").glob("*.json")
    tasks = json.loads(place.read_text())["zero_shot"]["tasks"]
    assert tasks["copied"] == tasks["named"]


@pytest.mark.parametrize(
    ("fields", "shots", "reason"),
    [
        ({"dataset_path": "user/others"}, None, "no copy of user/others in {root}/user/others"),
        ({"test_split": None, "validation_split": "validation"}, None, "cannot be set up (KeyError: 'validation')"),
        ({}, 1, "no documents available for sampling"),
    ],
)
def test_what_a_copy_of_a_task_s_data_lacks_is_named(tmp_path, fields, shots, reason):
    root = tmp_path / "root"
    write_copy(root, tmp_path, **fields)
    with pytest.raises(InputError, match=re.escape(reason.format(root=root))):
        load_tasks(["copied"], shots, tmp_path, root)


@pytest.mark.parametrize("package", ["lm_eval.tasks", "accelerate"])
def test_a_package_that_is_missing_is_told_with_what_installs_it(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"needs {package}.*; .* pip install '\.\[eval\]'"):
        load_tasks(BOTH, include_path=LOCAL_TASKS)


# The programs


def test_the_program_writes_a_record_and_the_results_to_the_log(folders, tmp_path, capfd):
    argv = [folders["compressed"], *LOCAL, "--save", str(tmp_path), "--dtype", "float32", "--limit", "4"]
    assert program.main(argv) == 0
    name = "half_zero_shot_pydocs_endings+pydocs_text_limit-4"
    record = json.loads((tmp_path / f"{name}.json").read_text())
    assert (record["kind"], record["request"]["tasks"]) == ("zero_shot", BOTH)
    assert record["command"] == " ".join(["python -m flatllmbench.zero_shot", *argv])
    assert record["model"] == describe_model(folders["compressed"])
    assert record["zero_shot"] == results_of(folders["compressed"], BOTH, limit=4)
    assert record["zero_shot"]["harness"] == f"lm_eval {lm_eval.__version__}"
    assert {"versions", "hardware", "elapsed_s"} <= record.keys()
    printed = capfd.readouterr().out
    assert printed == (tmp_path / f"{name}.log").read_text()
    assert f"acc_norm {record['zero_shot']['tasks']['pydocs_endings']['value']:.4f} on 4 samples" in printed


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (("--tasks", "nosuch"), "task 'nosuch' cannot be set up"),
        (("--limit", "0"), "--limit is 0; accepted: "),
        (("--include_path", "nosuch"), "--include_path is 'nosuch'; accepted: a folder that is there"),
        (("--save", f"{EMBEDDED}/config.json/x"), "cannot write to "),
    ],
)
def test_unusable_arguments_are_one_line(tmp_path, capsys, argv, reason):
    assert reason in one_line(capsys, program.main, [EMBEDDED, *LOCAL, "--save", str(tmp_path), *argv])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("context", "has_special_tokens", "reason"),
    [
        (8, True, r"cannot evaluate .* \(AssertionError: assert len\(.*\) <= self.max_length\).* its 8 tokens"),
        (512, False, "the tokenizer at .* has no BOS or EOS token; the harness puts one before each text"),
    ],
)
def test_what_the_harness_cannot_do_with_a_model_is_one_line(tmp_path, capsys, context, has_special_tokens, reason):
    folder = tmp_path / "model"
    tokenizer = load_tokenizer(EMBEDDED)
    if not has_special_tokens:
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    tokenizer.save_pretrained(folder)
    tiny_model(vocab_size=len(tokenizer), max_position_embeddings=context).float().save_pretrained(folder)
    argv = [str(folder), *LOCAL, "--limit", "4", "--save", str(tmp_path / "logs")]
    assert re.search(reason, one_line(capsys, program.main, argv))
    assert not (tmp_path / "logs").exists()


def test_a_model_that_gives_no_numbers_is_refused_in_one_line(folders, tmp_path, capsys):
    shutil.copytree(folders["compressed"], tmp_path / "model")
    model = load_model(folders["compressed"])
    model.model.norm.weight.data.fill_(torch.nan)
    model.save_pretrained(tmp_path / "model")
    argv = [str(tmp_path / "model"), *LOCAL, "--limit", "1", "--save", str(tmp_path / "logs")]
    assert "NaN or infinite logits in torch." in one_line(capsys, program.main, argv)
    assert not list(tmp_path.glob("logs/*.json"))


@pytest.fixture
def compress(tiny, tmp_path):
    """Run main.py on the random model on little text; return its exit status."""
    (tmp_path / "text").mkdir()
    for split in ("train", "test"):
        (tmp_path / "text" / f"{split}.txt").write_text("\n\n".join(PASSAGES))
    model = ["--model", tiny, "--dataset", str(tmp_path / "text"), "--device", "cpu", "--sparsity_ratio", "40"]
    sampling = ["--nsamples", "4", "--seqlen", "64", "--bi_score", str(tmp_path / "scores")]
    output = ["--save", str(tmp_path / "logs"), "--save_model", str(tmp_path / "small")]
    return lambda *argv: main.main([*model, *sampling, *output, *argv])


def test_main_evaluates_what_it_compressed_at_every_ratio(compress, tmp_path):
    """Oracle: the same evaluation of each folder it saved, the tasks loaded anew."""
    flags = ("--eval_zero_shot", *LOCAL, "--dtype", "float32", "--eval_batch_size", "8", "--limit", "5")
    assert compress(*flags, "--sparsity_ratio", "40", "60") == 0
    for percent in (40, 60):
        record = json.loads((tmp_path / "logs" / f"tiny_flatllm_{percent}.json").read_text())
        assert record["zero_shot"] == results_of(str(tmp_path / f"small-{percent}"), BOTH, limit=5)
        assert record["request"]["eval_zero_shot"] is True


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (("--eval_zero_shot",), "task 'mmlu' cannot be set up (Couldn't reach 'cais/mmlu'"),
        (("--eval_zero_shot", "--dataset_root", "models"), "no copy of cais/mmlu in models/cais/mmlu)"),
        (("--tasks", "pydocs_text"), "give --eval_zero_shot too"),
    ],
)
def test_main_refuses_unusable_tasks_before_any_weight_is_read(compress, tmp_path, monkeypatch, capsys, argv, reason):
    monkeypatch.setattr("flatllmcore.checkpoint_run.CheckpointRun.compressed", None)
    assert reason in one_line(capsys, lambda flags: compress(*flags), argv)
    assert not (tmp_path / "small").exists()
