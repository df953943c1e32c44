import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from flatllmcore import FlatLLMConfig, InputError
from flatllmcore.config import IMPORTANCE_METHODS, merged_config
from flatllmcore.core.importance import METHODS


def test_the_defaults_are_the_documented_ones():
    """Oracle: the table of options in the flatllmcore user document."""
    config = FlatLLMConfig()
    assert (config.target_sparsity, config.tolerance, config.cal_dataset) == (0.5, 0.96, "wikitext2")
    assert (config.cal_nsamples, config.importance_method, config.preserve_qk_layers) == (128, "angular", True)


def test_the_importance_methods_are_those_that_exist():
    assert set(IMPORTANCE_METHODS) == set(METHODS)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("target_sparsity", -0.01),
        ("target_sparsity", 1.01),
        ("target_sparsity", 50),
        ("target_sparsity", True),
        ("target_sparsity", "0.5"),
        ("target_sparsity", math.nan),
        ("tolerance", 0),
        ("tolerance", 1.01),
        ("cal_dataset", ""),
        ("cal_dataset", 7),
        ("cal_dataset", iter("abc")),
        ("cal_nsamples", 0),
        ("cal_nsamples", 12.5),
        ("cal_nsamples", np.float64(12)),
        ("cal_nsamples", True),
        ("importance_method", "random"),
        ("importance_method", None),
        ("preserve_qk_layers", "no"),
        ("seqlen", 1),
        ("batch_size", 0),
        ("seed", -1),
        ("seed", 2**63),
        ("rank_multiple", 0),
        ("device", 0),
        ("device", "gpu"),
        ("device", "cuda:"),
        ("device", "CPU"),
        ("device", "mps"),
        ("dataset_root", 3),
        ("cache_dir", 3),
    ],
)
def test_an_unusable_value_is_refused_by_name_in_one_line(field, value):
    with pytest.raises(InputError) as caught:
        FlatLLMConfig(**{field: value})
    message = str(caught.value)
    assert message.startswith(f"{field} is {value!r}; accepted: ")
    assert "\n" not in message


def test_a_large_unusable_value_is_named_by_its_type_in_one_line():
    with pytest.raises(InputError, match=r"^seed is a Tensor; accepted: an integer, 0 to 2\^63 - 1$"):
        FlatLLMConfig(seed=torch.zeros(300, 300))


@pytest.mark.parametrize("target", [0, 0.0, 1, 1.0])
def test_the_ends_of_the_documented_range_are_targets(target):
    assert FlatLLMConfig(target_sparsity=target).target_sparsity == target


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
    config = FlatLLMConfig(**{field: value})
    assert getattr(config, field) == plain
    assert type(getattr(config, field)) is type(plain)
    assert json.loads(json.dumps(config.to_dict()))[field] == plain


def test_data_given_directly_are_not_printed():
    for data in (torch.zeros(300, 300).long(), ["text"] * 100_000):
        assert f"cal_dataset=<{type(data).__name__}>" in repr(FlatLLMConfig(cal_dataset=data))
        assert len(repr(FlatLLMConfig(cal_dataset=data))) < 500
    assert repr(FlatLLMConfig()).startswith(
        "FlatLLMConfig(target_sparsity=0.5, tolerance=0.96, cal_dataset='wikitext2'"
    )


def test_configs_are_equal_by_their_fields_and_data_by_being_the_same():
    ids = torch.zeros(2, 8, dtype=torch.int64)
    config = FlatLLMConfig(cal_dataset=ids, seed=1)
    assert config == FlatLLMConfig(cal_dataset=ids, seed=1)
    assert hash(config) == hash(FlatLLMConfig(cal_dataset=ids, seed=1))
    assert config != FlatLLMConfig(cal_dataset=ids, seed=2)
    assert config != FlatLLMConfig(cal_dataset=ids.clone(), seed=1)
    assert config != FlatLLMConfig(seed=1)
    assert FlatLLMConfig(cal_dataset="c4") == FlatLLMConfig(cal_dataset="c4") != FlatLLMConfig(cal_dataset="alpaca")
    assert FlatLLMConfig() != "wikitext2"


def test_a_saved_config_loads_as_an_equal_one(tmp_path):
    config = FlatLLMConfig(
        target_sparsity=0.2, seqlen=64, preserve_qk_layers=False, dataset_root=tmp_path, device="cpu"
    )
    config.save(tmp_path / "config.json")
    assert FlatLLMConfig.load(tmp_path / "config.json") == config
    assert FlatLLMConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_an_unknown_option_is_refused_by_name(tmp_path):
    with pytest.raises(TypeError, match="sparsity_target"):
        FlatLLMConfig(sparsity_target=0.5)
    with pytest.raises(InputError, match="unknown option 'sparsity_target'; accepted: target_sparsity"):
        FlatLLMConfig.from_dict({"sparsity_target": 0.5})
    path = tmp_path / "config.json"
    path.write_text('{"tolerance": 2}')
    with pytest.raises(InputError, match=r"config\.json: tolerance is 2"):
        FlatLLMConfig.load(path)


def test_data_given_directly_cannot_be_saved():
    with pytest.raises(InputError, match="cal_dataset is a Tensor"):
        FlatLLMConfig(cal_dataset=torch.zeros(1, 4)).to_dict()


def test_overrides_take_precedence_and_the_given_config_stays():
    config = FlatLLMConfig(target_sparsity=0.2, seed=1)
    merged = merged_config(config, {"seed": 2})
    assert (merged.target_sparsity, merged.seed, config.seed) == (0.2, 2, 1)
    with pytest.raises(InputError, match="config is a dict"):
        merged_config({"seed": 2}, {})
