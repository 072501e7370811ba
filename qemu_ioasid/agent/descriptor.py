"""A file descriptor that several threads may use and one may close."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from contextlib import contextmanager

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from ctypes import Structure


class Descriptor:
    """Owns one fd. close() takes effect when the last call in progress on it has returned.

    A thread may sit in an ioctl for long (a detach that drains). Closing the number under it would
    hand the number to the next open(), and a later call would hit the wrong file. The kernel keeps
    the file alive during the ioctl anyway, so waiting changes nothing that can be seen outside.
    """

    def __init__(self, fd: int, name: str) -> None:
        self.name = name
        self._fd = fd
        self._users = 0
        self._closing = False
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: str, flags: int = os.O_RDWR, name: str = "") -> Descriptor:
        """Opens path (close-on-exec). Raises OSError."""
        return cls(os.open(path, flags | os.O_CLOEXEC), name or path)

    @contextmanager
    def borrowed(self) -> Iterator[int]:
        """The fd number, valid inside the block. Raises OSError EBADF once close() was called."""
        with self._lock:
            if self._closing:
                raise OSError(errno.EBADF, f"{self.name} is closed")
            self._users += 1
        try:
            yield self._fd
        finally:
            with self._lock:
                self._users -= 1
                last = self._closing and not self._users
            if last:
                os.close(self._fd)

    def ioctl(self, request: int, argument: Structure | int = 0) -> int:
        """ioctl(2) with the struct written back in place. Raises OSError with the kernel's errno.

        Other threads run meanwhile.
        """
        with self.borrowed() as fd:
            answer: int = fcntl.ioctl(fd, request, argument)
            return answer

    def close(self) -> None:
        """Closes, or lets the last call in progress close. Calling it again does nothing."""
        with self._lock:
            now = not self._closing and not self._users
            self._closing = True
        if now:
            os.close(self._fd)

    @property
    def closed(self) -> bool:
        """close() was called."""
        return self._closing

    def __enter__(self) -> Descriptor:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
