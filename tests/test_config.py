import json
import math

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
        ("target_sparsity", 0.0),
        ("target_sparsity", 1.0),
        ("target_sparsity", 50),
        ("target_sparsity", True),
        ("target_sparsity", "0.5"),
        ("target_sparsity", math.nan),
        ("tolerance", 0),
        ("tolerance", 1.01),
        ("cal_dataset", ""),
        ("cal_dataset", 7),
        ("cal_nsamples", 0),
        ("cal_nsamples", 12.5),
        ("importance_method", "random"),
        ("importance_method", None),
        ("preserve_qk_layers", "no"),
        ("seqlen", 1),
        ("batch_size", 0),
        ("seed", -1),
        ("rank_multiple", 0),
        ("device", 0),
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


@pytest.mark.parametrize("field", ["dataset_root", "cache_dir"])
def test_folders_may_be_given_as_text(field, tmp_path):
    assert getattr(FlatLLMConfig(**{field: str(tmp_path)}), field) == tmp_path


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
