"""Calibration data as callers have it (texts, token ids, batches of them), made windows of real tokens.

Windows are cut from token ids, never from text made of tokens again, so every one has exactly the tokens asked for.
"""

from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle, islice
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..errors import InputError, door
from .documents import document_of
from .progress import progress
from .text_sources import TextDataset

LONGEST_WINDOW = 4096  # the published one
# A tokenizer works with about 550 bytes per token; one call on a whole C4 shard would take 90 GB.
_PIECE_CHARACTERS, _LONGEST_PIECE = 2**22, 2**23


def sample_documents(
    text: TextDataset, tokenizer: PreTrainedTokenizerBase, nsamples: int, seqlen: int, seed: int
) -> Tensor:
    """Return int64 windows (nsamples, seqlen) that start at random documents and run on through the following ones.

    No token is used twice: the rest of the document that a window ends in stays a document for later windows. Running
    past the last document goes on with the first one left. Documents are tokenised one by one, each with its
    separator, without special tokens, and only when needed. More windows of the same seed begin with the same ones.
    """
    can_start = torch.tensor([bool(document.strip()) for document in text.documents], dtype=torch.bool)
    is_left = torch.ones(len(can_start), dtype=torch.bool)
    rests: dict[int, list[int]] = {}
    generator = torch.Generator().manual_seed(seed)
    windows: list[list[int]] = []
    for _ in progress(range(nsamples), "sampling text", "window"):
        window: list[int] = []
        left, starts = is_left.nonzero().flatten(), (is_left & can_start).nonzero().flatten()
        if len(starts) > 0:
            start = starts[torch.randint(len(starts), (1,), generator=generator)]
            left = torch.cat([left[left >= start], left[left < start]])
            for document in left.tolist():
                ids = rests.get(document) or _encode(tokenizer, text.documents[document] + text.separator)
                missing = seqlen - len(window)
                window += ids[:missing]
                rests[document] = ids[missing:]
                is_left[document] = len(ids) > missing
                if len(window) == seqlen:
                    break
        if len(window) < seqlen:
            raise InputError(
                f"asked {nsamples} windows of {seqlen} tokens, text {text.name!r} ({text.split}) gives at most "
                f"{len(windows)}; give a longer text, fewer windows or shorter ones"
            )
        windows.append(window)
    return torch.tensor(windows)


def sample_mixture(
    texts: Sequence[TextDataset], tokenizer: PreTrainedTokenizerBase, nsamples: int, seqlen: int, seed: int
) -> Tensor:
    """Return windows (nsamples, seqlen), text by text, each text's as :func:`sample_documents` makes them.

    Shares are equal, or one window larger for the first texts; one that is there twice has two.
    """
    if nsamples < len(texts):
        raise InputError(f"asked {nsamples} windows of {len(texts)} texts; give more windows, or fewer texts")
    by_name = {text.name: text for text in texts}
    shares = Counter(text.name for text in islice(cycle(texts), nsamples))
    windows = [sample_documents(by_name[name], tokenizer, share, seqlen, seed) for name, share in shares.items()]
    return torch.cat(windows)


def consecutive_windows(
    text: TextDataset, tokenizer: PreTrainedTokenizerBase, seqlen: int, most: int | None = None
) -> Tensor:
    """Return the joined text, BOS first where there is one, cut into int64 windows (n, seqlen) without overlap.

    Of ``most`` windows they are the first; what is far behind them is not tokenised.
    """
    pieces = list(_pieces(text))
    ids = array("q", _leading_ids(tokenizer, pieces[0][:100]))
    for piece in progress(pieces, "tokenising text", "piece"):
        ids.extend(_encode(tokenizer, piece))
        if most is not None and len(ids) >= most * seqlen:
            break
    if len(ids) < seqlen:
        raise InputError(f"text {text.name!r} ({text.split}) has {len(ids)} tokens, fewer than one window of {seqlen}")
    return torch.frombuffer(ids, dtype=torch.int64).unfold(0, seqlen, seqlen)[:most]


def calibration_statistics(windows: Tensor) -> dict[str, int]:
    """Return how much text token windows (N, S) hold, and how varied it is."""
    (nsamples, seqlen), distinct = windows.shape, len(windows.unique())
    return {"nsamples": nsamples, "seqlen": seqlen, "tokens": nsamples * seqlen, "distinct_tokens": distinct}


def read_calibration_data(
    cal_dataset: Any,
    nsamples: int,
    padding_ids: Sequence[int],
    tokenizer: PreTrainedTokenizerBase | None = None,
    seqlen: int | None = None,
) -> TextDataset | list[Tensor]:
    """Return the texts given, to sample windows from, or rows of token ids without padding, from the first on.

    ``cal_dataset`` is what ``FlatLLMConfig.cal_dataset`` takes except a name or path; rows are int64 (n,), ``nsamples``
    of them, or enough for as many windows of ``seqlen`` where that is given. Conversations are rendered by the
    tokenizer's chat template.
    """
    texts: list[str] = []
    rows: list[Tensor] = []
    tokens = 0
    if isinstance(cal_dataset, bytes) or hasattr(cal_dataset, "columns"):  # a table gives its columns, not its rows
        raise InputError(f"the calibration data are a {type(cal_dataset).__name__}; accepted: a list of its texts")
    is_batch = isinstance(cal_dataset, Tensor | Mapping) or _is_row_or_array(cal_dataset)
    for batch in [cal_dataset] if is_batch else cal_dataset:
        found: list[Tensor] = []
        if isinstance(batch, Mapping) and "input_ids" in batch:
            found = real_rows(batch["input_ids"], batch.get("attention_mask"), padding_ids)
        elif (records := _text_records(batch)) is None:
            found = real_rows(batch, None, padding_ids)
        else:
            numbered = enumerate(records, len(texts) + 1)
            texts += [document_of(record, "the calibration data", number, tokenizer) for number, record in numbered]
        rows += found
        tokens += sum(map(len, found))
        if len(rows) >= nsamples and tokens >= nsamples * (seqlen or 0):
            break
    if bool(texts) == bool(rows):
        raise InputError("the calibration data are empty or mix texts and token ids; accepted: texts, or token ids")
    return rows[: None if seqlen else nsamples] or TextDataset("the texts given", "train", texts, "\n\n")


def _is_row_or_array(data: Any) -> bool:
    """Tell whether data are one row of token ids, of any kind of numbers, or a NumPy array of them."""
    first = data[0] if isinstance(data, Sequence) and len(data) > 0 else None
    is_array = getattr(getattr(data, "dtype", None), "kind", None) in ("i", "u")  # NumPy's kinds of integers
    return is_array or isinstance(first, Integral) or getattr(first, "ndim", None) == 0


def _text_records(batch: Any) -> Sequence[Any] | None:
    """Return the records of a batch of texts, usable or not; None where it can only be token ids."""
    if isinstance(batch, Mapping) and isinstance(batch.get("text"), list | tuple):
        return batch["text"]
    if isinstance(batch, Mapping | str | float | None):
        return [batch]
    return batch if isinstance(batch, Sequence) and batch and isinstance(batch[0], str | None) else None


def real_rows(ids: Any, mask: Any, padding_ids: Sequence[int]) -> list[Tensor]:
    """Return rows of token ids, int64 (n,), without padding: where ``mask`` is 0, else ``padding_ids`` at both ends.

    A padding id between real tokens stays: models often pad with the token that ends a text. ``ids`` are (n,) or
    (B, S): a tensor, an array, lists that may differ in length, or a list of one tensor.
    """
    rows, masks = _rows(ids), None if mask is None else _rows(mask)
    if not rows:
        raise InputError("the calibration data, or a batch of them, are empty")
    for row in rows:
        if row.ndim != 1 or (row.is_floating_point() and len(row) > 0):  # a list without ids becomes float
            raise InputError(f"token ids are {row.dtype}, {tuple(row.shape)}; accepted: integers, (n,) or (B, S)")
    if masks is None:
        return [_without_padding(row.long(), padding_ids) for row in rows]
    if [row.shape for row in rows] != [row.shape for row in masks]:
        raise InputError("the attention mask has another shape than the token ids")
    return [row.long()[is_real.bool()] for row, is_real in zip(rows, masks, strict=True)]


def windows_of_rows(rows: Sequence[Tensor], seqlen: int) -> Tensor:
    """Return rows (n,) joined in order and cut to (N, seqlen), the remainder dropped; rows of ``seqlen`` stay whole."""
    joined = torch.cat(list(rows))
    if not 2 <= seqlen <= len(joined):
        found = f"{len(joined)} tokens without padding, for windows of {seqlen}"
        raise InputError(f"the calibration data hold {found}; accepted: 2 or more, and data for one window")
    return joined.unfold(0, seqlen, seqlen)


def padding_ids_of(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> tuple[int, ...]:
    """Return the ids that rows are padded with: the tokenizer's, else the model's, else what ends a text."""
    for ids in (tokenizer and tokenizer.pad_token_id, config.pad_token_id, config.eos_token_id):
        if ids is not None:
            return tuple(ids) if isinstance(ids, list | tuple) else (ids,)
    return ()


def window_length(asked: int | None, longest: int) -> int:
    """Return the tokens per window: as asked, else ``LONGEST_WINDOW`` or what the model takes."""
    length = min(LONGEST_WINDOW, longest) if asked is None else asked
    if not 2 <= length <= longest:
        raise InputError(f"windows of {length} tokens are out of range; this model takes 2 to {longest} tokens")
    return length


def check_token_ids(windows: Tensor, vocab_size: int) -> None:
    """Refuse, by an InputError, token ids that the model has no embedding for."""
    least, most = int(windows.min()), int(windows.max())
    if least < 0 or most >= vocab_size:
        raise InputError(f"token ids {least} to {most} are out of range; the model knows 0 to {vocab_size - 1}")


def _rows(values: Any) -> list[Tensor]:
    if isinstance(values, Sequence) and len(values) == 1 and isinstance(values[0], Tensor):
        values = values[0]  # of a loader of a TensorDataset
    kind = type(values).__name__
    with door(f"no texts or token ids in the calibration data, a {kind}", "accepted: texts, or rows of token ids"):
        if isinstance(values, Sequence) and values and isinstance(values[0], Sequence):  # which may differ in length
            return [torch.as_tensor(row).cpu() for row in values]
        # Refuses lists of several tensors: rows? columns, as torch's default collation makes of lists? ids and mask?
        return list(torch.atleast_2d(torch.as_tensor(values)).cpu())


def _without_padding(ids: Tensor, padding_ids: Sequence[int]) -> Tensor:
    real = torch.isin(ids, torch.tensor(padding_ids, dtype=ids.dtype), invert=True).nonzero()
    return ids[real[0] : real[-1] + 1] if len(real) else ids[:0]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool = False) -> list[int]:
    with door(f"the tokenizer at {tokenizer.name_or_path!r} cannot read the text", "mend its files, or the text"):
        # verbose: a text longer than the model takes is meant here, so no warning about it.
        return tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]


def _leading_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids of special tokens that the tokenizer puts before a text, as BOS; those behind it are left out."""
    whole, plain = _ids(tokenizer, text, add_special_tokens=True), _ids(tokenizer, text)
    starts = range(len(whole) - len(plain), -1, -1)
    return whole[: next((start for start in starts if whole[start : start + len(plain)] == plain), 0)]


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids of a text, piece by piece where it is very long: pieces end with a line, or at the longest."""
    ids: list[int] = []
    start = 0
    while start == 0 or start < len(text):
        end = min(len(text), start + _LONGEST_PIECE)
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        ids += _ids(tokenizer, text[start:end])
        start = max(end, 1)
    return ids


def _pieces(text: TextDataset) -> Iterator[str]:
    """Yield the joined text, in pieces that end between documents where it is very long."""
    piece = ""
    for document in text.documents:
        if len(piece) >= _PIECE_CHARACTERS:
            yield piece
            piece = ""
        piece += document + text.separator
    yield piece.removesuffix(text.separator)
