"""What can be asked for: the one table of options, with each one's default, check and help.

The fields of :class:`FlatLLMConfig` are the library's options, those of :class:`RunConfig` add what a run from
checkpoint to checkpoint takes. Checks, the flags of ``main.py`` and the README's table are made from them.
"""

import os
import re
from collections.abc import Callable, Collection, Sized
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from math import inf
from numbers import Integral, Real
from pathlib import Path
from types import NoneType
from typing import Any, Self, get_args

from .errors import InputError
from .methods import METHODS
from .utils import names

MOST = 10**6  # windows or steps: more than anybody means, and still a number of things that memory might take


@dataclass(frozen=True)
class Accepted:
    """What an option takes: in words, as a test, and as what makes the field's type of it, or of a word."""

    words: str
    is_accepted: Callable[[Any], bool]
    convert: Callable[[Any], Any] = lambda value: value


def number(words: str, is_in_range: Callable[[Any], bool], kind: type = Real, convert: type = float) -> Accepted:
    """Return what takes numbers of a kind in a range."""
    return Accepted(words, lambda n: isinstance(n, kind) and not isinstance(n, bool) and is_in_range(n), convert)


def integer(least: int, most: float = inf) -> Accepted:
    """Return what takes integers from ``least`` to ``most``."""
    words = f"an integer, {least} {'or more' if most == inf else f'to {most}'}"
    return number(words, lambda n: least <= int(n) <= most, Integral, int)


def one_of(choices: Collection[str]) -> Accepted:
    """Return what takes one of some words."""
    return Accepted(" or ".join(choices), lambda value: isinstance(value, str) and value in choices)


def _is_name(value: Any) -> bool:
    """Tell whether ``value`` is a name or path in UTF-8, and a ~ at its beginning the home of a user that there is."""
    name = os.fspath(value) if isinstance(value, str | os.PathLike) else ""
    is_utf8 = isinstance(name, str) and name == name.encode(errors="ignore").decode()
    return is_utf8 and name != "" and "\0" not in name and not os.path.expanduser(name).startswith("~")


_NAME = "in UTF-8, with ~ for a home folder that there is"
SWITCH = Accepted("True or False", lambda value: isinstance(value, bool))
# Shells leave the ~ of ``--flag=~/here``. pathlib would raise RuntimeError where there is no such user.
PATH = Accepted(f"a path {_NAME}", _is_name, lambda value: Path(os.path.expanduser(value)))
TEXT = Accepted(f"a name or path {_NAME}", lambda value: isinstance(value, str) and _is_name(value), os.path.expanduser)
DEVICE = Accepted(
    names.DEVICE_NAMES, lambda name: isinstance(name, str) and bool(re.fullmatch("cpu|cuda(:[0-9]+)?", name))
)
DATA = Accepted(
    f"a dataset's name, a path {_NAME}, texts, token ids, or batches of them whose number is known",
    lambda data: _is_name(data) if isinstance(data, str | os.PathLike) else isinstance(data, Sized),
    lambda data: os.path.expanduser(data) if isinstance(data, str | os.PathLike) else data,
)


def option(default: Any, accepted: Accepted, words: str, is_list: bool = False) -> Any:
    """Return a dataclass field that is an option, with its help; one whose type has ``None`` takes that too.

    One that ``is_list`` takes one or several of what is accepted, and holds a list.
    """
    about = {"accepted": accepted, "help": words, "is_list": is_list}
    return field(default=default, repr=accepted is not DATA, metadata=about)


def checked(row: Field[Any], value: Any, name: str) -> Any:
    """Return ``value`` as an option has it, or raise an InputError: its name, what came and what is accepted."""
    accepted: Accepted = row.metadata["accepted"]
    if value is None and NoneType in get_args(row.type):
        return None
    is_list = row.metadata["is_list"]
    values = value if is_list and isinstance(value, list) else [value]
    for one in values:
        if not accepted.is_accepted(one):
            raise InputError(f"{name} is {' '.join(f'{one!r:.80}'.split())}; accepted: {accepted.words}")
    converted = [accepted.convert(one) for one in values]
    return converted if is_list else converted[0]


@dataclass(frozen=True, kw_only=True, eq=False)
class FlatLLMConfig:
    """How to compress a model, and on which text; each field's help says what it means.

    ``cal_dataset`` takes calibration text (a dataset's name, a file or folder, several of them in equal shares as
    ``"wikitext2+c4"``, a list of texts) or token ids (a tensor, rows of one, or an iterable of batches such as a
    ``datasets.Dataset`` or a ``DataLoader``). ``target_sparsity`` is the share **removed** of the decoder layers'
    linear weights; Q and K count in the total even where they stay whole. What is not accepted is an InputError.
    """

    target_sparsity: float = option(
        0.5,
        number("the share of weights to remove, 0 to 1", lambda value: 0 <= value <= 1),
        "share of the decoder layers' linear weights that is removed",
    )
    tolerance: float = option(
        0.96,
        number("a share above 0 and at most 1", lambda value: 0 < value <= 1),
        "share of eigenvalue mass whose rank is logged for comparison; changes nothing",
    )
    cal_dataset: Any = option(
        "wikitext2",
        DATA,
        "text: wikitext2, c4, alpaca, pydocs, a hub id (ID:CONFIGURATION), a file or folder; A+B: both in equal shares",
    )
    cal_nsamples: int | None = option(128, integer(1, MOST), "windows of text; None: 128 for scores, 256 to compress")
    importance_method: str = option(
        "auto",
        one_of(("auto", *names.IMPORTANCE_METHODS)),
        "what ranks are allocated by: angular or gradient scores, or curves of damage; auto is damage for flatllm+, "
        "else angular",
    )
    gradient_nsamples: int = option(
        0,
        integer(0, MOST),
        "windows by whose loss gradients flatllm+ weighs errors: more accurate, for one backward pass (none)",
    )
    preserve_qk_layers: bool | None = option(
        None, SWITCH, "leave Q and K whole; None: unless flatllm+ allocates by damage, where they lose rotary pairs"
    )
    method: str = option("flatllm", one_of(METHODS), "the compression method")
    seqlen: int | None = option(None, integer(2), "tokens per window (4096, or less if the model takes less)")
    batch_size: int | None = option(None, integer(1, MOST), "windows run at a time (about 4096 tokens)")
    seed: int = option(42, integer(0, 2**63 - 1), "seed of the sampling")
    rank_multiple: int | None = option(
        None,
        integer(1),
        "ranks and widths are multiples of this, at the exact target; 1 rounds down, as published "
        "(8 if heads are 64 wide or more, else 1)",
    )
    width_multiple: int | None = option(
        None,
        integer(1),
        "MLP widths are multiples of this, and so is o_proj's input as far as 32: for int4 and its like 32 to 256 "
        "(64 where it costs next to nothing, else the rank's)",
    )
    shape: str = option(
        names.PER_LAYER,
        one_of(names.SHAPES),
        "per-layer: ranks and widths of each layer's own; stock: Q, K, V, O whole and one MLP width, a model of the "
        "dense class that any program loads",
    )
    device: str | None = option(None, DEVICE, f"{names.DEVICE_NAMES}: where layers run (the GPU if any)")
    dataset_root: Path | None = option(None, PATH, "folder with copies of the named datasets and of the tasks' data")
    cache_dir: Path | None = option(None, PATH, "where hub downloads are kept (the hub's own cache)")

    def __post_init__(self) -> None:
        for row in fields(self):
            object.__setattr__(self, row.name, checked(row, getattr(self, row.name), row.name))
        asked = {name: getattr(self, name) for name in ("importance_method", "preserve_qk_layers")}
        object.__setattr__(self, "_asked", asked)
        own = METHODS[self.method].importance_method  # what goes with a method where nothing is asked
        if self.importance_method == "auto":
            object.__setattr__(self, "importance_method", own)
        if self.preserve_qk_layers is None:
            prunes_pairs = own == self.importance_method == names.DAMAGE
            object.__setattr__(self, "preserve_qk_layers", not prunes_pairs)
        if self.shape == names.STOCK:  # also where a config of the other shape was the pattern
            object.__setattr__(self, "preserve_qk_layers", True)

    def changed(self, **changes: Any) -> Self:
        """Return the config with other fields; what nobody has asked for goes with the method again.

        To ``dataclasses.replace`` all fields are asked for.
        """
        return replace(self, **(vars(self)["_asked"] | changes))

    @property
    def keep_ratio(self) -> float:
        """Share of the decoder layers' linear weights that stays."""
        return 1 - self.target_sparsity


@dataclass(frozen=True, kw_only=True, eq=False)
class RunConfig(FlatLLMConfig):
    """What a run from a dense checkpoint to scores or to a compressed checkpoint takes beside the library's options."""

    model: str = option(MISSING, TEXT, "local model folder, GGUF file or hub id")
    eval_dataset: list[str] | None = option(
        None,
        TEXT,
        "one or several texts for perplexity, the main one first (the test split of --dataset)",
        is_list=True,
    )
    eval_nsamples: int | None = option(None, integer(1, MOST), "windows of each such text, from its beginning (all)")
    bi_score: Path | None = option(
        None,
        PATH,
        "folder of importance.json and ranks_<percent>.json, or one such file, saved or used (ranks/<model>)",
    )
    dtype: str = option(
        "auto",
        one_of(("auto", "bfloat16", "float16", "float32", "float64")),
        "type of the weights, also of the result: auto (the checkpoint's own), bfloat16, float16, float32 or float64",
    )
    out_of_core: bool = option(False, SWITCH, "leave the weights on disk also where they fit in half of the memory")
    host_memory_gib: float | None = option(
        None,
        number("a number, 0 to 1e9", lambda value: 0 <= value <= 1e9),
        "host memory to plan with, per process (what is free, shared by the processes)",
    )
    offload_folder: Path | None = option(
        None, PATH, "where hidden states go that memory is too small for (the temporary folder)"
    )
    save_model: Path | None = option(
        None, PATH, "folder for the compressed model, which is not kept without one; for several ratios DIR-10, DIR-20"
    )
    overwrite: bool = option(False, SWITCH, "replace scores that exist, or a model folder that a run wrote")

    @property
    def score_place(self) -> Path:
        """Folder or file of scores and ranks."""
        return self.bi_score or Path("ranks") / names.model_name(self.model)

    @property
    def score_file(self) -> Path:
        """File that scores are written to."""
        place = self.score_place
        return place if place.suffix == ".json" and not place.is_dir() else place / names.IMPORTANCE_FILE

    @property
    def eval_texts(self) -> list[str]:
        """Names or paths of the texts that perplexity is measured on, the main one first."""
        mixtures = self.eval_dataset or [self.cal_dataset]
        return list(dict.fromkeys(name for mixture in mixtures for name in names.text_names(mixture)))
