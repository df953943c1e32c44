"""The text of a record: as it stands, as the Alpaca prompt, or as the chat template has a conversation."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import InputError, door

_OTHERS = ("text", "messages", "conversations", "instruction")  # columns that count before a prompt and its completion
_ROLES = {"human": "user", "gpt": "assistant"}  # what ShareGPT calls them: what templates do


def document_of(record: Any, place: Path | str, number: int, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
    """Return a record's ``text``, its conversation rendered, ``prompt`` and ``completion``, or the Alpaca prompt of it.

    An InputError tells which record holds none of these, or a conversation that the tokenizer has no template for.
    """
    if isinstance(record, str):
        return record
    columns = record if isinstance(record, Mapping) else {"text": record}
    parts: list[Any] = [columns.get("prompt"), columns.get("completion")]
    for kind, whole in ((str, "text"), (list, "messages")):
        if all(isinstance(part, kind) for part in parts) and all(columns.get(other) is None for other in _OTHERS):
            columns = {whole: parts[0] + parts[1]}
    turns = columns.get("conversations") if columns.get("messages") is None else columns["messages"]
    if columns.get("text") is None and isinstance(turns, list):
        if tokenizer is None or tokenizer.chat_template is None:
            raise InputError(f"{place}, record {number} is a conversation; give a tokenizer that has a chat template")
        accepted = "accepted: messages with role and content, or conversations with from and value"
        with door(f"{place}, record {number} does not fit the chat template", accepted):
            return tokenizer.apply_chat_template(list(map(_message, turns)), tokenize=False)
    names = ("text",) if "text" in columns else ("instruction", "input", "output")
    parts = [columns.get(name) for name in names]
    if parts[1:] and parts[1] is None:
        parts[1] = ""
    if not all(isinstance(part, str) for part in parts):
        found = ", ".join(f"{name} ({type(value).__name__})" for name, value in columns.items())
        accepted = "text (str), messages or conversations (list), prompt and completion, or instruction and output"
        raise InputError(f"{place}, record {number} has {found:.200}; accepted: {accepted}")
    return parts[0] if len(parts) == 1 else _alpaca_prompt(*parts)


def alpaca_split(documents: list[str], split: str) -> list[str]:
    """Return the split SliceGPT made: a fifth held out with seed 42, then the first half of that as test."""
    from datasets import Dataset

    with door(f"{len(documents)} records cannot be split as Alpaca's are", "give a longer text"):
        parts = Dataset.from_dict({"text": documents}).train_test_split(test_size=0.2, seed=42)
        part = parts["train"] if split == "train" else parts["test"].train_test_split(test_size=0.5, seed=42)["train"]
    return list(part["text"])


def _message(turn: Any) -> Any:
    """Return a turn with its role and content, which ShareGPT calls from and value."""
    is_message = not isinstance(turn, Mapping) or "from" not in turn
    return turn if is_message else {"role": _ROLES.get(turn["from"], turn["from"]), "content": turn["value"]}


def _alpaca_prompt(instruction: str, given: str, output: str) -> str:
    context, asked = "", f"\n\n### Instruction:\n{instruction}"
    if given:
        context, asked = ", paired with an input that provides further context", f"{asked}\n\n### Input:\n{given}"
    task = f"Below is an instruction that describes a task{context}. Write a response that appropriately completes the"
    return f"{task} request.{asked}\n\n### Response:\n{output}"
