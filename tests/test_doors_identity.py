"""A checkpoint's folder as a door: whatever is done to a valid one, both readers agree on what it holds, or refuse it.

pytest -m slow tests/test_doors_identity.py --hypothesis-profile=long
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from checkpoints import on_disk
from conftest import tiny_model
from flatllmcore.errors import InputError
from flatllmcore.utils.loading import load_model
from tiny_text import word_tokenizer

pytestmark = pytest.mark.slow

DTYPES = [torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.int32, torch.bool, torch.complex64]
DTYPES += [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8]
FIELDS = {
    "quantization_config": [None, {}, {"quant_method": "gptq", "bits": 4}, {"load_in_4bit": True}, "fp8"],
    "tie_word_embeddings": [True, False],
    "rms_norm_eps": [1e-3, 1e-6],
    "hidden_act": ["gelu", "silu"],
    "rope_parameters": [{"rope_type": "default", "rope_theta": theta} for theta in (500.0, 10000.0)],
    "architectures": [None, ["LlamaModel"]],
    "num_hidden_layers": [1, 2, 3],
    "auto_map": [{"AutoModelForCausalLM": "theirs.Model", "AutoConfig": "theirs.Config"}],
}
NAMES = ["model.", "", "lm_head.weight", "model.embed_tokens.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"]
FILES = ["tokenizer.json", "special_tokens_map.json", "adapter_config.json", "flat_llm.json", "notes.txt"]
Change = Callable[[Path, st.DataObject], None]


def edit_weights(folder: Path, data: st.DataObject) -> None:
    """Cast, drop, rename, copy or change one weight, or rename all as a base model's."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    name, kind = data.draw(st.sampled_from(sorted(weights))), data.draw(st.integers(0, 5))
    if kind == 0:
        weights[name] = weights[name].to(data.draw(st.sampled_from(DTYPES)))
    elif kind == 1:
        del weights[name]
    elif kind == 2:
        weights[data.draw(st.sampled_from(NAMES)) + name.removeprefix("model.")] = weights.pop(name)
    elif kind == 3:
        weights[data.draw(st.sampled_from(NAMES))] = weights[name].clone()
    elif kind == 4:
        row = data.draw(st.integers(0, len(weights[name]) - 1))
        values = weights[name][row]
        values = values.double() if values.is_floating_point() else values  # float8 knows no products
        weights[name][row] = values * data.draw(st.sampled_from([-1, 0, 0.5, 1, 1.01]))
    else:
        weights = {name.removeprefix("model."): weight for name, weight in weights.items()}
    save_file(weights, path, {"format": "pt"})


def edit_config(folder: Path, data: st.DataObject) -> None:
    path, field = folder / "config.json", data.draw(st.sampled_from(sorted(FIELDS)))
    value = data.draw(st.sampled_from(FIELDS[field]))
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))


def edit_bytes(folder: Path, data: st.DataObject) -> None:
    """Change a byte of the weights, in the header or behind it, or cut them off."""
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, data.draw(st.sampled_from([9, 3000, 100_000]))))
    if data.draw(st.booleans()):
        content[place : place + 1] = data.draw(st.binary(min_size=1, max_size=1))
    else:
        del content[place:]
    path.write_bytes(content)


def edit_file(folder: Path, data: st.DataObject) -> None:
    path = folder / data.draw(st.sampled_from(FILES))
    path.write_text((path.read_text() if path.exists() else "{}") + data.draw(st.sampled_from(["", " "])))


def reshard(folder: Path, data: st.DataObject) -> None:
    """Write the same model again, in files of other sizes."""
    tiny_model().float().save_pretrained(folder, max_shard_size=data.draw(st.sampled_from(["20KB", "1GB"])))


@pytest.fixture(scope="module")
def valid(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("valid")
    tiny_model().float().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def taken_for(folder: Path, load: Callable) -> tuple[dict, dict] | str:
    """Return the weights and the config that a reader finds, or why it refuses."""
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("builtins.input", lambda *_: pytest.fail("asked on stdin"))
            model = load(str(folder))
    except InputError as error:
        return str(error)
    if load is load_model:
        weights = dict(model.named_parameters())
    else:
        weights = {name: model._read(name) for name in model._names}
    ignored = ("dtype", "_name_or_path", "architectures", "auto_map")
    return weights, {name: value for name, value in model.config.to_dict().items() if name not in ignored}


def is_same(one: tuple[dict, dict] | str, other: tuple[dict, dict] | str) -> bool:
    if isinstance(one, str) or isinstance(other, str):
        return one == other
    (weights, config), (others, other_config) = one, other
    is_equal = weights.keys() == others.keys() and config == other_config
    return is_equal and all(
        weights[name].equal(others[name]) and weights[name].dtype == others[name].dtype for name in weights
    )


@given(
    data=st.data(),
    changes=st.lists(st.sampled_from([edit_weights, edit_config, edit_bytes, edit_file, reshard]), max_size=3),
)
def test_a_changed_checkpoint_is_read_alike_known_for_another_or_refused(
    valid, tmp_path_factory, data, changes: list[Change]
):
    folder = shutil.copytree(valid, tmp_path_factory.mktemp("changed") / "model")
    try:
        for change in changes:
            if change is not edit_weights or load_of(folder):
                change(folder, data)
        found = taken_for(folder, on_disk)
        assert is_same(found, taken_for(folder, load_model))
        assert "\n" not in str(found) or not isinstance(found, str)
        if not isinstance(found, str) and on_disk(str(folder)).identity == on_disk(str(valid)).identity:
            assert is_same(found, taken_for(valid, on_disk))
            assert (folder / "tokenizer.json").read_bytes() == (valid / "tokenizer.json").read_bytes()
    finally:
        shutil.rmtree(folder.parent)


def load_of(folder: Path) -> bool:
    """Tell whether the weights are one file that can be read, so that they can be changed one by one."""
    try:
        return bool(load_file(folder / "model.safetensors"))
    except Exception:  # whatever an earlier change made of it
        return False
