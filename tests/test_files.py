"""Atomic writes, and room for them."""

import errno
import fcntl
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flatllmcore.errors import InputError
from flatllmcore.utils.files import check_disk_space, replacing, temporary_folder, write_atomically


@pytest.mark.parametrize("failing", ["os.fsync", "pathlib.Path.replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()])
def test_a_file_is_replaced_whole_or_left_as_it_was_and_folders_are_made(tmp_path, monkeypatch, failing, error):
    path = tmp_path / "a" / "b" / "file"
    write_atomically(path, b"old")

    def fail(*_args: object) -> None:
        assert path.read_bytes() == b"old"
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(failing, fail)
        with pytest.raises(type(error)) as raised:
            write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    if isinstance(error, OSError):  # it is about the file asked for
        assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(path))
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == ["file"]


def test_a_temporary_is_new_under_a_name_that_nobody_knows(tmp_path, monkeypatch):
    names = {write_and_name(tmp_path / "file") for _ in range(9)}
    assert len(names) == 9
    assert all(name.startswith(".tmp") for name in names)
    (tmp_path / "theirs").write_bytes(b"precious")
    (tmp_path / ".tmp.known").symlink_to(tmp_path / "theirs")
    monkeypatch.setattr("flatllmcore.utils.files.token_hex", lambda _: "known")
    with pytest.raises(FileExistsError):
        write_atomically(tmp_path / "file", b"new")
    assert ((tmp_path / "theirs").read_bytes(), (tmp_path / "file").read_bytes()) == (b"precious", b"old")


def test_a_temporary_that_another_process_took_for_left_over_is_made_again(tmp_path, monkeypatch):
    """By a stand-in for the lock, before which the file is gone."""
    taken = []

    def taken_once(file, operation):
        assert operation == fcntl.LOCK_EX  # waits for one who looks whether it is left over
        if not taken:
            taken.append(file.name)
            os.unlink(file.name)

    monkeypatch.setattr(fcntl, "flock", taken_once)
    assert write_and_name(tmp_path / "file") != Path(taken[0]).name
    assert (tmp_path / "file").read_bytes() == b"old"


def write_and_name(path: Path) -> str:
    with replacing(path) as temporary:
        temporary.write(b"old")
        return Path(temporary.name).name


def test_space_is_asked_of_the_file_system_that_the_folder_will_be_on(tmp_path, monkeypatch):
    asked = []
    usage = shutil.disk_usage(tmp_path)

    def free_of(place):
        asked.append(place)
        return usage._replace(free=3 * 2**30)

    monkeypatch.setattr(shutil, "disk_usage", free_of)
    folder = tmp_path / "not" / "yet"
    check_disk_space(folder, 3 * 2**30)
    with pytest.raises(InputError, match=r"not/yet needs 3.5 GiB of disk and 3 GiB are free"):
        check_disk_space(folder, 7 * 2**29)
    monkeypatch.chdir(tmp_path)
    check_disk_space(Path("new"), 3 * 2**30)
    assert asked == [tmp_path] * 3


def test_what_kills_left_goes_and_what_another_run_writes_or_others_made_stays(tmp_path):
    path, dead = tmp_path / "file", tmp_path / ".tmp.0123456789abcdef"
    others = [tmp_path / ".tmp.fedcba9876543210", tmp_path / ".tmp.my_precious_note"]
    dead.touch()
    others[0].mkdir()
    others[1].touch()
    with replacing(path) as file:
        file.write(b"slow")
        write_atomically(tmp_path / "other", b"fast")
        assert not dead.exists()
    assert path.read_bytes() == b"slow"
    assert {*tmp_path.iterdir()} == {path, tmp_path / "other", *others}


def test_temporary_folders_of_killed_runs_go_and_those_of_others_stay(tmp_path):
    for name in ("flat-llm-dead", "flat-llm-mine"):
        (tmp_path / name / "model").mkdir(parents=True)
    (tmp_path / "flat-llm-dead" / ".flat-llm.lock").touch()
    (tmp_path / "flat-llm-mine" / ".lock").touch()
    with temporary_folder(tmp_path) as first, temporary_folder(tmp_path) as second:
        assert {*tmp_path.iterdir()} == {first, second, tmp_path / "flat-llm-mine"}
    assert {*tmp_path.iterdir()} == {tmp_path / "flat-llm-mine"}


def test_what_a_library_puts_in_the_place_of_the_temporary_file_is_as_readable_as_any(tmp_path):
    with replacing(tmp_path / "weights.safetensors") as file:
        save_file({"a": torch.ones(3)}, file.name)
    write_atomically(tmp_path / "plain", b"")
    assert torch.equal(load_file(tmp_path / "weights.safetensors")["a"], torch.ones(3))
    assert (tmp_path / "weights.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
