"""What of a command can be refused before any work: flags that do not go together, and places."""

import os
from pathlib import Path

from flatllmcore.errors import InputError, door
from flatllmcore.utils.checkpoint import check_output_folder, partial_folder
from flatllmcore.utils.files import check_is_no_folder, check_writable
from flatllmcore.utils.names import IMPORTANCE_FILE, STOCK, ranks_file
from flatllmcore.utils.processes import local_world_size
from flatllmcore.utils.text_sources import has_test_split

from .command_line import FLAGS, Options


def check_request(options: Options) -> None:
    """Refuse what can be refused without looking at the model."""
    for name, flag in FLAGS.items():
        place = Path(options.model) if name == "model" else getattr(options, name)
        if isinstance(place, Path):
            with door(f"--{flag} {place} is no place", "give another one"):
                place.resolve()  # RuntimeError of a link to itself
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
    if options.shape == STOCK and any(unused.values()):
        given = ", ".join(flag for flag, value in unused.items() if value)
        raise InputError(f"--shape stock has Q and K whole and all layers alike, without scores; leave out {given}")
    place = options.score_place
    is_kind_for_scores = place.suffix != ".pt" and not place.match("ranks_*.json")
    if not (is_kind_for_scores or place.is_file()):
        raise InputError(f"--bi_score {place} does not exist; give a file that does, a folder, or a .json for scores")
    if options.prune_method == "bi":
        if place.is_file() and not (is_kind_for_scores and place == options.score_file):
            raise InputError(f"--bi_score {place} is a file; scores are written to a folder, or to a .json of them")
        if options.score_file.exists() and not options.overwrite:
            raise InputError(f"{options.score_file} exists; give --overwrite, or another --bi_score")
        return
    for name in [] if options.eval_dataset else options.eval_texts:
        if not has_test_split(name, options.dataset_root):
            raise InputError(f"{name} has no test split to measure perplexity on; name an --eval_dataset")


def check_places(options: Options) -> None:
    """Refuse places that cannot be written to, and a model folder that another place would be part of."""
    for place in filter(None, (options.save, options.offload_folder)):
        check_writable(place)
    for file in (IMPORTANCE_FILE, *map(ranks_file, options.sparsity_ratio)):
        check_is_no_folder(options.score_place / file)
    for suffix in (".log", ".json"):
        check_is_no_folder(options.record_place.with_suffix(suffix))
    if options.save_model is None:
        return
    out = Path(os.path.realpath(options.save_model))
    places: dict[str, Path | None] = {
        "save": options.save,
        "bi_score": options.score_place,
        "model": Path(options.model),
        "offload_folder": options.offload_folder,
        "cache_dir": options.cache_dir,
    }
    for flag, path in places.items():
        real = Path(os.path.realpath(path or "/"))  # which is part of nothing
        is_part = any(real.is_relative_to(folder) for folder in (out, partial_folder(out)))
        if is_part or (flag == "model" and out.is_relative_to(real)):
            raise InputError(f"--save_model {options.save_model} overlaps with --{flag} {path}; give another folder")
    check_output_folder(options.save_model, options.overwrite)
