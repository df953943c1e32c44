"""The tokenizer of a GGUF file, as llama.cpp reads it."""

import json
import re
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ..errors import InputError, door

_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?"
    r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# llama.cpp's name for how text is cut before merges.
CUTS = {
    ("words",): "gpt-2",
    ("digits", "words"): "smollm",
    (_LLAMA_3,): "llama-bpe",
    (_LLAMA_3.replace("{1,3}", ""),): "qwen2",
    (_TEKKEN,): "tekken",
}


def add_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Add a tokenizer of byte-level or SentencePiece's BPE to a GGUFWriter; InputError if llama.cpp has not its like.

    ``vocab_size`` is the model's: tokens that the tokenizer lacks get names of their own, and added ones that the model
    lacks, as transformers adds to some tokenizers of GGUF files, are left out.
    """
    from gguf import TokenType

    state: Any = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {"model": {"type": "slow"}}
    model, added = state["model"], {token["id"]: token for token in state.get("added_tokens", ())}
    if model["type"] != "BPE":
        raise InputError(f"llama.cpp is not given a tokenizer of type {model['type']}; accepted: BPE")
    texts = {n: text for text, n in tokenizer.get_vocab().items() if n < vocab_size or n not in added}
    if max(texts) >= vocab_size:
        raise InputError(f"the tokenizer has a token {max(texts)}, and the model's vocabulary {vocab_size}")
    tokens = [texts.get(number, f"[PAD{number}]") for number in range(vocab_size)]
    types = dict.fromkeys(texts, TokenType.NORMAL)
    merges = [" ".join(merge) for merge in model["merges"]]
    if model["byte_fallback"]:
        types |= {n: TokenType.BYTE for n, text in texts.items() if re.fullmatch("<0x[0-9A-F]{2}>", text)}
        ranks = {merge.replace(" ", ""): -rank for rank, merge in reversed([*enumerate(merges)])}
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores([float(ranks.get(token, -len(merges))) for token in tokens])
        writer.add_add_space_prefix(tokenizer.tokenize("a")[0].startswith("▁"))
    else:
        normalizer, cut = state["normalizer"], tuple(_cuts(state["pre_tokenizer"]))
        if cut not in CUTS or (normalizer or {}).get("type") not in (None, "NFC"):
            raise InputError(f"no tokenizer of llama.cpp is known to cut text as this one does: {cut}, {normalizer}")
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(CUTS[cut])
        writer.add_token_merges(merges)
    types |= {n: TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED for n, token in added.items()}
    writer.add_token_list(tokens)
    writer.add_token_types([types.get(number, TokenType.UNUSED) for number in range(vocab_size)])
    for name in ("bos", "eos", "unk", "pad"):
        if (number := getattr(tokenizer, f"{name}_token_id")) in texts:
            getattr(writer, f"add_{name}_token_id")(number)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(ids[-1] == tokenizer.eos_token_id)
    if tokenizer.chat_template:
        with door("no chat template to write", "accepted: one, or several with one called default"):
            writer.add_chat_template(tokenizer.get_chat_template())


def _cuts(step: Any) -> list[str]:
    """Return what a pre-tokenizer cuts text by, one after the other."""
    match step:
        case {"type": "Sequence", "pretokenizers": steps}:
            return [cut for each in steps for cut in _cuts(each)]
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
            return [pattern]
        case {"type": "Digits", "individual_digits": True}:
            return ["digits"]
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": is_cutting}:
            return ["words"] if is_cutting else []
    return ["unknown"]
