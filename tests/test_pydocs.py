import pytest

from flatllmcore.utils import pydocs
from flatllmcore.utils.data_utils import has_test_split, load_text
from flatllmcore.utils.pydocs import pydocs_documents, pydocs_sources


def paragraphs(documents: list[str]) -> list[str]:
    return [paragraph for document in documents for paragraph in document.split("\n\n")]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and little to parse: the help topics and one small package."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(pydocs, "PACKAGES", ("hypothesis",))
    roots = list(pydocs._roots())
    monkeypatch.setattr(pydocs, "_roots", lambda: [root for root in roots if root[0] == "hypothesis"])
    pydocs._documents.cache_clear()
    yield tmp_path
    pydocs._documents.cache_clear()


def test_no_paragraph_stands_in_both_splits_or_twice(cache):
    train, test = (paragraphs(pydocs_documents(split)) for split in ("train", "test"))
    assert len(train) > len(test) > 0
    assert len(set(train + test)) == len(train) + len(test)


def test_documents_from_the_cache_equal_parsed_ones(cache):
    parsed = pydocs._parsed_documents()
    first = pydocs_documents("train"), pydocs_documents("test")
    assert sum(map(len, first)) == len(parsed)
    (file,) = (cache / "flatllmcore").iterdir()
    written = file.stat().st_mtime_ns
    pydocs._documents.cache_clear()
    assert (pydocs_documents("train"), pydocs_documents("test")) == first
    assert {text for _, text in parsed} == {*first[0], *first[1]}
    assert file.stat().st_mtime_ns == written


def test_parsing_again_gives_the_same_documents_in_the_same_order(cache):
    assert pydocs._parsed_documents() == pydocs._parsed_documents()


def test_paragraphs_are_prose(cache):
    for paragraph in paragraphs(pydocs_documents("train")):
        assert ">>>" not in paragraph
        assert len(paragraph.split()) >= 6


def test_sources_are_named_with_versions(cache):
    assert pydocs_sources().keys() == {"python", "hypothesis"}


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match=r"train, test; got 'validation'"):
        pydocs_documents("validation")


def test_the_text_is_loaded_by_its_name(cache):
    text = load_text("pydocs", "test")
    assert (text.name, text.split, text.separator) == ("pydocs", "test", "\n\n")
    assert text.documents == pydocs_documents("test")
    assert has_test_split("pydocs")


@pytest.mark.slow
def test_the_whole_text_has_millions_of_characters_and_disjoint_splits(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pydocs._documents.cache_clear()
    train, test = (paragraphs(pydocs_documents(split)) for split in ("train", "test"))
    pydocs._documents.cache_clear()
    assert sum(map(len, train)) > 3_000_000
    assert sum(map(len, test)) > 30_000
    assert set(train).isdisjoint(test)
