"""Files are whole or absent."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import signal
import stat
from pathlib import Path

import pytest

from leap_shared import files
from leap_shared.errors import UserError


def test_failed_write_keeps_the_former_file_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "kept.txt"
    files.write_text(path, "before")
    with pytest.raises(TypeError), files.atomic_writer(path) as file:
        file.writelines([b"half", "of it is text"])
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["kept.txt"]


def test_file_is_invisible_until_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new.bin"
    with files.atomic_writer(path) as file:
        file.write(b"x" * 100_000)
        file.flush()
        assert not path.exists()
    assert path.stat().st_size == 100_000


def test_disk_filling_up_in_mid_write_is_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "big.bin"
    files.write_text(path, "before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the kernel then fails the write with an OSError
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(UserError, match=r"big\.bin: File too large"), files.atomic_writer(path) as file:
            file.write(b"x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["big.bin"]


def test_missing_folder_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent.*No such file"):
        files.write_text(tmp_path / "absent" / "a.txt", "")


def test_file_in_place_of_the_folder_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Not a directory"):
        files.write_text(tmp_path / "file" / "a.txt", "")


def test_folder_that_cannot_be_synced_keeps_the_written_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def refuse_folders(number: int) -> None:
        if stat.S_ISDIR(os.fstat(number).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real(number)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    files.write_text(tmp_path / "a.txt", "whole")
    assert (tmp_path / "a.txt").read_text() == "whole"


def test_checksum_of_a_missing_file_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*absent"):
        files.sha256(tmp_path / "absent")


def test_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        files.ensure_folder(tmp_path / "file")


def test_folder_without_permission_is_refused(tmp_path: Path) -> None:
    folder = Path("/proc/self") if os.getuid() == 0 else tmp_path / "closed"
    if os.getuid() != 0:
        folder.mkdir(mode=0o500)
    with pytest.raises(UserError, match="cannot write"):
        files.ensure_folder(folder)


def test_new_files_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        files.write_text(tmp_path / "a.txt", "")
    finally:
        os.umask(before)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o640


def test_json_refuses_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())


def test_sha256_is_that_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"leap" * 1_000_000)
    assert files.sha256(tmp_path / "a") == hashlib.sha256(b"leap" * 1_000_000).hexdigest()
