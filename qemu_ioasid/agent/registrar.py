"""The registrar: which PASID this side has put into which device's list, and the kernel's word.

PASIDs are numbers of one parent (rule 5 of the security model): 1 to 2^20 - 1. Addresses spaces
are IOAS ids of an iommufd. The registrar stops mistakes of its own side; it is never what stops an
attack, and whoever holds a device's fd can go round it.
"""

from __future__ import annotations

import errno
import threading
from contextlib import contextmanager

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from qemu_ioasid.agent.iommufd import Iommufd
    from qemu_ioasid.agent.vfio import VfioDevice

    Row = dict[str, int | str | None]

FIRST_PASID = 1
LAST_PASID = (1 << 20) - 1


class PasidPool:
    """Hands out PASIDs next-fit: a freed one comes round again only after all the others.

    A stale use of a freed PASID then meets an empty entry instead of its next owner. Takes no
    lock: the registrar's covers it.
    """

    def __init__(self, first: int = FIRST_PASID, last: int = LAST_PASID) -> None:
        self._first = first
        self._last = last
        self._next = first
        self.owners: dict[int, str] = {}

    def alloc(self, owner: str) -> int:
        """A PASID nobody has. OSError ENOSPC: all are taken."""
        if len(self.owners) > self._last - self._first:
            raise OSError(errno.ENOSPC, "every PASID is taken")
        while True:
            pasid = self._next
            self._next = self._first if pasid == self._last else pasid + 1
            if pasid not in self.owners:
                self.owners[pasid] = owner
                return pasid

    def free(self, pasid: int) -> None:
        """OSError ENOENT: it was not handed out."""
        if self.owners.pop(pasid, None) is None:
            raise OSError(errno.ENOENT, f"PASID {pasid} is not allocated")


class Registration:
    """A line of the ledger. state: live, or the change that is in the kernel just now."""

    __slots__ = ("device", "ioas", "pasid", "state")

    def __init__(self, device: VfioDevice, pasid: int, ioas: int, state: str) -> None:
        self.device = device
        self.pasid = pasid
        self.ioas = ioas
        self.state = state

    def row(self) -> Row:
        """As the operations report it."""
        return {
            "device": self.device.name,
            "pasid": self.pasid,
            "ioas": self.ioas,
            "iommufd": self.device.iommufd.name if self.device.iommufd else None,
            "state": self.state,
        }


class Registrar:
    """The PASIDs and the ledger of one parent.

    Threads may call at once. No lock is held across an ioctl: those block while work drains. A
    line under change says so in its state, and a second change of it answers EBUSY.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pool = PasidPool()
        self._ledger: dict[tuple[VfioDevice, int], Registration] = {}

    def alloc(self, owner: str) -> int:
        """A PASID for owner (a name, for the books). OSError ENOSPC."""
        with self._lock:
            return self._pool.alloc(owner)

    def free(self, pasid: int) -> None:
        """OSError EBUSY: the ledger has it on a device; ENOENT: not allocated."""
        with self._lock:
            if any(pasid == line.pasid for line in self._ledger.values()):
                raise OSError(errno.EBUSY, f"PASID {pasid} is registered")
            self._pool.free(pasid)

    def allocated(self) -> list[Row]:
        """The PASIDs handed out, with their owners."""
        with self._lock:
            return [{"pasid": p, "owner": o} for p, o in sorted(self._pool.owners.items())]

    def register(self, device: VfioDevice, iommufd: Iommufd, pasid: int, ioas: int) -> None:
        """Puts pasid, naming ioas, into the device's list.

        iommufd must be the very one the device is bound to (EXDEV): an IOAS id alone would name
        whatever has that number there. EEXIST: registered already, see replace. Otherwise the
        kernel's errno, and then the ledger is as before.
        """
        if device.iommufd is not iommufd:
            raise OSError(errno.EXDEV, f"{device.name} is not bound to {iommufd.name}")
        line = Registration(device, pasid, ioas, "attaching")
        with self._lock:
            if (device, pasid) in self._ledger:
                raise OSError(errno.EEXIST, f"PASID {pasid} is registered on {device.name}")
            self._ledger[device, pasid] = line
        try:
            device.attach_pasid(pasid, ioas)
        except BaseException:
            self._strike(line)
            raise
        with self._lock:
            line.state = "live"

    def replace(self, device: VfioDevice, pasid: int, ioas: int) -> None:
        """Makes a registered pasid name another ioas of the same iommufd.

        ENOENT: not registered. Otherwise the kernel's errno, and the old binding stays.
        """
        with self._changing(device, pasid, "replacing") as line:
            device.attach_pasid(pasid, ioas)
            with self._lock:
                line.ioas = ioas

    def unregister(self, device: VfioDevice, pasid: int) -> None:
        """Takes pasid out of the device's list; returns when nothing in flight can use it.

        ENOENT: not registered.
        """
        with self._changing(device, pasid, "detaching") as line:
            device.detach_pasid(pasid)
            self._strike(line)

    @contextmanager
    def _changing(self, device: VfioDevice, pasid: int, state: str) -> Iterator[Registration]:
        with self._lock:
            line = self._ledger.get((device, pasid))
            if line is None:
                raise OSError(errno.ENOENT, f"PASID {pasid} is not registered on {device.name}")
            if line.state != "live":
                raise OSError(errno.EBUSY, f"PASID {pasid} on {device.name} is {line.state}")
            line.state = state
        try:
            yield line
        finally:
            with self._lock:
                line.state = "live"

    def _strike(self, line: Registration) -> None:
        with self._lock:
            if self._ledger.get((line.device, line.pasid)) is line:
                del self._ledger[line.device, line.pasid]

    def drop_device(self, device: VfioDevice) -> None:
        """Strikes a closed device from the ledger: its list died with its file."""
        with self._lock:
            for key in [key for key in self._ledger if key[0] is device]:
                del self._ledger[key]

    def drop_owner(self, owner: str) -> None:
        """Frees the PASIDs of an owner, except those still registered somewhere."""
        with self._lock:
            registered = {line.pasid for line in self._ledger.values()}
            for pasid, name in list(self._pool.owners.items()):
                if name == owner and pasid not in registered:
                    self._pool.free(pasid)

    def clear(self) -> None:
        """Unregisters everything, frees every PASID. Raises OSError; the rest is in the books."""
        with self._lock:
            lines = list(self._ledger.values())
        for line in lines:
            self.unregister(line.device, line.pasid)
        with self._lock:
            for pasid in list(self._pool.owners):
                self._pool.free(pasid)

    def ledger(self) -> list[Row]:
        """The ledger's lines."""
        with self._lock:
            return [line.row() for line in self._ledger.values()]

    def _live(self) -> dict[tuple[VfioDevice, int], tuple[int, str]]:
        with self._lock:
            return {key: (line.ioas, line.state) for key, line in self._ledger.items()}

    def audit(
        self,
        devices: Iterable[VfioDevice],
        kernel_list: Callable[[VfioDevice], dict[int, int]],
    ) -> dict[str, bool | list[Row]]:
        """Compares the ledger with the kernel's lists (PASID to IOAS id) of open devices.

        missing: only in the ledger. unexpected: only in the kernel. different: another IOAS.
        unsettled: changed while this looked, no verdict. agrees: none of the first three.
        """
        before = self._live()
        kernel: dict[tuple[VfioDevice, int], int] = {}
        for device in devices:
            for pasid, ioas in kernel_list(device).items():
                kernel[device, pasid] = ioas
        after = self._live()
        rows: dict[str, list[Row]] = {
            name: [] for name in ("missing", "unexpected", "different", "unsettled")
        }
        for key in kernel.keys() | before.keys() | after.keys():
            line = after.get(key)
            ledger_ioas = line[0] if line else None
            kernel_ioas = kernel.get(key)
            if before.get(key) != line or (line and line[1] != "live"):
                verdict = "unsettled"
            elif ledger_ioas == kernel_ioas:
                continue
            elif kernel_ioas is None:
                verdict = "missing"
            else:
                verdict = "unexpected" if ledger_ioas is None else "different"
            device, pasid = key
            rows[verdict].append(
                {
                    "device": device.name,
                    "pasid": pasid,
                    "ledger": ledger_ioas,
                    "kernel": kernel_ioas,
                }
            )
        agrees = not (rows["missing"] or rows["unexpected"] or rows["different"])
        return {"agrees": agrees, **rows}
