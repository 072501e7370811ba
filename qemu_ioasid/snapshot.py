# SPDX-License-Identifier: GPL-2.0-or-later
"""A host VM as it was at one moment, with all that ran in it, kept to be restored many times.

A snapshot is a folder: ``ram``, the very file that was the VM's memory;
``state``, QEMU's migration stream without that memory; ``snapshot.json``, what
the two must be like, and what whoever restores them must know. Every restore
maps ``ram`` privately: it reads what it touches, copies what it changes, and
the file stays as it was saved.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import stat
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qemu_ioasid import cache
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.qmp import CommandFailed, Qmp

KIND = "snapshot"
#: Changes with the layout of the folder.
_VERSION = 1
#: How many snapshots stay in the cache; the least recently used goes first. Each is some 400 MB.
KEPT = 32

_RAM, _STATE, _TOLD = "ram", "state", "snapshot.json"
_CHUNK = 32 << 20
#: More than QEMU writes of a VM without its memory.
_STATE_ROOM = 16 << 20
_BLOCK = 1 << 18
_ZEROS = bytes(_BLOCK)
#: fallocate(2), include/uapi/linux/falloc.h.
_KEEP_SIZE, _PUNCH_HOLE = 1, 2


class Unusable(Exception):
    """There is no snapshot to restore, or it is not to be trusted; the message says why."""


@dataclass(frozen=True)
class Memory:
    """Where a VM's RAM, the object ``ram``, is: QEMU's arguments, and the fds they name."""

    argv: tuple[str, ...]
    fds: tuple[int, ...] = ()
    #: The migration capability that a saved VM is read with; "" where none is read.
    capability: str = ""

    def receive(self, monitor: Qmp, deadline: Deadline) -> None:
        """Have the QEMU that was started with this read the saved VM, and run it.

        Capabilities are no options of QEMU 10.0's command line.
        """
        wanted = [{"capability": self.capability, "state": True}]
        monitor.execute("migrate-set-capabilities", deadline, capabilities=wanted)
        monitor.execute("migrate-incoming", deadline, uri=f"file:/proc/self/fd/{self.fds[-1]}")


def anonymous(size: int) -> Memory:
    """RAM that nobody else sees."""
    return Memory(("-object", f"memory-backend-ram,id=ram,size={size}"))


def _file_memory(fd: int, size: int, options: str) -> str:
    return f"memory-backend-file,id=ram,mem-path=/proc/self/fd/{fd},size={size},{options}"


@contextlib.contextmanager
def saveable(folder: Path, size: int) -> Iterator[Memory]:
    """RAM in a new file of *folder*, for a VM that `save` will save there.

    The room is taken now: a disk that is full later on would kill the VM. Raises
    OSError (ENOSPC).
    """
    fd = os.open(folder / _RAM, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, size)
        yield Memory(("-object", _file_memory(fd, size, "share=on")), (fd,))
    finally:
        os.close(fd)


def _next_data(fd: int, offset: int, size: int) -> int:
    """Where stored bytes begin from *offset* on; *size* when there are none."""
    try:
        return os.lseek(fd, offset, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return size


def _digest(path: int | Path) -> str:
    """Names the bytes of a file, on all cores. Blocks of zeros count the same, stored or not.

    Holes are not read: that would make them look like data (ext4, unwritten extents).
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC) if isinstance(path, Path) else os.dup(path)

    def chunk(start: int) -> bytes:
        hasher = hashlib.sha256()
        end = min(start + _CHUNK, size)
        offset = start
        while offset < end:
            offset = max(offset, _next_data(fd, offset, size) // _BLOCK * _BLOCK)
            if offset < end and (block := os.pread(fd, _BLOCK, offset)) != _ZEROS:
                hasher.update(offset.to_bytes(8, "little"))
                hasher.update(block)
            offset += _BLOCK
        return hasher.digest()

    try:
        size = os.fstat(fd).st_size
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            return cache.digest(str(size), *pool.map(chunk, range(0, size, _CHUNK)))
    finally:
        os.close(fd)


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def save(monitor: Qmp, folder: Path, known: dict[str, Any], deadline: Deadline) -> None:
    """Save the VM whose memory `saveable` put into *folder*; it is stopped afterwards.

    *known* is kept for whoever restores it. Once that QEMU is gone, `seal` makes
    *folder* a snapshot. Raises CommandFailed with QEMU's reason, and then the VM
    runs on; OSError, and then ``cont`` lets it.
    """
    _migrate(monitor, folder, {"x-ignore-shared": True}, deadline)
    _tell(folder, (_RAM, _STATE), known)


def save_whole(monitor: Qmp, folder: Path, known: dict[str, Any], deadline: Deadline) -> None:
    """As `save`, for any VM: its memory goes into ``state``, which is read whole to restore it."""
    _migrate(monitor, folder, {"x-ignore-shared": False, "mapped-ram": True}, deadline)
    _tell(folder, (_STATE,), known)


def _migrate(monitor: Qmp, folder: Path, capabilities: dict[str, bool], deadline: Deadline) -> None:
    state = folder / _STATE
    os.close(os.open(state, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    try:
        monitor.migrate(f"file:{state}", capabilities, deadline)
    except CommandFailed:
        # QEMU says "Input/output error" of a disk that is full.
        room = os.statvfs(folder)
        if room.f_bavail * room.f_frsize < _STATE_ROOM:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(state)) from None
        raise


def _tell(folder: Path, names: tuple[str, ...], known: dict[str, Any]) -> None:
    now = time.time_ns()
    files = {
        name: {"size": path.stat().st_size, "mtime": now, "digest": _digest(path)}
        for name, path in ((name, folder / name) for name in names)
    }
    _write_told(
        folder, {"version": _VERSION, "boot_id": _boot_id(), "known": known, "files": files}
    )


def seal(folder: Path) -> None:
    """Make what `save` left a whole snapshot that nothing will change. Needs no room."""
    files = _told(folder)["files"]
    if _RAM in files:
        _punch_holes(folder / _RAM)
    for name, told in files.items():
        # The memory's own time is that of the last write that the kernel took notice of.
        os.utime(folder / name, ns=(told["mtime"], told["mtime"]))
        (folder / name).chmod(0o400)


def _write_told(folder: Path, told: dict[str, Any]) -> None:
    text = json.dumps(told, sort_keys=True)
    whole = json.dumps({"told": told, "digest": cache.digest(text)}, indent=1)
    new = folder / f"{_TOLD}.{os.getpid()}"
    new.write_text(whole + "\n")
    new.chmod(0o600)
    new.replace(folder / _TOLD)


def _punch_holes(path: Path) -> None:
    """Give back the room of what the VM never touched: `saveable` took it all."""
    fallocate = ctypes.CDLL(None).fallocate
    with open(path, "r+b") as file:
        fd, end = file.fileno(), os.fstat(file.fileno()).st_size
        position = 0
        while position < end:
            data = _next_data(fd, position, end)
            if data > position:
                # A file system that cannot keeps the room; the bytes are the same.
                hole = (ctypes.c_long(position), ctypes.c_long(data - position))
                fallocate(fd, _KEEP_SIZE | _PUNCH_HOLE, *hole)
            position = os.lseek(fd, data, os.SEEK_HOLE) if data < end else end


@dataclass(frozen=True)
class Snapshot:
    """A snapshot that was found whole, its files held open: it stays usable if it is removed."""

    folder: Path
    #: What `save` was told to keep.
    known: dict[str, Any]
    fds: dict[str, int]

    def memory(self, size: int) -> Memory:
        """For a QEMU with RAM of *size*, which starts where the snapshot was taken; any number."""
        incoming = ("-incoming", "defer")
        if _RAM not in self.fds:
            argv = (*anonymous(size).argv, *incoming)
            return Memory(argv, (self.fds[_STATE],), "mapped-ram")
        backend = _file_memory(self.fds[_RAM], size, "share=off,readonly=on,rom=off")
        fds = (self.fds[_RAM], self.fds[_STATE])
        return Memory(("-object", backend, *incoming), fds, "x-ignore-shared")


def _told(folder: Path) -> dict[str, Any]:
    try:
        whole = json.loads((folder / _TOLD).read_text())
        told: dict[str, Any] = whole["told"]
        if whole["digest"] != cache.digest(json.dumps(told, sort_keys=True)):
            raise ValueError
    except FileNotFoundError:
        raise Unusable("there is none") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise Unusable(f"{_TOLD} is damaged") from None
    if told["version"] != _VERSION:
        raise Unusable("it is of another layout")
    return told


@contextlib.contextmanager
def opened(folder: Path, *, verify: bool) -> Iterator[Snapshot]:
    """The snapshot in *folder*, if it is whole and as it was saved; raises Unusable.

    What is compared: sizes, times, and every byte of the state; every byte of the
    memory with *verify*, and once after the machine has been started anew, since a
    machine that went down may have lost what it had not written yet.
    """
    told = _told(folder)
    with contextlib.ExitStack() as stack:
        fds = {}
        for name, expected in told["files"].items():
            try:
                fd = os.open(folder / name, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise Unusable(f"{name}: {error.strerror}") from None
            stack.callback(os.close, fd)
            fds[name] = fd
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode) or found.st_size != expected["size"]:
                raise Unusable(f"{name} has {found.st_size} bytes, not {expected['size']}")
            if found.st_mtime_ns != expected["mtime"]:
                raise Unusable(f"{name} was changed after it was saved")
        restarted = told["boot_id"] != _boot_id()
        for name in fds if verify or restarted else (_STATE,):
            if _digest(fds[name]) != told["files"][name]["digest"]:
                raise Unusable(f"{name} has other bytes than were saved")
        with contextlib.suppress(OSError):
            if restarted:
                _write_told(folder, {**told, "boot_id": _boot_id()})
            os.utime(folder)
        yield Snapshot(folder, told["known"], fds)


def nearest(identity: dict[str, Any]) -> str:
    """Which parts of *identity* the most similar snapshot in the cache differs in, for a reason."""
    best: list[str] | None = None
    for folder in (cache.root() / KIND).glob("[!.]*"):
        with contextlib.suppress(Unusable, KeyError):
            other = _told(folder)["known"]["identity"]
            names = sorted(identity.keys() | other.keys())
            differing = [name for name in names if identity.get(name) != other.get(name)]
            if best is None or len(differing) < len(best):
                best = differing
    if not best:
        return "there is none"
    return f"there is none; the nearest differs in {', '.join(best)}"
