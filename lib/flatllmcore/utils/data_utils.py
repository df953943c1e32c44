"""Calibration data as callers have it (names, texts, token ids, batches of them), made windows of real tokens.

Windows are cut from token ids, never from text made of tokens again, so every one has exactly the tokens asked for.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..errors import InputError
from .progress import progress
from .text_sources import TextDataset, load_text

LONGEST_WINDOW = 4096  # the published one
# A tokenizer works with about 550 bytes per token; one call on a whole C4 shard would take 90 GB.
_PIECE_CHARACTERS = 2**24


def sample_documents(
    text: TextDataset, tokenizer: PreTrainedTokenizerBase, nsamples: int, seqlen: int, seed: int
) -> Tensor:
    """Return int64 windows (nsamples, seqlen) that start at random documents and run on through the following ones.

    No token is used twice: the rest of the document that a window ends in stays a document for later windows. Running
    past the last document goes on with the first one left. Documents are tokenised one by one, each with its
    separator, without special tokens, and only when needed.
    """
    documents = text.documents
    can_start = torch.tensor([bool(document.strip()) for document in documents], dtype=torch.bool)
    is_left = torch.ones(len(documents), dtype=torch.bool)
    rests: dict[int, list[int]] = {}
    generator = torch.Generator().manual_seed(seed)
    windows: list[list[int]] = []
    for _ in progress(range(nsamples), "sampling text", "window"):
        starts, left = (is_left & can_start).nonzero().flatten(), is_left.nonzero().flatten()
        if len(starts) == 0:
            raise _too_short(text, nsamples, seqlen, len(windows))
        start = starts[torch.randint(len(starts), (1,), generator=generator)]
        window: list[int] = []
        for document in torch.cat([left[left >= start], left[left < start]]).tolist():
            ids = rests.pop(document, None) or _encode(tokenizer, documents[document] + text.separator)
            missing = seqlen - len(window)
            window += ids[:missing]
            rests[document] = ids[missing:]
            is_left[document] = len(rests[document]) > 0
            if len(window) == seqlen:
                break
        if len(window) < seqlen:
            raise _too_short(text, nsamples, seqlen, len(windows))
        windows.append(window)
    return torch.tensor(windows)


def sample_windows(
    text: TextDataset, tokenizer: PreTrainedTokenizerBase, nsamples: int, seqlen: int, seed: int
) -> Tensor:
    """Return random int64 windows (nsamples, seqlen) of the joined text, without special tokens; they may overlap."""
    ids = _token_ids(text, tokenizer, add_special_tokens=False)
    if len(ids) < seqlen:
        raise _too_short(text, nsamples, seqlen, 0)
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(ids) - seqlen + 1, (nsamples,), generator=generator)
    return ids.unfold(0, seqlen, 1)[starts]


def consecutive_windows(text: TextDataset, tokenizer: PreTrainedTokenizerBase, seqlen: int) -> Tensor:
    """Return the joined text, BOS first where there is one, cut into int64 windows (n, seqlen) without overlap."""
    ids = _token_ids(text, tokenizer, add_special_tokens=True)
    if len(ids) < seqlen:
        raise InputError(
            f"text {text.name!r} ({text.split}) has {len(ids)} tokens, fewer than one window of {seqlen}; "
            "give a longer text or shorter windows"
        )
    return _cut(ids, seqlen)


def calibration_statistics(windows: Tensor) -> dict[str, int]:
    """Return how much text token windows (N, S) hold, and how varied it is."""
    nsamples, seqlen = windows.shape
    distinct = windows.unique().numel()
    return {"nsamples": nsamples, "seqlen": seqlen, "tokens": windows.numel(), "distinct_tokens": distinct}


def read_calibration_data(
    cal_dataset: Any,
    *,
    nsamples: int,
    padding_ids: Sequence[int],
    dataset_root: Path | None = None,
    cache_dir: Path | None = None,
) -> TextDataset | list[Tensor]:
    """Return text to sample windows from, or the first ``nsamples`` rows of token ids, int64 (n,), without padding.

    ``cal_dataset`` is what ``FlatLLMConfig.cal_dataset`` takes; of a text by name or path it is the train split.
    """
    if isinstance(cal_dataset, str):
        return load_text(cal_dataset, "train", dataset_root=dataset_root, cache_dir=cache_dir)
    texts: list[str] = []
    rows: list[Tensor] = []
    for batch in [cal_dataset] if isinstance(cal_dataset, Tensor | Mapping) else cal_dataset:
        found_texts, found_rows = _texts_or_rows(batch, padding_ids)
        texts += found_texts
        rows += found_rows
        if texts and rows:
            raise InputError("the calibration data mix texts and token ids; give one or the other")
        if len(rows) >= nsamples:
            break
    if not texts and not rows:
        raise InputError("the calibration data are empty; accepted: texts, or rows of token ids")
    return rows[:nsamples] or TextDataset("the texts given", "train", texts, "\n\n")


def real_rows(ids: Any, mask: Any, padding_ids: Sequence[int]) -> list[Tensor]:
    """Return rows of token ids, int64 (n,), without padding: where ``mask`` is 0, else ``padding_ids`` at both ends.

    A padding id between real tokens stays: models often pad with the token that ends a text. ``ids`` are (n,) or
    (B, S): a tensor, an array, lists that may differ in length, or a list of one tensor.
    """
    rows, masks = _rows(ids), [] if mask is None else _rows(mask)
    for row in rows:
        if row.is_floating_point() or row.is_complex() or row.dtype is torch.bool or row.ndim != 1:
            raise InputError(
                f"the calibration data hold rows of {row.dtype} and shape {tuple(row.shape)}; "
                "accepted: token ids, which are integers, (n,) or (B, S)"
            )
    if mask is None:
        return [_without_padding(row.long(), padding_ids) for row in rows]
    if [row.shape for row in rows] != [row.shape for row in masks]:
        raise InputError("the attention mask has another shape than the token ids; give one entry of it for each id")
    return [row.long()[is_real.bool()] for row, is_real in zip(rows, masks, strict=True)]


def windows_of_rows(rows: Sequence[Tensor], seqlen: int) -> Tensor:
    """Return rows (n,) joined in order and cut to (N, seqlen), the remainder dropped; rows of ``seqlen`` stay whole."""
    joined = torch.cat(list(rows))
    if not 2 <= seqlen <= len(joined):
        raise InputError(
            f"the calibration data hold {len(joined)} tokens without padding, and a window would have {seqlen}; "
            "give more, or windows of another length, 2 or more"
        )
    return _cut(joined, seqlen)


def padding_ids_of(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> tuple[int, ...]:
    """Return the ids that rows are padded with: the tokenizer's, else the model's, else what ends a text."""
    for ids in (tokenizer and tokenizer.pad_token_id, config.pad_token_id, config.eos_token_id):
        if ids is not None:
            return tuple(ids) if isinstance(ids, list | tuple) else (ids,)
    return ()


def window_length(asked: int | None, longest: int) -> int:
    """Return the tokens per window: as asked, else ``LONGEST_WINDOW`` or what the model takes."""
    if asked is None:
        return min(LONGEST_WINDOW, longest)
    if not 2 <= asked <= longest:
        raise InputError(f"windows of {asked} tokens are out of range; this model takes 2 to {longest} tokens")
    return asked


def check_token_ids(windows: Tensor, vocab_size: int) -> None:
    """Refuse, by an InputError, token ids that the model has no embedding for."""
    for extreme in (windows.min().item(), windows.max().item()):
        if not 0 <= extreme < vocab_size:
            raise InputError(
                f"token id {extreme} is out of range: the model knows 0 to {vocab_size - 1}; "
                "give the tokenizer that belongs to the model"
            )


def _texts_or_rows(batch: Any, padding_ids: Sequence[int]) -> tuple[Sequence[str], list[Tensor]]:
    """Return the texts, or the rows without padding, that a batch holds, in order."""
    mask = None
    if isinstance(batch, Mapping):
        column = next((name for name in ("input_ids", "text") if name in batch), None)
        if column is None:
            raise InputError(
                f"the calibration data have {', '.join(map(repr, batch)) or 'no columns'}; expected the column "
                "'input_ids' or 'text' (of a dataset with splits, give one split)"
            )
        batch, mask = batch[column], batch.get("attention_mask")
    if isinstance(batch, str):
        return [batch], []
    is_texts = isinstance(batch, Sequence) and len(batch) > 0 and isinstance(batch[0], str)
    return (batch, []) if is_texts else ([], real_rows(batch, mask, padding_ids))


def _rows(values: Any) -> list[Tensor]:
    is_list = isinstance(values, Sequence) and len(values) > 0
    if is_list and isinstance(values[0], Tensor):
        if len(values) > 1:  # rows? columns, as torch's default collation makes of lists? ids beside their mask?
            raise InputError(
                f"a batch of the calibration data is a list of {len(values)} tensors, which can mean several things; "
                "give one tensor (B, S), or a mapping with 'input_ids' and, for padding, 'attention_mask'"
            )
        values = values[0]  # of a loader of a TensorDataset
    try:
        of_lists = is_list and isinstance(values[0], Sequence)  # which may differ in length
        rows = [torch.as_tensor(row) for row in values] if of_lists else torch.atleast_2d(torch.as_tensor(values))
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"the calibration data hold {type(values).__name__}; accepted: texts, or token ids") from error
    if len(rows) == 0:
        raise InputError("a batch of the calibration data is empty; accepted: texts, or rows of token ids")
    return [row.cpu() if row.numel() else torch.zeros(0, dtype=torch.int64) for row in rows]  # [] alone would be float


def _without_padding(ids: Tensor, padding_ids: Sequence[int]) -> Tensor:
    real = torch.isin(ids, torch.tensor(padding_ids, dtype=ids.dtype), invert=True).nonzero()
    return ids[real[0] : real[-1] + 1] if len(real) else ids[:0]


def _cut(ids: Tensor, seqlen: int) -> Tensor:
    return ids[: len(ids) // seqlen * seqlen].view(-1, seqlen)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool = False) -> list[int]:
    # verbose: a text longer than the model takes is meant here, so no warning about it.
    options = {"add_special_tokens": add_special_tokens, "return_attention_mask": False, "verbose": False}
    return tokenizer(text, **options)["input_ids"]


def _token_ids(text: TextDataset, tokenizer: PreTrainedTokenizerBase, *, add_special_tokens: bool) -> Tensor:
    """Return the ids of the joined text, (tokens,); special tokens, if asked for, only with its beginning."""
    tokens = []
    characters = sum(map(len, text.documents)) + len(text.separator) * (len(text.documents) - 1)
    with progress(None, "tokenising text", "char", total=characters) as bar:
        for number, piece in enumerate(_pieces(text)):
            ids = _encode(tokenizer, piece, add_special_tokens and number == 0)
            tokens.append(torch.tensor(ids, dtype=torch.int64))
            bar.update(len(piece))
    return torch.cat(tokens)


def _pieces(text: TextDataset) -> Iterator[str]:
    """Yield the joined text, in pieces that end between documents where it is very long."""
    piece: list[str] = []
    characters = 0
    for document in text.documents:
        if characters >= _PIECE_CHARACTERS:
            yield text.separator.join(piece) + text.separator
            piece, characters = [], 0
        piece.append(document)
        characters += len(document) + len(text.separator)
    yield text.separator.join(piece)


def _too_short(text: TextDataset, nsamples: int, seqlen: int, possible: int) -> InputError:
    return InputError(
        f"asked {nsamples} windows of {seqlen} tokens, text {text.name!r} ({text.split}) gives at most {possible}; "
        "give a longer text, fewer windows or shorter ones"
    )
