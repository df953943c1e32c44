"""Atomic writes, and room for them."""

import errno
import os
import shutil

import pytest

from flatllmcore.errors import InputError
from flatllmcore.utils.files import check_disk_space, write_atomically


def test_what_is_written_replaces_what_was_there_and_folders_are_made(tmp_path):
    path = tmp_path / "a" / "b" / "file"
    for content in (b"old", b"new"):
        write_atomically(path, content)
        assert path.read_bytes() == content
        assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_is_about_the_file_asked_for(tmp_path, monkeypatch, failing):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(*_args: object) -> None:
        assert path.read_bytes() == b"old"
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(f"{'os' if failing == 'fsync' else 'pathlib.Path'}.{failing}", fail)
    with pytest.raises(OSError, match=r"No space left on device: .*/file'") as full:
        write_atomically(path, b"new")
    assert full.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    def interrupt(_descriptor: int) -> None:
        raise KeyboardInterrupt

    (tmp_path / "file").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


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
    assert asked == [tmp_path, tmp_path]


def test_a_relative_folder_is_below_the_current_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="new needs"):
        check_disk_space(tmp_path.__class__("new"), 2**80)
