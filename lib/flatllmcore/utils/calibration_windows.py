"""Calibration data as callers have it (names, texts, token ids, batches of them) made windows of real tokens."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..errors import InputError
from .text_sources import TextDataset, load_text

LONGEST_WINDOW = 4096
TokenRow: TypeAlias = tuple[Tensor, Tensor | None]  # ids (n,) and, where one is given, their mask (n,)


def read_calibration_data(
    cal_dataset: Any,
    *,
    nsamples: int,
    padding_ids: Sequence[int],
    dataset_root: Path | None = None,
    cache_dir: Path | None = None,
) -> TextDataset | list[Tensor]:
    """Return text to sample windows from, or the first ``nsamples`` rows of token ids, int64 (n,), without padding.

    Args:
        cal_dataset: What ``FlatLLMConfig.cal_dataset`` takes. Of a named dataset it is the train split.
        nsamples: The most rows of token ids to take; texts are all taken.
        padding_ids: What rows given without a mask are padded with.
        dataset_root: As for :func:`load_text`, and so is ``cache_dir``.

    Raises:
        InputError: If there is no such dataset, or the data hold neither texts nor token ids.
    """
    if isinstance(cal_dataset, str):
        return load_text(cal_dataset, "train", dataset_root=dataset_root, cache_dir=cache_dir)
    batches = [cal_dataset] if isinstance(cal_dataset, Tensor | Mapping) else cal_dataset
    texts: list[str] = []
    rows: list[Tensor] = []
    for item in (item for batch in batches for item in _items(batch)):
        if isinstance(item, str):
            texts.append(item)
        else:
            rows.append(real_tokens(*item, padding_ids))
        if texts and rows:
            raise InputError("the calibration data mix texts and token ids; give one or the other")
        if len(rows) == nsamples:
            break
    if not texts and not rows:
        raise InputError("the calibration data are empty; accepted: texts, or rows of token ids")
    return rows or TextDataset("the texts given", "train", texts, "\n\n")


def _items(batch: Any) -> Sequence[str | TokenRow]:
    """Return the texts or rows of token ids that a batch holds, in order."""
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
        return [batch]
    is_texts = isinstance(batch, Sequence) and len(batch) > 0 and isinstance(batch[0], str)
    return batch if is_texts else token_rows(batch, mask)


def token_rows(ids: Any, mask: Any = None) -> list[TokenRow]:
    """Return the rows of ids (n,) or (B, S), each with its mask.

    Args:
        ids: A tensor, an array, lists that may differ in length, or a list of one tensor and nothing else.
        mask: Of the same shape, 0 for padding; ``None`` if there is none.

    Raises:
        InputError: If these are no token ids, or the mask has another shape.
    """
    rows = _rows(ids)
    for row in rows:
        if row.is_floating_point() or row.is_complex() or row.dtype is torch.bool or row.ndim != 1:
            raise InputError(
                f"the calibration data hold rows of {row.dtype} and shape {tuple(row.shape)}; "
                "accepted: token ids, which are integers, (n,) or (B, S)"
            )
    masks = None if mask is None else _rows(mask)
    if masks is not None and [row.shape for row in rows] != [row.shape for row in masks]:
        raise InputError("the attention mask has another shape than the token ids; give one entry of it for each id")
    return [(row.long(), masks[number] if masks else None) for number, row in enumerate(rows)]


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


def windows_of_rows(rows: Sequence[Tensor], seqlen: int) -> Tensor:
    """Return rows (n,) joined in order and cut to (N, seqlen), the remainder dropped; rows of ``seqlen`` stay whole.

    Raises:
        InputError: If a window would have fewer than 2 tokens, or more than there are.
    """
    joined = torch.cat(list(rows))
    if not 2 <= seqlen <= len(joined):
        raise InputError(
            f"the calibration data hold {len(joined)} tokens without padding, and a window would have {seqlen}; "
            "give more, or windows of another length, 2 or more"
        )
    count = len(joined) // seqlen
    return joined[: count * seqlen].view(count, seqlen)


def real_tokens(ids: Tensor, mask: Tensor | None, padding_ids: Sequence[int]) -> Tensor:
    """Return a row's ids without its padding: where ``mask`` is 0, else the runs of ``padding_ids`` at both ends.

    A padding id between real tokens stays: models often pad with the token that ends a text.
    """
    if mask is not None:
        return ids[mask.bool()]
    real = torch.isin(ids, torch.tensor(padding_ids, dtype=ids.dtype), invert=True).nonzero()
    return ids[real[0] : real[-1] + 1] if len(real) else ids[:0]


def padding_ids_of(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> tuple[int, ...]:
    """Return the ids that rows are padded with: the tokenizer's, else the model's, else what ends a text.

    The last is what callers pad with where neither names a padding token.
    """
    for ids in (tokenizer and tokenizer.pad_token_id, config.pad_token_id, config.eos_token_id):
        if ids is not None:
            return tuple(ids) if isinstance(ids, list | tuple) else (ids,)
    return ()


def window_length(asked: int | None, longest: int) -> int:
    """Return the tokens per window: as asked, else the published 4096 or what the model takes.

    Raises:
        InputError: If the model takes fewer.
    """
    if asked is None:
        return min(LONGEST_WINDOW, longest)
    if not 2 <= asked <= longest:
        raise InputError(f"windows of {asked} tokens are out of range; this model takes 2 to {longest} tokens")
    return asked


def check_token_ids(windows: Tensor, vocab_size: int) -> None:
    """Refuse token ids that the model has no embedding for.

    Raises:
        InputError: Naming the id.
    """
    for extreme in (windows.min().item(), windows.max().item()):
        if not 0 <= extreme < vocab_size:
            raise InputError(
                f"token id {extreme} is out of range: the model knows 0 to {vocab_size - 1}; "
                "give the tokenizer that belongs to the model"
            )
