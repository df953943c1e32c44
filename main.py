"""Score the layers of a language model (`bi`), or compress it (`flatllm`).

    python main.py --model models/pydocs-llama --dataset pydocs --prune_method bi --bi_score out/scores
    python main.py --model models/pydocs-llama --dataset pydocs --prune_method flatllm \\
        --sparsity_ratio 20 --save_model out/pydocs-llama-20
    python main.py --model meta-llama/Llama-2-7b-hf --dataset wikitext2 --prune_method flatllm \\
        --sparsity_ratio 20 --save_model out/llama-2-7b-20

`flatllm` takes ranks or scores from --bi_score where they are, and else scores the model on the way.
"""

import argparse
import errno
import logging
import math
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import PreTrainedModel

from flatllmbench.command_line import check_arguments, complain, logging_to, parse_arguments, request, run_name
from flatllmbench.perplexity import perplexity
from flatllmbench.records import hardware, versions, write_record
from flatllmcore.core.calibration import ModelInMemory, default_batch_size
from flatllmcore.core.importance import layer_importance
from flatllmcore.core.importance_scores import ImportanceScores
from flatllmcore.core.prune import compress_layers
from flatllmcore.core.rank_allocation import (
    ImportancePreservingRankSelector,
    RankAllocation,
    prunable_keep_ratio,
)
from flatllmcore.core.rank_files import IMPORTANCE_FILE, find_ranks, ranks_file
from flatllmcore.core.stopwatch import Stopwatch
from flatllmcore.errors import InputError
from flatllmcore.layers import attention_value_width
from flatllmcore.utils.calibration_windows import check_token_ids, window_length
from flatllmcore.utils.checkpoint import count_parameters, model_card, save_compressed
from flatllmcore.utils.data_utils import (
    TextDataset,
    consecutive_windows,
    load_text,
    sample_documents,
    sample_windows,
)
from flatllmcore.utils.devices import parse_device, peak_memory_gib
from flatllmcore.utils.files import check_disk_space
from flatllmcore.utils.layer_utils import dimensions_from_config, load_config
from flatllmcore.utils.loading import load_model, load_tokenizer, model_fingerprint

logger = logging.getLogger("flatllm")

UNUSABLE_PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOTDIR, errno.EEXIST)
PUBLISHED_NSAMPLES = {"bi": 128, "flatllm": 256}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit status: 0, or 2 after one line on stderr about unusable input."""
    args = parse_arguments(argv, __doc__ or "")
    command = shlex.join(["python", "main.py", *(sys.argv[1:] if argv is None else argv)])
    try:
        check_arguments(args)
        with logging_to(args.save / f"{run_name(args)}.log"), logging_redirect_tqdm():
            record = score(args) if args.prune_method == "bi" else compress(args, command)
            asked = {"kind": args.prune_method, "command": command, "request": request(args)}
            record = asked | {"versions": versions()} | record
            write_record(args.save / f"{run_name(args)}.json", record)
    except InputError as error:
        return complain(str(error))
    except KeyboardInterrupt:
        return complain(f"interrupted; scores and ranks finished so far stay in {args.bi_score}; go on with: {command}")
    except OSError as error:
        if error.errno not in UNUSABLE_PLACE:
            raise
        place = error.filename or args.save  # a log that cannot be written does not say its name
        return complain(f"{error.strerror}: {place}; nothing is left half-written; mend that and run: {command}")
    return 0


def score(args: argparse.Namespace) -> dict[str, Any]:
    """Write the model's importance scores; return what the record says about it."""
    started = time.perf_counter()
    place = args.bi_score / IMPORTANCE_FILE
    setup = Setup(args)
    windows = importance_windows(args, setup)
    scores = score_layers(args, setup, setup.load_source(args), windows)
    scores.save(place)
    logger.info("importance scores are in %s", place)
    return {"scores": scores.scores, "zero_rows": scores.zero_rows} | costs(setup, started)


def compress(args: argparse.Namespace, command: str) -> dict[str, Any]:
    """Compress the model, measure it before and after, save it; return what the record says about it."""
    started = time.perf_counter()
    setup = Setup(args)
    prunable_keep_ratio(setup.dimensions, 1 - args.sparsity_ratio / 100, args.prune_qk)  # refuses the impossible
    with setup.stopwatch.stage("data"):
        nsamples = args.nsamples or PUBLISHED_NSAMPLES["flatllm"]
        windows = sample_documents(training_text(args), setup.tokenizer, nsamples, setup.seqlen, args.seed)
        test_windows = consecutive_windows(test_text(args), setup.tokenizer, setup.seqlen)
        check_token_ids(windows, setup.vocab_size)
        check_token_ids(test_windows, setup.vocab_size)
    source = setup.load_source(args)
    allocation = ranks_for(args, setup, source)
    parameters_before = count_parameters(source.model)
    if args.save_model is not None:
        removed = allocation.parameters_before - allocation.parameters_after
        check_disk_space(args.save_model, (parameters_before["total"] - removed) * source.model.dtype.itemsize)

    dense = perplexity(source, test_windows, setup.batch_size, setup.stopwatch)
    if not math.isfinite(dense.value):
        raise InputError(f"dense perplexity is {dense.value}; check the final norm and lm_head of the checkpoint")
    logger.info("dense perplexity %.4f over %d windows of %d tokens", dense.value, dense.windows, dense.seqlen)
    flat_config, layers = compress_layers(
        source,
        source,
        windows,
        allocation,
        batch_size=setup.batch_size,
        tolerance=args.tol,
        stopwatch=setup.stopwatch,
    )
    model = source.adopt(flat_config)
    compressed = perplexity(ModelInMemory(model, setup.device), test_windows, setup.batch_size, setup.stopwatch)
    if not math.isfinite(compressed.value):
        raise InputError(f"compressed perplexity is {compressed.value}; the model does not bear this ratio, or --dtype")
    logger.info(
        "compressed perplexity %.4f, %.3f times the dense one", compressed.value, compressed.value / dense.value
    )
    result: dict[str, Any] = {
        "base_model": args.model,
        "sparsity_ratio": allocation.sparsity_ratio,
        "achieved_sparsity_percent": allocation.achieved_sparsity_percent,
        "rank_multiple": allocation.rank_multiple,
        "prune_qk": allocation.prune_qk,
        "parameters_before": parameters_before,
        "parameters_after": count_parameters(model),
        "dataset": args.dataset,
        "nsamples": nsamples,
        "seqlen": setup.seqlen,
        "seed": args.seed,
        "perplexity": {
            "dataset": args.eval_dataset,
            "seqlen": setup.seqlen,
            "windows": dense.windows,
            "dense": dense.value,
            "compressed": compressed.value,
        },
        "attention": attention_widths(model, setup.device),
        "layers": [asdict(layer) for layer in layers],
    }
    if args.save_model is not None:
        with setup.stopwatch.stage("save"):
            card = model_card({"command": command, "versions": versions()} | result)
            save_compressed(model, setup.tokenizer, args.save_model, card, overwrite=args.overwrite)
        logger.info("compressed model is in %s", args.save_model)
    return result | costs(setup, started)


class Setup:
    """What both stages need: device, window length, tokenizer, the dense model and a stopwatch.

    Everything that can be refused is checked before any weight is read.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.device = parse_device(args.device)
        if not Path(args.model).is_dir():
            logger.info("there is no folder %s; asking the Hugging Face Hub for it", args.model)
        config = load_config(args.model, args.cache_dir)
        self.dimensions = dimensions_from_config(config)
        self.seqlen = window_length(args.seqlen, config.max_position_embeddings)
        self.batch_size = args.batch_size or default_batch_size(self.seqlen)
        self.selector = ImportancePreservingRankSelector(
            self.dimensions, rank_multiple=args.rank_multiple, prune_qk=args.prune_qk
        )
        self.stopwatch = Stopwatch(self.device)
        self.tokenizer = load_tokenizer(args.model, cache_dir=args.cache_dir)
        self.vocab_size = config.vocab_size
        logger.info(
            "%s: %s of %d layers; windows of %d tokens; on %s",
            args.model,
            self.dimensions.architecture,
            self.dimensions.num_layers,
            self.seqlen,
            self.device,
        )

    def load_source(self, args: argparse.Namespace) -> ModelInMemory:
        """Read the weights, into host memory."""
        with self.stopwatch.stage("load"):
            model = load_model(args.model, dtype=args.dtype, cache_dir=args.cache_dir)
        return ModelInMemory(model, self.device)


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


def score_layers(args: argparse.Namespace, setup: Setup, source: ModelInMemory, windows: Tensor) -> ImportanceScores:
    """Return the importance of every layer, with what it takes to compute it again."""
    found = layer_importance(source, windows, setup.batch_size, setup.stopwatch)
    return ImportanceScores(
        model_id=args.model,
        fingerprint=model_fingerprint(source.model),
        dimensions=setup.dimensions,
        dataset=args.dataset,
        nsamples=len(windows),
        seqlen=setup.seqlen,
        seed=args.seed,
        scores=found.scores,
        zero_rows=found.zero_rows,
        versions=versions(),
    )


def ranks_for(args: argparse.Namespace, setup: Setup, source: ModelInMemory) -> RankAllocation:
    """Return the ranks that --bi_score holds, or else score the layers, allocate, and leave both there."""
    found = find_ranks(args.bi_score, setup.selector, model_fingerprint(source.model), args.sparsity_ratio)
    if found is None:
        logger.info("no ranks or scores in %s: scoring the layers first", args.bi_score)
        scores = score_layers(args, setup, source, importance_windows(args, setup))
        scores.save(args.bi_score / IMPORTANCE_FILE)
        found = setup.selector.allocate(scores.scores, args.sparsity_ratio, scores.sha256())
        found.save(args.bi_score / ranks_file(args.sparsity_ratio))
    elif args.rank_multiple not in (None, found.rank_multiple):
        raise InputError(
            f"the ranks in {args.bi_score} go with --rank_multiple {found.rank_multiple}, not {args.rank_multiple}; "
            "drop the flag, or name a file of scores by --bi_score"
        )
    logger.info(
        "asked to remove %d %% of %d decoder-layer weights; the ranks remove %.3f %%",
        args.sparsity_ratio,
        found.parameters_before,
        found.achieved_sparsity_percent,
    )
    return found


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
    sys.exit(main())
