"""What of a command can be refused before any work: flags that do not go together, and places."""

import os
from pathlib import Path

from flatllmcore.core.importance import ImportanceScores
from flatllmcore.errors import InputError
from flatllmcore.utils.checkpoint import check_output_folder, partial_folder
from flatllmcore.utils.files import check_replaceable, check_writable, read_json
from flatllmcore.utils.names import IMPORTANCE_FILE, STOCK, ranks_file
from flatllmcore.utils.processes import local_world_size
from flatllmcore.utils.text_sources import has_test_split

from .command_line import Options


def check_request(options: Options) -> None:
    """Refuse what can be refused without looking at the model."""
    if options.device is not None and ":" in options.device and local_world_size() > 1:
        raise InputError(f"--device {options.device} is one GPU for several processes; with cuda each has its own")
    for flag in ("tasks", "num_fewshot", "limit", "include_path"):
        if getattr(options, flag) is not None and not options.eval_zero_shot:
            raise InputError(f"--{flag} is about tasks of the evaluation harness; give --eval_zero_shot too")
    unused = {
        "--prune_method bi": options.prune_method == "bi",
        "--prune_qk": options.prune_qk,
        "--bi_score": options.bi_score,
    }
    if options.shape == STOCK and (given := ", ".join(flag for flag, is_given in unused.items() if is_given)):
        raise InputError(f"--shape stock has Q and K whole and all layers alike, without scores; leave out {given}")
    place = options.score_place
    check_replaceable(options.score_file)
    is_kind_for_scores = place.suffix != ".pt" and not place.match("ranks_*.json")
    if not (is_kind_for_scores or place.is_file()):
        raise InputError(f"--bi_score {place} does not exist; give a file that does, a folder, or a .json for scores")
    if options.prune_method == "bi":
        if place.is_file() and not (is_kind_for_scores and place == options.score_file):
            raise InputError(f"--bi_score {place} is a file; scores are written to a folder, or to a .json of them")
        if options.score_file.exists():
            if not options.overwrite:
                raise InputError(f"{options.score_file} exists; give --overwrite, or another --bi_score")
            try:
                read_json(options.score_file, ImportanceScores)
            except InputError as error:
                raise InputError(f"no scores to overwrite ({error}); move it, or give another --bi_score") from error
        return
    for name in [] if options.eval_dataset else options.eval_texts:
        if not has_test_split(name, options.dataset_root):
            raise InputError(f"{name} has no test split to measure perplexity on; name an --eval_dataset")


def check_places(options: Options) -> None:
    """Refuse places that cannot be written to, and a model folder that another place would be part of."""
    for place in filter(None, (options.save, options.offload_folder)):
        check_writable(place)
    scores = (options.score_place / name for name in (IMPORTANCE_FILE, *map(ranks_file, options.sparsity_ratio)))
    for file in (*scores, options.record_place, options.record_place.with_suffix(".log")):
        check_replaceable(file)
    if os.path.realpath(options.score_file) == os.path.realpath(options.record_place):
        raise InputError(f"--bi_score {options.bi_score} is where the record goes; give another one, or another --save")
    if options.save_model is None:
        return
    out = Path(os.path.realpath(options.save_model))
    for flag in ("save", "bi_score", "model", "offload_folder", "cache_dir"):
        path = options.score_place if flag == "bi_score" else getattr(options, flag)
        real = Path(os.path.realpath(path or "/"))  # which is part of nothing
        is_part = any(real.is_relative_to(folder) for folder in (out, partial_folder(out)))
        if is_part or (flag == "model" and out.is_relative_to(real)):
            raise InputError(f"--save_model {options.save_model} overlaps with --{flag} {path}; give another folder")
    check_output_folder(options.save_model, options.overwrite)
