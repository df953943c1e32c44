"""Score the layers of a language model (`bi`), or compress it (`flatllm`).

    python main.py --model models/pydocs-llama --dataset pydocs --prune_method bi
    python main.py --model models/pydocs-llama --dataset pydocs --prune_method flatllm \\
        --sparsity_ratio 20 --save_model out/pydocs-llama-20
    python main.py --model meta-llama/Llama-2-7b-hf --dataset wikitext2 --prune_method flatllm \\
        --sparsity_ratio 20 --save_model out/llama-2-7b-20

`flatllm` takes ranks or scores from --bi_score where they are, and else scores the model on the way.
"""

import argparse
import errno
import logging
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor
from tqdm.contrib.logging import logging_redirect_tqdm

from flatllmbench.perplexity import perplexity
from flatllmbench.records import hardware, versions, write_record
from flatllmcore.core.calibration import ModelInMemory, default_batch_size
from flatllmcore.core.importance import layer_importance
from flatllmcore.core.importance_scores import ImportanceScores
from flatllmcore.core.prune import compress_layers
from flatllmcore.core.rank_allocation import (
    ImportancePreservingRankSelector,
    RankAllocation,
    check_sparsity_ratio,
    prunable_keep_ratio,
)
from flatllmcore.core.rank_files import IMPORTANCE_FILE, find_ranks, ranks_file
from flatllmcore.core.stopwatch import Stopwatch
from flatllmcore.errors import InputError
from flatllmcore.utils.checkpoint import check_output_folder, count_parameters, model_card, save_compressed
from flatllmcore.utils.data_utils import (
    TextDataset,
    consecutive_windows,
    has_test_split,
    load_text,
    sample_documents,
    sample_windows,
)
from flatllmcore.utils.devices import parse_device, peak_memory_gib
from flatllmcore.utils.layer_utils import dimensions_from_config, load_config
from flatllmcore.utils.loading import load_model, load_tokenizer, model_fingerprint

logger = logging.getLogger("flatllm")

LONGEST_WINDOW = 4096
PUBLISHED_NSAMPLES = {"bi": 128, "flatllm": 256}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit status: 0, or 2 after one line on stderr about unusable input."""
    args = parse_arguments(argv)
    command = shlex.join(["python", "main.py", *(sys.argv[1:] if argv is None else argv)])
    try:
        check_arguments(args)
        with logging_to(args.save / f"{run_name(args)}.log"), logging_redirect_tqdm():
            record = score(args) if args.prune_method == "bi" else compress(args, command)
            record = {"command": command, "request": request(args), "versions": versions()} | record
            write_record(args.save / f"{run_name(args)}.json", record)
    except InputError as error:
        return complain(str(error))
    except KeyboardInterrupt:
        return complain(f"interrupted; scores and ranks finished so far stay in {args.bi_score}; go on with: {command}")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return complain(f"disk full ({error.filename}); nothing was left half-written; free space and run: {command}")
    return 0


def score(args: argparse.Namespace) -> dict[str, Any]:
    """Write the model's importance scores; return what the record says about it."""
    started = time.perf_counter()
    place = args.bi_score / IMPORTANCE_FILE
    if place.exists() and not args.overwrite:
        raise InputError(f"{place} exists; give --overwrite to score anew, or another --bi_score")
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
    prunable_keep_ratio(setup.dimensions, 1 - args.sparsity_ratio / 100, prune_qk=False)  # refuses the impossible
    with setup.stopwatch.stage("data"):
        nsamples = args.nsamples or PUBLISHED_NSAMPLES["flatllm"]
        windows = sample_documents(training_text(args), setup.tokenizer, nsamples, setup.seqlen, args.seed)
        test_windows = consecutive_windows(test_text(args), setup.tokenizer, setup.seqlen)
    source = setup.load_source(args)
    allocation = ranks_for(args, setup, source)

    parameters_before = count_parameters(source.model)
    dense = perplexity(source, test_windows, setup.batch_size, setup.stopwatch)
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
    logger.info(
        "compressed perplexity %.4f, %.3f times the dense one", compressed.value, compressed.value / dense.value
    )
    result: dict[str, Any] = {
        "base_model": args.model,
        "sparsity_ratio": allocation.sparsity_ratio,
        "achieved_sparsity_percent": allocation.achieved_sparsity_percent,
        "rank_multiple": allocation.rank_multiple,
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
        config = load_config(args.model, args.cache_dir)
        self.dimensions = dimensions_from_config(config)
        self.seqlen = window_length(args.seqlen, config.max_position_embeddings)
        self.batch_size = args.batch_size or default_batch_size(self.seqlen)
        self.selector = ImportancePreservingRankSelector(self.dimensions, rank_multiple=args.rank_multiple)
        self.stopwatch = Stopwatch(self.device)
        self.tokenizer = load_tokenizer(args.model, cache_dir=args.cache_dir)

    def load_source(self, args: argparse.Namespace) -> ModelInMemory:
        """Read the weights, into host memory."""
        with self.stopwatch.stage("load"):
            model = load_model(args.model, dtype=args.dtype, cache_dir=args.cache_dir)
        return ModelInMemory(model, self.device)


def score_layers(args: argparse.Namespace, setup: Setup, source: ModelInMemory, windows: Tensor) -> ImportanceScores:
    """Return the importance of every layer, with what it takes to compute it again."""
    found = layer_importance(source, windows, setup.batch_size, setup.stopwatch)
    if found.zero_rows:
        logger.warning("%d rows of zeros have no angle and count as cosine 0.5", found.zero_rows)
    for index, value in enumerate(found.scores):
        logger.info("layer %d: importance %.4f", index, value)
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
    logger.info(
        "asked to remove %g %% of %d decoder-layer weights; the ranks remove %.3f %%",
        found.sparsity_ratio,
        found.parameters_before,
        found.achieved_sparsity_percent,
    )
    return found


def importance_windows(args: argparse.Namespace, setup: Setup) -> Tensor:
    """Return the token windows that importance is measured on, (N, S)."""
    with setup.stopwatch.stage("data"):
        nsamples = args.nsamples or PUBLISHED_NSAMPLES["bi"]
        return sample_windows(training_text(args), setup.tokenizer, nsamples, setup.seqlen, args.seed)


def training_text(args: argparse.Namespace) -> TextDataset:
    return load_text(args.dataset, "train", dataset_root=args.dataset_root, cache_dir=args.cache_dir)


def test_text(args: argparse.Namespace) -> TextDataset:
    return load_text(args.eval_dataset, "test", dataset_root=args.dataset_root, cache_dir=args.cache_dir)


def costs(setup: Setup, started: float) -> dict[str, Any]:
    """Return where the run's time went, its peak memory and the hardware, for its record."""
    elapsed_s = time.perf_counter() - started
    stages = {name: round(seconds, 3) for name, seconds in setup.stopwatch.elapsed_s.items()}
    peak = peak_memory_gib(setup.device)
    logger.info("%.1f s in all; peak memory %s GiB", elapsed_s, peak)
    return {
        "elapsed_s": round(elapsed_s, 3),
        "stages_s": stages | {"rest": round(elapsed_s - sum(stages.values()), 3)},
        "peak_memory_gib": peak,
        "hardware": hardware(setup.device),
    }


def window_length(asked: int | None, longest: int) -> int:
    """Return the length of the windows, the published 4096 or what the model takes."""
    if asked is None:
        return min(LONGEST_WINDOW, longest)
    if not 2 <= asked <= longest:
        raise InputError(f"--seqlen {asked} is out of range; this model takes 2 to {longest} tokens")
    return asked


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    what = parser.add_argument_group("model and text")
    what.add_argument("--model", required=True, help="local model folder or hub id")
    what.add_argument(
        "--dataset",
        default="wikitext2",
        help="calibration text: wikitext2, c4, alpaca, pydocs, or a file or folder (default: %(default)s)",
    )
    what.add_argument("--eval_dataset", help="text to measure perplexity on (default: the test split of --dataset)")
    what.add_argument("--dataset_root", type=Path, help="folder with local copies of the named datasets")
    what.add_argument("--cache_dir", type=Path, help="where hub downloads are kept (default: the hub's own)")

    how = parser.add_argument_group("compression")
    how.add_argument(
        "--prune_method",
        choices=("bi", "flatllm"),
        default="flatllm",
        help="bi: write importance scores; flatllm: compress (default: %(default)s)",
    )
    how.add_argument(
        "--sparsity_ratio",
        type=int,
        default=20,
        help="percentage of decoder-layer linear parameters removed, 1-95 (default: %(default)s)",
    )
    how.add_argument(
        "--bi_score",
        type=Path,
        help="folder of importance.json and ranks_<percent>.json, or one such file (default: ranks/<model>)",
    )
    how.add_argument(
        "--rank_multiple",
        type=int,
        help="round ranks and widths to multiples of this (default: 8 if heads are 64 wide or more, else 1)",
    )
    how.add_argument(
        "--tol",
        type=float,
        default=0.96,
        help="share of eigenvalue mass whose rank is logged for comparison; changes nothing (default: %(default)s)",
    )

    sampling = parser.add_argument_group("calibration")
    sampling.add_argument("--nsamples", type=int, help="windows of text (default: 128 for scores, 256 to compress)")
    sampling.add_argument("--seqlen", type=int, help="tokens per window (default: 4096 or what the model takes)")
    sampling.add_argument("--seed", type=int, default=42, help="of the sampling (default: %(default)s)")
    sampling.add_argument("--batch_size", type=int, help="windows run at a time (default: about 8192 tokens)")

    where = parser.add_argument_group("machine and output")
    where.add_argument("--device", help="cpu, cuda or cuda:N (default: the GPU if there is one)")
    where.add_argument(
        "--dtype",
        choices=("auto", "bfloat16", "float16", "float32", "float64"),
        default="auto",
        help="of the weights in the run and in the result (default: the checkpoint's own)",
    )
    where.add_argument("--save", type=Path, default=Path("logs"), help="folder for logs and records (default: logs)")
    where.add_argument("--save_model", type=Path, help="folder for the compressed model")
    where.add_argument("--overwrite", action="store_true", help="replace scores or a model folder that exist")

    args = parser.parse_args(argv)
    if args.bi_score is None:
        args.bi_score = Path("ranks") / Path(args.model).name
    return args


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what can be refused without looking at the model; fill in the default evaluation text."""
    check_sparsity_ratio(args.sparsity_ratio)
    for name in ("nsamples", "batch_size", "rank_multiple"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} {value} is out of range; 1 or more is accepted")
    if not 0 < args.tol <= 1:
        raise InputError(f"--tol {args.tol} is out of range; a share above 0 and at most 1 is accepted")
    if args.save_model is not None:
        check_output_folder(args.save_model, args.overwrite)
    if args.eval_dataset is None:
        if args.prune_method == "flatllm" and not has_test_split(args.dataset, args.dataset_root):
            raise InputError(f"{args.dataset} has no test split to measure perplexity on; name one with --eval_dataset")
        args.eval_dataset = args.dataset


def run_name(args: argparse.Namespace) -> str:
    stage = "bi" if args.prune_method == "bi" else f"flatllm_{args.sparsity_ratio}"
    return f"{Path(args.model).name}_{stage}"


def request(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments as JSON takes them."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


@contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Log to the console and to a file, and keep transformers to its warnings, inside the block."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    path.parent.mkdir(parents=True, exist_ok=True)
    file = logging.FileHandler(path, mode="w")
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
        handlers=[logging.StreamHandler(sys.stdout), file],
        force=True,
    )
    try:
        yield
    finally:
        logging.getLogger().removeHandler(file)
        file.close()


def complain(message: str) -> int:
    """Say in one line what was unusable; return the exit status that goes with it."""
    print("error:", " ".join(message.split()), file=sys.stderr)  # noqa: T201
    return 2


if __name__ == "__main__":
    sys.exit(main())
