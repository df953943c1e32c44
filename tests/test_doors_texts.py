"""The door for text: a valid file, or a record, with something in it changed."""

import contextlib
import gzip
import io
import json
import lzma
import random

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from flatllmcore.errors import InputError
from flatllmcore.utils.data_utils import read_calibration_data
from flatllmcore.utils.text_sources import TextDataset, load_text

TEXTS = [f"Über {number} Steine läuft\nder Fluß 😀" for number in range(30)]
LINES = "".join(f'{{"text": {json.dumps(text)}, "url": "u"}}\n' for text in TEXTS).encode()
INSERTED = st.sampled_from(
    [b"\x00", b"\xff", b"\xed\xa0\xbd", b"\\ud83d", b"\n", b"\r\n", b"[" * 2000, b'"', b"{", b"null"]
)


def _parquet() -> bytes:
    rows = io.BytesIO()
    Dataset.from_dict({"text": TEXTS}).to_parquet(rows)
    return rows.getvalue()


FILES = {
    "a.txt": "\n".join(TEXTS).encode(),
    "a.jsonl": LINES,
    "a.json": json.dumps([{"text": text} for text in TEXTS], indent=1).encode(),
    "a.json.gz": gzip.compress(LINES, mtime=0),
    "a.jsonl.xz": lzma.compress(LINES),
    "a.parquet": _parquet(),
}


@st.composite
def changed(draw: st.DrawFn) -> tuple[str, bytes]:
    """A file of TEXTS, cut off, with bytes put into it, or with a few bytes changed."""
    name = draw(st.sampled_from([*FILES]))
    content = bytearray(FILES[name])
    start = draw(st.integers(0, len(content) - 1))
    match draw(st.sampled_from(["cut", "insert", "delete", "change"])):
        case "cut":
            del content[start:]
        case "insert":
            content[start:start] = draw(INSERTED)
        case "delete":
            del content[start : start + draw(st.integers(1, 40))]
        case "change":
            chance = random.Random(draw(st.integers(0, 2**32)))
            for _ in range(draw(st.integers(1, 4))):
                content[chance.randrange(len(content))] = chance.randrange(256)
    return name, bytes(content)


@given(changed())
def test_a_changed_file_gives_its_texts_or_one_line(tmp_path_factory, file):
    """Of lines and records that are not changed none is lost, whatever became of the others."""
    name, content = file
    path = tmp_path_factory.mktemp("texts") / name
    path.write_bytes(content)
    refusal = None
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            documents = load_text(str(path), "train").documents
        except InputError as error:
            refusal = str(error)
    assert said.getvalue() == ""
    if refusal is not None:
        assert str(path) in refusal
        assert "\n" not in refusal
        return
    assert "".join(documents).encode() is not None
    lines = content.split(b"\n")
    if name == "a.txt":
        assert "\n".join(documents) == content.decode()
    elif name in ("a.json.gz", "a.jsonl.xz"):
        assert documents == TEXTS
    elif name == "a.jsonl":
        whole = [text for text, line in zip(TEXTS, LINES.splitlines(), strict=True) if line in lines]
        assert [text for text in documents if text in whole] == whole
        assert len(documents) == len([line for line in lines if line.strip()])


UNFIT = st.sampled_from([None, 5, 1.5, float("nan"), True, b"x", [["a"]], {"a": "b"}, {"text": None}, {"text": 5}])


@given(st.integers(0, len(TEXTS)), UNFIT | st.text(), st.sampled_from([list, "records", "batches", "column"]))
def test_a_changed_text_in_the_library_is_used_or_refused(place, found, form):
    """A text is used; anything else is refused, in the library's every form."""
    texts = [*TEXTS[:place], found, *TEXTS[place:]]
    data = {
        list: texts,
        "records": [{"text": text} for text in texts],
        "batches": [{"text": texts[:9]}, {"text": texts[9:]}],
        "column": {"text": texts},
    }[form]
    if isinstance(found, str):
        assert read_calibration_data(data, 9, ()) == TextDataset("the texts given", "train", texts, "\n\n")
    else:
        with pytest.raises(InputError, match=r"calibration data"):
            read_calibration_data(data, 9, ())
