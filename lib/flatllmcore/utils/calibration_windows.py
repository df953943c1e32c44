"""Calibration data as callers have it (names, texts, token ids, loaders of batches) made windows of real tokens."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from itertools import repeat, tee
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..errors import InputError
from .data_utils import TextDataset, load_text

LONGEST_WINDOW = 4096
TokenRow: TypeAlias = tuple[Tensor, Tensor | None]  # ids (n,) and, where one is given, their mask (n,)

_SEPARATOR = "\n\n"
# Read of a stream for each token asked: English has 4 to 5, so that windows have several places to start from.
_STREAM_CHARACTERS_PER_TOKEN = 16


class Rereadable(Iterable[Any]):
    """What an iterator gives, any number of times; what has been read of it stays in memory."""

    def __init__(self, iterator: Iterator[Any]) -> None:
        (self._start,) = tee(iterator, 1)

    def __iter__(self) -> Iterator[Any]:
        return copy(self._start)


def read_calibration_data(
    cal_dataset: Any,
    *,
    nsamples: int,
    padding_ids: Sequence[int],
    seqlen: int = LONGEST_WINDOW,
    dataset_root: Path | None = None,
    cache_dir: Path | None = None,
) -> TextDataset | list[Tensor]:
    """Return text to sample windows from, or the real tokens of rows of token ids.

    Texts are all taken where their number is known. A stream or a generator is read no further than to 16 characters
    for each token of ``nsamples`` windows, which is text for several times as many.

    Args:
        cal_dataset: What ``FlatLLMConfig.cal_dataset`` takes. Of a named dataset it is the train split.
        nsamples: Windows that are wanted, and the most rows of token ids to take.
        seqlen: Tokens per window.
        padding_ids: What rows given without a mask are padded with.
        dataset_root: As for :func:`load_text`.
        cache_dir: As for :func:`load_text`.

    Returns:
        A text, or rows of int64 (n,) that may differ in length, without padding.

    Raises:
        InputError: If there is no such dataset, or the data hold neither texts nor token ids.
    """
    if isinstance(cal_dataset, str):
        return load_text(cal_dataset, "train", dataset_root=dataset_root, cache_dir=cache_dir)
    is_one_batch = isinstance(cal_dataset, Tensor | Mapping)
    most_characters = None if _has_length(cal_dataset) else nsamples * seqlen * _STREAM_CHARACTERS_PER_TOKEN
    if isinstance(cal_dataset, DataLoader) and cal_dataset.collate_fn is default_collate:
        cal_dataset = map(_uncollated, cal_dataset)
    items = _items([cal_dataset] if is_one_batch else cal_dataset)
    found = list(_taken(items, nsamples, most_characters))
    if not found:
        raise InputError("the calibration data are empty; accepted: texts, or rows of token ids")
    documents = [item for item in found if isinstance(item, str)]
    rows = [real_tokens(*item, padding_ids) for item in found if not isinstance(item, str)]
    if documents and rows:
        raise InputError("the calibration data mix texts and token ids; give one or the other")
    return rows or TextDataset("the texts given", "train", documents, _SEPARATOR)


def token_rows(ids: Any, mask: Any = None) -> Iterator[TokenRow]:
    """Yield the rows of ids (n,) or (B, S), each with its mask.

    Args:
        ids: A tensor, an array, or lists that may differ in length.
        mask: Of the same shape, 0 for padding; ``None`` if there is none.

    Raises:
        InputError: If these are no token ids.
    """
    if isinstance(ids, Sequence) and ids and isinstance(ids[0], Sequence | Tensor):
        if mask is not None and len(mask) != len(ids):
            raise InputError(f"there are {len(ids)} rows of token ids and {len(mask)} of their mask; give one for each")
        for row, row_mask in zip(ids, [None] * len(ids) if mask is None else mask, strict=True):
            yield from token_rows(row, row_mask)
        return
    try:
        tokens = torch.as_tensor(ids).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"the calibration data hold {type(ids).__name__}; accepted: texts, or token ids") from error
    if tokens.shape == (0,):
        tokens = tokens.long()  # an empty line of a text: a row like any other, though a list of nothing has no ids
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype is torch.bool or tokens.ndim not in (1, 2):
        raise InputError(
            f"the calibration data hold {tokens.dtype} of shape {tuple(tokens.shape)}; "
            "accepted: token ids, which are integers, (n,) or (B, S)"
        )
    if tokens.ndim == 2 and tokens.numel() == 0:
        raise InputError(f"the calibration data hold token ids of shape {tuple(tokens.shape)}, so none; give some")
    rows = torch.atleast_2d(tokens.long())
    if mask is None:
        yield from zip(rows, repeat(None))
        return
    masks = torch.as_tensor(mask).cpu()
    if masks.shape != tokens.shape:
        raise InputError(
            f"the attention mask has the shape {tuple(masks.shape)} and the token ids {tuple(tokens.shape)}; "
            "give one entry of the mask for each id"
        )
    yield from zip(rows, masks.reshape(rows.shape), strict=True)


def windows_of_rows(rows: Sequence[Tensor], seqlen: int) -> Tensor:
    """Return the rows joined in order and cut, the remainder dropped; rows of ``seqlen`` tokens stay as they are.

    Args:
        rows: Token ids, (n,) each.
        seqlen: Tokens per window, at least 2.

    Returns:
        int64, (N, seqlen).

    Raises:
        InputError: If there are fewer tokens than one window has, or than 2 in it.
    """
    if seqlen < 2:
        raise InputError(
            f"the longest row of token ids holds {seqlen} tokens without padding, and a window takes 2 or more; "
            "give longer rows, or the seqlen to join them to"
        )
    joined = torch.cat(list(rows))
    if seqlen > len(joined):
        raise InputError(
            f"the calibration data hold {len(joined)} tokens without padding, fewer than one window of {seqlen}; "
            "give more, or shorter windows"
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


def _has_length(data: Any) -> bool:
    try:
        len(data)
    except TypeError:  # also that of a loader over a stream
        return False
    return True


def _taken(items: Iterator[str | TokenRow], nsamples: int, most_characters: int | None) -> Iterator[str | TokenRow]:
    """Yield ``nsamples`` rows of token ids, or texts of ``most_characters`` and a bit more, or all for ``None``."""
    rows = characters = 0
    for item in items:
        yield item
        if isinstance(item, str):
            characters += len(item) + len(_SEPARATOR)
        else:
            rows += 1
        if rows == nsamples or (most_characters is not None and characters >= most_characters):
            return


def _items(batches: Iterable[Any]) -> Iterator[str | TokenRow]:
    """Yield the texts or rows of token ids that batches hold, in order."""
    for batch in batches:
        if isinstance(batch, str):
            yield batch
        elif isinstance(batch, Mapping):
            yield from _items_of_columns(batch)
        elif isinstance(batch, Sequence) and batch and isinstance(batch[0], str):
            yield from batch
        elif isinstance(batch, Sequence) and batch and isinstance(batch[0], Tensor) and batch[0].ndim > 1:
            yield from token_rows(batch[0], _mask_among(batch))  # ids come first in a TensorDataset
        else:
            yield from token_rows(batch, None)


def _uncollated(batch: Any) -> Any:
    """Return a batch of the default collation with its lists of ids as rows.

    That collation turns equally long lists of numbers around: it gives a list of tensors, one per position.
    """
    if isinstance(batch, Mapping):
        return {name: _uncollated(column) for name, column in batch.items()}
    if isinstance(batch, list) and batch and all(isinstance(part, Tensor) and part.ndim == 1 for part in batch):
        return torch.stack(batch, dim=1)
    return batch


def _mask_among(tensors: Sequence[Any]) -> Tensor | None:
    """Return the second tensor if it can only be the mask of the first: of its shape, zeros and ones."""
    ids, *others = tensors
    if others and isinstance(others[0], Tensor) and others[0].shape == ids.shape:
        is_mask = bool(((others[0] == 0) | (others[0] == 1)).all())
        return others[0] if is_mask else None
    return None


def _items_of_columns(batch: Mapping[str, Any]) -> Iterator[str | TokenRow]:
    if "input_ids" in batch:
        yield from token_rows(batch["input_ids"], batch.get("attention_mask"))
    elif "text" in batch:
        yield from [batch["text"]] if isinstance(batch["text"], str) else batch["text"]
    else:
        raise InputError(
            f"the calibration data have {', '.join(map(repr, batch)) or 'no columns'}; expected the column "
            "'input_ids' or 'text' (of a dataset with splits, give one split)"
        )
