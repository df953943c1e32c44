"""The options: what each takes, and what is said of what it does not."""

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from flatllmcore import FlatLLMConfig, InputError
from flatllmcore.config import RunConfig
from flatllmcore.utils.names import IMPORTANCE_METHODS


def test_the_defaults_are_the_documented_ones():
    """Oracle: the table of options in the flatllmcore user document."""
    config = FlatLLMConfig()
    assert (config.target_sparsity, config.tolerance, config.cal_dataset) == (0.5, 0.96, "wikitext2")
    assert (config.cal_nsamples, config.importance_method, config.preserve_qk_layers) == (128, "angular", True)


def test_the_importance_methods_are_those_that_exist():
    for name in IMPORTANCE_METHODS:
        assert FlatLLMConfig(importance_method=name).importance_method == name
    with pytest.raises(InputError, match=rf"accepted: auto or {' or '.join(IMPORTANCE_METHODS)}$"):
        FlatLLMConfig(importance_method="random")


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("target_sparsity", (-0.01, 1.01, 50, True, "0.5", math.nan, None)),
        ("tolerance", (0, 1.01)),
        ("cal_dataset", ("", 7, iter("abc"), None)),
        ("cal_nsamples", (0, 12.5, np.float64(12), True)),
        ("preserve_qk_layers", ("no",)),
        ("method", ("nosuch", None)),
        ("seqlen", (1,)),
        ("batch_size", (0, 10**20)),
        ("seed", (-1, 2**63)),
        ("rank_multiple", (0,)),
        ("device", (0, "gpu", "cuda:", "CPU", "mps")),
        ("dataset_root", (3,)),
    ],
)
def test_an_unusable_value_is_refused_by_name_in_one_line(field, values):
    for value in values:
        with pytest.raises(InputError) as caught:
            FlatLLMConfig(**{field: value})
        assert str(caught.value).startswith(f"{field} is {value!r}; accepted: ")
        assert "\n" not in str(caught.value)


def test_what_nobody_has_asked_for_goes_with_a_changed_method():
    """As with one that is asked for at once: damage is what flatllm+ allocates by, and pairs go of Q and K."""
    for asked, expected in (
        ({}, ("damage", False)),
        ({"importance_method": "angular"}, ("angular", True)),
        ({"preserve_qk_layers": True}, ("damage", True)),
    ):
        for config in (FlatLLMConfig(**asked).changed(method="flatllm+"), FlatLLMConfig(**asked, method="flatllm+")):
            assert (config.importance_method, config.preserve_qk_layers) == expected
    stock = FlatLLMConfig(shape="stock", method="flatllm+")  # in which Q and K stay whole
    assert (stock.preserve_qk_layers, stock.changed(shape="per-layer").preserve_qk_layers) == (True, False)


def test_large_values_are_cut_in_errors_and_not_printed():
    with pytest.raises(InputError, match=rf"^seed is tensor\(.{{50,80}}; accepted: an integer, 0 to {2**63 - 1}$"):
        FlatLLMConfig(seed=torch.zeros(300, 300))
    for data in (torch.zeros(300, 300).long(), ["text"] * 100_000):
        assert len(repr(FlatLLMConfig(cal_dataset=data))) < 500


@pytest.mark.parametrize("target", [0, 0.0, 1, 1.0])
def test_the_ends_of_the_documented_range_are_targets(target):
    config = FlatLLMConfig(target_sparsity=target)
    assert (config.target_sparsity, config.keep_ratio) == (target, 1 - target)


@pytest.mark.parametrize(
    ("field", "value", "plain"),
    [
        ("target_sparsity", Fraction(1, 4), 0.25),
        ("tolerance", 1, 1.0),
        ("cal_nsamples", np.int64(12), 12),
        ("cal_nsamples", None, None),
        ("device", "cuda:15", "cuda:15"),  # named before it is looked for
        ("dataset_root", "text", Path("text")),
        ("cal_dataset", Path("text"), "text"),
    ],
)
def test_usable_values_become_plain_ones(field, value, plain):
    found = getattr(FlatLLMConfig(**{field: value}), field)
    assert (found, type(found)) == (plain, type(plain))


def test_a_run_s_places_follow_the_model_and_its_texts_the_calibration():
    run = RunConfig(model="some/tiny", cal_dataset="c4")
    assert (run.score_place, run.eval_texts) == (Path("ranks/tiny"), ["c4"])

    assert RunConfig(model="tiny", eval_dataset=["alpaca", "c4+alpaca"]).eval_texts == ["alpaca", "c4"]
