"""Checkpoints on disk as source and sink of the walk, against the same model in memory."""

import json
import logging
import os
import shutil
from contextlib import suppress

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpoints import (
    CPU,
    bytes_in,
    compress_to,
    hub_cache,
    on_disk,
    save_tiny_checkpoint,
    stop_at,
    weights_in,
)
from flatllmcore.engine import checkpoint_sink
from flatllmcore.engine.importance import layer_importance
from flatllmcore.engine.storage import StatesStorage
from flatllmcore.errors import InputError
from flatllmcore.methods.flatllm import FlatLLMStep
from flatllmcore.utils.loading import WeightFiles
from tiny_text import word_tokenizer


@pytest.fixture
def checkpoint(tmp_path):
    return save_tiny_checkpoint(tmp_path / "dense")


def test_a_hub_id_is_found_in_the_cache(tmp_path, checkpoint, monkeypatch):
    """The layout is the hub's; nothing is downloaded."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    shutil.copytree(checkpoint, hub_cache(tmp_path / "cache", "models--someone--tiny"))
    found = WeightFiles("someone/tiny", tmp_path / "cache")
    assert found.shapes == WeightFiles(checkpoint).shapes


def test_one_layer_is_read_ahead_and_no_more(checkpoint):
    source, asked = on_disk(checkpoint), []
    read_layer = source._read_layer
    source._read_layer = lambda index: asked.append(index) or read_layer(index)
    for index in (0, 1, 2, 3, 0):
        with source.layer(index):
            pass
        source._reader.submit(int).result()  # the reader is done with what it was given
        assert asked[-1] == min(index + 1, 3)
    assert asked == [0, 1, 2, 3, 0, 1]


def test_states_go_to_the_first_place_that_is_large_enough(tmp_path, monkeypatch):
    """A quarter of a GPU's memory, half of the host's, or the disk."""
    monkeypatch.setattr("flatllmcore.engine.storage.free_device_memory", lambda _device: 100)
    storage, gpu = StatesStorage(host_memory_bytes=52, folder=tmp_path), torch.device("cuda")
    assert [storage.place(size, gpu) for size in (25, 26, 27)] == ["device", "host", "file"]
    assert storage.place(25, CPU) == "host"
    with pytest.raises(InputError, match="GiB of disk"):
        storage.place(2**60, gpu)


@pytest.mark.parametrize("method", ["angular", "damage"])
def test_states_in_a_file_give_the_same_scores_and_leave_nothing(tmp_path, windows, checkpoint, caplog, method):
    caplog.set_level(logging.INFO)
    expected = layer_importance(on_disk(checkpoint), windows, 5, method)
    source = on_disk(checkpoint)
    source.storage = StatesStorage(host_memory_bytes=0, folder=tmp_path / "offload")
    assert layer_importance(source, windows, 5, method) == expected
    assert f"a file in {tmp_path / 'offload'}" in caplog.text
    assert not any((tmp_path / "offload").iterdir())


def test_the_folder_holds_what_save_pretrained_writes_and_its_tokenizer_loads_without_a_question(
    tmp_path, windows, checkpoint, monkeypatch
):
    """Oracle: the library's own saving of the same model, shards apart."""
    monkeypatch.setattr("builtins.input", pytest.fail)
    compress_to(tmp_path / "ours", checkpoint, windows)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    places["model.layers"] = "disk"
    offloaded = {"device_map": places, "offload_folder": tmp_path / "offload"}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "ours", **offloaded).hf_device_map == places
    (tmp_path / "ours" / "README.md").write_text("---\nflat_llm: {}\n---\n")
    model.save_pretrained(tmp_path / "theirs")
    word_tokenizer().save_pretrained(tmp_path / "theirs")
    ours, theirs = bytes_in(tmp_path / "ours"), bytes_in(tmp_path / "theirs")
    ours_alone = {"flat_llm.json", "model.safetensors.index.json"}
    theirs_alone = {"model.safetensors", "generation_config.json"}  # the dense folder had none of the latter
    assert {n for n in ours.keys() - ours_alone if "-of-" not in n} == theirs.keys() - theirs_alone
    assert (
        theirs["README.md"]
        == ours["README.md"] + b"\nThese weights were saved again: what is said above is of those before.\n"
    )
    assert json.loads(ours["config.json"]) == json.loads(theirs["config.json"])
    assert ours["flat_models.py"] == theirs["flat_models.py"]
    index = json.loads(ours["model.safetensors.index.json"])
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in weights_in(tmp_path / "ours").values())
    assert index["weight_map"].keys() == model.state_dict().keys()
    for folder in ("ours", "theirs"):
        loaded = AutoTokenizer.from_pretrained(tmp_path / folder)
        assert loaded("w3 w5")["input_ids"] == word_tokenizer()("w3 w5")["input_ids"]


class StoppedError(Exception):
    """Stands for whatever may end a run."""


def zero_the_end(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))


@pytest.mark.parametrize("damage", [lambda path: os.truncate(path, path.stat().st_size - 1), os.unlink, zero_the_end])
def test_a_damaged_shard_is_found_and_done_again(tmp_path, windows, checkpoint, monkeypatch, damage):
    compress_to(tmp_path / "straight", checkpoint, windows)
    with monkeypatch.context() as patch:
        stop_at(patch, FlatLLMStep, 2, StoppedError)
        with pytest.raises(StoppedError):
            compress_to(tmp_path / "out", checkpoint, windows)
    damage(tmp_path / "out.partial/model-00002-of-00006.safetensors")  # layer 0, with layer 1 whole behind it
    for name in (".tmp.model-00003-of-00006.safetensors.17", ".tmpyCJIMv"):  # what we and libraries leave when killed
        (tmp_path / "out.partial" / name).touch()
    solved = stop_at(monkeypatch, FlatLLMStep)
    compress_to(tmp_path / "out", checkpoint, windows)
    assert len(solved) == 3
    assert not (tmp_path / "out.partial").exists()
    assert bytes_in(tmp_path / "out") == bytes_in(tmp_path / "straight")


def test_what_others_put_into_a_partial_folder_outlives_a_run_that_leaves_nothing(tmp_path, windows, checkpoint):
    def stop(sink):
        (sink.partial / "notes").mkdir(exist_ok=True)
        raise StoppedError

    for _ in range(2):
        with suppress(StoppedError):
            compress_to(tmp_path / "out", checkpoint, windows, before_layers=stop)
        assert (tmp_path / "out.partial" / "notes").is_dir()
        (tmp_path / "out.partial" / ".tmp.notes").mkdir(exist_ok=True)


def test_two_runs_in_one_folder_are_refused(tmp_path, windows, checkpoint, monkeypatch):
    """The second begins while the first works, or while it puts its model in place."""

    def second_run(_sink=None):
        with pytest.raises(InputError, match="another run is writing"):
            compress_to(tmp_path / "out", checkpoint, windows, overwrite=True)

    def put_in_place_among_others(complete, folder, overwrite):
        second_run()
        put_in_place(complete, folder, overwrite)
        second_run()

    put_in_place = checkpoint_sink.checkpoint.put_in_place
    monkeypatch.setattr(checkpoint_sink.checkpoint, "put_in_place", put_in_place_among_others)
    compress_to(tmp_path / "out", checkpoint, windows, before_layers=second_run)
    assert (tmp_path / "out" / "config.json").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("out", "dense")] == []
