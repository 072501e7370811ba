"""Memory that puts an access to sleep until it is told to let it through.

An anonymous mapping of this process under userfaultfd (mm/userfaultfd.c), mapped into an IOAS: an
access of a device that pins nothing faults on it, in the kernel, and waits.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import mmap
import os
import threading
from contextlib import ExitStack

from qemu_ioasid.agent.descriptor import Descriptor
from qemu_ioasid.agent.libc import address_of
from qemu_ioasid.agent.uapi import userfaultfd as uapi

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from qemu_ioasid.agent.iommufd import Iommufd

USERFAULTFD = "/dev/userfaultfd"


def _open() -> int:
    # the device node, unlike the system call, gives faults taken in kernel mode without a sysctl
    with Descriptor.open(USERFAULTFD) as device:
        return device.ioctl(uapi.USERFAULTFD_IOC_NEW, os.O_CLOEXEC | os.O_NONBLOCK)


class SlowMemory:
    """length bytes, mapped read-write at iova of an IOAS; untouched until release().

    A context manager; close() releases first. Raises OSError when made, and leaves nothing then.
    """

    def __init__(self, iommufd: Iommufd, ioas: int, iova: int, length: int) -> None:
        self._iommufd = iommufd
        self._ioas = ioas
        self._iova = iova
        self.length = length
        self._released = False
        self._memory = mmap.mmap(-1, length, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        try:
            self._address = address_of(self._memory)
            self._fault = Descriptor(_open(), "userfaultfd")
        except BaseException:
            self._memory.close()
            raise
        try:
            self._fault.ioctl(uapi.UFFDIO_API, uapi.uffdio_api(api=uapi.UFFD_API))
            register = uapi.uffdio_register(
                range=self._range(), mode=uapi.UFFDIO_REGISTER_MODE_MISSING
            )
            self._fault.ioctl(uapi.UFFDIO_REGISTER, register)
            iommufd.ioas_map(ioas, self._address, length, iova)
        except BaseException:
            self._fault.close()
            self._memory.close()
            raise

    def _range(self) -> uapi.uffdio_range:
        return uapi.uffdio_range(start=self._address, len=self.length)

    def wait(self, seconds: float) -> tuple[int, bool]:
        """Waits until an access sleeps; (offset of its page, whether it writes).

        Each sleeper is reported once. Raises TimeoutError.
        """
        import select

        poll = select.poll()
        with self._fault.borrowed() as fd:
            poll.register(fd, select.POLLIN)
            if not poll.poll(seconds * 1000):
                raise TimeoutError(f"an access that sleeps: not within {seconds:g} s")
            data = os.read(fd, ctypes.sizeof(uapi.uffd_msg))
        message = uapi.uffd_msg.from_buffer_copy(data)
        if message.event != uapi.UFFD_EVENT_PAGEFAULT:
            raise RuntimeError(f"userfaultfd event {message.event:#x}")
        fault = message.arg.pagefault
        return fault.address - self._address, bool(fault.flags & uapi.UFFD_PAGEFAULT_FLAG_WRITE)

    def release(self) -> None:
        """Wakes every sleeper and makes the memory ordinary, zeros. Again: does nothing."""
        if not self._released:
            self._fault.ioctl(uapi.UFFDIO_UNREGISTER, self._range())
            self._released = True

    def read(self, offset: int, length: int) -> bytes:
        """OSError EBUSY before release(): the reader itself would sleep. ValueError: outside."""
        if not self._released:
            raise OSError(errno.EBUSY, "the slow memory is not released")
        if offset < 0 or length < 0 or offset + length > self.length:
            raise ValueError(f"{offset:#x}+{length:#x} is outside the slow memory")
        return self._memory[offset : offset + length]

    def close(self) -> None:
        """Releases, unmaps from the IOAS (which may be gone already), and frees."""
        self.release()
        try:
            self._iommufd.ioas_unmap(self._ioas, self._iova, self.length)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EBADF):
                raise
        finally:
            self._fault.close()
            self._memory.close()

    def __enter__(self) -> SlowMemory:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class SlowMemories:
    """The slow memories by handle, with the operations on them. iommufd finds one by its name."""

    def __init__(self, iommufd: Callable[[str], Iommufd]) -> None:
        self._iommufd = iommufd
        self._lock = threading.Lock()
        self._slow: dict[int, SlowMemory] = {}
        self._handles = itertools.count(1)
        self.operations: Mapping[str, Callable[..., Any]] = {
            f"slow_{name}": getattr(self, name) for name in ("create", "wait", "release", "read")
        } | {"slow_close": self.close_one}

    def _get(self, handle: int) -> SlowMemory:
        with self._lock:
            if handle not in self._slow:
                raise KeyError(f"no slow memory {handle}")
            return self._slow[handle]

    def create(self, iommufd: str, ioas: int, iova: int, length: int) -> dict[str, int]:
        """Maps memory that puts accesses to sleep into an IOAS."""
        slow = SlowMemory(self._iommufd(iommufd), ioas, iova, length)
        handle = next(self._handles)
        with self._lock:
            self._slow[handle] = slow
        return {"handle": handle}

    def wait(self, handle: int, seconds: float) -> dict[str, int | bool]:
        """Waits until an access sleeps."""
        offset, write = self._get(handle).wait(seconds)
        return {"offset": offset, "write": write}

    def release(self, handle: int) -> None:
        """Wakes all sleepers."""
        self._get(handle).release()

    def read(self, handle: int, offset: int, length: int) -> dict[str, str]:
        """Bytes of released memory."""
        return {"hex": self._get(handle).read(offset, length).hex()}

    def close_one(self, handle: int) -> None:
        """Releases, unmaps and frees."""
        self._get(handle).close()
        with self._lock:
            self._slow.pop(handle, None)

    def close(self) -> None:
        """Releases, unmaps and frees all of them."""
        # An unmap of one waits for whoever sleeps in another of the same IOAS.
        with self._lock:
            every = list(self._slow.values())
        for slow in every:
            slow.release()
        with ExitStack() as stack:
            for handle in list(self._slow):
                stack.callback(self.close_one, handle)
