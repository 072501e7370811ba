"""The few C library calls that Python's standard library lacks."""

from __future__ import annotations

import ctypes
import errno
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable

_libc = ctypes.CDLL(None, use_errno=True)


def prctl_caller(option: int, argument: int) -> Callable[[], int]:
    """prctl(2), resolved now so that a freshly forked child needs no symbol lookup.

    The answer is 0, or -1 on error.
    """
    function = _libc.prctl
    option_argument = ctypes.c_int(option)
    value_argument = ctypes.c_ulong(argument)

    def call() -> int:
        return int(function(option_argument, value_argument))

    return call


def called(name: str, fd: int, *arguments: object) -> str | int:
    """What the function *name* of the C library answers, or the errno's name."""
    answered: int = getattr(_libc, name)(fd, *arguments)
    return errno.errorcode[ctypes.get_errno()] if answered == -1 else answered


def mount(source: str, target: str, filesystem: str) -> None:
    """mount(2) without flags or data. Raises OSError (EBUSY: already there)."""
    if _libc.mount(source.encode(), target.encode(), filesystem.encode(), 0, None):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), target)


def address_of(memory: object) -> int:
    """The virtual address of a writable buffer (an mmap), valid while that stays open."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))  # type: ignore[arg-type]


def protect(address: int, length: int, protection: int) -> None:
    """mprotect(2), of whole pages. Raises OSError."""
    pointer, size = ctypes.c_void_p(address), ctypes.c_size_t(length)
    if _libc.mprotect(pointer, size, protection):
        raise OSError(ctypes.get_errno(), "mprotect")


def vmsplice(pipe: int, memory: bytearray | mmap.mmap) -> None:
    """vmsplice(2): a pipe, which must have room, refers to the pages of all of a buffer.

    Raises OSError.
    """
    length = len(memory)
    # struct iovec (include/uapi/linux/uio.h)
    vector = (ctypes.c_size_t * 2)(address_of(memory), length)
    taken = _libc.vmsplice(pipe, vector, ctypes.c_ulong(1), 0)
    if taken != length:
        raise OSError(ctypes.get_errno(), f"vmsplice: {taken} of {length} bytes")


_libc.memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


def differ(one: int, other: int, length: int) -> bool:
    """Whether as many bytes at two addresses, which stay what they are meanwhile, differ."""
    return bool(_libc.memcmp(one, other, length))


def same_bytes(one: object, offset: int, other: object, start: int, length: int) -> bool:
    """Whether two writable buffers, at offset and start, hold the same bytes, all inside them."""
    return not differ(address_of(one) + offset, address_of(other) + start, length)
