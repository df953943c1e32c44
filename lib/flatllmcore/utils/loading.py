"""Models and tokenizers from a local folder, a GGUF file, or the hub, whose downloads are kept in ``cache_dir``."""

import hashlib
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.generation import GenerationConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from ..errors import InputError, door
from .dimensions import MOST_LAYERS
from .files import digest, file_digest, naming_place, to_json_bytes
from .gguf import checkpoint_folder
from .layer_utils import WEIGHT_DTYPES, dense_dimensions, stored_tensors
from .names import FAMILY_NAMES

logger = logging.getLogger(__name__)

EMBEDDINGS = "model.embed_tokens.weight"  # as the model classes of all families name them
_COMPUTED = r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$|(^|\.)masked_bias$"  # in old checkpoints, and never read
_TOKENIZER_FILES = (  # all that one of any kind is read from
    *("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "merges.txt"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
)


def load_config(model: str, cache_dir: Path | None = None) -> PretrainedConfig:
    """Return the config of a local folder, a GGUF file or a hub id; of a folder or hub id no weight is read."""
    place = checkpoint_folder(model)
    with door(f"no usable model config at {model!r}", f"give a model of one of the families {', '.join(FAMILY_NAMES)}"):
        fields, _ = PretrainedConfig.get_config_dict(place, cache_dir=cache_dir)
        for name in ("num_hidden_layers", "num_labels"):  # of which transformers makes lists
            if isinstance(count := fields.get(name), int) and count > MOST_LAYERS:
                raise ValueError(f"{name} is {count:,}; accepted: at most {MOST_LAYERS:,}")
        for share in _named(fields, "partial_rotary_factor"):  # angles are made that many times as wide as a head
            if isinstance(share, int | float) and not 0 < share <= 1:
                raise ValueError(f"partial_rotary_factor is {share:g}; accepted: above 0, up to 1")
        return AutoConfig.from_pretrained(place, cache_dir=cache_dir, trust_remote_code=False)


def _named(fields: dict[str, Any], name: str) -> Iterator[Any]:
    """Yield what fields of this name hold, at any depth."""
    for key, value in fields.items():
        yield from [value] * (key == name)
        yield from _named(value, name) if isinstance(value, dict) else ()


def load_model(model: str, *, dtype: str = "auto", cache_dir: Path | None = None) -> PreTrainedModel:
    """Return a causal language model in host memory, every weight read from safetensors, checked and cast."""
    skeleton, files, stored = open_checkpoint(model, cache_dir)
    cast_to = stored if dtype == "auto" else getattr(torch, dtype)
    with door(f"{model!r} cannot be loaded", "accepted: a model that transformers loads"):
        loaded = type(skeleton).from_pretrained(
            None,  # given a folder it would look for weights by itself, and add an adapter that lies beside them
            config=skeleton.config,
            dtype=cast_to,
            state_dict={name: files.read(name, cast_to) for name in stored_tensors(skeleton)},
            generation_config=skeleton.generation_config,
        )
    loaded.name_or_path = loaded.config.name_or_path = ""  # and not "None", which PEFT looks for on the hub
    return loaded


def open_checkpoint(model: str, cache_dir: Path | None) -> tuple[PreTrainedModel, "WeightFiles", torch.dtype]:
    """Return a checkpoint's model on the meta device, and its weights with their type, checked against each other."""
    skeleton, files = empty_causal_lm(load_config(model, cache_dir)), WeightFiles(model, cache_dir)
    if generation_file := found_file(model, GENERATION_CONFIG_NAME, cache_dir):
        with door(f"{generation_file} is unusable", "mend it, or delete it"):
            skeleton.generation_config = GenerationConfig.from_pretrained(generation_file.parent)
    return skeleton, files, files.check(skeleton)


def empty_causal_lm(config: PretrainedConfig) -> PreTrainedModel:
    """Return the causal language model of a dense or compressed config, on the meta device: shapes and no weights.

    What its decoder does not run with, or transformers does not know or has no package for, is an InputError.
    """
    dense_dimensions(config)  # refuses sizes that are none
    with door(f"the model config of {config._name_or_path!r} is unusable", "mend its config.json"):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        model.config.validate()  # again, with the attention that was chosen for it
        decoder = model.get_decoder()
        rotary = type(decoder.rotary_emb)(config=model.config)  # not on meta: some look at the positions
        example = torch.zeros(0, dtype=model.dtype), torch.arange(2)[None]
        kind = getattr(rotary, "layer_types", ())[:1]  # some turn each kind of layer by angles of its own
        angles = [part.to("meta") for part in rotary(*example, *kind)]
        chosen, model.config._attn_implementation = model.config._attn_implementation, "eager"  # it runs anywhere
        with torch.no_grad(), patch.object(decoder.rotary_emb, "forward", lambda *_, **__: angles):
            mask = torch.zeros(1, 1, 2, 2, device="meta")  # given, or the values of the tokens would be looked at
            decoder(torch.zeros(1, 2, dtype=torch.long, device="meta"), attention_mask=mask, use_cache=False)
        model.config._attn_implementation = chosen
        return model


def load_tokenizer(model: str, *, cache_dir: Path | None = None) -> PreTrainedTokenizerBase:
    """Return the tokenizer that stands beside a model, and that can be saved again."""
    accepted = "tokenizer.json beside the weights, or tokenizer.model with the packages sentencepiece and protobuf"
    place = checkpoint_folder(model)
    if found_file(model, CONFIG_NAME, cache_dir):
        load_config(model, cache_dir)  # before transformers reads it, whatever its sizes
    with TemporaryDirectory() as folder, door(f"no usable tokenizer at {model!r}", f"accepted: {accepted}"):
        tokenizer = AutoTokenizer.from_pretrained(place, cache_dir=cache_dir, trust_remote_code=False)
        with naming_place(Path(folder)):
            tokenizer.save_pretrained(folder)  # tried now, not after all the work
        if getattr(getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None), "dropout", None):
            raise ValueError("it merges at random; take the dropout out of its model")
    return tokenizer


def save_whole(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str, folder: Path) -> None:
    """Save a model and its tokenizer with the generation config beside ``source``.

    That as it is: transformers reads some that it does not write.
    """
    generation_file = found_file(source, GENERATION_CONFIG_NAME, None)
    model.generation_config = GenerationConfig() if generation_file else model.generation_config
    with naming_place(folder):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if generation_file:
            shutil.copyfile(generation_file, folder / GENERATION_CONFIG_NAME)


def tokenizer_digest(model: str, cache_dir: Path | None = None) -> str:
    """Return the SHA-256 of the files that the tokenizer beside a model is read from."""
    found = {name: found_file(model, name, cache_dir) for name in _TOKENIZER_FILES}
    return digest(to_json_bytes({name: file_digest(file) for name, file in found.items() if file}))


class WeightFiles:
    """Names, shapes and values of a checkpoint's weights, in one safetensors file or sharded, read as asked for."""

    def __init__(self, model: str, cache_dir: Path | None = None) -> None:
        self.model = model
        self._stored: dict[str, tuple[str, str, str]] = {}  # file, name there, and type as safetensors spells it
        self.shapes: dict[str, tuple[int, ...]] = {}
        with _naming_checkpoint(model):
            if single := found_file(model, SAFE_WEIGHTS_NAME, cache_dir):  # first, as in transformers
                files = [str(single)]
            else:
                place = checkpoint_folder(model)
                index = cached_file(place, SAFE_WEIGHTS_INDEX_NAME, cache_dir=cache_dir)
                files, _ = get_checkpoint_shard_files(place, index, cache_dir=cache_dir)
            for file in files:
                if not Path(file).is_file():
                    raise InputError(f"checkpoint {model!r} is damaged: {file} is no file")
                with safe_open(file, "pt") as weights:
                    for name in weights.keys():  # noqa: SIM118 (not a mapping)
                        self._stored[name] = file, name, weights.get_slice(name).get_dtype()
                        self.shapes[name] = tuple(weights.get_slice(name).get_shape())
            if found_file(model, "adapter_config.json", cache_dir):
                logger.warning("the adapter beside the weights of %s is not used, unless it is merged into them", model)

    def check(self, skeleton: PreTrainedModel) -> torch.dtype:
        """Refuse weights that are not exactly those ``skeleton`` has, naming the first that is wrong.

        They have its names from then on, and its config no ``quantization_config``. Returns their type, as it says or
        the embeddings have it.
        """
        self._name_as_in(skeleton)
        weights = stored_tensors(skeleton)
        expected = {name: tuple(weight.shape) for name, weight in weights.items()}
        found, known = self.shapes, expected.keys() | skeleton.state_dict().keys()
        of_places = {name for name, weight in weights.items() if not weight.is_floating_point()}
        kinds = {name: kind for name, (_, _, kind) in self._stored.items()}
        odd = {name: kind for name, kind in kinds.items() if name not in of_places and kind not in WEIGHT_DTYPES}
        mistyped = {name: kinds[name] for name in kinds.keys() & of_places if kinds[name] != "I64"}
        wrong = {
            f"are {', '.join(sorted(set(odd.values())))}, not {', '.join(WEIGHT_DTYPES)}": odd,
            f"are {', '.join(sorted(set(mistyped.values())))}, not I64": mistyped,
            "are missing": expected.keys() - found.keys(),
            "have other shapes than config.json says": dict(expected.items() - found.items()),  # where none is missing
            "have no place in the model": found.keys() - known,
        }
        stated = getattr(skeleton.config, "quantization_config", None)
        method = stated.get("quant_method", "some method") if isinstance(stated, dict) else stated
        state = f"is quantised by {method}" if method else "is damaged"
        if method == "bitnet":  # which rounds what is stored when it runs: another model
            raise InputError(f"checkpoint {self.model!r} {state}; accepted: one that is not quantised")
        for problem, names in wrong.items():
            if names:
                first = min(names)
                raise InputError(f"checkpoint {self.model!r} {state}: {len(names)} weights {problem}, first {first}")
        for tied, original in skeleton.all_tied_weights_keys.items():
            if tied in found and self.digest(original) != self.digest(tied):
                problem = f"{tied} differs from its embeddings, but tie_word_embeddings is true in config.json"
                raise InputError(f"checkpoint {self.model!r}: {problem}")
        width = dense_dimensions(skeleton.config).head_dim
        for name in of_places:
            places = self.read(name, torch.int64)
            if not (places.min() >= 0 and places.max() < width and places.sort().values.diff().all()):
                problem = f"{name} has places {places.min()} to {places.max()} in heads of {width}, each once"
                raise InputError(f"checkpoint {self.model!r} is damaged: {problem}")
        if stated is not None:
            logger.warning("%s is not quantised, though its config.json says so (%s): left out", self.model, method)
        vars(skeleton.config).pop("quantization_config", None)
        return skeleton.config.dtype or WEIGHT_DTYPES[self._stored[EMBEDDINGS][2]]

    def _name_as_in(self, skeleton: PreTrainedModel) -> None:
        """Name weights as transformers does, if they are a base model's or stand for a tied pair; leave out buffers."""
        prefix, free = f"{skeleton.base_model_prefix}.", skeleton.state_dict().keys() - self.shapes.keys()
        ignored = re.compile("|".join([_COMPUTED, *(skeleton._keys_to_ignore_on_load_unexpected or ())]))
        names = {n: prefix + n if prefix + n in free else n for n in self.shapes if not ignored.search(n)}
        for tied, original in skeleton.all_tied_weights_keys.items():
            if original not in names.values() and tied in names:
                names[tied] = original
        self.shapes = {name: self.shapes[stored] for stored, name in names.items()}
        self._stored = {name: self._stored[stored] for stored, name in names.items()}

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """Return a weight in ``dtype``, or whole numbers as they are, in memory of its own: the file is closed."""
        with self._mapped(name) as weight:
            if not weight.is_floating_point():
                return weight.clone()
            found = weight.to(dtype, copy=True)
            is_narrower = torch.finfo(dtype).max < torch.finfo(weight.dtype).max
            if is_narrower and not torch.stack(found.aminmax()).isfinite().all():
                raise InputError(f"{name} of {self.model!r} is not finite in {dtype}; a wider dtype may help")
        return found

    def digest(self, name: str) -> str:
        """Return the SHA-256 of a weight as it is stored, type and shape included; no copy of it is made."""
        sha256 = hashlib.sha256(f"{self._stored[name][2]} {self.shapes[name]}".encode())
        with self._mapped(name) as weight:
            sha256.update(weight.flatten().view(torch.uint8).numpy().data)
        return sha256.hexdigest()

    @contextmanager
    def _mapped(self, name: str) -> Iterator[Tensor]:
        file, stored_name, _ = self._stored[name]
        with _naming_checkpoint(self.model), safe_open(file, "pt") as weights:
            yield weights.get_tensor(stored_name)


def found_file(model: str, name: str, cache_dir: Path | None) -> Path | None:
    """Return where a file beside a model is, local or from the hub, if there is one."""
    place = checkpoint_folder(model)
    with door(f"{name} of {model!r} cannot be looked for", "give a folder, or mend what keeps the hub away"):
        file = cached_file(place, name, cache_dir=cache_dir, _raise_exceptions_for_missing_entries=False)
    return None if file is None else Path(file)


def _naming_checkpoint(model: str) -> AbstractContextManager[None]:
    return door(f"checkpoint {model!r} is missing or damaged", "expected safetensors files")
