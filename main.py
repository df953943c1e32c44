"""Score the layers of a language model (`bi`), or compress it (`flatllm`).

    python main.py --model models/pydocs-llama --dataset pydocs --prune_method bi --bi_score out/scores
    python main.py --model models/pydocs-llama --dataset pydocs --prune_method flatllm \\
        --sparsity_ratio 20 --save_model out/pydocs-llama-20
    python main.py --model meta-llama/Llama-2-7b-hf --dataset wikitext2 --prune_method flatllm \\
        --sparsity_ratio 20 --save_model out/llama-2-7b-20

`flatllm` takes ranks or scores from --bi_score where they are, and else scores the model on the way.
"""

import argparse
import hashlib
import json
import logging
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import PreTrainedModel

from flatllmbench.command_line import (
    UNUSABLE_PLACE,
    check_arguments,
    complain,
    logging_to,
    parse_arguments,
    request,
    run_name,
)
from flatllmbench.harness import Tasks, load_tasks
from flatllmbench.perplexity import Perplexity, perplexity
from flatllmbench.records import hardware, versions, write_record
from flatllmbench.setup import Setup
from flatllmbench.zero_shot import OVER_SEVERAL_GPUS, evaluate_saved
from flatllmcore.core.calibration import LayerSource
from flatllmcore.core.checkpoint_sink import CheckpointSink, partial_folder
from flatllmcore.core.checkpoint_source import CheckpointSource
from flatllmcore.core.importance import layer_importance
from flatllmcore.core.importance_scores import ImportanceScores
from flatllmcore.core.prune import compress_layers
from flatllmcore.core.rank_allocation import RankAllocation, prunable_keep_ratio
from flatllmcore.core.rank_files import IMPORTANCE_FILE, find_ranks, ranks_file
from flatllmcore.errors import InputError
from flatllmcore.layers import attention_value_width
from flatllmcore.utils.calibration_windows import check_token_ids
from flatllmcore.utils.checkpoint import count_parameters, model_card
from flatllmcore.utils.data_utils import (
    TextDataset,
    consecutive_windows,
    load_text,
    sample_documents,
    sample_windows,
)
from flatllmcore.utils.devices import check_whole_models_fit, parse_device, peak_memory_gib
from flatllmcore.utils.files import check_disk_space
from flatllmcore.utils.loading import generation_config_file
from flatllmcore.utils.processes import (
    OtherProcessError,
    is_first_failure,
    is_first_process,
    process_count,
    process_group,
    told_by_first,
)

logger = logging.getLogger("flatllm")

PUBLISHED_NSAMPLES = {"bi": 128, "flatllm": 256}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit status: 0, or 2 after one line on stderr about unusable input."""
    args = parse_arguments(argv, __doc__ or "")
    command = command_line(sys.argv[1:] if argv is None else argv)
    try:
        device = parse_device(args.device)
    except InputError as error:
        with process_group(torch.device("cpu")):
            return complain_once(error)
    with process_group(device):
        try:
            told_by_first(lambda: check_arguments(args))  # what all would refuse, one refuses
            check_arguments(args)
            with logging_to(args.save / f"{run_name(args)}.log"), logging_redirect_tqdm():
                if args.prune_method == "bi":
                    score(args, command)
                else:
                    compress(args, command)
        except (InputError, OtherProcessError) as error:
            return complain_once(error)
        except KeyboardInterrupt:
            return complain_once(InputError(f"interrupted; {finished(args)}; go on with: {command}"))
        except OSError as error:
            if error.errno not in UNUSABLE_PLACE:
                raise
            place = error.filename or args.save  # a log that cannot be written does not say its name
            message = f"{error.strerror}: {place}; {finished(args)}; mend that and run: {command}"
            return complain_once(InputError(message))
    return 0


def command_line(argv: Sequence[str]) -> str:
    """Return what to type for this run with as many processes; on several machines, N numbers them from 0."""
    count, local_count = (os.environ.get(name, "1") for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if count == "1":
        return shlex.join(["python", "main.py", *argv])
    start = ["torchrun", "--nproc_per_node", local_count]
    if count != local_count:
        machines = ["--nnodes", str(int(count) // int(local_count)), "--node_rank", "N"]
        start += [*machines, "--master_addr", os.environ["MASTER_ADDR"], "--master_port", os.environ["MASTER_PORT"]]
    return shlex.join([*start, "main.py", *argv])


def complain_once(error: InputError | OtherProcessError) -> int:
    """Say what was wrong, unless another process has said something; return the exit status."""
    try:
        is_first = is_first_failure()
    except OtherProcessError:  # with the process that counts; its own failure is not this one's to tell
        is_first = isinstance(error, InputError)
    return complain(str(error)) if is_first else 2


def finished(args: argparse.Namespace) -> str:
    """Say what a run that was stopped leaves to go on from."""
    partial = None if args.save_model is None else partial_folder(args.save_model)
    layers = f", finished layers in {partial}" if partial and partial.exists() else ""
    return f"scores and ranks finished so far stay in {args.bi_score}{layers}"


def score(args: argparse.Namespace, command: str) -> None:
    """Write the model's importance scores, and the record of the run."""
    started = time.perf_counter()
    place = args.bi_score / IMPORTANCE_FILE
    setup = Setup(args)
    windows = importance_windows(args, setup)
    scores = score_layers(args, setup, setup.load_source(len(windows)), windows)
    if is_first_process():
        scores.save(place)
    logger.info("importance scores are in %s", place)
    found = {name: getattr(scores, name) for name in ("nsamples", "seqlen", "scores", "zero_rows")}
    keep_record(args, command, found | costs(setup, started))


def compress(args: argparse.Namespace, command: str) -> None:
    """Compress the model, measure it before and after, save it and the record of the run."""
    tasks = tasks_to_evaluate(args)  # refused before anything is read, and not counted among the costs
    started = time.perf_counter()
    setup = Setup(args)
    prunable_keep_ratio(setup.dimensions, 1 - args.sparsity_ratio / 100, args.prune_qk)  # refuses the impossible
    windows, test_windows = compression_windows(args, setup)
    with output_folder(args) as folder:
        check_disk_space(folder, expected_size(args, setup) - written_size(folder))
        if tasks is not None:
            check_whole_models_fit(setup.device, [expected_size(args, setup)], OVER_SEVERAL_GPUS)
        source = setup.load_source(max(len(windows), len(test_windows)))
        allocation = ranks_for(args, setup, source)
        asked = compression_request(args, setup, source, allocation, windows, test_windows)
        with CheckpointSink(folder, source.num_layers, asked, args.overwrite) as sink:
            dense = dense_perplexity(setup, source, test_windows, sink)
            flat_config, layers = compress_layers(
                source,
                sink,
                windows,
                allocation,
                batch_size=setup.batch_size,
                tolerance=args.tol,
                stopwatch=setup.stopwatch,
            )
            with setup.stopwatch.stage("write"):
                generation_config = generation_config_file(args.model, args.cache_dir)
                partial = sink.complete(source, flat_config, generation_config, setup.tokenizer)
            del source  # the dense model makes room
            written = CheckpointSource(partial, setup.device, storage=setup.storage)
            compressed = compressed_perplexity(setup, written, test_windows, dense)
            result = {
                **description(args, setup, allocation, len(windows)),
                "parameters_before": setup.parameters,
                "parameters_after": count_parameters(written.skeleton),
                "perplexity": {
                    "dataset": args.eval_dataset,
                    "seqlen": setup.seqlen,
                    "windows": dense.windows,
                    "dense": dense.value,
                    "compressed": compressed.value,
                },
                "attention": attention_widths(written.skeleton, setup.device),
                "layers": [asdict(layer) for layer in layers],
            }
            result |= costs(setup, started)
            keep_record(args, command, result)
            sink.publish(model_card({"command": command, "versions": versions()} | result))  # last: then all is there
        if args.save_model is not None:
            logger.info("compressed model is in %s", args.save_model)
        if tasks is not None:
            result["zero_shot"] = evaluate_compressed(args, setup, folder, tasks)
            keep_record(args, command, result)


def tasks_to_evaluate(args: argparse.Namespace) -> Tasks | None:
    """Return the tasks that this process evaluates the compressed model on; ``None`` if it does not."""
    if not args.eval_zero_shot or not is_first_process():
        return None
    return load_tasks(args.tasks, args.num_fewshot, args.include_path)


def evaluate_compressed(args: argparse.Namespace, setup: Setup, folder: Path, tasks: Tasks) -> dict[str, Any]:
    """Return the zero-shot results of the compressed model, which is in ``folder``."""
    try:
        return evaluate_saved(str(folder), tasks, setup.device, args.eval_batch_size, args.limit)
    except KeyboardInterrupt as error:
        raise InputError(
            f"interrupted in the evaluation; the record of the compression is in {args.save}; "
            "a model that --save_model kept is evaluated by: python -m flatllmbench.zero_shot FOLDER"
        ) from error


def compression_windows(args: argparse.Namespace, setup: Setup) -> tuple[Tensor, Tensor]:
    """Return the token windows to compress on and those to measure perplexity on, (N, S) each."""
    with setup.stopwatch.stage("data"):
        nsamples = args.nsamples or PUBLISHED_NSAMPLES["flatllm"]
        windows = sample_documents(training_text(args), setup.tokenizer, nsamples, setup.seqlen, args.seed)
        test_windows = consecutive_windows(test_text(args), setup.tokenizer, setup.seqlen)
        check_token_ids(windows, setup.vocab_size)
        check_token_ids(test_windows, setup.vocab_size)
    return windows, test_windows


def expected_size(args: argparse.Namespace, setup: Setup) -> int:
    """Return about how many bytes the compressed weights will take."""
    removed = args.sparsity_ratio / 100 * setup.parameters["decoder_linear"]
    return int(setup.parameters["total"] - removed) * setup.checkpoint.dtype.itemsize


def written_size(folder: Path) -> int:
    """Return how many bytes a run that was stopped has written of the compressed weights."""
    return sum(path.stat().st_size for path in partial_folder(folder).glob("*.safetensors"))


def description(args: argparse.Namespace, setup: Setup, allocation: RankAllocation, nsamples: int) -> dict[str, Any]:
    """Return what was done to the model, for its card and for the record."""
    return {
        "base_model": args.model,
        "sparsity_ratio": float(allocation.sparsity_ratio),  # the same whether fresh or read from a file
        "achieved_sparsity_percent": allocation.achieved_sparsity_percent,
        "rank_multiple": allocation.rank_multiple,
        "prune_qk": allocation.prune_qk,
        "dataset": args.dataset,
        "nsamples": nsamples,
        "seqlen": setup.seqlen,
        "seed": args.seed,
    }


@contextmanager
def output_folder(args: argparse.Namespace) -> Iterator[Path]:
    """Give the folder for the compressed model: the one asked for, or a temporary one that is deleted at the end."""
    if args.save_model is not None:
        yield args.save_model
        return
    with ExitStack() as stack:
        if args.offload_folder is not None:
            args.offload_folder.mkdir(parents=True, exist_ok=True)
        made = told_by_first(
            lambda: stack.enter_context(TemporaryDirectory(prefix="flat-llm-", dir=args.offload_folder))
        )
        yield Path(made, "model")


def compression_request(
    args: argparse.Namespace,
    setup: Setup,
    source: LayerSource,
    allocation: RankAllocation,
    windows: Tensor,
    test_windows: Tensor,
) -> dict[str, Any]:
    """Return all that decides the bytes of the result, in words where there are some, for a run that goes on."""
    return {
        **description(args, setup, allocation, len(windows)),
        "fingerprint": source.fingerprint(),
        "dtype": str(source.dtype),
        "ranks": digest(json.dumps([allocation.value_rank, allocation.mlp_width]).encode()),
        "windows": digest(windows.numpy().tobytes()),
        "eval_dataset": args.eval_dataset,
        "eval_windows": digest(test_windows.numpy().tobytes()),
        "tol": args.tol,
        "batch_size": setup.batch_size,
        "processes": process_count(),
        "hardware": hardware(setup.device),
        "versions": versions(),
    }


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def dense_perplexity(setup: Setup, source: LayerSource, windows: Tensor, sink: CheckpointSink) -> Perplexity:
    """Return the dense model's perplexity, as the sink remembers it from an earlier run or else measured."""
    if "dense_perplexity" not in sink.results:
        measured = perplexity(source, windows, setup.batch_size, setup.stopwatch)
        if not math.isfinite(measured.value):
            raise InputError(
                f"dense perplexity is {measured.value}; check the final norm and lm_head of the checkpoint"
            )
        sink.remember("dense_perplexity", asdict(measured))
    dense = Perplexity(**sink.results["dense_perplexity"])
    logger.info("dense perplexity %.4f over %d windows of %d tokens", dense.value, dense.windows, dense.seqlen)
    return dense


def compressed_perplexity(setup: Setup, written: LayerSource, windows: Tensor, dense: Perplexity) -> Perplexity:
    compressed = perplexity(written, windows, setup.batch_size, setup.stopwatch)
    if not math.isfinite(compressed.value):
        raise InputError(f"compressed perplexity is {compressed.value}; the model does not bear this ratio, or --dtype")
    logger.info(
        "compressed perplexity %.4f, %.3f times the dense one", compressed.value, compressed.value / dense.value
    )
    return compressed


def keep_record(args: argparse.Namespace, command: str, result: dict[str, Any]) -> None:
    """Write the record of the run."""
    if is_first_process():
        asked = {"kind": args.prune_method, "command": command, "request": request(args), "versions": versions()}
        write_record(args.save / f"{run_name(args)}.json", asked | result)


def attention_widths(model: PreTrainedModel, device: torch.device) -> dict[str, Any]:
    """Return the value width per layer that the attention function is handed on ``device``, so what kernel it takes."""
    implementation = model.config._attn_implementation
    widths = {
        stage: [
            attention_value_width(a.value_head_dim, a.head_dim, query_length, implementation, device.type)
            for a in (layer.self_attn for layer in model.get_decoder().layers)
        ]
        for stage, query_length in (("prompt", 2), ("decoding", 1))
    }
    return {"implementation": implementation, "value_width": widths}


def score_layers(args: argparse.Namespace, setup: Setup, source: LayerSource, windows: Tensor) -> ImportanceScores:
    """Return the importance of every layer, with what it takes to compute it again."""
    found = layer_importance(source, windows, setup.batch_size, setup.stopwatch)
    return ImportanceScores(
        model_id=args.model,
        fingerprint=source.fingerprint(),
        dimensions=setup.dimensions,
        dataset=args.dataset,
        nsamples=len(windows),
        seqlen=setup.seqlen,
        seed=args.seed,
        scores=found.scores,
        zero_rows=found.zero_rows,
        versions=versions(),
    )


def ranks_for(args: argparse.Namespace, setup: Setup, source: LayerSource) -> RankAllocation:
    """Return the ranks that --bi_score holds, or else score the layers, allocate, and leave both there."""
    told = told_by_first(lambda: ranks_that_are_there(args, setup, source))
    if told is not None:
        found = RankAllocation.from_json(told)
    else:
        logger.info("no ranks or scores in %s: scoring the layers first", args.bi_score)
        scores = score_layers(args, setup, source, importance_windows(args, setup))
        found = setup.selector.allocate(scores.scores, args.sparsity_ratio, scores.sha256())
        if is_first_process():
            scores.save(args.bi_score / IMPORTANCE_FILE)
            found.save(args.bi_score / ranks_file(args.sparsity_ratio))
    logger.info(
        "asked to remove %d %% of %d decoder-layer weights; the ranks remove %.3f %%",
        args.sparsity_ratio,
        found.parameters_before,
        found.achieved_sparsity_percent,
    )
    return found


def ranks_that_are_there(args: argparse.Namespace, setup: Setup, source: LayerSource) -> dict[str, Any] | None:
    """Return the ranks that --bi_score holds, as JSON takes them."""
    found = find_ranks(args.bi_score, setup.selector, source.fingerprint(), args.sparsity_ratio)
    if found is None:
        return None
    if args.rank_multiple not in (None, found.rank_multiple):
        raise InputError(
            f"the ranks in {args.bi_score} go with --rank_multiple {found.rank_multiple}, not {args.rank_multiple}; "
            "drop the flag, or name a file of scores by --bi_score"
        )
    return found.to_json()


def importance_windows(args: argparse.Namespace, setup: Setup) -> Tensor:
    """Return the token windows that importance is measured on, (N, S)."""
    with setup.stopwatch.stage("data"):
        nsamples = args.nsamples or PUBLISHED_NSAMPLES["bi"]
        windows = sample_windows(training_text(args), setup.tokenizer, nsamples, setup.seqlen, args.seed)
        check_token_ids(windows, setup.vocab_size)
        return windows


def training_text(args: argparse.Namespace) -> TextDataset:
    return load_text(args.dataset, "train", dataset_root=args.dataset_root, cache_dir=args.cache_dir)


def test_text(args: argparse.Namespace) -> TextDataset:
    return load_text(args.eval_dataset, "test", dataset_root=args.dataset_root, cache_dir=args.cache_dir)


def costs(setup: Setup, started: float) -> dict[str, Any]:
    """Return where the run's time went, its peak memory and the hardware, for its record."""
    elapsed_s = time.perf_counter() - started
    stages = {name: round(seconds, 3) for name, seconds in setup.stopwatch.elapsed_s.items()}
    peak = peak_memory_gib(setup.device)
    memory = ", ".join(f"{gib:.2f} GiB on the {place}" for place, gib in peak.items())
    logger.info("%.1f s in all; peak memory %s", elapsed_s, memory)
    return {
        "elapsed_s": round(elapsed_s, 3),
        "stages_s": stages | {"rest": round(elapsed_s - sum(stages.values()), 3)},
        "peak_memory_gib": peak,
        "hardware": hardware(setup.device),
    }


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that temporary folders go
    sys.exit(main())
