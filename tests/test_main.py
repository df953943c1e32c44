"""The program ``main.py``, called as from the command line, on tiny random models and a small local text."""

import errno
import math
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from itertools import chain, repeat
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import compute_rank
import main
from checkpoints import edit, read, room, shards, stop_at, weights_in
from conftest import tiny_model
from flatllmcore.errors import door
from flatllmcore.methods import METHODS
from flatllmcore.methods.flatllm import FlatLLMStep
from flatllmcore.methods.flatllm_plus import OutputStep
from flatllmcore.utils.checkpoint import locked
from flatllmcore.utils.dimensions import Kept, ModelDimensions
from flatllmcore.utils.files import file_digest
from python_process import redirect, run_forked
from tiny_text import word_tokenizer, write_texts

SEQLEN = 32
SHORT = ("--nsamples", "6", "--seqlen", str(SEQLEN), "--device", "cpu")
SCORES = "ranks/llama/importance.json"
RANKS = "ranks/llama/ranks_30.json"
MODEL = "out/llama-30"
SIZES = ModelDimensions("llama", 3, 32, 4, 2, 12, 56)
RECORD = "logs/llama_flatllm_30.json"
SEVERAL = ("--sparsity_ratio", "20", "30", "--save_model", "new")


def run(*argv: str, model: str = "llama") -> int:
    """Call the program in the current folder; a flag given twice counts as it stands last."""
    return main.main(["--model", model, "--dataset", "text", "--sparsity_ratio", "30", *SHORT, *argv])


def add_to(name: str, amount: float, rows: slice = slice(None)) -> None:
    tensors = load_file("llama/model.safetensors")
    tensors[name][rows] += amount
    save_file(tensors, "llama/model.safetensors", {"format": "pt"})


def layer_ranks(record: dict) -> list[tuple]:
    return [(layer["value_rank"], layer["mlp_width"]) for layer in record["layers"]]


def files(folder: Path) -> dict[str, bytes]:
    """Every file's content but the logs', which only grow."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".log")
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with two models, a text, and all that one command left: scores, ranks, record, compressed model."""
    folder = tmp_path_factory.mktemp("finished")
    write_texts(folder / "text")
    for family, dtype, fields in (("llama", torch.float32, {}), ("mistral", torch.bfloat16, {"sliding_window": 16})):
        model = tiny_model(family, num_hidden_layers=3, max_position_embeddings=128, **fields)
        model.to(dtype).save_pretrained(folder / family)
        word_tokenizer().save_pretrained(folder / family)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run("--save_model", MODEL) == 0
    return folder


@pytest.fixture
def here(finished, tmp_path, monkeypatch) -> Path:
    """A copy of the finished folder to work in, where nobody may use the network."""
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network was used"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = tmp_path / "here"
    shutil.copytree(finished, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def refused(here, capfd) -> Callable[..., str]:
    """Run, check status 2, one line of error and that no file has changed; return the line."""

    def run_refused(*argv: str, **options: str) -> str:
        before = files(here)
        log = (here / "logs/llama_flatllm_30.log").read_text()
        capfd.readouterr()
        assert run(*argv, **options) == 2
        line = capfd.readouterr().err
        assert line.startswith("error: ")
        assert line.count("\n") == 1
        assert "  " not in line
        assert files(here) == before
        assert (here / "logs/llama_flatllm_30.log").read_text().startswith(log)
        return line

    return run_refused


# What comes out


def test_scores_hold_all_it_takes_to_compute_them_again(here):
    assert run("--prune_method", "bi", "--bi_score", "new") == 0
    scores, record = read("new/importance.json"), read("logs/llama_bi.json")
    made_of = {"model_id": "llama", "dataset": "text", "nsamples": 6, "seqlen": SEQLEN, "seed": 42, "method": "angular"}
    assert made_of.items() <= scores.items()
    assert scores["dimensions"]["num_layers"] == len(scores["scores"]) == 3
    assert all(0 < score < 0.5 for score in scores["scores"])
    assert scores["versions"]["torch"] == torch.__version__
    assert (record["kind"], record["scores"]) == ("bi", scores["scores"])
    assert {"data", "read", "forward", "angles", "rest"} <= record["stages_s"].keys()


def test_the_record_says_what_was_asked_done_and_spent(finished):
    record = read(finished / RECORD)
    assert (record["kind"], record["method"]) == ("flatllm", "flatllm")
    assert (record["request"]["sparsity_ratio"], record["request"]["save_model"]) == ([30], MODEL)
    assert record["command"].startswith("python main.py --model llama --dataset text")
    assert record["versions"]["torch"] == torch.__version__
    assert "CPU" in record["hardware"]["device"]
    assert record["peak_memory_gib"]["host"] > 0
    assert record["importance_sha256"] == file_digest(finished / SCORES)
    assert [layer["layer"] for layer in record["layers"]] == [0, 1, 2]
    stages = record["stages_s"]
    found = {"data", "read", "forward", "angles", "moments", "reduce", "solves", "perplexity", "write", "rest"}
    assert stages.keys() == found
    assert sum(stages.values()) == pytest.approx(record["elapsed_s"], abs=0.01)
    assert sum(layer["elapsed_s"] for layer in record["layers"]) <= record["elapsed_s"]


def test_reported_sizes_equal_the_reloaded_model(finished):
    record = read(finished / RECORD)
    for folder, reported in (("llama", "parameters_before"), (MODEL, "parameters_after")):
        model = AutoModelForCausalLM.from_pretrained(finished / folder)
        linear = [p.numel() for name, p in model.named_parameters() if ".layers." in name and "_proj.weight" in name]
        total = sum(parameter.numel() for parameter in model.parameters())
        assert record[reported] == {"decoder_linear": sum(linear), "total": total}
    inputs = [part.in_features for name, part in model.named_modules() if name.endswith("_proj")]
    assert record["input_divisor"] == math.gcd(*inputs)
    before, after = (record[name]["decoder_linear"] for name in ("parameters_before", "parameters_after"))
    assert record["achieved_sparsity_percent"] == pytest.approx(100 * (1 - after / before))
    assert record["achieved_sparsity_percent"] == pytest.approx(30, abs=4)  # floors of 12 directions and 56 channels


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_reported_perplexities_equal_the_loss_of_the_saved_models(here, family):
    """Oracle: the causal language model's own loss on windows cut by hand."""
    out = f"out/{family}-30"
    if family == "mistral":
        assert run("--save_model", out, model=family) == 0
    (record,) = read(f"logs/{family}_flatllm_30.json")["perplexity"]
    ids = AutoTokenizer.from_pretrained(family)(Path("text/test.txt").read_text())["input_ids"]
    windows = torch.tensor(ids[: len(ids) // SEQLEN * SEQLEN]).view(-1, SEQLEN)
    assert record["windows"] == len(windows)
    for folder, value in ((family, record["dense"]), (out, record["compressed"])):
        model = AutoModelForCausalLM.from_pretrained(folder)
        losses = [model(window[None], labels=window[None]).loss.item() for window in windows]
        tolerance = 1e-4 if model.dtype == torch.float32 else 1e-2
        assert value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=tolerance)
    assert record["compressed"] != record["dense"]


def test_the_log_goes_to_the_console_and_to_the_end_of_a_file(here, capsys):
    Path("logs").rename("elsewhere")
    earlier = Path("elsewhere/llama_flatllm_30.log").read_text()
    assert run("--save", "elsewhere") == 0
    log, record = Path("elsewhere/llama_flatllm_30.log").read_text(), read("elsewhere/llama_flatllm_30.json")
    assert log == earlier + capsys.readouterr().out
    assert not Path("logs").exists()
    assert all(f"rank {layer['value_rank']}/12" in log for layer in record["layers"])
    assert f"{record['parameters_before']['decoder_linear']} decoder-layer weights" in log
    assert f"remove {record['achieved_sparsity_percent']:.3f} %" in log


# Where ranks come from


def test_ranks_are_the_same_however_they_are_given(here):
    """Scored on the way, from scores, from ranks of either program, or from the authors' scores, by folder or name."""
    expected = layer_ranks(read(RECORD))
    assert run("--prune_method", "bi", "--bi_score", "scores") == 0
    assert compute_rank.main(["--bi_score", "scores", "--sparsity_ratio", "30", "--no-plot"]) == 0
    Path("theirs").mkdir()
    torch.save(read(SCORES)["scores"], "theirs/bi_score.pt")
    shutil.copy(SCORES, "mine.json")
    ours = ("ranks/llama", SCORES, RANKS, "scores", "scores/ranks_30.json", "mine.json")
    for place in (*ours, "theirs", "theirs/bi_score.pt"):
        assert run("--bi_score", place) == 0
        assert layer_ranks(read(RECORD)) == expected, place
    assert len(set(expected)) > 1


@pytest.mark.parametrize("method", ["bi", "flatllm"])
def test_scores_are_saved_to_the_file_that_is_named(here, method):
    assert run("--bi_score", "new/mine.json", "--prune_method", method) == 0
    assert read("new/mine.json") == read(SCORES)
    assert os.listdir("new") == ["mine.json"]


def test_scores_that_are_there_are_used_and_not_written_again(here):
    """Oracle: scores made up to prefer another layer than the model's own do."""
    Path(RANKS).unlink()
    edit(SCORES, scores=read(SCORES)["scores"][::-1])
    scores = read(SCORES)
    expected = layer_ranks(read(RECORD))
    assert run() == 0
    assert layer_ranks(read(RECORD)) != expected
    assert read(SCORES) == scores
    assert "scores by angular on 6 x 32 tokens of text\n" in Path("logs/llama_flatllm_30.log").read_text()


def test_a_rank_multiple_other_than_that_of_the_ranks_found_is_refused(here, refused):
    assert "go with --rank_multiple 1, not 4" in refused("--rank_multiple", "4")
    assert "do not go with --width_multiple 5" in refused("--width_multiple", "5")
    multiples = ("--rank_multiple", "3", "--width_multiple", "4")
    assert run(*multiples, "--bi_score", SCORES) == 0
    assert all(rank % 3 == 0 and width % 4 == 0 for rank, width in layer_ranks(read(RECORD)))


# What the flags do


@pytest.mark.parametrize("method", METHODS)
def test_the_stock_shape_is_resumed_to_the_same_bytes_of_a_dense_model_without_scores(here, caplog, method):
    """From memory in one go, and from disk in two; the ranks and scores that lie there are not of this shape."""
    stock = ("--shape", "stock", "--width_multiple", "8", "--prune_method", method)
    scores, step = files(here / "ranks"), type(METHODS[method].steps(SIZES, Kept(0.7, 12, 24))[-1])
    assert run(*stock, "--save_model", "straight") == 0
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, step, 1 if method == "flatllm" else 3)
        assert run(*stock, "--save_model", "resumed", "--out_of_core") == 2
    assert run(*stock, "--save_model", "resumed", "--out_of_core") == 0
    assert "1 of 3 layers are finished" in caplog.text
    assert shards("resumed") == shards("straight")
    assert files(here / "ranks") == scores
    assert not list(Path("resumed").glob("*.py"))
    record = read(f"logs/llama_{method}_stock_30.json")
    assert (record["shape"], record["sparsity_ratio"]) == ("stock", 30)
    model = AutoModelForCausalLM.from_pretrained("resumed")
    assert type(model) is LlamaForCausalLM
    assert {layer_ranks(record)[0]} == set(layer_ranks(record)) == {(12, model.config.intermediate_size)}
    assert sum(p.numel() for p in model.parameters()) == record["parameters_after"]["total"]


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(here):
    """With ``--overwrite`` the other model takes the place of the first, and its scores those that are there."""
    old_scores, expected = Path(SCORES).read_bytes(), shards(MODEL)
    assert run("--save_model", "same") == 0
    assert shards("same") == expected
    assert run("--prune_method", "bi", "--seed", "43", "--overwrite") == 0
    assert Path(SCORES).read_bytes() != old_scores
    assert run("--bi_score", SCORES, "--save_model", MODEL, "--seed", "43", "--overwrite") == 0
    assert shards(MODEL) != expected


def test_tol_changes_what_is_monitored_and_nothing_else(here):
    before = [layer["rank_at_tolerance"] for layer in read(RECORD)["layers"]]
    assert run("--save_model", "same", "--tol", "0.5") == 0
    after = [layer["rank_at_tolerance"] for layer in read(RECORD)["layers"]]
    assert all(fewer < more for fewer, more in zip(after, before, strict=True))
    assert shards("same") == shards(MODEL)


def test_weights_are_in_the_checkpoints_dtype_or_the_one_asked_for(here):
    assert run("--save_model", "typed", "--dtype", "float16") == 0
    for folder, dtype in ((MODEL, "float32"), ("typed", "float16")):
        assert {tensor.dtype for tensor in weights_in(folder).values()} == {getattr(torch, dtype)}
        assert read(f"{folder}/config.json")["dtype"] == dtype


@pytest.mark.parametrize(("flags", "seqlen"), [(("--seqlen", "20"), 20), ((), 128)], ids=["asked", "the model's"])
def test_windows_are_as_many_and_as_long_as_asked(here, flags, seqlen):
    """Without a length they are as long as the model takes; perplexity can be measured on other texts."""
    shutil.copy("text/train.txt", "other.txt")
    argv = ["--model", "llama", "--dataset", "text", "--eval_dataset", "other.txt", "text", "--nsamples=3"]
    assert main.main([*argv, "--device", "cpu", "--sparsity_ratio", "30", "--bi_score", "new", *flags]) == 0
    record, scores = read(RECORD), read("new/importance.json")
    for found in (record, scores):
        assert (found["nsamples"], found["seqlen"]) == (3, seqlen)
    texts = {"other.txt": Path("other.txt"), "text": Path("text/test.txt")}
    windows = {name: len(path.read_text().split()) // seqlen for name, path in texts.items()}
    assert {of["dataset"]: of["windows"] for of in record["perplexity"]} == windows


# Bad input: the command line


@pytest.mark.parametrize(("name", "is_said"), [("text/train.txt", True), ("text", False)])
def test_perplexity_of_text_calibrated_on_is_called_that(here, capsys, name, is_said):
    assert run("--dataset", name, "--eval_dataset", *dict.fromkeys(("text", name))) == 0
    assert (f"{name} keeps no test split apart" in capsys.readouterr().out) == is_said


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        ("--sparsity_ratio 0", "--sparsity_ratio is 0; accepted: an integer, 1 to 95"),
        ("--sparsity_ratio 95", "the largest possible target is 74 %; more with Q and K pruned: --prune_qk"),
        ("--save_model ~nobody9/x", "--save_model is PosixPath('~nobody9/x'); accepted: a path in UTF-8, with ~ for"),
        ("--model llama\udcff", r"--model is 'llama\udcff'; accepted: a name or path in UTF-8"),
        ("--shape stock --prune_method bi --prune_qk --bi_score x", "leave out --prune_method bi, --prune_qk, --bi"),
        ("--shape stock --width_multiple 8 --sparsity_ratio 20 60", "largest possible target is 48 %; the stock shape"),
        ("--seqlen 129", "this model takes 2 to 128 tokens"),
        ("--nsamples 9999", "asked 9999 windows of 32 tokens, text 'text' (train) gives at most"),
        ("--device cuda:99", "device 'cuda:99'"),
        ("--dataset nosuch", "no dataset, file or folder called 'nosuch'; known datasets: pydocs, wikitext2"),
        ("--dataset wikitext2", "without a network give a folder with a copy as dataset_root"),
        ("--eval_dataset short.txt", "has 2 tokens, fewer than one window of 32"),
        ("--save_model out/llama --sparsity_ratio 20 30", "cannot save to out/llama-30: it is not empty"),
        ("--dataset text+short.txt", "short.txt has no test split to measure perplexity on; name an --eval_dataset"),
        ("--dataset text+text --nsamples 1", "asked 1 windows of 2 texts; give more windows, or fewer texts"),
        ("--prune_method bi --bi_score logs/llama_bi.json", "llama_bi.json is where the record goes"),
        ("--prune_method bi --bi_score llama/config.json --overwrite", "no scores to overwrite (llama/config.json"),
        ("--save_model text --overwrite", "no run wrote text/"),
        ("--save_model / --overwrite", "--save_model / overlaps with --save logs"),
        ("--save_model new --save new/logs", "overlaps with --save new/logs"),
        ("--save_model new --bi_score new.partial", "overlaps with --bi_score new.partial"),
        ("--save_model new --offload_folder new", "overlaps with --offload_folder new"),
        ("--save_model llama/small", "overlaps with --model"),
        ("--save_model text/train.txt/new", "cannot write to "),
        ("--offload_folder text/train.txt", "cannot write to text/train.txt: Not a directory"),
        (f"--prune_method bi --bi_score {SCORES}", f"{SCORES} exists; give --overwrite"),
        (f"--prune_method bi --bi_score {RANKS} --overwrite", f"{RANKS} is a file; scores are written to a folder"),
        ("--bi_score ranks/llama/ranks_40.json", "ranks_40.json does not exist"),
        ("--bi_score bi_score.pt", "bi_score.pt: 'scores' has 2 entries; the model has 3 layers"),
        ("--save held", "cannot write held/llama_flatllm_30.json: it is a folder"),
        ("--save held --sparsity_ratio 40", "cannot write held/llama_flatllm_40.log: it is a folder"),
        ("--bi_score pipe.json", "cannot write pipe.json: it is a pipe"),
        ("--save theirs", "theirs/llama_flatllm_30.json is no record; move it"),
        ("--bi_score held", "cannot write held/importance.json: it is a folder"),
        (f"--model {MODEL}", "compressed already"),
    ],
)
def test_unusable_arguments_are_refused(here, refused, argv, reason):
    Path("short.txt").write_text("too short")
    for name in ("llama_flatllm_30.json", "llama_flatllm_40.log", "importance.json"):
        Path("held", name).mkdir(parents=True)
    torch.save([0.1, 0.2], "bi_score.pt")
    os.mkfifo("pipe.json")
    Path("theirs").mkdir()
    Path("theirs/llama_flatllm_30.json").write_text('{"mine": 1}')
    assert reason in refused(*argv.split())


# Bad input: files


def not_a_number(folder: Path, name: str = "model.layers.1.mlp.up_proj.weight") -> None:
    tensors = load_file(folder / "model.safetensors")
    flat = tensors[name].flatten()
    flat[0] = math.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ({"model_type": "gpt2"}, "model family 'gpt2' is not supported; supported: llama, mistral"),
        ({"model_type": "nonsense"}, "nonsense"),
        ({"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Config"}}, "contains custom code"),
        ({"model_type": "qwen2", "num_attention_heads": 0, "head_dim": None}, "num_heads is 0; accepted: 1 to"),
        ({"per_layer_config": {"0": {"intermediate_size": 24}}}, "the layers of this llama differ (per_layer_config)"),
        ({"hidden_act": "nosuch"}, "config of 'llama' is unusable (KeyError: 'nosuch'); mend its config.json"),
        ({"num_key_value_heads": 3}, "RuntimeError: The size of tensor"),  # of 4 heads
        ({"vocab_size": -4}, "the model knows 0 to -5"),
        (lambda folder: (folder / "config.json").write_text("null"), "no usable model config at 'llama'"),
        (lambda folder: os.truncate(folder / "model.safetensors", 9999), "checkpoint 'llama' is missing or damaged"),
        (not_a_number, "layer 1 gives NaN or infinite activations; a wider dtype"),
        (lambda folder: not_a_number(folder, "lm_head.weight"), "the dense model's perplexity is nan"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "no usable tokenizer at 'llama'"),
    ],
)
def test_a_damaged_or_unsupported_model_is_refused(here, refused, monkeypatch, damage, reason):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("code of the model's folder was offered to be run"))
    torch.save(read(SCORES)["scores"], "bi_score.pt")  # which is any model's of three layers
    damage(here / "llama") if callable(damage) else edit("llama/config.json", **damage)
    assert reason in refused("--save_model", "new", "--bi_score", "bi_score.pt")


@pytest.mark.parametrize("flags", [("--sparsity_ratio", "95"), ("--seqlen", "64", "--nsamples", "100000")], ids=str)
def test_a_request_that_cannot_be_met_is_refused_before_weights_are_looked_for(here, refused, flags):
    """Those of a hub id would be downloaded first."""
    Path("llama/model.safetensors").unlink()
    assert "weights" not in refused(*flags, "--save_model", "new")
    assert "checkpoint 'llama' is missing" in refused("--save_model", "new")


OTHERS = "weights and config and tokenizer"
CHANGES = [  # of the model, and what is said to be another: what sizes, signs and the first rows do not show
    (lambda: add_to("model.layers.2.mlp.down_proj.weight", 1e-3, slice(17, None)), "weights"),
    (lambda: edit("llama/config.json", rope_parameters={"rope_type": "default", "rope_theta": 500.0}), "config"),
    (lambda: Path("llama/chat_template.jinja").write_text("{{ messages }}"), "tokenizer"),
]


@pytest.mark.parametrize("place", ["ranks/llama", SCORES, RANKS])
def test_scores_and_ranks_of_other_models_are_refused(here, refused, place):
    assert "architecture llama, not mistral" in refused("--bi_score", place, model="mistral")
    for (change, _), named in zip(CHANGES, ("weights", "weights and config", OTHERS), strict=True):
        change()
        assert f"belong to other {named}" in refused("--bi_score", place)
    Path(SCORES).unlink()
    assert f"ranks_30.json: the ranks belong to other {OTHERS}" in refused("--bi_score", RANKS)


def test_ranks_and_scores_by_another_importance_method_are_refused(here, refused):
    """Angles come with curves of damage too, and gradients alone."""
    assert "go by angular, not gradient; give another --bi_score" in refused("--importance_method", "gradient")
    Path(RANKS).unlink()
    reason = "importance.json: the scores are by angular, and here it is gradient; give another --bi_score"
    assert reason in refused("--importance_method", "gradient")
    assert "score elsewhere by damage" in refused("--importance_method", "damage")


def test_gradients_weigh_errors_where_they_are_asked_for(here, refused):
    weighed = ("--prune_method", "flatllm+", "--bi_score", "plus", "--gradient_nsamples", "3")
    for folder, flags in (("plain", weighed[:4]), ("memory", weighed), ("disk", (*weighed, "--out_of_core"))):
        assert run(*flags, "--save_model", folder) == 0
    assert shards("memory") == shards("disk") != shards("plain")
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, OutputStep, 3)
        assert run(*weighed, "--save_model", "resumed") == 2
    assert run(*weighed, "--save_model", "resumed") == 0
    assert shards("resumed") == shards("memory")
    assert "flatllm weighs no errors by gradients" in refused("--gradient_nsamples", "3")


def test_of_two_runs_that_score_into_one_place_the_second_is_refused(here, refused, monkeypatch):
    """While the first is at work, and where it has ended between the second's look and its turn."""
    assert "called 'nosuch'" in refused("--prune_method", "bi", "--bi_score", "new", "--dataset", "nosuch")
    assert not Path("new").exists()
    with locked(Path("new", "importance.json.new")):
        for flags in (("--prune_method", "bi"), ()):
            assert "another run is writing new/importance.json.new" in refused(*flags, "--bi_score", "new")
    monkeypatch.setattr(main, "check_request", lambda _: None)
    assert f"another run has just written {SCORES}" in refused("--prune_method", "bi")
    assert run("--prune_method", "bi", "--overwrite") == 0


@pytest.mark.parametrize("flags", [(), ("--out_of_core",)], ids=["memory", "disk"])
def test_a_quantization_config_over_plain_weights_is_left_out(here, flags):
    edit("llama/config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    assert run("--save_model", "plain", *flags) == 0
    assert shards("plain") == shards(MODEL)
    assert Path("plain/config.json").read_bytes() == Path(MODEL, "config.json").read_bytes()
    log = Path("logs/llama_flatllm_30.log").read_text()
    assert "llama is not quantised, though its config.json says so (gptq)" in log


# Full disk and interruption


DISK = [errno.EIO, errno.ESTALE, errno.EPERM, errno.EFBIG, errno.ENODEV, errno.ENOTCONN, errno.ETIMEDOUT, errno.ENOSPC]


@pytest.mark.parametrize(
    ("number", "argv"),
    [*((number, "--bi_score new") for number in DISK), (errno.ENOSPC, "--save_model out/new"), (errno.ENOSPC, "")],
)
def test_a_disk_that_fails_or_is_full_is_one_clear_line(refused, monkeypatch, number, argv):
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(number, os.strerror(number))))
    line = refused(*argv.split())
    assert f"{os.strerror(number)}: " in line
    assert (argv.split() or [".partial"])[-1] in line


def test_a_mistake_of_ours_with_a_file_keeps_its_traceback(here, monkeypatch):
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(errno.EBADF, os.strerror(errno.EBADF))))
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        run("--bi_score", "new")


def test_the_home_folder_may_be_called_by_its_sign(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    places = ("--dataset=~/text", "--save_model=~/out/new", "--bi_score=~/new", "--save=~/records")
    assert run(*places, model="~/llama") == 0
    assert Path("new/importance.json").is_file()
    assert Path("records/llama_flatllm_30.json").is_file()
    assert shards("out/new") == shards(MODEL)
    assert not Path("~").exists()


def test_a_disk_that_fills_up_leaves_what_to_go_on_from(here, capfd, monkeypatch):
    """Room for the manifest, two layers and what is said of them; the finished shards then count as there."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", Mock(side_effect=chain(repeat(None, 6), repeat(full))))
        assert run("--save_model", "out/new") == 2
    line = capfd.readouterr().err
    assert line.startswith("error: No space left on device: ")
    assert "/out/new.partial; mend that and run: python main.py" in line
    partial = sum(path.stat().st_size for path in Path("out/new.partial").glob("*.safetensors"))
    missing = sum(weight.nbytes for weight in weights_in(MODEL).values()) - partial
    room(monkeypatch, 1.1 * missing)
    assert run("--save_model", "out/new") == 0
    assert "2 of 3 layers are finished" in Path("logs/llama_flatllm_30.log").read_text()
    assert shards("out/new") == shards(MODEL)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
def test_a_log_on_a_full_disk_is_one_clear_line(here, refused):
    Path("full").mkdir()
    Path("full/llama_flatllm_30.log").symlink_to("/dev/full")
    assert "No space left on device: full" in refused("--save", "full")


def test_the_command_of_a_run_on_several_machines_starts_it_on_each(monkeypatch):
    for variable in ["WORLD_SIZE=8", "LOCAL_WORLD_SIZE=4", "MASTER_ADDR=10.0.0.1", "MASTER_PORT=29501"]:
        monkeypatch.setenv(*variable.split("="))
    start = "torchrun --nproc_per_node 4 --nnodes 2 --node_rank N --master_addr 10.0.0.1 --master_port 29501"
    assert main.command_line(["--model", "a b"]) == f"{start} main.py --model 'a b'"


@pytest.fixture
def interrupted(monkeypatch) -> Callable[..., None]:
    """Run until a layer, counted over all ratios, and interrupt it there."""

    def run_interrupted(*argv: str, at: int = 2) -> None:
        with monkeypatch.context() as patch:
            stop_at(patch, FlatLLMStep, at - 1)
            assert run(*argv) == 2

    return run_interrupted


@pytest.mark.parametrize(("change", "named"), CHANGES)
def test_an_interrupted_run_does_not_go_on_with_another_model(here, refused, interrupted, change, named):
    torch.save(read(SCORES)["scores"], "bi_score.pt")
    argv = ("--bi_score", "bi_score.pt", "--save_model", "out/new")
    interrupted(*argv)
    change()
    assert re.search(rf"another request \({named} \w{{16}}, not \w{{16}}\)", refused(*argv, "--overwrite"))


def test_an_interrupted_run_says_how_to_go_on_and_its_command_then_succeeds(here, capfd, interrupted):
    argv = ("--bi_score", "new", "--save_model", "out/new")
    interrupted(*argv)
    line = capfd.readouterr().err
    assert line.startswith("error: interrupted; scores and ranks finished so far stay in new, finished layers in /")
    assert "/out/new.partial; go on with: python main.py" in line
    assert line.endswith("--bi_score new --save_model out/new\n")
    assert line.count("\n") == 1
    assert set(os.listdir("new")) == {"importance.json", "ranks_30.json"}
    assert set(os.listdir("out")) == {"llama-30", "new.partial"}
    scores = Path("new/importance.json").read_bytes()
    assert run(*argv) == 0
    assert Path("new/importance.json").read_bytes() == scores
    assert shards("out/new") == shards(MODEL)


def test_a_place_for_scores_that_cannot_be_written_to_is_refused_before_they_are_computed(refused, monkeypatch):
    monkeypatch.setattr("flatllmcore.pipeline.Pipeline.score", None)
    for method in ("bi", "flatllm"):
        assert "cannot write to text/train.txt/x" in refused("--bi_score", "text/train.txt/x", "--prune_method", method)


def test_ranks_are_written_beside_scores_that_a_stopped_run_left(here):
    """Not beside a file of scores given by name, nor beside the authors' scores, which do not say their digest."""
    ranks = Path(RANKS).read_bytes()
    Path(RANKS).unlink()
    Path("theirs").mkdir()
    torch.save(read(SCORES)["scores"], "theirs/bi_score.pt")
    for place in (SCORES, "theirs"):
        assert run("--bi_score", place) == 0
        assert {*os.listdir("ranks/llama"), *os.listdir("theirs")} == {"importance.json", "bi_score.pt"}
    assert run() == 0
    assert Path(RANKS).read_bytes() == ranks


def test_a_run_stopped_in_the_evaluation_goes_on_with_it(here, monkeypatch, capfd):
    """That of the second ratio; after another run, and when it is done, the folder is one that is not empty."""
    argv = (*SEVERAL, "--eval_zero_shot")
    monkeypatch.setattr(main, "load_tasks", loaded := Mock(return_value={}))
    monkeypatch.setattr(main, "evaluate_saved", Mock(side_effect=[{"of": 20}, KeyboardInterrupt]))
    assert run(*argv) == 2
    loaded.assert_called_once()
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("error: interrupted; ")
    assert "; go on with: python main.py --model" in line
    model, record = files(Path("new-30")), read(RECORD)
    assert run(*SEVERAL) == 2
    assert "it is not empty" in capfd.readouterr().err
    monkeypatch.setattr(main, "evaluate_saved", lambda folder, *_: {"of": folder})
    monkeypatch.setattr(main.CheckpointRun, "compressed", None)
    assert run(*argv) == 0
    assert read("logs/llama_flatllm_20.json")["zero_shot"] == {"of": 20}
    assert read(RECORD) == record | {"zero_shot": {"of": "new-30"}}
    assert files(Path("new-30")) == model
    assert run(*argv) == 2
    assert "it is not empty" in capfd.readouterr().err


# Several ratios, several texts


@pytest.fixture
def counted(monkeypatch) -> dict[str, Mock]:
    """Count what is to be done once for all ratios."""
    places = {"perplexity": "checkpoint_run.perplexity", "sample_documents": "utils.data_utils.sample_documents"}
    mocks = {}
    for name, place in places.items():
        module, _, function = f"flatllmcore.{place}".rpartition(".")
        mocks[name] = Mock(wraps=getattr(sys.modules[module], function))
        monkeypatch.setattr(f"flatllmcore.{place}", mocks[name])
    return mocks


def test_several_ratios_give_what_each_gives_alone_and_share_text_and_dense_perplexity(here, counted):
    assert run("--sparsity_ratio", "20", "--save_model", "alone") == 0
    alone = {20: read("logs/llama_flatllm_20.json"), 30: read(RECORD)}
    for mock in counted.values():
        mock.reset_mock()
    assert run(*SEVERAL) == 0
    assert (counted["sample_documents"].call_count, counted["perplexity"].call_count) == (1, 3)
    for percent, folder in ((20, "alone"), (30, MODEL)):
        assert shards(f"new-{percent}") == shards(folder)
        record = read(f"logs/llama_flatllm_{percent}.json")
        same = ("sparsity_ratio", "parameters_after", "perplexity", "nsamples")
        assert {name: record[name] for name in same} == {name: alone[percent][name] for name in same}
        assert record["command"].endswith("--sparsity_ratio 20 30 --save_model new")
        assert sum(record["stages_s"].values()) == pytest.approx(record["elapsed_s"], abs=0.01)
    assert "layer 2" in Path("logs/llama_flatllm_20-30.log").read_text()


def test_perplexity_is_measured_on_the_first_windows_where_fewer_are_asked_for(here):
    """Oracle: the text's beginning, by itself."""
    words = Path("text/test.txt").read_text().split()
    Path("beginning.txt").write_text(" ".join(words[: 5 * SEQLEN]))
    assert run("--eval_dataset", "text", "beginning.txt", "--eval_nsamples", "5") == 0
    first, same = read(RECORD)["perplexity"]
    assert first["windows"] == same["windows"] == 5
    assert [first[which] for which in ("dense", "compressed")] == [same[which] for which in ("dense", "compressed")]


def test_a_command_goes_on_with_the_ratio_it_was_stopped_at(here, interrupted, counted, capfd):
    """Oracle: the published model's bytes and times. When all is done it is refused, or done anew."""
    interrupted(*SEVERAL, at=5)
    assert ", finished layers in /" in (line := capfd.readouterr().err)
    assert "/new-30.partial; go on with: python main.py" in line
    made, record = Path("new-20/config.json").stat().st_mtime_ns, read("logs/llama_flatllm_20.json")
    counted["perplexity"].reset_mock()
    assert run(*SEVERAL) == 0
    assert counted["perplexity"].call_count == 1  # of the second model; the dense one's was remembered
    assert (Path("new-20/config.json").stat().st_mtime_ns, read("logs/llama_flatllm_20.json")) == (made, record)
    assert shards("new-30") == shards(MODEL)
    capfd.readouterr()
    assert run(*SEVERAL) == 2
    assert "cannot save to new-20: it is not empty" in capfd.readouterr().err
    assert run(*SEVERAL, "--overwrite") == 0
    assert Path("new-20/config.json").stat().st_mtime_ns != made


def test_a_command_does_not_go_on_beside_or_in_what_is_of_another_request(here, refused, interrupted):
    torch.save(read(SCORES)["scores"], "bi_score.pt")
    argv = (*SEVERAL, "--bi_score", "bi_score.pt")
    interrupted(*argv, at=2)
    shutil.move("new-20.partial", "new-30.partial")
    assert re.search(r"new-30.partial holds a run of another request \(.*ranks \w{16}, not", refused(*argv))
    shutil.rmtree("new-30.partial")
    interrupted(*argv, at=5)
    shutil.rmtree("new-30.partial")
    add_to("lm_head.weight", 1e-3)
    assert re.search(r"new-20 holds a run of another request \(weights \w{16}, not", refused(*argv))


def test_room_on_the_disk_is_for_all_ratios(here, refused, monkeypatch):
    """Oracle: the weights of one of them, written before: room for nine tenths is none, that for 1.5 none for two."""
    needed = sum(tensor.nbytes for tensor in weights_in(MODEL).values())
    for size, flags, place in ((0.9, ("--save_model", "out/new"), "out/new"), (1.5, SEVERAL, "new")):
        with monkeypatch.context() as patch:
            room(patch, size * needed)
            patch.setattr(FlatLLMStep, "solve", None)  # the work may not begin
            assert f"{place} needs" in refused(*flags)
    room(monkeypatch, 1.5 * needed)
    (here / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(here / "temporary"))
    assert run(*SEVERAL[:3]) == 0  # one after the other, in a temporary folder
    assert read("logs/llama_flatllm_20.json")["sparsity_ratio"] == 20
    assert os.listdir("temporary") == []


def test_a_mixture_is_calibrated_on_and_measured_on_each_of_its_texts(here):
    """A path with a plus that is there is one text."""
    (text,) = read(RECORD)["perplexity"]
    write_texts(Path("b+c"))
    shutil.copy("text/train.txt", "b+c/test.txt")
    assert run("--dataset", "b+c") == 0
    (of_path,) = read(RECORD)["perplexity"]
    shutil.copytree("b+c", "d")
    assert run("--dataset", f"text+{here}/d", "--save_model", "new", "--bi_score", "mixed") == 0
    record = read(RECORD)
    assert (record["dataset"], record["nsamples"]) == (f"text+{here}/d", 6)
    dense = [(of["dataset"], of["windows"], of["dense"]) for of in record["perplexity"]]
    expected = [("text", text), (f"{here}/d", of_path)]
    assert dense == [(name, of["windows"], of["dense"]) for name, of in expected]
    assert read("mixed/importance.json")["dataset"] == read("new/flat_llm.json")["request"]["dataset"] == "text+d"


def test_what_is_published_names_no_folder_of_this_machine(here):
    """With paths for all that can be one; the record is the user's own."""
    shutil.copytree("text", "also")
    places = f"--dataset {here}/text+{here}/also --save_model {here}/a/new --bi_score {here}/b/scores"
    assert run(*places.split(), model=f"{here}/llama") == 0
    for published in (Path("a/new"), Path("b/scores")):
        for name, content in files(published).items():
            assert str(here).encode() not in content, name
    card = Path("a/new/README.md").read_text()
    assert "`python main.py --model llama --dataset text" in card
    assert " --dataset text+also --save_model new --bi_score scores`" in card
    assert "\n| perplexity (also, windows of 32 tokens) | " in card
    assert "\nbase_model:" not in card  # the hub links this name to a repository
    assert read("b/scores/importance.json")["model_id"] == "llama"
    assert read("a/new/flat_llm.json")["request"]["base_model"] == "llama"
    assert read(RECORD)["base_model"] == f"{here}/llama"


def run_program_until(ending: signal.Signals, folder: Path, argv: list[str]) -> None:
    """Run main.py; the signal comes when the weights of a layer are there."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

    def hook(event: str, args: tuple) -> None:
        if event == "os.rename" and "00003-of" in str(args[1]):
            os.kill(os.getpid(), ending)

    sys.addaudithook(hook)
    os.chdir(folder)
    redirect(os.devnull, Path("stderr"))
    sys.argv, tempfile.tempdir = argv, "temporary"
    runpy.run_path(main.__file__, run_name="__main__")


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_ends_the_program_leaves_no_temporary_folder(here, monkeypatch, ending):
    monkeypatch.undo()  # the server that forks is asked by a socket
    (here / "temporary").mkdir()
    argv = ["main.py", "--model", "llama", "--dataset", "text", "--sparsity_ratio", "30", *SHORT]
    assert run_forked(run_program_until, ending, here, argv) == 128 + ending, (here / "stderr").read_text()
    assert os.listdir(here / "temporary") == []


BI = ("main.py", "--model", "llama", "--dataset", "text", *SHORT, "--prune_method", "bi", "--bi_score", "new")
RANK = ("compute_rank.py", "--bi_score", SCORES)
FULL = "error: No space left on device: standard output or error\n"


@pytest.mark.parametrize(
    ("argv", "stdout", "said"),
    [(BI, "/dev/full", ""), (RANK, None, ""), (RANK, "unread", ""), (RANK, "/dev/full", FULL)],
)
def test_a_console_that_is_closed_or_takes_no_more_ends_no_work_and_shows_no_traceback(here, argv, stdout, said):
    """None stands for stdin, stdout and stderr closed before the program starts."""
    reader, writer = os.pipe()
    os.close(reader)
    out = open(stdout, "w") if stdout == "/dev/full" else writer  # noqa: SIM115
    command = [sys.executable, str(Path(main.__file__).with_name(argv[0])), *argv[1:]]
    closing = None if stdout else (lambda: os.closerange(0, 3))
    streams = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": subprocess.PIPE}
    os.makedirs("temporary")
    environment = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    environment |= {"HOME": str(here), "TMPDIR": str(here / "temporary")}
    done = subprocess.run(command, **streams, env=environment, text=True, check=False, preexec_fn=closing)
    os.close(writer)
    assert os.listdir("temporary") == []  # nor a folder of torch's
    assert (done.stderr, done.returncode) == (said, 2 if said else 0)
    made = "new/importance.json" if argv is BI else "ranks/llama/ranks_50.json"
    assert Path(made).is_file()
    if argv is BI:
        assert "importance scores are in new/importance.json" in Path("logs/llama_bi.log").read_text()


@pytest.mark.parametrize(
    ("take", "said"),
    [
        (lambda: torch.empty(2**50), r"DefaultCPUAllocator: can't allocate memory: you tried to allocate \d+ bytes"),
        (lambda: bytearray(2**62), "of the host"),
        (Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has")), "2 GiB"),
    ],
)
def test_too_little_memory_is_one_line_that_says_what_takes_less_and_how_to_go_on(here, capfd, monkeypatch, take, said):
    monkeypatch.setattr("flatllmcore.checkpoint_run.perplexity", lambda *_: take())
    assert run("--save_model", "out/new") == 2
    line = capfd.readouterr().err
    remedy = "a smaller host_memory_gib takes less, or begin anew with a smaller batch_size"
    way_on = "scores .*; mend that and run: python main.py"
    assert re.fullmatch(rf"error: out of memory \(.*{said}\); {remedy}; {way_on} .*\n", line)
    with pytest.raises((MemoryError, RuntimeError)), door("the file is damaged", "mend it"):
        take()


def test_a_mistake_of_ours_that_torch_raises_keeps_its_traceback(here, monkeypatch):
    monkeypatch.setattr("flatllmcore.checkpoint_run.perplexity", lambda *_: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        run()
