"""Recover some of what compression took: train adapters (LoRA, by PEFT) on text, and merge them into the weights.

    python scripts/recover.py out/llama-2-7b-20 out/llama-2-7b-20-recovered --steps 200

Every linear layer but the head is trained, by transformers' Trainer on one device. The result is a folder of the same
shape, without adapters; its `recovery.json` has the request and the perplexity before and after. It is no result of the
method, which trains nothing: keep the two apart. Interrupted, the same command goes on from the last checkpoint.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainingArguments

from flatllmbench.command_line import ROWS, parser_with, read_flags
from flatllmbench.logs import keep_bars_to_terminals
from flatllmcore.config import MOST, checked
from flatllmcore.engine.checkpoint_source import CheckpointSource
from flatllmcore.engine.perplexity import perplexity
from flatllmcore.errors import InputError, run_program
from flatllmcore.utils.checkpoint import locked, partial_folder
from flatllmcore.utils.data_utils import check_token_ids, consecutive_windows, sample_mixture, window_length
from flatllmcore.utils.devices import parse_device
from flatllmcore.utils.files import LEFT_OVER, check_writable, digest, naming_place, read_json, write_json
from flatllmcore.utils.loading import load_model, load_tokenizer, save_whole
from flatllmcore.utils.names import text_names
from flatllmcore.utils.processes import check_alone
from flatllmcore.utils.text_sources import load_text

_FIELDS = ("cal_dataset", "eval_dataset", "eval_nsamples", "dataset_root", "seqlen", "batch_size", "seed", "device")
FLAGS = {field: field.removeprefix("cal_") for field in _FIELDS}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit status: 0, or 2 after one line on stderr about unusable input."""
    args = parse_arguments(argv)
    return run_program(lambda: recover(args), args.out)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments of the program."""
    parser = parser_with(FLAGS, "scripts/recover.py", __doc__)
    parser.add_argument("model", metavar="FOLDER", help="compressed model: folder or hub id")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for the recovered one; OUT.partial until then")
    parser.add_argument("--steps", type=int, default=200, help="of training, a batch each (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters (default: %(default)s)")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="falls to 0 (default: %(default)s)")
    return parser.parse_args(argv)


def recover(args: argparse.Namespace) -> None:
    """Train, merge, measure and save, alone; InputError for what cannot be used, before any work."""
    try:
        import peft  # noqa: F401 (needed after the first measurements, which is too late to say so)
    except ImportError as error:
        raise InputError(f"recovery needs {error.name}; from the repository: pip install '.[recover]'") from error
    check_alone()
    asked = read_flags(args, FLAGS)
    args.model, args.out = checked(ROWS["model"], args.model, "FOLDER"), checked(ROWS["save"], args.out, "OUT")
    request = {name: getattr(args, name) for name in ("steps", "rank", "learning_rate")}
    if not (0 < args.steps <= MOST and args.rank > 0 and 0 < args.learning_rate <= 1):
        raise InputError(f"{request}; accepted: numbers above 0, up to {MOST} steps, and a learning rate up to 1")
    check_writable(args.out.parent)
    keep_bars_to_terminals()
    with locked(args.out):
        recover_alone(args, asked, request)


def recover_alone(args: argparse.Namespace, asked: dict[str, Any], request: dict[str, Any]) -> None:
    """Do so in a folder that is this process's; ``asked`` are the flags of the library, ``request`` the others."""
    if os.path.lexists(args.out):
        raise InputError(f"{args.out} exists; give another folder, or delete it")
    tokenizer, source = load_tokenizer(args.model), CheckpointSource(args.model, parse_device(asked["device"]))
    seqlen = window_length(asked["seqlen"], source.config.max_position_embeddings)
    batch_size = asked["batch_size"] or max(1, 4096 // seqlen)
    places = {"dataset_root": asked["dataset_root"], "tokenizer": tokenizer}
    names = text_names(asked["cal_dataset"])
    texts = [load_text(name, "train", **places) for name in names]
    windows = sample_mixture(texts, tokenizer, args.steps * batch_size, seqlen, asked["seed"])
    test_text = load_text((asked["eval_dataset"] or names)[0], "test", **places)
    test_windows = consecutive_windows(test_text, tokenizer, seqlen, asked["eval_nsamples"])
    for of in (windows, test_windows):
        check_token_ids(of, source.config.vocab_size)
    request |= {"seed": asked["seed"], "batch_size": batch_size, "seqlen": seqlen, "model": source.fingerprint()}
    request["windows"] = digest(windows.numpy().tobytes())
    work = partial_folder(args.out)
    is_begun = os.path.lexists(work) and not all(path.match(LEFT_OVER) for path in work.iterdir())
    if is_begun and read_json(work / "request.json", dict[str, Any]) != request:
        raise InputError(f"{work} is of another request; give another folder, or delete it")
    write_json(work / "request.json", request)

    before = perplexity(source, test_windows, batch_size)
    model = trained(load_model(args.model), windows, request, work, source.device)
    save_whole(model, tokenizer, args.model, work / "model")
    after = perplexity(CheckpointSource(str(work / "model"), source.device), test_windows, batch_size)
    print(f"perplexity {before:.4f} before, {after:.4f} after, {len(test_windows)} windows of {seqlen} tokens")
    measured = {"windows": len(test_windows), "before": before, "after": after}
    write_json(work / "model" / "recovery.json", request | {"perplexity": measured})
    os.replace(work / "model", args.out)
    shutil.rmtree(work)


def trained(
    model: PreTrainedModel, windows: Tensor, request: dict[str, Any], work: Path, device: torch.device
) -> PreTrainedModel:
    """Return the model with adapters trained on token windows (N, S) and merged; checkpoints are kept in ``work``."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(request["seed"])
    lora = LoraConfig(r=request["rank"], lora_alpha=2 * request["rank"], target_modules="all-linear")
    adapted = get_peft_model(model, lora)
    on_cpu, every = device.type == "cpu", max(1, request["steps"] // 10)
    how = {"max_steps": request["steps"], "learning_rate": request["learning_rate"], "seed": request["seed"] % 2**32}
    how |= {"per_device_train_batch_size": request["batch_size"], "label_names": ["labels"], "report_to": "none"}
    how |= {"save_steps": every, "logging_steps": every, "save_total_limit": 1, "disable_tqdm": not sys.stderr.isatty()}
    training = TrainingArguments(work, use_cpu=on_cpu, dataloader_pin_memory=not on_cpu, **how)
    training._n_gpu = min(1, training.n_gpu)  # else transformers shares batches out among all there are
    whole = sorted(work.glob("checkpoint-*/trainer_state.json"), key=os.path.getmtime)  # which is written last
    batches = [{"input_ids": ids, "labels": ids} for ids in windows]
    with naming_place(work):
        Trainer(adapted, training, train_dataset=batches).train(str(whole[-1].parent) if whole else None)
    return adapted.merge_and_unload()


if __name__ == "__main__":
    sys.exit(main())
