"""Atomic writes, and room for them."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from flatllmcore.errors import InputError
from flatllmcore.utils.files import check_disk_space, replacing, write_atomically


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


def write_and_name(path: Path) -> str:
    with replacing(path) as temporary:
        temporary.write_bytes(b"old")
        return temporary.name


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
