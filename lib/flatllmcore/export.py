"""Write a dense or compressed model as a GGUF file, which llama.cpp runs.

    python -m flatllmcore.export out/llama-2-7b-20 out/llama-2-7b-20.gguf

Where all MLPs are equally wide the file has the family's own architecture, else `deci`, in which every layer has its
own. llama.cpp knows one width of heads for queries, keys and values, so what attention lost comes back as zeros: logits
are the same but for rounding, the cache and attention as large as the dense model's. Matrices have the model's type,
F32 where that is float64; vectors are F32.
"""

import argparse
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from .config import PATH, TEXT
from .core.rotary_pairs import pairs_are_halves
from .errors import InputError, door, run_program
from .utils.checkpoint import MODEL_CARD, stated_licence
from .utils.files import check_disk_space, check_replaceable, check_writable, replacing
from .utils.gguf_tokenizer import add_tokenizer
from .utils.layer_utils import DecoderModule, dense_dimensions, find_decoder_layers
from .utils.loading import found_file, load_tokenizer, open_checkpoint
from .utils.names import model_name

# llama.cpp's name of each family's architecture, and of one whose MLPs may differ in width.
_ARCHITECTURES: dict[str, tuple[str, str | None]] = {
    "llama": ("llama", "deci"),
    "qwen2": ("qwen2", "deci"),
    **dict.fromkeys(("ernie4_5", "helium", "ministral", "mistral", "seed_oss"), ("llama", "deci")),
    **{name: (name, None) for name in ("cohere2", "exaone4", "gemma2", "granite", "olmo2", "qwen3", "smollm3")},
    "gemma3_text": ("gemma3", None),
    "hunyuan_v1_dense": ("hunyuan-dense", None),
    "olmo3": ("olmo2", None),
}
# Those that rotate rows 2i and 2i+1 of a head together where transformers does not, and take rope_freqs.
_OF_NEIGHBOURS = ("llama", "deci", "granite", "smollm3")
_GEMMA = ("gemma2", "gemma3")  # whose norms transformers multiplies by 1 + weight
_FIELDS = {  # and what the writer calls them
    **{name: name for name in ("attn_logit_softcapping", "final_logit_softcapping", "layer_norm_eps", "logit_scale")},
    "attention_multiplier": "attention_scale",
    "embedding_multiplier": "embedding_scale",
    "logits_scaling": "logit_scale",
    "residual_multiplier": "residual_scale",
    "rms_norm_eps": "layer_norm_rms_eps",
}
_KINDS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_PROJECTION = re.compile(r"(.*\.self_attn)\.(?!o_proj\.bias)([qkvo])_proj\.(?:down\.)?(weight|bias)")


def export_gguf(model: str, file: Path | str, overwrite: bool = False) -> None:
    """Write a model, a folder or a hub id, to a GGUF file; InputError if llama.cpp has nothing that computes the same.

    One weight at a time is in memory; ``file`` is in its place when it is whole.
    """
    file = Path(file)
    check_replaceable(file)
    if file.exists() and not overwrite:
        raise InputError(f"{file} exists; give --overwrite, or another file")
    if file.exists():
        with file.open("rb") as there:
            if there.read(4) != b"GGUF":
                raise InputError(f"{file} is no GGUF file to overwrite; give another file")
    check_writable(file.parent)
    with door("a GGUF file cannot be written", "from the repository: pip install '.[programs]'"):
        import gguf
    skeleton, files, stored = open_checkpoint(model, None)
    dtype = torch.float32 if stored == torch.float64 else stored
    layers: list[DecoderModule] = list(find_decoder_layers(skeleton))
    widths = [layer.mlp.down_proj.in_features for layer in layers]
    architecture = _architecture(skeleton, set(widths))
    writer = gguf.GGUFWriter(None, architecture)
    writer.add_name(model_name(model))
    for name, of in stated_licence(found_file(model, MODEL_CARD, None)).items():
        getattr(writer, f"add_{name}")(of)
    _add_sizes(writer, skeleton.config, widths)
    add_tokenizer(writer, load_tokenizer(model), skeleton.config.vocab_size)
    (key,) = (key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names, factors = gguf.get_tensor_name_map(key, len(widths)), _add_rotary(writer, skeleton)

    def tensors(read: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
        yield from factors.items()
        for name, weight in _dense_shaped(skeleton, read, architecture in _OF_NEIGHBOURS):
            kind = names.get_name(name, (".weight", ".bias"))
            yield kind, weight.to(dtype) if weight.ndim > 1 else weight.float() + (architecture in _GEMMA)

    size = 0
    for name, weight in tensors(skeleton.state_dict().__getitem__):  # on the meta device
        writer.add_tensor_info(name, weight.shape, None, weight.nbytes, gguf.GGMLQuantizationType[_KINDS[weight.dtype]])
        size += weight.nbytes
    check_disk_space(file.parent, size)
    with replacing(file) as lent:
        with door(f"{model!r} cannot be written as GGUF", "accepted: a config whose numbers fit the format"):
            writer.write_header_to_file(Path(lent.name))
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        for _, weight in tensors(lambda name: files.read(name, dtype)):
            with door(f"cannot write {file}", "give a place with more room"):  # of a full disk NumPy gives no number
                writer.write_tensor_data(weight.contiguous().view(torch.uint8).numpy())
        writer.close()


def _architecture(model: PreTrainedModel, widths: set[int]) -> str:
    """Return llama.cpp's architecture for a model of these MLP widths; InputError if none computes what it does."""
    family = dense_dimensions(model.config).architecture
    if family not in _ARCHITECTURES:
        raise InputError(f"GGUF files of {family} are not written; accepted: {', '.join(_ARCHITECTURES)}")
    own, per_layer = _ARCHITECTURES[family]
    chosen = own if len(widths) == 1 else per_layer
    if chosen is None:
        raise InputError(f"llama.cpp has no {own} with MLPs of several widths; compress to one width for all layers")
    if lacking := [what for what, is_asked in _not_computed(model.config, chosen).items() if is_asked]:
        raise InputError(f"llama.cpp has no {chosen} with {lacking[0]}")
    return chosen


def _not_computed(config: PreTrainedConfig, architecture: str) -> dict[str, bool]:
    """Return what llama.cpp's architecture lacks, and whether a config asks for it."""
    sizes, is_gemma, is_tied = dense_dimensions(config), architecture in _GEMMA, config.tie_word_embeddings
    layers, width, window = sizes.num_layers, sizes.head_dim, getattr(config, "sliding_window", None)
    share, has_biases = sizes.hidden_size // sizes.num_heads, architecture in ("deci", "granite", "llama", "qwen2")
    used, activation = (config.hidden_activation, "gelu_pytorch_tanh") if is_gemma else (config.hidden_act, "silu")
    # By its layers it knows the model of 27 billion weights, whose scores have a scale of their own.
    scalar = share if (architecture, layers) in (("gemma2", 46), ("gemma3", 62)) else width
    return {
        f"the activation {used}; accepted: {activation}": used != activation,
        "positions missing in other layers than every fourth": architecture == "smollm3"
        and any(has == (i % 4 == 3) for i, has in enumerate(config.no_rope_layers)),
        "attention_bias": getattr(config, "attention_bias", False) and not has_biases,
        "mlp_bias": getattr(config, "mlp_bias", False) and not has_biases,
        f"tie_word_embeddings = {is_tied}": architecture in (("olmo2",) if is_tied else ("cohere2", "gemma2")),
        f"heads of width {width}; accepted: {share}": width != share and architecture in ("exaone4", "olmo2"),
        # Windows are those of the model of 64 layers, and that has them always.
        f"sliding_window = {window} in {layers} layers": (architecture, window is None) == ("exaone4", layers == 64),
        f"query_pre_attn_scalar other than {scalar}": is_gemma and config.query_pre_attn_scalar != scalar,
        "scores or logits without a cap": architecture == "gemma2"
        and None in (config.attn_logit_softcapping, config.final_logit_softcapping),
        "attention to what comes later": getattr(config, "use_bidirectional_attention", False),
    }


def _add_sizes(writer: Any, config: PreTrainedConfig, widths: list[int]) -> None:
    """Write what llama.cpp reads of a config."""
    sizes, length = dense_dimensions(config), config.max_position_embeddings
    writer.add_block_count(sizes.num_layers)
    window = getattr(config, "sliding_window", None)
    if window and writer.arch in ("cohere2", "exaone4", "gemma2", "gemma3", "olmo2"):
        writer.add_sliding_window(window)
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
        window = None
    # Elsewhere llama.cpp has none, and up to the length of one nothing is out of sight.
    writer.add_context_length(min(length, window or length))
    writer.add_embedding_length(sizes.hidden_size)
    writer.add_feed_forward_length(widths if len(set(widths)) > 1 else widths[0])
    writer.add_head_count(sizes.num_heads)
    writer.add_head_count_kv(sizes.num_kv_heads)
    for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        add(sizes.head_dim)
    writer.add_vocab_size(config.vocab_size)
    for field, name in _FIELDS.items():
        if getattr(config, field, None) is not None:
            getattr(writer, f"add_{name}")(getattr(config, field))


def _add_rotary(writer: Any, model: PreTrainedModel) -> dict[str, Tensor]:
    """Write a model's angles; return the tensor of what frequencies are divided by, (head_dim / 2), if it needs one."""
    from gguf import RopeScalingType

    rotary, rope = type(model.get_decoder().rotary_emb)(config=model.config), model.config.rope_parameters
    whole, local = (rope.get(f"{layers}_attention", rope) for layers in ("full", "sliding"))
    if rotary.rope_type == "ntk_alpha":
        base = whole["rope_theta"] * whole["alpha"] ** (len(rotary.inv_freq) / (len(rotary.inv_freq) - 1))
        whole = local = {"rope_type": "default", "rope_theta": base}
    kind, theta, factor = whole["rope_type"], whole["rope_theta"], whole.get("factor")
    writer.add_rope_freq_base(theta)
    if kind in ("linear", "llama3") and writer.arch in (*_OF_NEIGHBOURS, "exaone4"):
        exponents = torch.arange(len(rotary.inv_freq)) / len(rotary.inv_freq)
        return {"rope_freqs.weight": theta**-exponents / rotary.inv_freq}
    wanted = (writer.arch, kind, whole.get("beta_fast") or 32, whole.get("beta_slow") or 1)
    is_known = kind == "default" or wanted in (("gemma3", "linear", 32, 1), ("olmo2", "yarn", 32, 1))
    if not is_known or local["rope_type"] != "default" or (writer.arch == "olmo2" and local["rope_theta"] != theta):
        raise InputError(f"rotary embeddings of type {kind} are not written for {writer.arch}: {rope}")
    if local is not whole:
        writer.add_rope_freq_base_swa(local["rope_theta"])
    if kind != "default":
        writer.add_rope_scaling_type(RopeScalingType(kind))
        writer.add_rope_scaling_factor(factor)
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(whole["original_max_position_embeddings"])
        writer.add_rope_scaling_attn_factors(rotary.full_attention_attention_scaling / (1 + 0.1 * math.log(factor)))
    return {}


def _dense_shaped(
    model: PreTrainedModel, read: Callable[[str], Tensor], is_of_neighbours: bool
) -> Iterator[tuple[str, Tensor]]:
    """Give every weight as the dense model has it, by its name there: heads are whole, factors one product."""
    for name in dict(model.named_parameters()):  # tied ones once
        match = _PROJECTION.fullmatch(name)
        if match is None:
            if not name.endswith("_proj.up"):
                yield name, read(name)
            continue
        (place, part, kind), weight = match.groups(), read(name)
        attention = model.get_submodule(place)
        width = head_dim = attention.head_dim
        if ".down." in name:
            up = read(f"{place}.{part}_proj.up")  # (H, d, r)
            product = torch.einsum("hdr,hr...->hd...", up.float(), weight.float().unflatten(0, up.shape[::2]))
            weight = product.flatten(0, 1)
        if part in "vo":
            width = getattr(attention, "value_head_dim", head_dim)
        places = torch.arange(width, device=weight.device)[None]
        if part in "qk" and hasattr(attention, "rotary_places"):
            places = read(f"{place}.rotary_places")
        weight = _spread(weight.T, places, head_dim).T if part == "o" else _spread(weight, places, head_dim)
        if part in "qk" and is_of_neighbours and pairs_are_halves(attention):
            weight = weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)
        yield f"{place}.{part}_proj.{kind}", weight


def _spread(rows: Tensor, places: Tensor, head_dim: int) -> Tensor:
    """Return the rows of heads (heads·w, ...) at ``places`` (heads or groups, w) of ``head_dim`` ones, the others 0."""
    heads = rows.unflatten(0, (-1, places.shape[-1]))
    spread = heads.new_zeros(len(heads), head_dim, *heads.shape[2:])
    places = places.repeat_interleave(len(heads) // len(places), dim=0)  # (heads, w)
    spread[torch.arange(len(heads), device=rows.device)[:, None], places] = heads
    return spread.flatten(0, 1)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit status: 0, or 2 after one line on stderr about unusable input."""
    args = parse_arguments(argv)
    logging.set_verbosity_error()
    return run_program(lambda: export_gguf(**vars(args)), args.file)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments of the program."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m flatllmcore.export", description=__doc__, formatter_class=layout)
    parser.add_argument(
        "model", metavar="FOLDER", type=TEXT.convert, help="dense or compressed model: folder, GGUF file or hub id"
    )
    parser.add_argument("file", metavar="FILE.gguf", type=PATH.convert, help="where to write it")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
