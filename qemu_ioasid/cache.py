# SPDX-License-Identifier: GPL-2.0-or-later
"""Things that were built, kept by the hash of what they were built from."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import RequirementError
from qemu_ioasid.process import current_run

#: What a full, read-only or forbidden place answers.
_NO_PLACE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
)


#: How long a scratch folder may be without a lock before its maker is taken for gone.
_IDLE_SECONDS = 3600

_ADVICE = "make room, or set QEMU_IOASID_CACHE to another folder"


def root() -> Path:
    """``QEMU_IOASID_CACHE``, else ``qemu_ioasid`` below the user's cache folder; it is made."""
    own = os.environ.get("QEMU_IOASID_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    path = Path(own).absolute() if own else Path(home) / "qemu_ioasid"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _no_place(error, path) from None
    return path


def digest(*parts: str | bytes) -> str:
    """A key: 16 hexadecimal digits over *parts*, whose borders count."""
    hasher = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        hasher.update(len(data).to_bytes(8, "little") + data)
    return hasher.hexdigest()[:16]


@contextlib.contextmanager
def explained(path: Path, advice: str = _ADVICE) -> Iterator[None]:
    """Turn what a full or read-only disk answers into a RequirementError that names *path*."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_PLACE:
            raise _no_place(error, path, advice) from None
        raise


def _no_place(error: OSError, path: Path, advice: str = _ADVICE) -> RequirementError:
    return RequirementError(f"{error.filename or path}: {error.strerror}; {advice}")


@contextlib.contextmanager
def locked(
    path: Path, deadline: Deadline, on_wait: Callable[[], None] | None = None
) -> Iterator[None]:
    """Hold an exclusive lock on *path* (made if missing), across processes.

    *on_wait* is called once when somebody else holds it. Raises
    DeadlineExceeded. The lock ends with its holder, whatever ends that.
    """
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if on_wait is not None:
                on_wait()
            _wait_for_lock(fd, deadline)
        yield
    finally:
        os.close(fd)


def _wait_for_lock(fd: int, deadline: Deadline) -> None:
    # flock() has no timeout: a thread of its own blocks in it, on a duplicate that it closes
    # if we have stopped waiting (the lock belongs to the open file that both share).
    acquired = threading.Event()
    waiter = os.dup(fd)

    def block() -> None:
        with contextlib.suppress(OSError):
            fcntl.flock(waiter, fcntl.LOCK_EX)
            acquired.set()
        os.close(waiter)

    threading.Thread(target=block, daemon=True).start()
    if not acquired.wait(deadline.remaining()):
        raise deadline.exceeded()


def entry(kind: str, key: str) -> Path:
    """Where the thing of that *kind* and *key* is or would be."""
    return root() / kind / key


@contextlib.contextmanager
def scratch(kind: str) -> Iterator[Path]:
    """A folder on the cache's file system that is gone afterwards, even after SIGKILL."""
    parent = root() / kind
    with explained(parent):
        parent.mkdir(parents=True, exist_ok=True)
        path = Path(tempfile.mkdtemp(prefix=f".{current_run().token}-", dir=parent))
    current_run().dies_with_us(path)
    # Tells `sweep` that somebody is at work in it.
    held = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(held)


def sweep() -> list[Path]:
    """Remove the scratch folders whose makers are gone; returns them.

    Only a machine that went down leaves any that the sweeping of run folders
    does not find.
    """
    swept = []
    for path in root().glob("*/.*-*"):
        if re.fullmatch(r"\.[0-9a-f]{12}-\w{8}", path.name) is None:
            continue
        with contextlib.suppress(OSError):
            held = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                # One that is being made is not locked yet.
                if time.time() - os.fstat(held).st_mtime > _IDLE_SECONDS:
                    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path, ignore_errors=True)
                    swept.append(path)
            finally:
                os.close(held)
    return swept


def get_or_build(
    kind: str,
    key: str,
    build: Callable[[Path], object],
    *,
    deadline: Deadline,
    on_wait: Callable[[], None] | None = None,
) -> tuple[Path, bool]:
    """The entry of *kind* and *key*, and whether it was there already.

    *build* fills an empty folder, which becomes the entry by one rename when it
    returns: an entry is whole or absent. Of several at once one builds, the
    others wait (*on_wait*) and find it.
    """
    path = entry(kind, key)
    if _touched(path):
        return path, True
    with locked(path.parent / f".{key}.lock", deadline, on_wait):
        if _touched(path):
            return path, True
        with explained(path), scratch(kind) as folder:
            whole = folder / "entry"
            whole.mkdir()
            build(whole)
            whole.rename(path)
    return path, False


def _touched(path: Path) -> bool:
    """Whether there is an entry; `prune` keeps what was used last."""
    if not path.is_dir():
        return False
    # Somebody else's cache may be read only.
    with contextlib.suppress(OSError):
        os.utime(path)
    return True


def prune(kind: str, kept: int) -> dict[Path, int]:
    """Remove all entries of *kind* but the *kept* that were touched last; their sizes."""
    found = []
    for folder in (root() / kind).glob("[!.]*"):
        with contextlib.suppress(OSError):
            found.append((folder.stat().st_mtime_ns, folder))
    removed = {}
    for _, folder in sorted(found, reverse=True)[kept:]:
        removed[folder] = size(folder)
        shutil.rmtree(folder, ignore_errors=True)
    return removed


def size(folder: Path) -> int:
    """The bytes that *folder* takes on its disk."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += 512 * os.lstat(os.path.join(place, name)).st_blocks
    return total
