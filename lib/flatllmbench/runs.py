"""What records say, as typed values: one class for each kind of run, its fields those of the JSON.

A record that lacks a field, or has another type in it, is refused in one line that names file and field.
"""

from collections.abc import Iterable
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TypeVar

from flatllmcore.errors import InputError
from flatllmcore.utils.layer_utils import model_name

from .records import read_records
from .typed_json import read_as

RunT = TypeVar("RunT", bound="Run")
BESIDE_CALIBRATION = ("load", "read", "perplexity", "write")


@dataclass(frozen=True)
class Hardware:
    device: str
    machine: str
    system: str

    def __str__(self) -> str:
        return f"{self.device}, {self.system} {self.machine}"


@dataclass(frozen=True, kw_only=True)
class Run:
    """What every record says."""

    command: str
    versions: dict[str, str]
    hardware: Hardware
    elapsed_s: float


@dataclass(frozen=True)
class ScoringRequest:
    model: str
    dataset: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class Scoring(Run):
    """``main.py --prune_method bi``."""

    request: ScoringRequest
    nsamples: int
    seqlen: int
    scores: list[float]
    stages_s: dict[str, float]
    peak_memory_gib: dict[str, float]

    @property
    def model(self) -> str:
        return model_name(self.request.model)


@dataclass(frozen=True)
class Sizes:
    decoder_linear: int
    total: int


@dataclass(frozen=True)
class Perplexities:
    dataset: str
    seqlen: int
    windows: int
    dense: float
    compressed: float


@dataclass(frozen=True)
class KeptLayer:
    keep: float


@dataclass(frozen=True)
class TaskResult:
    """Accuracies are shares of 1; a group whose tasks have different numbers of examples has no one number."""

    metric: str
    value: float
    samples: int
    num_fewshot: int | None = None
    stderr: float | None = None


@dataclass(frozen=True)
class ZeroShot:
    """``mean_accuracy`` is of the paper's seven tasks, in percent; there is none unless all were run whole."""

    tasks: dict[str, TaskResult]
    mean_accuracy: float | None = None
    limit: float | None = None
    harness: str | None = None


@dataclass(frozen=True)
class CompressionRequest:
    dtype: str
    save_model: str | None = None


@dataclass(frozen=True, kw_only=True)
class Compression(Run):
    """``main.py --prune_method flatllm``; percentages are of the decoder layers' linear weights, removed."""

    request: CompressionRequest
    base_model: str
    sparsity_ratio: float
    achieved_sparsity_percent: float
    rank_multiple: int
    prune_qk: bool
    parameters_before: Sizes
    parameters_after: Sizes
    dataset: str
    nsamples: int
    seqlen: int
    seed: int
    perplexity: Perplexities
    layers: list[KeptLayer]
    stages_s: dict[str, float]
    peak_memory_gib: dict[str, float]
    zero_shot: ZeroShot | None = None

    @property
    def model(self) -> str:
        return model_name(self.base_model)

    @property
    def calibration_s(self) -> float:
        """The run without loading, measuring and saving."""
        return self.elapsed_s - sum(self.stages_s.get(stage, 0.0) for stage in BESIDE_CALIBRATION)

    @property
    def saved_as(self) -> str | None:
        """The name of the folder it saved its model to."""
        return model_name(self.request.save_model) if self.request.save_model else None


@dataclass(frozen=True)
class ModelSizes:
    total: int
    decoder_layers: int


@dataclass(frozen=True, kw_only=True)
class Model:
    """A dense model, or a compressed one and the name of what it was made from."""

    model: str
    base_model: str | None
    achieved_sparsity_percent: float
    parameters: ModelSizes

    @property
    def is_dense(self) -> bool:
        return self.base_model is None and self.achieved_sparsity_percent == 0


@dataclass(frozen=True)
class EvaluationRequest:
    dtype: str


@dataclass(frozen=True, kw_only=True)
class Evaluation(Run):
    """Zero-shot and few-shot accuracy of one model."""

    request: EvaluationRequest
    model: Model
    zero_shot: ZeroShot


@dataclass(frozen=True, kw_only=True)
class TimedModel(Model):
    weight_memory_bytes: int


@dataclass(frozen=True)
class Spread:
    """Median and quartiles over repeats."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Predicted:
    """Ratios that operations (prefill) and bytes (decoding) predict."""

    decode_speedup_bytes: float | None = None
    prefill_speedup_flops: float | None = None


@dataclass(frozen=True)
class Cell:
    """One model at one batch size and length; ratios are dense over compressed, none for the dense model."""

    model: int
    batch_size: int
    prompt_length: int
    new_tokens: int
    repeats: int
    decode_ms_per_token: Spread
    decode_tokens_per_s: float
    kv_cache_bytes: int
    peak_memory_bytes: int | None = None
    prefill_ms: Spread | None = None
    prefill_tokens_per_s: float | None = None
    time_to_first_token_ms: float | None = None
    prefill_speedup: Spread | None = None
    decode_speedup: Spread | None = None
    predicted: Predicted | None = None


@dataclass(frozen=True)
class TimingRequest:
    """``shape`` is the model whose config was taken, with random weights; None where models were loaded."""

    shape: str | None = None


@dataclass(frozen=True, kw_only=True)
class Timing(Run):
    """Speed and memory of a dense model, the first, and compressed ones."""

    request: TimingRequest
    protocol: str
    dtype: str
    attention: str
    compiled: bool
    static_cache: bool
    models: list[TimedModel]
    cells: list[Cell]

    def __post_init__(self) -> None:
        for place, cell in enumerate(self.cells):
            if not 0 <= cell.model < len(self.models):
                raise InputError(f"the field 'cells[{place}].model' is {cell.model} of {len(self.models)}")


KINDS: dict[str, type[Run]] = {"bi": Scoring, "flatllm": Compression, "zero_shot": Evaluation, "speed": Timing}


def read_runs(paths: Iterable[Path]) -> list[Run]:
    """Return what the records in files and folders say.

    Raises:
        InputError: If one cannot be used; the line names the file and, if there is one to blame, the field.
    """
    runs = []
    for path, record in read_records(paths):
        try:
            kind = read_as(str, record.get("kind", MISSING), "kind")
            if kind not in KINDS:
                raise InputError(f"the field 'kind' is {kind!r}; expected one of {', '.join(KINDS)}")
            runs.append(read_as(KINDS[kind], record))
        except InputError as error:
            raise InputError(f"{path} is not a usable record: {error}") from error
    return runs


def of_kind(runs: Iterable[Run], kind: type[RunT]) -> list[RunT]:
    return [run for run in runs if isinstance(run, kind)]
