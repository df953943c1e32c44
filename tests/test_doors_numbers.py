"""Doors for numbers: files of scores, ranks and shares, and the variables of a launcher, changed anywhere.

What they say is used or refused in one line, in bounded memory; --hypothesis-profile=long looks further.
"""

import json
import resource
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import compute_rank
from flatllmcore.core.importance import ImportanceScores, read_author_numbers
from flatllmcore.core.rank_allocation import ImportancePreservingRankSelector
from flatllmcore.core.rank_files import find_ranks, read_ranks, save_ranks
from flatllmcore.errors import InputError
from flatllmcore.utils.dimensions import ModelDimensions
from flatllmcore.utils.processes import check_launch

T = TypeVar("T")

DIMENSIONS = ModelDimensions("llama", 3, 64, 4, 2, 16, 128)
SCORES = ImportanceScores("tiny", "0", DIMENSIONS, "pydocs", nsamples=1, seqlen=8, seed=42, scores=(0.3, 0.1, 0.2))
SELECTOR = ImportancePreservingRankSelector(DIMENSIONS)
HUGE = "1" + 5000 * "0"  # more digits than Python reads or writes

whole = st.integers(-3, 300) | st.integers(0, 400).map(lambda digits: 10**digits) | st.just("HUGE")
scalars = st.none() | st.booleans() | whole | st.floats() | st.text(max_size=3)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner))
words = st.integers(-1, 4).map(str) | st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=4)


@pytest.fixture(autouse=True, scope="module")
def bounded_memory():
    """Let this process take 2 GiB more than it has: what is tried here stands for more."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    own = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (own + 2**31, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("numbers")


def write_changed(path: Path, content: dict, per_layer: list[str], data: st.DataObject) -> None:
    """Write a file of JSON in which one value, of the file, its dimensions or a layer, is anything."""
    part = data.draw(st.sampled_from([content, content["dimensions"], *(content[name] for name in per_layer)]))
    part[data.draw(st.sampled_from(list(part) if isinstance(part, dict) else range(len(part))))] = data.draw(values)
    path.write_text(json.dumps(content).replace('"HUGE"', HUGE))


def unless_refused(call: Callable[[], T]) -> T | None:
    """Return what a call gives, or None after an error of one line, which does not say how to load a file unsafely."""
    try:
        return call()
    except InputError as error:
        message = str(error)
    assert "\n" not in message
    assert "weights_only" not in message
    return None


@given(st.data())
def test_a_changed_file_of_scores_gives_ranks_or_one_line(folder, data):
    path = folder / "importance.json"
    write_changed(path, json.loads(json.dumps(asdict(SCORES))), ["scores"], data)
    (folder / "ranks_20.json").unlink(missing_ok=True)
    with redirect_stderr(StringIO()) as said:
        status = compute_rank.main(["--no-plot", "--sparsity_ratio", "20", "--bi_score", str(path)])
    error = said.getvalue()
    if status == 0:
        assert error == ""
        assert read_ranks(folder / "ranks_20.json").achieved_sparsity_percent > 15
    else:
        assert status == 2
        assert error.startswith("error: ")
        assert error.count("\n") == 1


@given(st.data())
def test_a_changed_file_of_ranks_gives_ranks_of_the_model_or_one_line(folder, data):
    path = folder / "ranks_20.json"
    save_ranks(SELECTOR.allocate(SCORES.scores, 0.8), path)
    write_changed(path, json.loads(path.read_text()), ["keep", "value_rank", "mlp_width"], data)
    (folder / "importance.json").unlink(missing_ok=True)
    found = unless_refused(
        lambda: find_ranks(path, SELECTOR, "0", 0.8, lambda scores, *_: SELECTOR.allocate(scores, 0.8))
    )
    if found is not None:
        assert found.dimensions == DIMENSIONS
        assert all(1 <= kept.value_rank <= 16 and 1 <= kept.mlp_width <= 128 for kept in found.layers)


@given(st.lists(st.floats(), min_size=1, max_size=5), st.booleans(), st.data())
def test_a_changed_file_of_the_authors_gives_its_numbers_or_one_line(folder, numbers, is_damaged, data):
    path = folder / "bi_score.pt"
    torch.save(numbers, path)
    if is_damaged:
        content = bytearray(path.read_bytes())
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + data.draw(st.integers(0, 50))] = data.draw(st.binary(max_size=8))
        path.write_bytes(content)
    found = unless_refused(lambda: read_author_numbers(path))
    if found is not None:
        assert np.isfinite(found).all()
        assert is_damaged or found == numbers


@given(
    st.dictionaries(st.sampled_from(["WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]), words)
)
def test_changed_variables_of_a_launcher_describe_a_group_or_are_one_line(variables):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        is_group = unless_refused(lambda: check_launch() is None) and int(variables.get("WORLD_SIZE", "1")) > 1
    if is_group:
        assert 0 <= int(variables["RANK"]) < int(variables["WORLD_SIZE"])
        assert 1 <= int(variables.get("LOCAL_WORLD_SIZE", "1")) <= int(variables["WORLD_SIZE"])
        assert variables["MASTER_ADDR"]
