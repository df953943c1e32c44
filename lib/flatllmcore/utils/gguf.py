"""GGUF files, dequantised into folders that all else reads: which of them are read is the business of transformers."""

import atexit
import logging
import re
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from huggingface_hub import ModelCardData
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import CONFIG_NAME

from ..errors import InputError, door
from .checkpoint import MODEL_CARD
from .files import check_disk_space, naming_place, temporary_folder
from .layer_utils import WEIGHT_DTYPES, dense_dimensions
from .progress import bars_on_terminals_alone

logger = logging.getLogger(__name__)


def checkpoint_folder(model: str) -> str:
    """Return a model's folder or hub id, or the temporary folder that its GGUF file became.

    A folder stands for the one GGUF file in it, unless a config.json is there too.
    """
    place = Path(model)
    is_bare = place.is_dir() and not (place / CONFIG_NAME).exists()
    files = [file for file in (sorted(place.glob("*")) if is_bare else [place]) if file.suffix == ".gguf"]
    if len(files) > 1:
        raise InputError(f"there are {len(files)} GGUF files in {model}; give one of them, such as {files[0]}")
    if files and files[0].is_file():
        return _dequantised(files[0].resolve(), files[0].stat().st_mtime_ns)
    return model


def _complete(get: Callable[..., Any]) -> Callable[..., Any]:
    """Return the reader's way to get numbers, which raises at the end of the file: its own goes on with empty ones."""

    def get_all(reader: Any, offset: int, dtype: Any, count: int = 1, **order: Any) -> Any:
        found = get(reader, offset, dtype, count, **order)
        if len(found) < count:
            raise ValueError(f"it ends within the {count} numbers at byte {offset}")
        return found

    return get_all


@cache  # of a file as it is now
def _dequantised(file: Path, _modified_ns: int) -> str:
    """Return a checkpoint in float32, whose config says in which type it is meant to be; it goes when the process ends.

    That type is the file's own, or bfloat16 of a quantised one; then the config has in ``rounded_to`` what it was.
    """
    logger.info("dequantising %s", file)
    until_exit = ExitStack()
    atexit.register(until_exit.close)
    folder = until_exit.enter_context(temporary_folder(Path(tempfile.gettempdir())))
    accepted = "accepted: what transformers reads, of a supported family, with the packages gguf and accelerate"
    with door(f"cannot read {file}", accepted), bars_on_terminals_alone():
        import gguf
        from transformers import GgufConfig

        # Or transformers would read the file again for the config, the weights and the tokenizer, for seconds each.
        whole = patch.object(gguf.GGUFReader, "_get", _complete(gguf.GGUFReader._get))
        with whole, patch.object(gguf, "GGUFReader", cache(gguf.GGUFReader)):
            reader = gguf.GGUFReader(str(file))
            tensors, licence = reader.tensors, reader.fields.get("general.license")
            numbers = sum(int(tensor.n_elements) for tensor in tensors)
            check_disk_space(folder, numbers * torch.float32.itemsize)
            given = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
            config = AutoConfig.from_pretrained(**given, trust_remote_code=False)
            dense_dimensions(config)  # refuses other families, and sizes that are none
            with torch.device("meta"):
                made = list(AutoModelForCausalLM.from_config(config, trust_remote_code=False).parameters())
            there, found = (len(tensors), numbers), (len(made), sum(part.numel() for part in made))
            # More where some would be random, fewer where others are left out: rope_freqs.weight makes another model.
            if found != there:
                problem = "it has {} tensors of {} numbers, and transformers makes {} of {}".format(*there, *found)
                raise InputError(f"cannot read {file} ({problem}); {accepted}")
            how = {"config": config, "dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
            model = AutoModelForCausalLM.from_pretrained(**given, **how, trust_remote_code=False)
            tokenizer = AutoTokenizer.from_pretrained(**given, trust_remote_code=False)
    with naming_place(folder):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    kind = Counter(tensor.tensor_type.name for tensor in tensors if len(tensor.shape) > 1).most_common(1)[0][0]
    model.config.dtype = WEIGHT_DTYPES.get(kind, torch.bfloat16)
    if kind not in WEIGHT_DTYPES:
        model.config.rounded_to = f"{re.findall('[0-9]+', kind)[0]} bits ({kind})"
    model.config.save_pretrained(folder)
    if licence is not None:
        (folder / MODEL_CARD).write_text(f"---\n{ModelCardData(license=licence.contents()).to_yaml()}\n---\n")
    return str(folder)
