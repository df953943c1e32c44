"""Models and tokenizers from a local folder or the hub, whose downloads are kept in ``cache_dir``."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from ..errors import InputError

FINGERPRINT_ROWS = 16


def load_model(model: str, *, dtype: str = "auto", cache_dir: Path | None = None) -> PreTrainedModel:
    """Return a causal language model in host memory, every weight read from safetensors, checked and cast."""
    chosen: Any = dtype if dtype == "auto" else getattr(torch, dtype)
    with _naming_checkpoint(model):
        loaded, info = AutoModelForCausalLM.from_pretrained(
            model,
            dtype=chosen,
            cache_dir=cache_dir,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            output_loading_info=True,
        )
    check_weights(model, info)
    return loaded.eval()


def check_weights(model: str, info: Mapping[str, Any]) -> None:
    """Refuse, naming the first that is wrong, weights that are not exactly those a checkpoint's config asks for."""
    for kind, problem in (
        ("missing_keys", "are missing"),
        ("mismatched_keys", "have other shapes than its config.json says"),
        ("unexpected_keys", "have no place in the model its config.json describes"),
    ):
        names = sorted(key if isinstance(key, str) else key[0] for key in info[kind])
        if names:
            raise InputError(f"checkpoint {model!r} is damaged: {len(names)} weights {problem}, first {names[0]}")


def empty_causal_lm(config: PretrainedConfig) -> PreTrainedModel:
    """Return the causal language model of a dense or compressed config, on the meta device: shapes and no weights."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (KeyError, ValueError) as error:
        raise InputError(f"the model config asks for {error}, which transformers has not; mend config.json") from error


def generation_config_file(model: str, cache_dir: Path | None = None) -> Path | None:
    """Return the ``generation_config.json`` beside a model, local or on the hub, if it has one."""
    found = _found_file(model, GENERATION_CONFIG_NAME, cache_dir)
    return None if found is None else Path(found)


def load_tokenizer(model: str, *, cache_dir: Path | None = None) -> PreTrainedTokenizerBase:
    """Return the tokenizer that stands beside a model."""
    try:
        return AutoTokenizer.from_pretrained(model, cache_dir=cache_dir)
    except Exception as error:  # damaged files raise KeyError, and the tokenizers library Exception itself
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"no usable tokenizer at {model!r} ({reason}); expected one beside the weights") from error


def weights_fingerprint(leading_rows: Iterable[Tensor]) -> str:
    """Return 16 hexadecimal digits that tell a model's weights from another's of the same shape.

    A digest of signs, in the first ``FINGERPRINT_ROWS`` rows of every matrix in the order of the model's parameters:
    they are what loading the same checkpoint in another dtype leaves alone, and training or a merged adapter does not.
    """
    digest = hashlib.sha256()
    for rows in leading_rows:
        digest.update(rows.signbit().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


class WeightFiles:
    """Names, shapes and values of a checkpoint's weights, in one safetensors file or sharded, read as asked for."""

    def __init__(self, model: str, cache_dir: Path | None = None) -> None:
        self.model = model
        self._file_of: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        with _naming_checkpoint(model):
            for file in _weight_files(model, cache_dir):
                with safe_open(file, "pt") as weights:
                    for name in weights.keys():  # noqa: SIM118 (not a mapping)
                        self._file_of[name] = file
                        self.shapes[name] = tuple(weights.get_slice(name).get_shape())

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype of the first weight of floating-point numbers."""
        for rows in self.leading_rows(self._file_of, 0):
            if rows.is_floating_point():
                return rows.dtype
        raise InputError(f"checkpoint {self.model!r} has no floating-point weights")

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return weights by name, in memory of their own: the files are closed again."""
        with self._open(names) as found:
            return {name: weights.get_tensor(name).clone() for name, weights in found.items()}

    def leading_rows(self, names: Iterable[str], count: int) -> Iterator[Tensor]:
        """Yield the first ``count`` rows of each weight."""
        with self._open(names) as found:
            for name, weights in found.items():
                yield weights.get_slice(name)[:count].clone()

    @contextmanager
    def _open(self, names: Iterable[str]) -> Iterator[Mapping[str, Any]]:
        """Lend the open file of each name."""
        file_of = {name: self._file_of[name] for name in names}
        with _naming_checkpoint(self.model), ExitStack() as stack:
            opened = {file: stack.enter_context(safe_open(file, "pt")) for file in set(file_of.values())}
            yield {name: opened[file] for name, file in file_of.items()}


def _weight_files(model: str, cache_dir: Path | None) -> list[str]:
    """Return the one file, or else the shards: in the order in which transformers looks for them."""
    single = _found_file(model, SAFE_WEIGHTS_NAME, cache_dir)
    if single is not None:
        return [single]
    index = cached_file(model, SAFE_WEIGHTS_INDEX_NAME, cache_dir=cache_dir)
    return get_checkpoint_shard_files(model, index, cache_dir=cache_dir)[0]


def _found_file(model: str, name: str, cache_dir: Path | None) -> str | None:
    return cached_file(model, name, cache_dir=cache_dir, _raise_exceptions_for_missing_entries=False)


@contextmanager
def _naming_checkpoint(model: str) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, ValueError, KeyError) as error:  # the latter two: of a damaged index
        reason = str(error).splitlines()[0]
        raise InputError(
            f"checkpoint {model!r} is missing or damaged ({reason}); expected safetensors files"
        ) from error
