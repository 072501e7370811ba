# SPDX-License-Identifier: GPL-2.0-or-later
"""The calls that stand in for Python's own while something in them is to fail."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import termios
from pathlib import Path

import pytest

from qemu_ioasid.agent import failnth


def test_calls_on_files_do_as_pythons_own(tmp_path: Path) -> None:
    path = str(tmp_path / "file")
    fd = failnth._open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        assert failnth._write(fd, b"one two") == 7
        assert failnth._pwrite(fd, b"six", 4) == 3
        assert failnth._pread(fd, 100, 2) == b"e six" == os.pread(fd, 100, 2)
        os.lseek(fd, 0, os.SEEK_SET)
        assert failnth._read(fd, 3) == b"one"
        assert fcntl.fcntl(fd, fcntl.F_GETFD) == fcntl.FD_CLOEXEC
    finally:
        os.close(fd)


@pytest.mark.parametrize("argument", [ctypes.c_int(0), bytearray(4)])
def test_ioctl_writes_back(argument: ctypes.c_int | bytearray) -> None:
    reader, writer = os.pipe()
    try:
        os.write(writer, b"12345")
        assert failnth._ioctl(reader, termios.FIONREAD, argument) == 0
        assert int.from_bytes(bytes(argument), "little") == 5
    finally:
        os.close(reader)
        os.close(writer)


def test_the_errno_is_the_calls(tmp_path: Path) -> None:
    with pytest.raises(OSError) as raised:
        failnth._open(str(tmp_path / "nonesuch"), os.O_RDONLY)
    assert raised.value.errno == errno.ENOENT
    with pytest.raises(OSError) as raised:
        failnth._ioctl(-1, termios.FIONREAD, bytearray(4))
    assert raised.value.errno == errno.EBADF
