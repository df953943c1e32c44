"""What can be asked for: the one table of options, with each one's default, check and help.

The fields of :class:`FlatLLMConfig` are the library's options, those of :class:`RunConfig` add what a run from
checkpoint to checkpoint takes. Checks, the flags of ``main.py`` and the README's table are made from them.
"""

import os
from collections.abc import Callable, Collection, Mapping, Sized
from dataclasses import MISSING, dataclass, field, fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from .engine.importance import IMPORTANCE_METHODS
from .errors import InputError
from .methods import METHODS
from .utils.devices import DEVICE_NAMES, is_device_name
from .utils.layer_utils import model_name


@dataclass(frozen=True)
class Accepted:
    """What an option takes: in words, as a test, as what makes the field's type of it, and as what reads it.

    ``choices`` are the values where they can be listed; ``parse`` makes a value of a word on the command line.
    """

    words: str
    is_accepted: Callable[[Any], bool]
    convert: Callable[[Any], Any] = lambda value: value
    parse: Callable[[str], Any] = str
    choices: Collection[str] = ()

    def checked(self, name: str, value: Any) -> Any:
        """Return ``value`` converted, or raise an InputError that names the option, what came and what is accepted."""
        if not self.is_accepted(value):
            text = repr(value)
            shown = text if len(text) <= 80 and text.isprintable() else f"a {type(value).__name__}"
            raise InputError(f"{name} is {shown}; accepted: {self.words}")
        return self.convert(value)

    def or_none(self) -> "Accepted":
        """Return what also takes ``None``."""
        return replace(
            self,
            words=f"None or {self.words}",
            is_accepted=lambda value: value is None or self.is_accepted(value),
            convert=lambda value: None if value is None else self.convert(value),
        )


def number(words: str, is_in_range: Callable[[Any], bool]) -> Accepted:
    """Return what takes real numbers in a range."""
    return Accepted(words, lambda n: isinstance(n, Real) and not isinstance(n, bool) and is_in_range(n), float, float)


def integer(least: int, most: int | None = None) -> Accepted:
    """Return what takes integers from ``least`` to ``most``."""
    end = "or more" if most is None else f"to {most}"
    return Accepted(
        f"an integer, {least} {end}",
        lambda n: (
            isinstance(n, Integral) and not isinstance(n, bool) and least <= int(n) and (most is None or int(n) <= most)
        ),
        int,
        int,
    )


def one_of(choices: Collection[str]) -> Accepted:
    """Return what takes one of some words."""
    is_accepted = lambda value: isinstance(value, str) and value in choices  # noqa: E731
    return Accepted(" or ".join(choices), is_accepted, choices=choices)


SWITCH = Accepted("True or False", lambda value: isinstance(value, bool))
PATH = Accepted("a path", lambda value: isinstance(value, str | os.PathLike), Path, Path)
TEXT = Accepted("text", lambda value: isinstance(value, str) and value != "")
DATA = Accepted(
    "a dataset's name, a path, texts, token ids, or batches of them whose number is known",
    lambda data: isinstance(data, os.PathLike | Sized) and not (isinstance(data, str) and data == ""),
    lambda data: os.fspath(data) if isinstance(data, os.PathLike) else data,
)


@dataclass(frozen=True)
class Option:
    """One row of the table: what a field takes, its help, and how the command line has it.

    Attributes:
        flag: Name of the flag without dashes; "" for the field's own, ``None`` for an option of the library alone.
        flag_default: What the command line takes where the flag is not given; ``...`` for the field's default.
        flag_accepted: What the flag takes; ``None`` for what the field takes.
        to_field: What makes the field's value of the flag's.
    """

    accepted: Accepted
    help: str
    flag: str | None = ""
    flag_default: Any = ...
    flag_accepted: Accepted | None = None
    to_field: Callable[[Any], Any] = lambda value: value


def option(default: Any, accepted: Accepted, words: str, flag: str | None = "", **of_flag: Any) -> Any:
    """Return a dataclass field that is an option; ``...`` as default makes it required. See :class:`Option`."""
    row = Option(accepted, words, flag, **of_flag)
    kept = MISSING if default is ... else default
    return field(default=kept, repr=accepted is not DATA, metadata={"option": row})


@dataclass(frozen=True, kw_only=True, eq=False)
class FlatLLMConfig:
    """How to compress a model, and on which text; each field's help says what it means.

    ``cal_dataset`` takes calibration text (a dataset's name, a file or folder, a list of texts) or token ids (a tensor,
    rows of one, or an iterable of batches such as a ``datasets.Dataset`` or a ``DataLoader``). ``target_sparsity`` is
    the share **removed** of the decoder layers' linear weights; Q and K count in the total even where they stay whole.

    Raises:
        InputError: Naming the field, what came and what is accepted.
    """

    target_sparsity: float = option(
        0.5,
        number("the share of weights to remove, 0 to 1", lambda value: 0 <= value <= 1),
        "percentage of the decoder layers' linear weights that is removed",
        "sparsity_ratio",
        flag_default=20,
        flag_accepted=integer(1, 95),
        to_field=lambda percent: percent / 100,
    )
    tolerance: float = option(
        0.96,
        number("a share above 0 and at most 1", lambda value: 0 < value <= 1),
        "share of eigenvalue mass whose rank is logged for comparison; changes nothing",
        "tol",
    )
    cal_dataset: Any = option(
        "wikitext2", DATA, "calibration text: wikitext2, c4, alpaca, pydocs, or a file or folder", "dataset"
    )
    cal_nsamples: int | None = option(
        128, integer(1).or_none(), "windows of text (128 for scores, 256 to compress)", "nsamples", flag_default=None
    )
    importance_method: str = option("angular", one_of(IMPORTANCE_METHODS), "how layers are scored", None)
    preserve_qk_layers: bool = option(
        True,
        SWITCH,
        "prune Q and K too, each kept as two factors, instead of leaving them whole",
        "prune_qk",
        flag_default=False,
        to_field=lambda prune_qk: not prune_qk,
    )
    method: str = option("flatllm", one_of(METHODS), "the compression method", None)
    seqlen: int | None = option(None, integer(2).or_none(), "tokens per window (4096, or less if the model takes less)")
    batch_size: int | None = option(None, integer(1).or_none(), "windows run at a time (about 4096 tokens)")
    seed: int = option(42, integer(0, 2**63 - 1), "seed of the sampling")
    rank_multiple: int | None = option(
        None,
        integer(1).or_none(),
        "ranks and widths are multiples of this, at the exact target; 1 gives the published floors "
        "(8 if heads are 64 wide or more, else 1)",
    )
    device: str | None = option(
        None, Accepted(DEVICE_NAMES, is_device_name).or_none(), f"{DEVICE_NAMES}: where layers run (the GPU if any)"
    )
    dataset_root: Path | None = option(None, PATH.or_none(), "folder with local copies of the named datasets")
    cache_dir: Path | None = option(None, PATH.or_none(), "where hub downloads are kept (the hub's own cache)")

    def __post_init__(self) -> None:
        for row in fields(self):
            value = row.metadata["option"].accepted.checked(row.name, getattr(self, row.name))
            object.__setattr__(self, row.name, value)

    @property
    def keep_ratio(self) -> float:
        """Share of the decoder layers' linear weights that stays."""
        return 1 - self.target_sparsity


@dataclass(frozen=True, kw_only=True, eq=False)
class RunConfig(FlatLLMConfig):
    """What a run from a dense checkpoint to scores or to a compressed checkpoint takes beside the library's options."""

    model: str = option(..., TEXT, "local model folder or hub id")
    eval_dataset: str | None = option(None, TEXT.or_none(), "text for perplexity (the test split of --dataset)")
    bi_score: Path | None = option(
        None, PATH.or_none(), "folder of importance.json and ranks_<percent>.json, or one such file (ranks/<model>)"
    )
    dtype: str = option(
        "auto",
        one_of(("auto", "bfloat16", "float16", "float32", "float64")),
        "type of the weights, in the run and in the result; auto is the checkpoint's own",
    )
    out_of_core: bool = option(False, SWITCH, "leave the weights on disk also where they fit in half of the memory")
    host_memory_gib: float | None = option(
        None,
        number("a number, 0 or more", lambda value: value >= 0).or_none(),
        "host memory to plan with, per process (what is free, shared by the processes)",
    )
    offload_folder: Path | None = option(
        None, PATH.or_none(), "where hidden states go that memory is too small for (the temporary folder)"
    )
    save_model: Path | None = option(None, PATH.or_none(), "folder for the compressed model (a temporary one)")
    overwrite: bool = option(False, SWITCH, "replace scores or a model folder that exist")

    @property
    def score_place(self) -> Path:
        """Folder or file of scores and ranks."""
        return self.bi_score or Path("ranks") / model_name(self.model)

    @property
    def eval_text(self) -> str:
        """Name or path of the text that perplexity is measured on."""
        return self.eval_dataset or self.cal_dataset


def merged_config(config: FlatLLMConfig | None, overrides: Mapping[str, Any]) -> FlatLLMConfig:
    """Return ``config``, or the defaults for ``None``, with some fields replaced.

    Raises:
        InputError: If ``config`` is something else, an option does not exist or a value is unusable.
    """
    known = [row.name for row in fields(FlatLLMConfig)]
    unknown = [repr(name) for name in overrides if name not in known]
    if unknown:
        raise InputError(f"unknown option {', '.join(unknown)}; accepted: {', '.join(known)}")
    # By name: that of another copy of this package in the process is a config too.
    if config is not None and FlatLLMConfig.__name__ not in (kind.__name__ for kind in type(config).__mro__):
        kind = type(config).__name__
        raise InputError(f"config is a {kind}; accepted: a FlatLLMConfig, or none and its fields by name")
    given = {} if config is None else {name: getattr(config, name) for name in known}
    return FlatLLMConfig(**given | dict(overrides))
