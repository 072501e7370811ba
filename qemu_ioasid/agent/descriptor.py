"""A file descriptor that several threads may use and one may close."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import threading
from contextlib import contextmanager

from qemu_ioasid.agent.libc import address_of, protect

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from ctypes import Structure


def words(record: Structure) -> tuple[bytearray, memoryview]:
    """An ioctl's argument that is used over and over, and its 32-bit words, to be written.

    To set the fields of a ctypes struct, and to pass it, takes twice the time.
    """
    argument = bytearray(record)
    return argument, memoryview(argument).cast("I")


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

    def duplicate(self, name: str = "") -> Descriptor:
        """One more fd of the same file. Raises OSError."""
        with self.borrowed() as fd:
            return Descriptor(os.dup(fd), name or self.name)

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

    def ioctl_on_readonly(self, request: int, record: Structure) -> None:
        """ioctl(2) whose argument lies in memory that may only be read. Raises OSError."""
        with mmap.mmap(-1, mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as page:
            page[: ctypes.sizeof(record)] = bytes(record)
            protect(address_of(page), mmap.PAGESIZE, mmap.PROT_READ)
            # Up to 1024 bytes fcntl passes a copy; this is more, and so it passes the page itself.
            with self.borrowed() as fd, memoryview(page) as argument:
                fcntl.ioctl(fd, request, argument)

    def ioctl_each(
        self, request: int, record: Structure, offset: int, values: Iterable[int]
    ) -> tuple[int, OSError | None]:
        """ioctl(2) with each of values in turn at a 32-bit field of record, until the first error.

        How many were done, and that error.
        """
        argument, fields = words(record)
        call, at, done = fcntl.ioctl, offset // 4, 0
        try:
            with self.borrowed() as fd:
                for value in values:
                    fields[at] = value
                    call(fd, request, argument)
                    done += 1
        except OSError as error:
            return done, error
        return done, None

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
