"""The kernel as witness: every call of iommufd_access_rw, by a kprobe event in tracefs.

Documentation/trace/kprobetrace.rst; the function: drivers/iommu/iommufd/device.c
(int iommufd_access_rw(struct iommufd_access *access, unsigned long iova, void *data, size_t length,
unsigned int flags)), so by the x86-64 calling convention access is in di, iova in si, length in cx
and flags in r8.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress

from qemu_ioasid.agent.libc import mount

TRACEFS = "/sys/kernel/tracing"
GROUP = "qemu_ioasid"
FUNCTION = "iommufd_access_rw"
_ARGUMENTS = "iova=%si:x64 length=%cx:u64 flags=%r8:x32 access=%di:x64"
_WRITE = 1  # IOMMUFD_ACCESS_RW_WRITE, include/linux/iommufd.h


def ensure_mounted(filesystem: str, target: str) -> None:
    """Mounts tracefs or debugfs when it is not. Raises OSError."""
    if not os.path.ismount(target):
        mount(filesystem, target, filesystem)


def _write(path: str, text: str, append: bool = False) -> None:
    flags = os.O_WRONLY | os.O_CLOEXEC | (os.O_APPEND if append else os.O_TRUNC)
    fd = os.open(path, flags)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def _read(path: str) -> str:
    with open(path) as file:
        return file.read()


class Access:
    """One call: iova, length in bytes, whether it writes to the IOAS, and which access object."""

    __slots__ = ("access", "iova", "length", "write")

    def __init__(self, iova: int, length: int, write: bool, access: int) -> None:
        self.iova = iova
        self.length = length
        self.write = write
        self.access = access

    def told(self) -> dict[str, int | bool]:
        """As the protocol has it."""
        return {name: getattr(self, name) for name in ("iova", "length", "write", "access")}


def parse(text: str, event: str) -> list[Access]:
    """The accesses in a tracefs trace file, in its order. Raises ValueError for a broken line."""
    marker = f" {event}: "
    accesses = []
    for line in text.splitlines():
        head, found, tail = line.partition(marker)
        if not found or head.startswith("#"):
            continue
        fields = dict(word.split("=", 1) for word in tail.split() if "=" in word)
        try:
            accesses.append(
                Access(
                    int(fields["iova"], 0),
                    int(fields["length"], 0),
                    bool(int(fields["flags"], 0) & _WRITE),
                    int(fields["access"], 0),
                )
            )
        except KeyError as error:
            raise ValueError(f"no {error} in trace line {line!r}") from None
    return accesses


class AccessTrace:
    """The probe, in a tracefs instance of its own; runs from start() to close().

    A context manager. Raises OSError: ENOENT when the kernel has no kprobe events or no such
    function.
    """

    def __init__(self) -> None:
        self._event = f"access_rw_{os.getpid()}"
        self._instance = f"{TRACEFS}/instances/{GROUP}-{os.getpid()}"
        self._enable = f"{self._instance}/events/{GROUP}/{self._event}/enable"
        self._missed = 0
        self._lost_before = 0

    def start(self) -> None:
        """Makes the instance and the probe, and turns it on. On failure nothing is left."""
        ensure_mounted("tracefs", TRACEFS)
        definition = f"p:{GROUP}/{self._event} {FUNCTION} {_ARGUMENTS}\n"
        try:
            os.mkdir(self._instance)
            _write(f"{TRACEFS}/kprobe_events", definition, append=True)
            _write(self._enable, "1")
            self.clear()
        except BaseException:
            self.close()
            raise

    def clear(self) -> None:
        """Forgets what was recorded."""
        # Consumed, not reset: that waits for every processor to be done with the buffer.
        self._consume()
        self._lost_before, self._missed = self._lost(), self._misses()

    def read(self) -> list[Access]:
        """The accesses since start or clear, without forgetting them.

        Raises RuntimeError when the kernel lost events or missed hits: then this is no witness.
        """
        accesses = parse(_read(f"{self._instance}/trace"), self._event)
        self._check()
        return accesses

    def take(self) -> list[Access]:
        """As read, and forgets them."""
        accesses = parse(self._consume(), self._event)
        self._check()
        return accesses

    def _consume(self) -> str:
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
        pipe = os.open(f"{self._instance}/trace_pipe", flags)
        data = b""
        try:
            with suppress(BlockingIOError):
                while more := os.read(pipe, 1 << 16):
                    data += more
        finally:
            os.close(pipe)
        return data.decode()

    def _check(self) -> None:
        lost = self._lost() - self._lost_before
        missed = self._misses() - self._missed
        if lost or missed:
            raise RuntimeError(f"trace of {FUNCTION}: {lost} events lost, {missed} hits missed")

    def _lost(self) -> int:
        lost = 0
        folder = f"{self._instance}/per_cpu"
        for cpu in os.listdir(folder):
            for line in _read(f"{folder}/{cpu}/stats").splitlines():
                name, _, value = line.partition(":")
                if name in ("overrun", "commit overrun", "dropped events"):
                    lost += int(value)
        return lost

    def _misses(self) -> int:
        # lines of "event hits misses"; the event may be shown with its group
        for line in _read(f"{TRACEFS}/kprobe_profile").splitlines():
            words = line.split()
            if words and words[0].rpartition("/")[2] == self._event:
                return int(words[2])
        raise RuntimeError(f"kprobe_profile does not know {self._event}")

    def close(self) -> None:
        """Takes the probe and the instance away. Calling it again does nothing."""
        if os.path.exists(self._enable):
            _write(self._enable, "0")
        try:
            _write(f"{TRACEFS}/kprobe_events", f"-:{GROUP}/{self._event}\n", append=True)
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
        with suppress(FileNotFoundError):
            os.rmdir(self._instance)

    def __enter__(self) -> AccessTrace:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
