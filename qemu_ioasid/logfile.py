# SPDX-License-Identifier: GPL-2.0-or-later
"""Files that hold what VMs say: their user's alone, and with an end, however much is said."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Self

#: The longest a file of one stream gets, in bytes.
LIMIT = 64 << 20


class LogFile:
    """Appends to *path*, up to *limit* bytes in all; then says once, in it, that there was more.

    A disk that is full takes nothing more, either: whoever writes goes on. Any thread may write.
    """

    def __init__(self, path: Path, limit: int | None = None) -> None:
        self.limit = LIMIT if limit is None else limit
        self._lock = threading.Lock()
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        self._fd = os.open(path, flags, 0o600)
        self._closed = False
        self.size = os.fstat(self._fd).st_size
        #: Whether something was left out.
        self.full = self.size >= self.limit

    def write(self, data: bytes) -> None:
        """Keep *data*, or the part of it for which there is room."""
        with self._lock:
            if self.full or self._closed:
                return
            kept = data[: self.limit - self.size]
            self.full = len(kept) < len(data)
            if self.full:
                kept += b"\n(more was said; this file has no more than %d bytes)\n" % self.limit
            with contextlib.suppress(OSError):
                self.size += os.write(self._fd, kept)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """What is written from now on is not kept."""
        with self._lock:
            if not self._closed:
                self._closed = True
                os.close(self._fd)


class Collected:
    """What a child writes to *fd*, in a `LogFile` at *path*."""

    def __init__(self, path: Path, theirs: socket.socket) -> None:
        self._path = path
        self._theirs = theirs
        self._ended = threading.Event()

    @property
    def fd(self) -> int:
        """The child's output, which it inherits."""
        return self._theirs.fileno()

    def handed_over(self) -> None:
        """The child has it: its death is now the end."""
        self._theirs.close()

    def text(self, *, ended: bool) -> str:
        """What is kept; the last words too, of a child that has *ended*."""
        if ended:
            self._ended.wait(1.0)
        return self._path.read_text(errors="replace")


@contextlib.contextmanager
def collected(path: Path) -> Iterator[Collected]:
    """The output of a child that ends before the block does."""
    ours, theirs = socket.socketpair()
    with ours, theirs, LogFile(path) as log:
        found = Collected(path, theirs)

        def pump() -> None:
            with contextlib.suppress(OSError):
                while data := ours.recv(65536):
                    log.write(data)
            found._ended.set()

        thread = threading.Thread(target=pump, name=path.name, daemon=True)
        thread.start()
        try:
            yield found
        finally:
            found.handed_over()
            if not found._ended.wait(1.0):
                with contextlib.suppress(OSError):
                    ours.shutdown(socket.SHUT_RDWR)
            thread.join(5)
