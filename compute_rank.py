"""Allocate ranks to the layers of a model from its importance scores.

    python compute_rank.py                                              # every importance file under ranks/
    python compute_rank.py --bi_score ranks/llama-2-7b --sparsity_ratio 20 --rank_multiple 1
    python compute_rank.py --bi_score bi_score.pt --model meta-llama/Llama-2-7b-hf    # the authors' scores

Beside each importance file it writes `ranks_<percent>.json`, one per target, and `ranks.png`.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

try:
    from flatllmbench.command_line import ROWS
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}; install first: pip install -r requirements.txt (INSTALL.md)")

from flatllmbench.plots import PICTURE_MARK, draw_ranks
from flatllmcore.config import checked
from flatllmcore.core.curve_allocation import Curves
from flatllmcore.core.importance import ImportanceScores, check_importance_method, read_author_numbers
from flatllmcore.core.rank_allocation import ImportancePreservingRankSelector, RankAllocation
from flatllmcore.core.rank_files import read_ranks, save_ranks
from flatllmcore.errors import InputError, door, run_program
from flatllmcore.utils.dimensions import ModelDimensions
from flatllmcore.utils.files import check_replaceable, digest, read_json, write_atomically
from flatllmcore.utils.names import ANGULAR, DAMAGE, IMPORTANCE_FILE, IMPORTANCE_METHODS, ranks_file

IMPORTANCE_FILES = (IMPORTANCE_FILE, "bi_score.pt")
PICTURE = "ranks.png"


@dataclass(frozen=True)
class Importance:
    """What an importance file says about a model, whoever wrote it."""

    path: Path
    model_id: str
    dimensions: ModelDimensions
    scores: Sequence[float]
    fingerprint: str | None = None  # the authors' files have none
    curves: Sequence[Curves] | None = None  # of damage
    method: str = ANGULAR  # of the scores


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit status: 0, or 2 after one line on stderr about unusable input."""
    args = parse_arguments(argv)
    return run_program(lambda: allocate_all(args), args.bi_score)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags as given."""
    parser = argparse.ArgumentParser(
        prog="compute_rank.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--bi_score",
        default=Path("ranks"),
        metavar="PATH",
        help="importance.json, bi_score.pt, or a folder searched for both (default: ranks)",
    )
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="local folder or hub id, of which only the config is read: the sizes that bi_score.pt lacks; "
        "an importance.json must agree with it",
    )
    parser.add_argument(
        "--sparsity_ratio",
        type=int,
        nargs="+",
        default=[10, 20, 30, 40, 50],
        metavar="P",
        help=f"{ROWS['sparsity_ratio'].metadata['help']} (default: 10 20 30 40 50)",
    )
    parser.add_argument("--prune_qk", action="store_true", help="count Q and K among the pruned projections")
    parser.add_argument(
        "--importance_method",
        choices=IMPORTANCE_METHODS,
        help="damage allocates by the curves that main.py --importance_method damage has measured, for flatllm+; "
        "the others by the scores (default: by the scores)",
    )
    for name in ("rank_multiple", "width_multiple"):
        parser.add_argument(f"--{name}", type=int, metavar="M", help=ROWS[name].metadata["help"])
    parser.add_argument(
        "--plot",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="draw importance and kept share per layer as ranks.png",
    )
    return parser.parse_args(argv)


def allocate_all(args: argparse.Namespace) -> None:
    """Write the ranks of every importance file, and say what they are."""
    percents = checked(ROWS["sparsity_ratio"], args.sparsity_ratio, "--sparsity_ratio")
    shares = {percent: percent / 100 for percent in percents}
    model = None if args.model is None else checked(ROWS["model"], args.model, "--model")
    dimensions = None if model is None else dimensions_of(model)
    place = checked(ROWS["bi_score"], args.bi_score, "--bi_score")
    files = [read_importance(path, model, dimensions) for path in find_importance_files(place)]
    allocated = [(importance, allocate(importance, shares, args)) for importance in files]
    for importance, allocations in allocated:
        for name in (*map(ranks_file, allocations), *([PICTURE] * args.plot)):
            check_is_ours(importance.path.parent / name)
    pictures = [draw(*made) if args.plot else None for made in allocated]  # all before the first file
    for (importance, allocations), picture in zip(allocated, pictures, strict=True):
        write_ranks(importance, allocations, picture)
        sys.stdout.write(table(importance, allocations))


def dimensions_of(model: str) -> ModelDimensions:
    """Return the sizes of a model in a folder or at a hub id."""
    from flatllmcore.utils.layer_utils import dimensions_from_config
    from flatllmcore.utils.loading import load_config

    return dimensions_from_config(load_config(model))


def find_importance_files(path: Path) -> list[Path]:
    """Return the file itself, or every importance file below a folder; InputError if there is none, or two in one."""
    if path.is_file():
        return [path]
    files = sorted(file for name in IMPORTANCE_FILES for file in path.rglob(name) if file.is_file())
    if not files:
        raise InputError(
            f"no {' or '.join(IMPORTANCE_FILES)} at {path}; "
            "score a model first: python main.py --prune_method bi --model MODEL"
        )
    for earlier, later in pairwise(files):
        if earlier.parent == later.parent:
            raise InputError(f"{earlier.parent} holds {earlier.name} and {later.name}; name one of them by --bi_score")
    return files


def read_importance(path: Path, model: str | None, dimensions: ModelDimensions | None) -> Importance:
    """Return the scores of one file, checked against the dimensions of ``model`` where that is given."""
    if path.suffix != ".pt":
        ours = read_json(path, ImportanceScores)
        if dimensions is not None:
            ours.check_matches(dimensions, fingerprint=None)
        method = ANGULAR if ours.method == DAMAGE else ours.method  # curves come beside angles
        about = (ours.model_id, ours.dimensions, ours.scores, ours.fingerprint, ours.curves_in_nats, method)
        return Importance(path, *about)
    if model is None or dimensions is None:
        raise InputError(f"{path} does not say what model it is about; name it by --model, a local folder or a hub id")
    return Importance(path, model, dimensions, read_author_numbers(path))


def allocate(importance: Importance, shares: dict[int, float], args: argparse.Namespace) -> dict[int, RankAllocation]:
    """Return the ranks of each percentage removed."""
    sha256 = digest(importance.path.read_bytes())
    try:
        selector = ImportancePreservingRankSelector(
            importance.dimensions,
            rank_multiple=args.rank_multiple,
            width_multiple=args.width_multiple,
            prune_qk=args.prune_qk,
        )
        check_importance_method(importance.method, args.importance_method)
        curves = importance.curves if args.importance_method == DAMAGE else None
        if args.importance_method == DAMAGE and curves is None:
            raise InputError("it has no curves of damage; score anew by main.py --importance_method damage")
        allocated = {
            percent: selector.allocate(importance.scores, 1 - share, curves) for percent, share in shares.items()
        }
    except InputError as error:
        raise InputError(f"{importance.path}: {error}") from error
    made_by = importance.method if curves is None else DAMAGE
    made_from = partial(
        replace, importance_sha256=sha256, fingerprint=importance.fingerprint, importance_method=made_by
    )
    return {percent: made_from(allocation) for percent, allocation in allocated.items()}


def check_is_ours(place: Path) -> None:
    """Refuse a place where something else than ranks, or a picture of them, is."""
    check_replaceable(place)
    try:
        if place.suffix == ".png":
            if place.exists() and PICTURE_MARK not in place.read_bytes():
                raise InputError(f"{place} is no picture of ranks")
        elif place.exists():
            read_ranks(place)
    except InputError as error:
        raise InputError(f"{error}; it would be replaced, so move or delete it") from error


def draw(importance: Importance, allocations: dict[int, RankAllocation]) -> bytes:
    """Return the picture of the scores and of what each target keeps."""
    keep = {percent: allocation.per_layer("keep") for percent, allocation in allocations.items()}
    with door(f"{importance.path} cannot be drawn", "give --no-plot"):
        return draw_ranks(importance.scores, keep, importance.model_id)


def write_ranks(importance: Importance, allocations: dict[int, RankAllocation], picture: bytes | None) -> None:
    """Write the ranks of each target beside the scores, and the picture of them."""
    folder = importance.path.parent
    for percent, allocation in allocations.items():
        save_ranks(allocation, folder / ranks_file(percent))
    if picture is not None:
        write_atomically(folder / PICTURE, picture)


def table(importance: Importance, allocations: dict[int, RankAllocation]) -> str:
    """Return a line per target below a heading that names the model."""
    sizes = importance.dimensions
    multiple = next(iter(allocations.values())).rank_multiple
    lines = [
        f"{importance.model_id}: {sizes.num_layers} layers, head width {sizes.head_dim}, "
        f"MLP width {sizes.intermediate_size}, rank multiple {multiple} -> {importance.path.parent}",
        f"{'asked %':>8}{'achieved %':>12}{'V/O/MLP kept %':>16}{'rank':>14}{'MLP width':>18}",
    ]
    for percent, allocation in allocations.items():
        kept = 100 * sum(allocation.per_layer("keep")) / sizes.num_layers
        ranges = (allocation.per_layer(name) for name in ("value_rank", "mlp_width"))
        rank, width = (f"{min(found)}-{max(found)}" for found in ranges)
        lines.append(f"{percent:>8}{allocation.achieved_sparsity_percent:>12.3f}{kept:>16.2f}{rank:>14}{width:>18}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
