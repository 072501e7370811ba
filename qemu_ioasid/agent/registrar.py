"""The registrar: which PASID this side has put into which device's list, and the kernel's word.

PASIDs are numbers of one parent (rule 5 of the security model): 1 to 2^20 - 1. Addresses spaces
are IOAS ids of an iommufd. The registrar stops mistakes of its own side; it is never what stops an
attack, and whoever holds a device's fd can go round it.
"""

from __future__ import annotations

import errno
import threading
from contextlib import contextmanager
from itertools import islice

from qemu_ioasid.agent.ledger import LIVE, Book

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from qemu_ioasid.agent.iommufd import Iommufd
    from qemu_ioasid.agent.ledger import Change, Row
    from qemu_ioasid.agent.vfio import VfioDevice

FIRST_PASID = 1
LAST_PASID = (1 << 20) - 1
#: PASIDs that a batch changes between two looks at the ledger.
CHUNK = 512


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

    def alloc_many(self, owner: str, count: int) -> list[int]:
        """As many PASIDs nobody has. OSError ENOSPC: there are not as many, and none is taken."""
        if len(self.owners) + count > self._last - self._first + 1:
            raise OSError(errno.ENOSPC, f"fewer than {count} PASIDs are free")
        return [self.alloc(owner) for _ in range(count)]

    def free(self, pasid: int) -> None:
        """OSError ENOENT: it was not handed out."""
        if self.owners.pop(pasid, None) is None:
            raise OSError(errno.ENOENT, f"PASID {pasid} is not allocated")


def _by_chunks(
    pasids: Iterable[int], act: Callable[[Sequence[int]], tuple[int, OSError | None]]
) -> tuple[int, OSError | None]:
    rest = iter(pasids)
    done = 0
    while chunk := tuple(islice(rest, CHUNK)):
        count, error = act(chunk)
        done += count
        if error:
            return done, error
    return done, None


class Registrar:
    """The PASIDs and the ledger of one parent.

    Threads may call at once. No lock is held across an ioctl: those block while work drains. A
    line under change says so in its state, and a second change of it answers EBUSY.

    register_many and unregister_many do what register and unregister do, PASID by PASID in order,
    until the first error. They answer how many were done, which stay done, and that error. The
    ledger is brought up to date in chunks: a line is live at the latest when its chunk is over.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pool = PasidPool()
        self._books: dict[VfioDevice, Book] = {}

    def alloc(self, owner: str) -> int:
        """A PASID for owner (a name, for the books). OSError ENOSPC."""
        with self._lock:
            return self._pool.alloc(owner)

    def alloc_many(self, owner: str, count: int) -> list[int]:
        """As many PASIDs for owner, or none: OSError ENOSPC."""
        with self._lock:
            return self._pool.alloc_many(owner, count)

    def free_many(self, pasids: Iterable[int]) -> tuple[int, OSError | None]:
        """Frees pasids in order, until the first error: how many, and that error."""
        done = 0
        with self._lock:
            for pasid in pasids:
                try:
                    self._free(pasid)
                except OSError as error:
                    return done, error
                done += 1
        return done, None

    def free(self, pasid: int) -> None:
        """OSError EBUSY: the ledger has it on a device; ENOENT: not allocated."""
        with self._lock:
            self._free(pasid)

    def _free(self, pasid: int) -> None:
        if any(pasid in book.ioas for book in self._books.values()):
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
        _, error = self.register_many(device, iommufd, (pasid,), (ioas,))
        if error:
            raise error

    def register_many(
        self,
        device: VfioDevice,
        iommufd: Iommufd,
        pasids: Iterable[int],
        spaces: Iterable[int],
    ) -> tuple[int, OSError | None]:
        """Puts pasids into the device's list; each names the next of spaces.

        Raises EXDEV as register does, and then nothing is done.
        """
        if device.iommufd is not iommufd:
            raise OSError(errno.EXDEV, f"{device.name} is not bound to {iommufd.name}")
        rest = iter(spaces)
        return _by_chunks(
            pasids, lambda chunk: self._attach(device, chunk, tuple(islice(rest, len(chunk))))
        )

    def _attach(
        self, device: VfioDevice, pasids: Sequence[int], spaces: Sequence[int]
    ) -> tuple[int, OSError | None]:
        with self._changing(device, lambda book: book.enter(pasids, spaces)) as (_, change):
            count = len(change.pasids)
            change.struck = pasids[:count]
            attached, error = device.attach_pasids(pasids[:count], spaces[:count])
            change.struck = pasids[attached:count]
        return attached, error or change.refused

    def replace(self, device: VfioDevice, pasid: int, ioas: int) -> None:
        """Makes a registered pasid name another ioas of the same iommufd.

        ENOENT: not registered. EFAULT: it is not any more. Otherwise the kernel's errno, and the
        old binding stays.
        """
        with self._changing(device, lambda book: book.take((pasid,), "replacing")) as (
            book,
            change,
        ):
            if change.refused:
                raise change.refused
            try:
                device.attach_pasid(pasid, ioas)
            except OSError as error:
                if error.errno == errno.EFAULT:
                    # The kernel may have replaced, and detached since it could not say so.
                    device.detach_pasid(pasid)
                    change.struck = (pasid,)
                raise
            with self._lock:
                book.ioas[pasid] = ioas

    def unregister(self, device: VfioDevice, pasid: int) -> None:
        """Takes pasid out of the device's list; returns when nothing in flight can use it.

        ENOENT: not registered.
        """
        _, error = self.unregister_many(device, (pasid,))
        if error:
            raise error

    def unregister_many(
        self, device: VfioDevice, pasids: Iterable[int]
    ) -> tuple[int, OSError | None]:
        """Takes pasids out of the device's list."""
        return _by_chunks(pasids, lambda chunk: self._detach(device, chunk))

    def _detach(self, device: VfioDevice, pasids: Sequence[int]) -> tuple[int, OSError | None]:
        with self._changing(device, lambda book: book.take(pasids, "detaching")) as (_, change):
            detached, error = device.detach_pasids(pasids[: len(change.pasids)])
            change.struck = pasids[:detached]
        return detached, error or change.refused

    @contextmanager
    def _changing(
        self, device: VfioDevice, begin: Callable[[Book], Change]
    ) -> Iterator[tuple[Book, Change]]:
        with self._lock:
            book = self._books.setdefault(device, Book(device))
            change = begin(book)
        try:
            yield book, change
        finally:
            with self._lock:
                book.settle(change)
                # A device that was dropped meanwhile has another book, or none.
                if not book.ioas and self._books.get(device) is book:
                    del self._books[device]

    def drop_device(self, device: VfioDevice) -> None:
        """Strikes a closed device from the ledger: its list died with its file."""
        with self._lock:
            self._books.pop(device, None)

    def drop_owner(self, owner: str) -> None:
        """Frees the PASIDs of an owner, except those still registered somewhere."""
        with self._lock:
            registered = {pasid for book in self._books.values() for pasid in book.ioas}
            for pasid, name in list(self._pool.owners.items()):
                if name == owner and pasid not in registered:
                    self._pool.free(pasid)

    def clear(self) -> None:
        """Unregisters everything, frees every PASID. Raises OSError; the rest is in the books."""
        with self._lock:
            held = [(device, tuple(book.ioas)) for device, book in self._books.items()]
        for device, pasids in held:
            _, error = self.unregister_many(device, pasids)
            if error:
                raise error
        with self._lock:
            for pasid in list(self._pool.owners):
                self._pool.free(pasid)

    def ledger(self) -> list[Row]:
        """The ledger's lines."""
        with self._lock:
            return [row for book in self._books.values() for row in book.rows()]

    def _live(self) -> dict[tuple[VfioDevice, int], tuple[int, str]]:
        with self._lock:
            return {
                (device, pasid): (ioas, book.state(pasid))
                for device, book in self._books.items()
                for pasid, ioas in book.ioas.items()
            }

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
            if before.get(key) != line or (line and line[1] != LIVE):
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
