"""The options: what each takes, and what is said of what it does not."""

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from flatllmcore import FlatLLMConfig, InputError
from flatllmcore.config import RunConfig, merged_config
from flatllmcore.engine.importance import IMPORTANCE_METHODS


def test_the_defaults_are_the_documented_ones():
    """Oracle: the table of options in the flatllmcore user document."""
    config = FlatLLMConfig()
    assert (config.target_sparsity, config.tolerance, config.cal_dataset) == (0.5, 0.96, "wikitext2")
    assert (config.cal_nsamples, config.importance_method, config.preserve_qk_layers) == (128, "angular", True)


def test_the_importance_methods_are_those_that_exist():
    for name in IMPORTANCE_METHODS:
        assert FlatLLMConfig(importance_method=name).importance_method == name
    with pytest.raises(InputError, match=rf"accepted: {' or '.join(IMPORTANCE_METHODS)}$"):
        FlatLLMConfig(importance_method="random")


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("target_sparsity", (-0.01, 1.01, 50, True, "0.5", math.nan)),
        ("tolerance", (0, 1.01)),
        ("cal_dataset", ("", 7, iter("abc"))),
        ("cal_nsamples", (0, 12.5, np.float64(12), True)),
        ("importance_method", (None,)),
        ("preserve_qk_layers", ("no",)),
        ("method", ("nosuch", None)),
        ("seqlen", (1,)),
        ("batch_size", (0,)),
        ("seed", (-1, 2**63)),
        ("rank_multiple", (0,)),
        ("device", (0, "gpu", "cuda:", "CPU", "mps")),
        ("dataset_root", (3,)),
        ("cache_dir", (3,)),
    ],
)
def test_an_unusable_value_is_refused_by_name_in_one_line(field, values):
    for value in values:
        with pytest.raises(InputError) as caught:
            FlatLLMConfig(**{field: value})
        assert str(caught.value).startswith(f"{field} is {value!r}; accepted: ")
        assert "\n" not in str(caught.value)


def test_a_large_unusable_value_is_named_by_its_type_in_one_line():
    with pytest.raises(InputError, match=rf"^seed is a Tensor; accepted: an integer, 0 to {2**63 - 1}$"):
        FlatLLMConfig(seed=torch.zeros(300, 300))


@pytest.mark.parametrize("target", [0, 0.0, 1, 1.0])
def test_the_ends_of_the_documented_range_are_targets(target):
    config = FlatLLMConfig(target_sparsity=target)
    assert (config.target_sparsity, config.keep_ratio) == (target, 1 - target)


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:0", "cuda:15", None])
def test_devices_are_named_before_they_are_looked_for(device):
    assert FlatLLMConfig(device=device).device == device


def test_folders_and_files_may_be_paths_or_text(tmp_path):
    for path in (tmp_path, str(tmp_path)):
        config = FlatLLMConfig(dataset_root=path, cache_dir=path, cal_dataset=path)
        assert config.dataset_root == config.cache_dir == tmp_path
        assert isinstance(config.dataset_root, Path)
        assert config.cal_dataset == str(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "plain"),
    [
        ("target_sparsity", Fraction(1, 4), 0.25),
        ("target_sparsity", np.float32(0.25), 0.25),
        ("tolerance", 1, 1.0),
        ("cal_nsamples", np.int64(12), 12),
        ("seqlen", np.int32(24), 24),
        ("batch_size", np.uint8(3), 3),
        ("seed", np.int64(7), 7),
        ("rank_multiple", np.int16(8), 8),
    ],
)
def test_numbers_of_other_libraries_become_plain_ones(field, value, plain):
    found = getattr(FlatLLMConfig(**{field: value}), field)
    assert (found, type(found)) == (plain, type(plain))


def test_data_given_directly_are_not_printed():
    for data in (torch.zeros(300, 300).long(), ["text"] * 100_000):
        assert len(repr(FlatLLMConfig(cal_dataset=data))) < 500


def test_an_unknown_option_is_refused_by_name():
    with pytest.raises(TypeError, match="sparsity_target"):
        FlatLLMConfig(sparsity_target=0.5)
    with pytest.raises(InputError, match="unknown option 'sparsity_target'; accepted: target_sparsity"):
        merged_config(None, {"sparsity_target": 0.5})


def test_overrides_take_precedence_and_the_given_config_stays():
    config = FlatLLMConfig(target_sparsity=0.2, seed=1)
    merged = merged_config(config, {"seed": 2})
    assert (merged.target_sparsity, merged.seed, config.seed) == (0.2, 2, 1)
    with pytest.raises(InputError, match="config is a dict"):
        merged_config({"seed": 2}, {})


def test_a_run_s_places_follow_the_model_and_its_texts_the_calibration():
    run = RunConfig(model="some/tiny", cal_dataset="c4")
    assert (run.score_place, run.eval_text) == (Path("ranks/tiny"), "c4")
    run = RunConfig(model="some/tiny", bi_score="here", eval_dataset="wikitext2")
    assert (run.score_place, run.eval_text) == (Path("here"), "wikitext2")
    with pytest.raises(InputError, match="dtype is 'int8'; accepted: auto or bfloat16"):
        RunConfig(model="m", dtype="int8")
