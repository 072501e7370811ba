# SPDX-License-Identifier: GPL-2.0-or-later
"""Where labs are found: in the run folders of their keepers, which only their user may enter."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from qemu_ioasid import cache, process, reaper
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import ConfigurationError, InfrastructureError

#: A lab's own name where nobody gives one.
DEFAULT = "lab"
_ENTRY, _SOCKET = "lab.json", "lab"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,31}\Z")
#: inotify(7), include/uapi/linux/inotify.h.
_DELETED = 0x200
#: For the reaper of a keeper that has died to do its work.
REAP_SECONDS = 10.0


@dataclass(frozen=True)
class Entry:
    """A lab, as its keeper wrote it down. *started* is a time since 1970."""

    name: str
    pid: int
    rig: str
    report: str
    started: float
    folder: Path

    def connect(self, seconds: float = 5.0) -> socket.socket:
        """A connection to the keeper; raises InfrastructureError when there is none any more."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(seconds)
            with _entered(self.folder) as folder:
                sock.connect(f"{folder}/{_SOCKET}")
            sock.settimeout(None)
        except OSError as error:
            sock.close()
            raise InfrastructureError(
                f"lab {self.name}: its keeper is gone ({error.strerror or error}); "
                "qemu-ioasid lab gc removes what is left"
            ) from None
        return sock

    @property
    def alive(self) -> bool:
        """Whether the keeper takes connections."""
        with contextlib.suppress(InfrastructureError), self.connect():
            return True
        return False


@contextlib.contextmanager
def _entered(folder: Path) -> Iterator[str]:
    """A short path of *folder*: that of a unix socket ends at 107 characters."""
    fd = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


def check_name(name: str, what: str = "lab") -> None:
    """Raises ConfigurationError for a *name* that cannot be one."""
    if not _NAME.match(name):
        raise ConfigurationError(
            f"{what} {name!r}: a name is of letters, digits, dots, dashes and underscores, "
            "32 at most"
        )


def entries() -> list[Entry]:
    """All labs of this user, by name; also those whose keepers have died just now."""
    base = process.run_folders()
    with contextlib.suppress(OSError):
        if base.stat().st_uid != os.getuid():
            return []
    found = []
    for path in base.glob(f"*/{_ENTRY}"):
        with contextlib.suppress(OSError, ValueError, TypeError):
            found.append(Entry(**json.loads(path.read_text()), folder=path.parent))
    return sorted(found, key=lambda entry: entry.name)


def find(name: str | None) -> Entry:
    """The lab called *name*, or the only one. Raises ConfigurationError."""
    every = entries()
    names = [entry.name for entry in every]
    known = f"there is {', '.join(names)}" if names else "none is up"
    if name is None:
        if len(every) == 1:
            return every[0]
        if every:
            raise ConfigurationError(f"which lab? --name takes one of {', '.join(names)}")
        raise ConfigurationError("no lab is up; qemu-ioasid lab up starts one")
    for entry in every:
        if entry.name == name:
            return entry
    raise ConfigurationError(f"no lab {name}: {known}")


@contextlib.contextmanager
def listening() -> Iterator[socket.socket]:
    """The socket of this process's lab, in its run folder."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        with _entered(process.current_run().folder) as folder:
            sock.bind(f"{folder}/{_SOCKET}")
        sock.listen(64)
        yield sock


def refuse_taken(name: str) -> None:
    """Raises ConfigurationError when a lab of this *name* is up."""
    for entry in entries():
        if entry.name == name and entry.alive:
            raise ConfigurationError(
                f"lab {name} is up already (pid {entry.pid}); qemu-ioasid lab down --name {name} "
                "ends it, --name takes another name"
            )


def claim(name: str, rig: str) -> Entry:
    """Have this process be the keeper of lab *name*, once it is `listening`."""
    folder = process.current_run().folder
    entry = Entry(name, os.getpid(), rig, "", time.time(), folder)
    holding = reaper.hold(str(folder.parent))
    try:
        refuse_taken(name)
        write(entry)
    finally:
        os.close(holding)
    return entry


def write(entry: Entry) -> None:
    """Write down what is known of this process's lab."""
    told = asdict(entry)
    del told["folder"]
    new = entry.folder / f"{_ENTRY}.new"
    new.write_text(json.dumps(told) + "\n")
    new.replace(entry.folder / _ENTRY)


def wait_removed() -> None:
    """Return when somebody removes this process's run folder: nobody would find the lab then.

    A login's end does, where the system takes ``XDG_RUNTIME_DIR`` away with it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.inotify_init1(os.O_CLOEXEC)
    folder = process.current_run().folder
    # Of what is in it: the folder itself stays, nameless, as long as its lock is held.
    if fd < 0 or libc.inotify_add_watch(fd, os.fsencode(folder), _DELETED) < 0:
        raise OSError(ctypes.get_errno(), "inotify")
    while (folder / _SOCKET).exists():
        os.read(fd, 4096)


def sweep() -> list[str]:
    """End and remove what rigs have left whose owners are gone; says what, a line each."""
    if not process.run_folders().exists():
        return []
    dead = {entry.folder.name: entry for entry in entries() if not entry.alive}
    swept = process.sweep()
    lines = []
    for entry in dead.values():
        # Its reaper, where that lives, is at it.
        _wait_gone(entry.folder, Deadline(REAP_SECONDS, f"end of what lab {entry.name} left"))
        if entry.folder.exists():
            process.sweep()
        lines.append(f"lab {entry.name}: its keeper (pid {entry.pid}) is gone")
    lines += [f"run {token}: its orchestrator is gone" for token in swept if token not in dead]
    return lines


def _wait_gone(folder: Path, deadline: Deadline) -> None:
    try:
        fd = os.open(folder / reaper.LOCK, os.O_RDWR)
    except FileNotFoundError:
        return
    gone = threading.Event()

    def wait() -> None:
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX)
        os.close(fd)
        gone.set()

    threading.Thread(target=wait, daemon=True).start()
    if not gone.wait(deadline.remaining()):
        raise deadline.exceeded()


def collect_garbage() -> list[str]:
    """As `sweep`, and the scratch folders in the cache: snapshots of labs, unfinished builds."""
    return [*sweep(), *(f"{path}: its maker is gone" for path in cache.sweep())]
