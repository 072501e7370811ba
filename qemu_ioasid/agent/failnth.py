"""The kernel's fault injection: the nth thing that can fail inside an operation's calls fails.

/proc/TASK/fail-nth (Documentation/fault-injection) counts what the calls of one thread allocate
(failslab, fail_page_alloc) or copy from or to user space (fail_usercopy). It is set for the calls
on files alone, and those do not let go of Python's lock, so that nothing of Python's own fails.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import threading
from contextlib import contextmanager

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from typing import Any

    Json = dict[str, Any]

FAIL_NTH = "/proc/thread-self/fail-nth"
DEBUGFS = "/sys/kernel/debug"
#: Allocations that may wait, which are nearly all, and single pages are spared unless told.
SETTINGS = {
    "failslab/ignore-gfp-wait": "N",
    "fail_page_alloc/ignore-gfp-wait": "N",
    "fail_page_alloc/min-order": "0",
    "failslab/verbose": "0",
    "fail_page_alloc/verbose": "0",
    "fail_usercopy/verbose": "0",
    # What comes behind the nth: allocations of a task that is marked, as long as `times` lasts.
    "failslab/task-filter": "Y",
    "failslab/probability": "100",
    "failslab/interval": "1",
}
MARK = "/proc/thread-self/make-it-fail"
TIMES = "failslab/times"
# These keep Python's lock: a thread that had to wait for it again would do so with calls that
# may fail.
_libc = ctypes.PyDLL(None, use_errno=True)
for _function in (_libc.pread, _libc.pwrite):
    _function.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_long)
    _function.restype = ctypes.c_ssize_t


def supported() -> bool:
    """Whether the kernel has it: CONFIG_FAULT_INJECTION, FAILSLAB, its debugfs files."""
    return os.path.exists(FAIL_NTH) and all(
        os.path.exists(f"{DEBUGFS}/{name}") for name in SETTINGS
    )


def _prepare(more: int) -> None:
    # The nth counts as one of them (lib/fault-inject.c).
    times = more + 1 if more else 0
    for name, value in {**SETTINGS, TIMES: str(times)}.items():
        fd = os.open(f"{DEBUGFS}/{name}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, value.encode())
        finally:
            os.close(fd)


def _raised(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _ioctl(fd: int, request: int, argument: Any = 0) -> int:
    if not isinstance(argument, int):
        size = len(memoryview(argument).cast("B"))
        argument = ctypes.byref((ctypes.c_char * size).from_buffer(argument))
    return _raised(_libc.ioctl(fd, ctypes.c_ulong(request), argument))


def _open(path: str, flags: int, mode: int = 0o777) -> int:
    return _raised(_libc.open(os.fsencode(path), flags, mode))


def _write(fd: int, data: bytes) -> int:
    return _raised(_libc.write(fd, bytes(data), ctypes.c_size_t(len(data))))


def _pwrite(fd: int, data: bytes, offset: int) -> int:
    return _raised(_libc.pwrite(fd, bytes(data), len(data), offset))


def _read(fd: int, length: int) -> bytes:
    buffer = ctypes.create_string_buffer(length)
    done = _raised(_libc.read(fd, buffer, ctypes.c_size_t(length)))
    return buffer.raw[:done]


def _pread(fd: int, length: int, offset: int) -> bytes:
    buffer = ctypes.create_string_buffer(length)
    done = _raised(_libc.pread(fd, buffer, length, offset))
    return buffer.raw[:done]


#: What stands in for a module's function meanwhile: calls on files, that take and answer the same.
_CALLS: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
    (fcntl, "ioctl", _ioctl),
    (os, "open", _open),
    (os, "write", _write),
    (os, "pwrite", _pwrite),
    (os, "read", _read),
    (os, "pread", _pread),
)


class _Countdown:
    """Over all calls of one thread: `left` until the one that fails; 0: it has."""

    def __init__(self, fd: int, mark: int, nth: int) -> None:
        self._fd = fd
        self._mark = mark
        self.left = nth
        self._thread = threading.get_ident()
        self._buffer = ctypes.create_string_buffer(16)

    def around(self, call: Callable[..., Any], ordinary: Callable[..., Any]) -> Callable[..., Any]:
        """*call*, counted where it is made by our thread; else *ordinary*."""

        def counted(*args: Any, **named: Any) -> Any:
            if threading.get_ident() != self._thread or not self.left:
                return ordinary(*args, **named)
            _pwrite(self._mark, b"1", 0)
            _pwrite(self._fd, b"%d" % self.left, 0)
            try:
                return call(*args, **named)
            finally:
                # In this order: what is armed could have the second one fail.
                self._disarm()
                _libc.pwrite(self._mark, b"0", 1, 0)

        return counted

    def _disarm(self) -> None:
        told = _libc.pread(self._fd, self._buffer, 15, 0)
        # The read copies to user space itself: where it fails, the last one was its.
        self.left = int(self._buffer.raw[:told]) if told > 0 else 1
        if self.left:
            # So does this, and then the count is 0 as well.
            _libc.pwrite(self._fd, b"0", 1, 0)


@contextmanager
def _counting(nth: int) -> Iterator[_Countdown]:
    fd = os.open(FAIL_NTH, os.O_RDWR | os.O_CLOEXEC)
    mark = os.open(MARK, os.O_RDWR | os.O_CLOEXEC)
    ordinary = [(module, name, getattr(module, name)) for module, name, _ in _CALLS]
    try:
        countdown = _Countdown(fd, mark, nth)
        for (module, name, call), (_, _, before) in zip(_CALLS, ordinary, strict=True):
            setattr(module, name, countdown.around(call, before))
        yield countdown
    finally:
        for module, name, before in ordinary:
            setattr(module, name, before)
        os.close(mark)
        os.close(fd)


class FailNth:
    """The operation `fail_nth`, on *operations*."""

    def __init__(self, operations: Mapping[str, Callable[..., Any]]) -> None:
        self._operations = operations
        # one at a time: the modules' functions are everybody's
        self._lock = threading.Lock()

    def fail_nth(self, op: str, args: Json, nth: int, more: int = 0) -> Json:
        """Does an operation while the nth thing that can fail in its calls does.

        And so many more allocations behind it in the same call: of some the kernel makes two.
        """
        if nth < 1 or op not in self._operations:
            raise ValueError(f"{op}, {nth}: an operation, and a number from 1 on")
        answer = error = None
        with self._lock:
            _prepare(more)
            with _counting(nth) as countdown:
                try:
                    answer = self._operations[op](**args)
                except OSError as raised:
                    error = {"errno": raised.errno, "message": str(raised)}
        return {"answer": answer, "error": error, "failed": not countdown.left}
