"""The guest's arena: one huge page of its RAM that both sides watch."""

from __future__ import annotations

import errno
import mmap
import os

from qemu_ioasid.agent.libc import address_of
from qemu_ioasid.agent.uapi.mman import MAP_HUGETLB

SIZE = 2 << 20
PAGE = 4096
NONCE = 16

_POOL = "/sys/kernel/mm/hugepages/hugepages-2048kB"
_PRESENT = 1 << 63
_PFN = (1 << 55) - 1


def _reserve_page() -> None:
    with open(f"{_POOL}/free_hugepages") as file:
        if int(file.read()):
            return
    with open(f"{_POOL}/nr_hugepages", "r+") as pool:
        pool.write(str(int(pool.read()) + 1))


def physical_address(address: int) -> int:
    """The physical address behind a virtual one of this process, from /proc/self/pagemap.

    Layout: Documentation/admin-guide/mm/pagemap.rst. The page must be populated and unable to move
    (hugetlb). Raises OSError EFAULT: not present; EPERM: not shown without CAP_SYS_ADMIN.
    """
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        entry = int.from_bytes(os.pread(fd, 8, address // PAGE * 8), "little")
    finally:
        os.close(fd)
    if not entry & _PRESENT:
        raise OSError(errno.EFAULT, f"no page at {address:#x}")
    if not entry & _PFN:
        raise OSError(errno.EPERM, "the kernel hides page frame numbers")
    return (entry & _PFN) * PAGE + address % PAGE


class Arena:
    """SIZE bytes of RAM, contiguous and fixed in place, at guest-physical gpa. A context manager.

    Raises OSError when made: ENOMEM when no huge page can be had.
    """

    def __init__(self) -> None:
        _reserve_page()
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE | MAP_HUGETLB
        self.memory = mmap.mmap(-1, SIZE, flags)
        try:
            # MAP_POPULATE does not report a failure
            self.memory[0] = 0
            self.address = address_of(self.memory)
            self.gpa = physical_address(self.address)
        except BaseException:
            self.memory.close()
            raise

    def nonce(self) -> bytes:
        """Writes fresh random bytes at offset 0 and returns them."""
        data = os.urandom(NONCE)
        self.memory[:NONCE] = data
        return data

    def write(self, offset: int, data: bytes) -> None:
        """Raises ValueError outside the arena; then nothing is written."""
        self._check(offset, len(data))
        self.memory[offset : offset + len(data)] = data

    def read(self, offset: int, length: int) -> bytes:
        """Raises ValueError outside the arena."""
        self._check(offset, length)
        return self.memory[offset : offset + length]

    def va(self, offset: int, length: int) -> int:
        """The virtual address of a range. Raises ValueError outside the arena."""
        self._check(offset, length)
        return self.address + offset

    @staticmethod
    def _check(offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > SIZE:
            raise ValueError(f"{offset:#x}+{length:#x} is outside the arena of {SIZE:#x} bytes")

    def close(self) -> None:
        """Gives the page back to the kernel (a mapping in an IOAS keeps it)."""
        self.memory.close()

    def __enter__(self) -> Arena:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
