"""How much each method, and each ingredient of ``flatllm+``, leaves of a model: perplexity at equal size.

    python benchmarks/accuracy.py --model models/pydocs-llama --dataset pydocs --eval_dataset pydocs --seqlen 256
    python benchmarks/accuracy.py --model SMOLLM2 --dataset wikitext2+c4 --dataset_root DATA --seqlen 1024 \\
        --eval_dataset wikitext2 c4 DATA/tinystories_eval.txt --out results/accuracy/smollm2.jsonl

All rows see the same windows, scores and curves too. Excess is ``ln(compressed / dense)``.
A row is written to ``--out`` as soon as it is there, and is not done again.

    published    IPRS ranks of angular scores, the method of the paper; published-uniform: the same rank for all layers
    published-stock, flatllm+-stock    each method in the stock shape
    obs          structured OBS with refit, uniform, whole key/value groups and channels (benchmarks/obs_peer.py)
    obs-mlp      the same, all from the MLPs
    values       flatllm+ at IPRS ranks, Q and K whole, fitted to each layer's own dense output alone
    dense        ... led towards the dense model's stream
    damage       ... with ranks by curves of damage
    flatllm+     ... with rotary pairs of Q and K in the budget: the method
    gradients    ... with errors weighed by the gradients of 16 windows
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import PreTrainedModel

from common import perplexity
from flatllmbench.provenance import hardware, versions
from flatllmbench.tables import markdown_table
from flatllmcore.core.importance import LayerImportance
from flatllmcore.core.rank_allocation import ImportancePreservingRankSelector, RankAllocation
from flatllmcore.engine.compress import compress_layers
from flatllmcore.engine.importance import layer_importance, loss_metrics
from flatllmcore.engine.memory import ModelInMemory
from flatllmcore.engine.protocols import Method
from flatllmcore.engine.walk import spread
from flatllmcore.methods import METHODS, flatllm_plus
from flatllmcore.utils.data_utils import consecutive_windows, sample_mixture
from flatllmcore.utils.devices import parse_device, peak_memory_gib
from flatllmcore.utils.dimensions import ModelDimensions
from flatllmcore.utils.layer_utils import dimensions_from_config
from flatllmcore.utils.loading import load_model, load_tokenizer
from flatllmcore.utils.names import STOCK, public_name, text_names
from flatllmcore.utils.text_sources import load_text
from obs_peer import ObsPeer, channels_only, uniform_allocation

ROWS = ("published", "published-uniform", "published-stock", "obs", "obs-mlp", "values", "dense", "damage")
ROWS += ("flatllm+", "gradients", "flatllm+-stock")
GRADIENT_WINDOWS = 16


def main() -> None:
    args = parse_arguments()
    device, tokenizer = parse_device(args.device), load_tokenizer(args.model)
    model = load_model(args.model, dtype=args.dtype)
    places = {"dataset_root": args.dataset_root, "tokenizer": tokenizer}
    texts = [load_text(name, "train", **places) for name in text_names(args.dataset)]
    tests = {
        public_name(name): consecutive_windows(
            load_text(name, "test", **places), tokenizer, args.seqlen, args.eval_windows
        )
        for name in args.eval_dataset
    }
    done = read(args.out)
    about = {"model": public_name(args.model), "dtype": str(model.dtype), "nsamples": args.nsamples}
    about |= {"seqlen": args.seqlen, "dataset": "+".join(map(public_name, text_names(args.dataset)))}
    about |= {"hardware": hardware(device), "versions": versions()}
    dense = {name: perplexity(model, windows, device, args.batch_size) for name, windows in tests.items()}
    for seed in args.seed:
        windows = sample_mixture(texts, tokenizer, args.nsamples, args.seqlen, seed)
        found = None
        for percent in args.sparsity_ratio:
            for row in args.rows:
                key = {"row": row, "sparsity_ratio": percent, "seed": seed}
                if any(key.items() <= other.items() for other in done):
                    continue
                started = time.perf_counter()
                found = found or layer_importance(ModelInMemory(model, device), windows, args.batch_size, "damage")
                importance_s = time.perf_counter() - started
                started = time.perf_counter()
                small, allocation, parameters = compressed(model, windows, found, row, percent, device, args.batch_size)
                took = {"importance_s": round(importance_s, 1), "compress_s": round(time.perf_counter() - started, 1)}
                ours = {name: perplexity(small, test, device, args.batch_size) for name, test in tests.items()}
                result = about | key | took | {"peak_memory_gib": peak_memory_gib(device)}
                result["removed_percent"] = 100 * (1 - parameters / allocation.parameters_before)
                result["perplexity"] = ours
                result["dense"] = dense
                result["excess"] = {name: math.log(ours[name] / dense[name]) for name in ours}
                done.append(result)
                if args.save_models is not None:
                    folder = args.save_models / f"{row}-{percent}-{seed}"
                    small.save_pretrained(folder)
                    tokenizer.save_pretrained(folder)
                print(
                    row, percent, seed, {name: round(value, 4) for name, value in result["excess"].items()}, flush=True
                )
                if args.out is not None:
                    args.out.parent.mkdir(parents=True, exist_ok=True)
                    with args.out.open("a") as file:
                        file.write(json.dumps(result) + "\n")
    print(table(done))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="local folder or hub id")
    parser.add_argument("--dataset", required=True, help="text to calibrate on, or several as A+B")
    parser.add_argument("--dataset_root", type=Path, help="folder with local copies of the named datasets")
    parser.add_argument("--eval_dataset", nargs="+", required=True, help="texts to measure perplexity on")
    parser.add_argument("--sparsity_ratio", type=int, nargs="+", default=[10, 20, 30, 40, 50])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--seed", type=int, nargs="+", default=[42])
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--eval_windows", type=int, default=100, help="most test windows used of each text")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device")
    parser.add_argument("--out", type=Path, help="append the records here, a JSON object per line")
    parser.add_argument(
        "--save_models", type=Path, help="save the models of rows that are made now here, as ROW-PERCENT-SEED"
    )
    return parser.parse_args()


def read(path: Path | None) -> list[dict[str, Any]]:
    """Return the records that are there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path and path.exists() else []


def plan(
    dimensions: ModelDimensions, found: LayerImportance, row: str, keep_ratio: float
) -> tuple[Method, RankAllocation, int]:
    """Return a row's method, what its layers keep, and the linear weights that are left."""
    if row.startswith("obs"):
        groups, allocation = (uniform_allocation if row == "obs" else channels_only)(dimensions, keep_ratio)
        per_group = dimensions.head_dim * dimensions.rank_parameters + dimensions.qk_parameters
        left = allocation.parameters_after - groups * dimensions.num_layers * per_group // dimensions.num_kv_heads
        return ObsPeer(groups), allocation, left
    method = METHODS["flatllm" if row.startswith("published") else "flatllm+"]
    if row.endswith("stock"):
        allocation = ImportancePreservingRankSelector(dimensions, width_multiple=2, shape=STOCK).stock(keep_ratio)
        return method, allocation, allocation.parameters_after
    selector = ImportancePreservingRankSelector(dimensions, rank_multiple=2, prune_qk=row in ("flatllm+", "gradients"))
    scores = [1.0] * dimensions.num_layers if row.endswith("uniform") else found.scores
    is_by_damage = row in ("damage", "flatllm+", "gradients")
    allocation = selector.allocate(scores, keep_ratio, found.curves_in_nats if is_by_damage else None)
    return method, allocation, allocation.parameters_after


def compressed(
    model: PreTrainedModel,
    windows: Tensor,
    found: LayerImportance,
    row: str,
    percent: int,
    device: torch.device,
    batch_size: int,
) -> tuple[PreTrainedModel, RankAllocation, int]:
    """Return a compressed copy of a model, what it keeps, and the linear weights that are left."""
    source = ModelInMemory(copy.deepcopy(model), device)
    method, allocation, parameters = plan(dimensions_from_config(model.config), found, row, 1 - percent / 100)
    how: dict[str, Any] = {"batch_size": batch_size, "tolerance": 0.96}
    if row == "gradients":
        how["metrics"] = loss_metrics(source, spread(windows, GRADIENT_WINDOWS), batch_size)
    with patch.object(flatllm_plus, "SHARE", 0.0 if row == "values" else flatllm_plus.SHARE):
        config, _ = compress_layers(source, source, windows, method, allocation, **how)
    return source.adopt(config), allocation, parameters


def table(records: Sequence[dict[str, Any]]) -> str:
    """Return excess by row and percentage, the mean over seeds, as Markdown."""
    names = list(records[0]["excess"]) if records else []
    cells = []
    for percent in sorted({of["sparsity_ratio"] for of in records}):
        for row in ROWS:
            same = [of for of in records if (of["row"], of["sparsity_ratio"]) == (row, percent)]
            if same:
                removed = sum(of["removed_percent"] for of in same) / len(same)
                means = [sum(of["excess"][name] for of in same) / len(same) for name in names]
                cells.append((str(percent), row, f"{removed:.2f}", *(f"{mean:.4f}" for mean in means), str(len(same))))
    return markdown_table(("%", "row", "removed %", *(f"excess, {name}" for name in names), "seeds"), cells)


if __name__ == "__main__":
    main()
