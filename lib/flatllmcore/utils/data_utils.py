"""Token windows of a text: for calibration, for importance scores and for perplexity.

Windows are cut from token ids, never from text made of tokens again, so that every window has
exactly the tokens asked for, all real.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import InputError
from .progress import progress
from .text_sources import DATASET_NAMES, TextDataset, has_test_split, load_text

__all__ = [
    "DATASET_NAMES",
    "TextDataset",
    "calibration_statistics",
    "consecutive_windows",
    "has_test_split",
    "load_text",
    "sample_documents",
    "sample_windows",
]

# A tokenizer works with about 550 bytes per token; one call on a whole C4 shard would take 90 GB.
_PIECE_CHARACTERS = 2**24


def sample_documents(
    text: TextDataset, tokenizer: PreTrainedTokenizerBase, nsamples: int, seqlen: int, seed: int
) -> Tensor:
    """Return windows that start at random documents and run on through the following ones.

    No token is used twice: the rest of the document that a window ends in stays a document for
    later windows. Running past the last document goes on with the first one left. Documents are
    tokenised one by one, each with its separator, and only when needed.

    Returns:
        Token ids without special tokens, int64, (nsamples, seqlen).

    Raises:
        InputError: If the text is too short for that many windows.
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
    """Return random windows of the joined text; every start is equally likely, and windows may overlap.

    Returns:
        Token ids without special tokens, int64, (nsamples, seqlen).

    Raises:
        InputError: If the text is shorter than a window.
    """
    ids = _token_ids(text, tokenizer, add_special_tokens=False)
    if len(ids) < seqlen:
        raise _too_short(text, nsamples, seqlen, 0)
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(ids) - seqlen + 1, (nsamples,), generator=generator)
    return ids.unfold(0, seqlen, 1)[starts]


def consecutive_windows(text: TextDataset, tokenizer: PreTrainedTokenizerBase, seqlen: int) -> Tensor:
    """Return the joined text cut into windows that do not overlap; the remainder is dropped.

    Returns:
        Token ids, int64, (n, seqlen); the very first is BOS where the tokenizer adds one.

    Raises:
        InputError: If the text is shorter than a window.
    """
    ids = _token_ids(text, tokenizer, add_special_tokens=True)
    count = len(ids) // seqlen
    if count == 0:
        raise InputError(
            f"text {text.name!r} ({text.split}) has {len(ids)} tokens, fewer than one window of {seqlen}; "
            "give a longer text or shorter windows"
        )
    return ids[: count * seqlen].view(count, seqlen)


def calibration_statistics(windows: Tensor) -> dict[str, int]:
    """Return how much text token windows (N, S) hold, and how varied it is."""
    return {
        "nsamples": windows.shape[0],
        "seqlen": windows.shape[1],
        "tokens": windows.numel(),
        "distinct_tokens": windows.unique().numel(),
    }


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool = False) -> list[int]:
    # verbose: a text longer than the model takes is meant here, so no warning about it.
    return tokenizer(text, add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False)[
        "input_ids"
    ]


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
