"""Zero-shot results: the released harness on small local tasks, by the embedded model, dense and compressed."""

import copy
import io
import json
import math
import shutil
import socket
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import lm_eval
import pytest
import torch
from flatllmbench.harness import PAPER_TASKS, bars_for_terminals, language_model_of, load_tasks
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tqdm import tqdm

import main
from conftest import tiny_model
from flatllmbench import zero_shot as program
from flatllmbench.records import describe_model
from flatllmbench.zero_shot import zero_shot
from flatllmcore import FlatLLMPruner, InputError
from flatllmcore.engine.memory import ModelInMemory
from flatllmcore.engine.perplexity import perplexity
from flatllmcore.utils.data_utils import consecutive_windows
from flatllmcore.utils.loading import load_model, load_tokenizer
from flatllmcore.utils.text_sources import TextDataset
from python_process import BLOCKED, run_python
from tasks.generate import questions
from tiny_text import word_tokenizer

ROOT = Path(__file__).resolve().parents[1]
EMBEDDED = str(ROOT / "models" / "pydocs-llama")
LOCAL_TASKS = ROOT / "tests" / "tasks"
QUESTIONS = [json.loads(line) for line in (LOCAL_TASKS / "pydocs.jsonl").read_text().splitlines()]
PASSAGES = [f"{question['beginning']} {question['endings'][question['label']]}" for question in QUESTIONS]
BOTH = ["pydocs_endings", "pydocs_text"]
CPU = torch.device("cpu")


@cache
def every_task() -> TaskManager:
    return TaskManager()


def task_manager(include_path: Path | None) -> TaskManager:
    """Return local tasks alone, where there are any: reading the harness's own 15,000 definitions takes seconds."""
    return TaskManager(include_path=include_path, include_defaults=False) if include_path else every_task()


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """At the repository's root, where the tasks' data are found; nobody may use the network."""

    def refuse(*_address: object) -> None:
        raise AssertionError("the network was used")

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.setattr("lm_eval.tasks.TaskManager", task_manager)
        yield


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(EMBEDDED)


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory) -> dict[str, str]:
    """The embedded model, and half of its decoder layers' weights, in a folder as main.py leaves it."""
    model = load_model(EMBEDDED)
    pruner = FlatLLMPruner(model, tokenizer, target_sparsity=0.5, cal_dataset=PASSAGES, cal_nsamples=4, seqlen=256)
    pruner.prune_model()
    folder = tmp_path_factory.mktemp("compressed") / "half"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text("---\nflat_llm:\n  base_model: pydocs-llama\n---\n")
    return {"dense": EMBEDDED, "compressed": str(folder)}


@pytest.fixture(params=["dense", "compressed"])
def folder(request, folders) -> str:
    return folders[request.param]


@pytest.fixture
def model(folder):
    return load_model(folder, dtype="float32")


@pytest.fixture(scope="module")
def tasks():
    return load_tasks(BOTH, include_path=LOCAL_TASKS)


def own_log_likelihood(model, tokenizer, context: str, ending: str) -> float:
    start, ids = len(tokenizer(context)["input_ids"]), tokenizer(f"{context} {ending}")["input_ids"]
    with torch.no_grad():
        log_probabilities = model(torch.tensor([ids[:-1]], device=model.device)).logits[0].double().log_softmax(-1)
    return sum(log_probabilities[place - 1, ids[place]].item() for place in range(start, len(ids)))


# Multiple choice


def test_accuracies_equal_those_counted_by_hand(model, tokenizer, tasks, device):
    """Oracle: the log-probabilities of each ending after the question, summed one text at a time."""
    model.to(device)
    hits = {"acc": 0, "acc_norm": 0}
    for question in QUESTIONS:
        endings = question["endings"]
        sums = [own_log_likelihood(model, tokenizer, question["beginning"], ending) for ending in endings]
        means = [total / len(ending) for total, ending in zip(sums, endings, strict=True)]
        hits["acc"] += sums.index(max(sums)) == question["label"]
        hits["acc_norm"] += means.index(max(means)) == question["label"]
    count = len(QUESTIONS)
    share = hits["acc_norm"] / count
    assert 0.5 < share < 1
    assert zero_shot(model, tokenizer, tasks, batch_size=7)["tasks"]["pydocs_endings"] == {
        "metric": "acc_norm",
        "value": share,
        "stderr": pytest.approx(math.sqrt(share * (1 - share) / (count - 1))),
        "metrics": {name: number / count for name, number in hits.items()},
        "samples": count,
        "num_fewshot": 0,
        "version": 1.0,
    }


def test_log_probabilities_are_not_rounded_to_the_type_of_the_weights(folder, tokenizer):
    """In bf16 a sum of twenty would be off by some hundredths."""
    model = load_model(folder)
    assert model.dtype == torch.bfloat16
    pairs = [(question["beginning"], ending) for question in QUESTIONS[:4] for ending in question["endings"]]
    requests = [SimpleNamespace(args=(context, f" {ending}")) for context, ending in pairs]
    found = [
        total for total, _greedy in language_model_of(model, tokenizer, 1).loglikelihood(requests, disable_tqdm=True)
    ]
    assert found == pytest.approx([own_log_likelihood(model, tokenizer, *pair) for pair in pairs], rel=1e-5)


def test_examples_and_results_are_those_of_the_plain_harness(folders, tokenizer):
    """Also a second time, though drawing the examples takes random numbers."""
    model = load_model(folders["compressed"])
    tasks = load_tasks(["pydocs_endings"], num_fewshot=2, include_path=LOCAL_TASKS)
    ours = [zero_shot(model, tokenizer, tasks, batch_size=16, limit=16)["tasks"]["pydocs_endings"] for _ in range(2)]
    plain = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16, softmax_dtype="float32"),
        tasks=["pydocs_endings"],
        num_fewshot=2,
        limit=16,
        task_manager=task_manager(LOCAL_TASKS),
    )
    row = plain["results"]["pydocs_endings"]
    assert ours[0] == ours[1]
    assert ours[0]["num_fewshot"] == 2
    assert ours[0]["metrics"] == {"acc": row["acc,none"], "acc_norm": row["acc_norm,none"]}
    assert ours[0]["stderr"] == row["acc_norm_stderr,none"]
    prompts = [sample["arguments"][0][0] for sample in plain["samples"]["pydocs_endings"]]
    assert prompts == [task.args[0] for task in tasks.tasks["pydocs_endings"].instances[::4]]
    assert {prompt.count("\n\n") for prompt in prompts} == {2}


def test_a_limit_takes_the_first_questions(folders, tokenizer, tasks):
    model = load_model(folders["dense"])
    found = zero_shot(model, tokenizer, tasks, batch_size=8, limit=5)
    assert found["limit"] == 5
    assert [result["samples"] for result in found["tasks"].values()] == [5, 5]
    assert [task.doc["beginning"] for task in tasks.tasks["pydocs_text"].instances] == [
        question["beginning"] for question in QUESTIONS[:5]
    ]


def test_model_and_tokenizer_are_left_as_they_were(tmp_path):
    """The harness gives a tokenizer without padding one."""
    tokenizer = word_tokenizer(bos_token="w1")
    model = tiny_model()
    weights = copy.deepcopy(model.state_dict())
    data = tmp_path / "words.jsonl"
    data.write_text(json.dumps({"text": "w2 w3 w4"}))
    write_task(tmp_path, "words", output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="text", **on(data))
    zero_shot(model, tokenizer, load_tasks(["words"], include_path=tmp_path), batch_size=1)
    assert tokenizer.pad_token is None
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


# Perplexity


def own_nll(model, ids: list[int]) -> float:
    """Return the negative log-likelihood of all but the first token, as flatllmcore.engine.perplexity has it."""
    if len(ids) < 2:
        return 0.0
    found = perplexity(ModelInMemory(model, CPU), torch.tensor([ids]), 1)
    return math.log(found.value) * found.predicted_tokens


def harness_nll(model, tokenizer, text: str, length: int) -> float:
    """Return what the harness sums of a document, by our own perplexities of the windows that its rule gives.

    Every token is predicted once: the first ``length`` from BOS and those before them, further ones in windows of
    ``length`` from the token before, and the rest from the ``length`` tokens that end with the last but one.
    """
    ids = [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]
    total, done = 0.0, 1
    while done < len(ids):
        end = min(done + length, len(ids))
        window = ids[max(end - length - 1, 0) : end]
        total += own_nll(model, window) - own_nll(model, window[: len(window) - (end - done)])
        done = end
    return total


@pytest.mark.parametrize("length", [512, 16])
def test_the_harness_and_our_perplexity_agree_on_the_same_windows(model, tokenizer, length):
    """By documents that fit the model, and by some cut into several windows."""
    model.config.max_position_embeddings = length
    tasks = load_tasks(["pydocs_text"], include_path=LOCAL_TASKS)
    found = zero_shot(model, tokenizer, tasks, batch_size=8, limit=12)["tasks"]["pydocs_text"]
    nll = sum(harness_nll(model, tokenizer, text, length) for text in PASSAGES[:12])
    text = "".join(PASSAGES[:12])
    assert (found["metric"], found["stderr"]) == ("word_perplexity", None)
    words = sum(len(passage.split()) for passage in PASSAGES[:12])
    assert found["value"] == pytest.approx(math.exp(nll / words), rel=1e-4)
    assert found["metrics"]["byte_perplexity"] == pytest.approx(math.exp(nll / len(text.encode())), rel=1e-4)


def test_the_harness_agrees_with_our_perplexity_on_our_windows(model, tokenizer):
    """The windows of our protocol as the harness takes them: a context of one token and a continuation of the rest."""
    windows = consecutive_windows(TextDataset("passages", "test", PASSAGES, "\n\n"), tokenizer, 128)
    ours = perplexity(ModelInMemory(model, CPU), windows, 4)
    requests = [(None, ids[:1], ids[1:]) for ids in windows.tolist()]
    sums = language_model_of(model, tokenizer, 4)._loglikelihood_tokens(requests, disable_tqdm=True)
    theirs = math.exp(-sum(total for total, _greedy in sums) / ours.predicted_tokens)
    assert theirs == pytest.approx(ours.value, rel=1e-4)


# Tasks


def on(data: Path) -> dict[str, object]:
    return {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}


def write_task(folder: Path, name: str, **fields: object) -> None:
    (folder / f"{name}.yaml").write_text(json.dumps({"task": name} | fields))  # JSON is YAML


def write_endings(folder: Path, name: str, questions: list[dict] = QUESTIONS[:8], **fields: object) -> None:
    data = folder / f"{name}.jsonl"
    data.write_text("\n".join(map(json.dumps, questions)))
    metrics = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
    definition = {
        "output_type": "multiple_choice",
        "doc_to_text": "beginning",
        "doc_to_choice": "endings",
        "doc_to_target": "label",
        "fewshot_split": "test",
        "metric_list": metrics,
    }
    write_task(folder, name, **definition | on(data) | fields)


def test_the_paper_s_tasks_are_run_by_its_protocol_unless_asked_otherwise(folders, tokenizer, tmp_path):
    """On local questions under the seven names."""
    expected = dict.fromkeys(PAPER_TASKS, (0, "acc_norm")) | {"winogrande": (0, "acc"), "mmlu": (5, "acc")}
    for name in PAPER_TASKS:
        write_endings(tmp_path, name)
    tasks = load_tasks(include_path=tmp_path)
    model = load_model(folders["dense"])
    found = zero_shot(model, tokenizer, tasks, batch_size=32)
    assert list(found["tasks"]) == [
        *("mmlu", "piqa", "winogrande", "hellaswag", "arc_easy", "arc_challenge", "openbookqa")
    ]
    assert {name: (row["num_fewshot"], row["metric"]) for name, row in found["tasks"].items()} == expected
    values = [row["metrics"][expected[name][1]] for name, row in found["tasks"].items()]
    assert found["mean_accuracy"] == pytest.approx(100 * sum(values) / 7)
    assert zero_shot(model, tokenizer, tasks, batch_size=32, limit=1)["mean_accuracy"] is None
    other_shots = load_tasks(num_fewshot=0, include_path=tmp_path)
    assert zero_shot(model, tokenizer, other_shots, batch_size=32)["mean_accuracy"] is None


def test_the_harness_defines_the_paper_s_tasks_with_the_metrics_reported():
    definitions = every_task().task_index
    for name, protocol in PAPER_TASKS.items():
        definition = definitions[name].cfg
        metrics = {entry["metric"] for entry in definition.get("metric_list") or definition["aggregate_metric_list"]}
        assert metrics - {"acc"} == ({"acc_norm"} if protocol.metric == "acc_norm" else set()), name


def test_a_group_with_a_score_is_reported_as_one_and_others_by_their_tasks(folders, tokenizer, tmp_path):
    """Oracle: the tasks' own results, weighted by their questions, as MMLU's."""
    write_endings(tmp_path, "few", QUESTIONS[:4], num_fewshot=1)
    write_endings(tmp_path, "many", QUESTIONS[4:16], tag="tagged")
    score = {"aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}
    (tmp_path / "scored.yaml").write_text(json.dumps({"group": "scored", "task": ["few", "many"]} | score))
    (tmp_path / "plain.yaml").write_text(json.dumps({"group": "plain", "task": ["few", "many"]}))
    model = load_model(folders["dense"])

    def results(name: str, **options: int) -> dict:
        return zero_shot(model, tokenizer, load_tasks([name], include_path=tmp_path, **options), batch_size=8)["tasks"]

    each, both = results("plain"), results("scored")
    assert {name: row["num_fewshot"] for name, row in each.items()} == {"few": 1, "many": 0}
    assert list(both) == ["scored"]
    pooled = (4 * each["few"]["metrics"]["acc"] + 12 * each["many"]["metrics"]["acc"]) / 16
    assert both["scored"]["value"] == pytest.approx(pooled)
    assert {key: both["scored"][key] for key in ("metric", "samples", "num_fewshot")} == {
        "metric": "acc",
        "samples": 16,
        "num_fewshot": None,
    }
    assert results("scored", num_fewshot=2)["scored"]["num_fewshot"] == 2
    assert results("tagged") == {"many": each["many"]}
    with pytest.raises(InputError, match="task 'many' is asked for twice, the second time as 'tagged'"):
        load_tasks(["scored", "tagged"], include_path=tmp_path)


def test_a_task_defined_without_examples_keeps_to_that(tmp_path):
    write_endings(tmp_path, "fixed", num_fewshot=0)
    write_endings(tmp_path, "free")
    loaded = load_tasks(["fixed", "free"], num_fewshot=3, include_path=tmp_path)
    assert {name: task.get_config("num_fewshot") for name, task in loaded.tasks.items()} == {"fixed": 0, "free": 3}


def test_more_examples_than_there_are_is_refused_before_a_model_is_asked(tmp_path):
    write_endings(tmp_path, "few")
    with pytest.raises(InputError, match=r"task 'few' cannot be set up \(ValueError: "):
        load_tasks(["few"], num_fewshot=20, include_path=tmp_path)


def test_definitions_that_shuffle_their_data_give_the_same_questions_every_time(tmp_path):
    shuffle = "docs.select(numpy.random.permutation(random.sample(range(len(docs)), len(docs))))"
    shuffle = f"import random\nimport numpy\n\ndef shuffled(docs):\n    return {shuffle}\n"
    (tmp_path / "shuffling.py").write_text(shuffle)
    write_endings(tmp_path, "shuffled")
    place = tmp_path / "shuffled.yaml"
    place.write_text(place.read_text()[:-1] + ', "process_docs": !function shuffling.shuffled}')
    orders = [
        [doc["beginning"] for doc in load_tasks(["shuffled"], include_path=tmp_path).tasks["shuffled"].eval_docs]
        for _ in range(2)
    ]
    assert orders[0] == orders[1]
    assert orders[0] != [question["beginning"] for question in QUESTIONS[:8]]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"doc_to_target": "{{nosuch.upper()}}"}, "task 'broken' cannot be set up (UndefinedError: 'nosuch'"),
        (on(Path("nosuch.jsonl")), "task 'broken' cannot be set up (FileNotFoundError: "),
        ({"output_type": "nonsense"}, "task 'broken' cannot be set up (ValueError: Got invalid output_type"),
        ({"unsafe_code": True}, "task 'broken' runs code that a model wrote"),
        ({"doc_to_image": "beginning"}, "task 'broken' needs pictures or sound"),
    ],
)
def test_a_definition_that_does_not_work_is_refused_by_name(tmp_path, fields, reason):
    write_endings(tmp_path, "broken", **fields)
    with pytest.raises(InputError) as refused:
        load_tasks(["broken"], include_path=tmp_path)
    assert reason in str(refused.value)


def test_data_that_are_not_at_hand_are_told_with_the_task():
    with pytest.raises(
        InputError, match=r"task 'piqa' cannot be set up \(ConnectionError: Couldn't reach 'baber/piqa'"
    ):
        load_tasks(["piqa"])


@pytest.mark.parametrize("package", ["lm_eval", "accelerate"])
def test_a_package_that_is_missing_is_told_with_what_installs_it(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"needs the package {package}; .* pip install '\.\[eval\]'"):
        load_tasks(BOTH, include_path=LOCAL_TASKS)


def test_the_shipped_questions_swap_two_words_of_the_wrong_endings():
    text = "\n\n".join([" ".join(f"w{i}" for i in range(30)), "too short"])
    for question in (*QUESTIONS, *questions([text], count=1)):
        right, wrong = question["endings"][question["label"]].split(), list(question["endings"])
        del wrong[question["label"]]
        assert len({*wrong, " ".join(right)}) == 4
        for ending in wrong:
            differing = [place for place, word in enumerate(ending.split()) if word != right[place]]
            assert sorted(ending.split()) == sorted(right)
            assert len(differing) == 2
            assert differing[1] == differing[0] + 1
    assert f"{question['beginning']} {' '.join(right)}" == text.split("\n\n")[0]


# Progress bars


@pytest.mark.parametrize("is_terminal", [True, False])
def test_bars_are_drawn_on_terminals_alone(is_terminal):
    stream = io.StringIO()
    stream.isatty = lambda: is_terminal
    before = vars(tqdm)["__init__"]
    with bars_for_terminals():
        for options in ({}, {"disable": False}, {"disable": True}):
            list(tqdm(range(2), file=stream, desc=str(options), **options))
    assert ("{}" in stream.getvalue(), "False" in stream.getvalue()) == (is_terminal, is_terminal)
    assert "True" not in stream.getvalue()
    assert vars(tqdm)["__init__"] is before


# What is recorded


def test_a_model_that_gives_nan_is_refused_and_left_as_it_was(folder, tokenizer, tasks):
    model = load_model(folder, dtype="float32")
    model.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(InputError, match="NaN or infinite logits in"):
        zero_shot(model, tokenizer, tasks, batch_size=8, limit=2)
    assert not model._forward_hooks


def test_every_filter_of_a_metric_is_kept():
    row = {"exact_match,strict": 0.25, "exact_match_stderr,strict": 0.125, "exact_match,flexible": 0.5}
    row |= {"exact_match_stderr,flexible": "N/A", "alias": "a task", "sample_len": 4}
    result = program._result("some_task", row)
    assert result["metrics"] == {"exact_match,strict": 0.25, "exact_match,flexible": 0.5}
    assert (result["metric"], result["value"], result["stderr"]) == ("exact_match,strict", 0.25, 0.125)


# The programs


LOCAL = ["--tasks", ",".join(BOTH), "--include_path", str(LOCAL_TASKS), "--device", "cpu"]


def test_the_program_writes_a_record_and_the_results_to_the_log(folders, tokenizer, tasks, tmp_path, capfd):
    folder = folders["compressed"]
    argv = [folder, *LOCAL, "--save", str(tmp_path), "--batch_size", "4", "--dtype", "float32"]
    assert program.main(argv) == 0
    name = "half_zero_shot_pydocs_endings+pydocs_text_float32"
    record = json.loads((tmp_path / f"{name}.json").read_text())
    assert record["kind"] == "zero_shot"
    assert record["command"] == " ".join(["python -m flatllmbench.zero_shot", *argv])
    assert record["request"]["tasks"] == BOTH
    assert record["model"] == describe_model(folder)
    assert record["model"]["base_model"] == "pydocs-llama"
    found = record["zero_shot"]
    assert found == zero_shot(load_model(folder, dtype="float32"), tokenizer, tasks, batch_size=4)
    assert (found["mean_accuracy"], found["limit"], found["batch_size"]) == (None, None, 4)
    assert found["harness"] == f"lm_eval {lm_eval.__version__}"
    assert {"versions", "hardware", "elapsed_s"} <= record.keys()
    printed = capfd.readouterr()
    assert printed.err == ""
    assert printed.out == (tmp_path / f"{name}.log").read_text()
    value = found["tasks"]["pydocs_endings"]["value"]
    assert f"pydocs_endings, 0-shot: acc_norm {value:.4f} on 48 samples" in printed.out


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (("--tasks", "nosuch"), "the harness has no task 'nosuch'"),
        (("--tasks", ""), "the harness has no task ''"),
        (("--tasks", "pydocs_text,pydocs_text"), "'pydocs_text' is asked for twice"),
        (("--limit", "0"), "--limit 0 is out of range; 1 or more"),
        (("--num_fewshot", "-1"), "--num_fewshot -1 is out of range; 0 or more"),
        (("--batch_size", "0"), "batch_size 0 is out of range; 1 or more"),
        (("--include_path", "nosuch"), "--include_path nosuch is no folder"),
        (("--device", "cuda:99"), "device 'cuda:99' is not usable"),
    ],
)
def test_unusable_arguments_are_one_line(tmp_path, capfd, argv, reason):
    assert program.main([EMBEDDED, *LOCAL, "--save", str(tmp_path), *argv]) == 2
    line = capfd.readouterr().err
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    assert reason in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("spoil", ["nothing", "config.json", "tokenizer.json", "model.safetensors"])
def test_a_folder_that_is_no_model_is_one_line(folders, tmp_path, capfd, spoil):
    if spoil != "nothing":
        shutil.copytree(folders["compressed"], tmp_path / "model")
        (tmp_path / "model" / spoil).unlink()
    assert program.main([str(tmp_path / "model"), *LOCAL, "--save", str(tmp_path / "logs")]) == 2
    assert capfd.readouterr().err.count("\n") == 1
    assert not (tmp_path / "logs").exists()


def compress(tmp_path: Path, *argv: str, is_kept: bool = True) -> int:
    """Run main.py on the embedded model on little text; a flag given twice counts as it stands last."""
    model = ["--model", EMBEDDED, "--dataset", str(tmp_path / "text"), "--device", "cpu"]
    sampling = ["--nsamples", "4", "--seqlen", "64", "--bi_score", str(tmp_path / "scores")]
    output = ["--save", str(tmp_path / "logs"), *(["--save_model", str(tmp_path / "small")] if is_kept else [])]
    return main.main([*model, *sampling, *output, "--sparsity_ratio", "40", *argv])


def compression_record(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "logs" / "pydocs-llama_flatllm_40.json").read_text())


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text").mkdir()
    for split in ("train", "test"):
        (tmp_path / "text" / f"{split}.txt").write_text("\n\n".join(PASSAGES))


def test_main_evaluates_what_it_compressed(text, tmp_path, tokenizer, tasks):
    """Oracle: the same evaluation of the folder it saved."""
    flags = ("--eval_zero_shot", *LOCAL, "--eval_batch_size", "5")
    assert compress(tmp_path, *flags) == 0
    record = compression_record(tmp_path)
    saved = zero_shot(load_model(str(tmp_path / "small")), tokenizer, tasks, batch_size=5)
    assert record["zero_shot"] == saved
    assert record["request"]["eval_zero_shot"] is True
    assert record["request"]["tasks"] == BOTH
    assert compress(tmp_path, *flags, is_kept=False) == 0
    assert compression_record(tmp_path)["zero_shot"] == record["zero_shot"]
    assert compress(tmp_path, "--overwrite") == 0
    assert "zero_shot" not in compression_record(tmp_path)


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (("--eval_zero_shot", "--tasks", "nosuch"), "the harness has no task 'nosuch'"),
        (("--eval_zero_shot",), "task 'mmlu' cannot be set up (ConnectionError: Couldn't reach 'cais/mmlu'"),
        (("--eval_zero_shot", "--eval_batch_size", "0"), "eval_batch_size 0"),
        (("--tasks", "pydocs_text"), "--tasks is about tasks of the evaluation harness; give --eval_zero_shot too"),
        (("--num_fewshot", "0"), "give --eval_zero_shot too"),
    ],
)
def test_main_refuses_unusable_tasks_before_any_weight_is_read(text, tmp_path, monkeypatch, capfd, argv, reason):
    monkeypatch.setattr("flatllmbench.setup.load_model", None)
    assert compress(tmp_path, *argv) == 2
    line = capfd.readouterr().err
    assert line.count("\n") == 1
    assert reason in line
    assert not (tmp_path / "small").exists()


def too_small(device: torch.device, sizes: list[int], remedy: str) -> None:
    raise InputError(f"the whole model needs {sum(sizes)} bytes")


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_a_model_that_does_not_fit_is_refused_before_it_is_read(folders, monkeypatch, tmp_path, capfd, dtype):
    monkeypatch.setattr(program, "check_whole_models_fit", too_small)
    monkeypatch.setattr(program, "load_model", None)
    assert program.main([folders["compressed"], *LOCAL, "--save", str(tmp_path), "--dtype", dtype]) == 2
    size = sum(parameter.nbytes for parameter in load_model(folders["compressed"], dtype=dtype).parameters())
    assert f"needs {size} bytes" in capfd.readouterr().err


def test_main_refuses_to_evaluate_a_model_that_will_not_fit_before_the_work(text, tmp_path, monkeypatch, capfd):
    """Oracle: the size of the model that the same command without the evaluation makes."""
    with monkeypatch.context() as patch:
        patch.setattr(main, "check_whole_models_fit", too_small)
        patch.setattr("flatllmbench.setup.load_model", None)
        assert compress(tmp_path, "--eval_zero_shot", *LOCAL) == 2
    needed = int(capfd.readouterr().err.split("needs ")[1].split()[0])
    assert compress(tmp_path) == 0
    size = sum(parameter.nbytes for parameter in load_model(str(tmp_path / "small")).parameters())
    assert needed == pytest.approx(size, rel=0.01)


def test_an_interrupted_evaluation_leaves_the_model_and_its_record(text, tmp_path, monkeypatch, capfd):
    def interrupt(*_args: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "zero_shot", interrupt)
    assert compress(tmp_path, "--eval_zero_shot", *LOCAL) == 2
    line = capfd.readouterr().err
    assert line.startswith("error: interrupted in the evaluation; the record of the compression is in ")
    assert line.endswith("is evaluated by: python -m flatllmbench.zero_shot FOLDER\n")
    after = compression_record(tmp_path)["parameters_after"]
    assert after["total"] == describe_model(tmp_path / "small")["parameters"]["total"]
    assert program.main([EMBEDDED, *LOCAL, "--save", str(tmp_path / "other")]) == 2
    assert capfd.readouterr().err == "error: interrupted; run it again\n"
    assert not (tmp_path / "other").exists()


def test_a_place_that_cannot_be_written_to_is_one_line(tmp_path, capfd):
    (tmp_path / "file").touch()
    assert program.main([EMBEDDED, *LOCAL, "--limit", "1", "--save", str(tmp_path / "file")]) == 2
    line = capfd.readouterr().err
    assert line.count("\n") == 1
    assert str(tmp_path / "file") in line


def test_the_plain_harness_gives_the_same_figures_without_this_package(folders, tokenizer, tasks, tmp_path):
    """The folder's own modelling files, by the harness's command line where flatllmcore cannot be imported."""
    folder = folders["compressed"]
    arguments = ["run", "--model", "hf", "--device", "cpu", "--batch_size", "8", "--output_path", str(tmp_path / "out")]
    arguments += ["--model_args", f"pretrained={folder},trust_remote_code=True,softmax_dtype=float32"]
    arguments += ["--tasks", ",".join(BOTH), "--include_path", str(LOCAL_TASKS)]
    run_python(
        f"{BLOCKED}from lm_eval.__main__ import cli_evaluate\nsys.argv[1:] = {arguments}\ncli_evaluate()\n",
        paths=[],
        HF_HUB_OFFLINE="1",
        HF_DATASETS_CACHE=str(tmp_path / "datasets"),
        HF_MODULES_CACHE=str(tmp_path / "modules"),
        OMP_NUM_THREADS=str(torch.get_num_threads()),
    )
    (place,) = (tmp_path / "out").rglob("results_*.json")
    plain = json.loads(place.read_text())
    assert plain["config"]["model_num_parameters"] == describe_model(folder)["parameters"]["total"]
    ours = zero_shot(load_model(folder), tokenizer, tasks, batch_size=8)["tasks"]
    for name in BOTH:
        for metric, value in ours[name]["metrics"].items():
            assert plain["results"][name][f"{metric},none"] == pytest.approx(value, rel=1e-6), (name, metric)
