"""What the reproducers of docs/findings.md need of the host side, and nothing else does."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import select
import signal
import threading

from qemu_ioasid.agent.deadline import wait_for
from qemu_ioasid.agent.libc import address_of
from qemu_ioasid.agent.procfs import task_state
from qemu_ioasid.agent.uapi import iommufd as uapi

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from qemu_ioasid.agent.guestvm import GuestVm
    from qemu_ioasid.agent.iommufd import Iommufd

    Json = dict[str, Any]


def _ended(pidfd: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def _waits(pid: int, pidfd: int) -> bool | None:
    """Whether a process sleeps without heeding signals; False when it has ended."""
    if _ended(pidfd, 0):
        return False
    try:
        return True if task_state(f"/proc/{pid}") == "D" else None
    except (FileNotFoundError, ProcessLookupError):
        return False


def _mapping(ioas: int, address: int, iova: int) -> uapi.iommu_ioas_map:
    return uapi.iommu_ioas_map(
        size=ctypes.sizeof(uapi.iommu_ioas_map),
        flags=uapi.IOMMU_IOAS_MAP_READABLE | uapi.IOMMU_IOAS_MAP_FIXED_IOVA,
        ioas_id=ioas,
        user_va=address,
        length=mmap.PAGESIZE,
        iova=iova,
    )


class Findings:
    """Operations, on the host's iommufds and guests, found by their names."""

    def __init__(self, iommufd: Callable[[str], Iommufd], guest: Callable[[str], GuestVm]) -> None:
        self._iommufd = iommufd
        self._guest = guest
        self.operations: Mapping[str, Callable[..., Any]] = {
            "guest_wait": self.guest_wait,
            "map_killed": self.map_killed,
            "map_unreported": self.map_unreported,
        }

    def guest_wait(self, name: str, seconds: float) -> Json:
        """Waits for the end of a guest's QEMU; how it ended, and what it wrote."""
        guest = self._guest(name)
        guest.wait(seconds)
        return {"returncode": guest.returncode, "stderr": guest.output()}

    def map_killed(self, iommufd: str, ioas: int, iova: int, seconds: float) -> Json:
        """Kills a process once it waits in the call that maps a page of it, or has made it.

        Whether it had to wait, and whether it ended within seconds of that.
        """
        memory = mmap.mmap(-1, mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with memory, self._iommufd(iommufd).descriptor.borrowed() as fd:
            argument = bytearray(_mapping(ioas, address_of(memory), iova))
            pid = os.fork()
            if not pid:
                try:
                    fcntl.ioctl(fd, uapi.IOMMU_IOAS_MAP, argument)
                finally:
                    os._exit(0)
        threading.Thread(target=os.waitpid, args=(pid, 0), daemon=True).start()
        pidfd = os.pidfd_open(pid)
        try:
            waits = wait_for("a process in IOMMU_IOAS_MAP", 20, lambda: _waits(pid, pidfd))
            if waits:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            return {"waits": waits, "ended": _ended(pidfd, seconds)}
        finally:
            os.close(pidfd)

    def map_unreported(self, iommufd: str, ioas: int, iova: int) -> None:
        """Maps a page, with the ioctl's struct in memory that may only be read. OSError EFAULT."""
        with mmap.mmap(-1, mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
            record = _mapping(ioas, address_of(memory), iova)
            self._iommufd(iommufd).descriptor.ioctl_on_readonly(uapi.IOMMU_IOAS_MAP, record)
