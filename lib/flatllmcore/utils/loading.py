"""Models and tokenizers from a local folder or the hub, whose downloads are kept in ``cache_dir``."""

from contextlib import AbstractContextManager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from ..errors import InputError, door
from .layer_utils import dense_dimensions, find_decoder_layers, load_config

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"  # as the model classes of all families name them
_COMPUTED = "rotary_emb.inv_freq"  # in old checkpoints, and never read


def load_model(model: str, *, dtype: str = "auto", cache_dir: Path | None = None) -> PreTrainedModel:
    """Return a causal language model in host memory, every weight read from safetensors, checked and cast."""
    WeightFiles(model, cache_dir).check(empty_causal_lm(load_config(model, cache_dir)))
    with door(f"{model!r} cannot be loaded", "accepted: a model that transformers loads"):
        options = {"dtype": dtype, "cache_dir": cache_dir, "use_safetensors": True}
        return AutoModelForCausalLM.from_pretrained(model, **options).eval()


def empty_causal_lm(config: PretrainedConfig) -> PreTrainedModel:
    """Return the causal language model of a dense or compressed config, on the meta device: shapes and no weights.

    What its decoder layers do not run with, or transformers does not know or has no package for, is an InputError.
    """
    dense_dimensions(config)  # refuses sizes that are none
    with door(f"the model config of {config._name_or_path!r} is unusable", "mend its config.json"):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        model.config.validate()  # again, with the attention that was chosen for it
        states = torch.zeros(1, 2, config.hidden_size, dtype=model.dtype, device="meta")
        rotary = type(model.get_decoder().rotary_emb)(config=model.config)  # not on meta: some look at the positions
        angles = [part.to("meta") for part in rotary(torch.zeros(0, dtype=model.dtype), torch.arange(2)[None])]
        chosen, model.config._attn_implementation = model.config._attn_implementation, "eager"  # it runs anywhere
        with torch.no_grad():
            for layer in find_decoder_layers(model):
                states = layer(states, position_embeddings=angles)
        model.config._attn_implementation = chosen
        return model


def load_tokenizer(model: str, *, cache_dir: Path | None = None) -> PreTrainedTokenizerBase:
    """Return the tokenizer that stands beside a model, and that can be saved again."""
    accepted = "tokenizer.json beside the weights, or tokenizer.model with the packages sentencepiece and protobuf"
    with TemporaryDirectory() as folder, door(f"no usable tokenizer at {model!r}", f"accepted: {accepted}"):
        tokenizer = AutoTokenizer.from_pretrained(model, cache_dir=cache_dir)
        tokenizer.save_pretrained(folder)  # tried now, not after all the work
    return tokenizer


class WeightFiles:
    """Names, shapes and values of a checkpoint's weights, in one safetensors file or sharded, read as asked for."""

    def __init__(self, model: str, cache_dir: Path | None = None) -> None:
        self.model = model
        self._file_of: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        with _naming_checkpoint(model):
            if single := found_file(model, SAFE_WEIGHTS_NAME, cache_dir):  # first, as in transformers
                files = [str(single)]
            else:
                index = cached_file(model, SAFE_WEIGHTS_INDEX_NAME, cache_dir=cache_dir)
                files, _ = get_checkpoint_shard_files(model, index, cache_dir=cache_dir)
            for file in files:
                with safe_open(file, "pt") as weights:
                    for name in weights.keys():  # noqa: SIM118 (not a mapping)
                        self._file_of[name] = file
                        self.shapes[name] = tuple(weights.get_slice(name).get_shape())

    def check(self, skeleton: PreTrainedModel) -> None:
        """Refuse weights that are not exactly the parameters of ``skeleton``, naming the first that is wrong."""
        expected = {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()}  # tied ones once
        found, known = self.shapes, expected.keys() | skeleton.state_dict().keys()
        wrong = {
            "are missing": expected.keys() - found.keys(),
            "have other shapes than config.json says": dict(expected.items() - found.items()),  # where none is missing
            "have no place in the model": [name for name in found.keys() - known if not name.endswith(_COMPUTED)],
        }
        for problem, names in wrong.items():
            if names:
                raise InputError(
                    f"checkpoint {self.model!r} is damaged: {len(names)} weights {problem}, first {min(names)}"
                )
        if HEAD in found and HEAD not in expected and not torch.equal(self.read(EMBEDDINGS), self.read(HEAD)):
            raise InputError(
                f"checkpoint {self.model!r} has an {HEAD} that differs from its embeddings, but tie_word_embeddings "
                "is true in config.json"
            )

    def read(self, name: str, rows: int | None = None) -> Tensor:
        """Return a weight, or its first ``rows``, in memory of its own: the file is closed again."""
        with _naming_checkpoint(self.model), safe_open(self._file_of[name], "pt") as weights:
            part = weights.get_tensor(name) if rows is None else weights.get_slice(name)[:rows]
            return part.clone()


def found_file(model: str, name: str, cache_dir: Path | None) -> Path | None:
    """Return where a file beside a model is, local or from the hub, if there is one."""
    file = cached_file(model, name, cache_dir=cache_dir, _raise_exceptions_for_missing_entries=False)
    return None if file is None else Path(file)


def _naming_checkpoint(model: str) -> AbstractContextManager[None]:
    return door(f"checkpoint {model!r} is missing or damaged", "expected safetensors files")
