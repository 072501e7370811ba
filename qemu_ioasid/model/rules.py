# SPDX-License-Identifier: GPL-2.0-or-later
"""The rules as a program: what the kernel must answer to a step, and which bytes it may change.

What is pdma's is in kernel-patches/ABI.md; what is the core's, in the order in which it checks, in
drivers/vfio/device_cdev.c of Linux 7.2.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from qemu_ioasid.model import engine
from qemu_ioasid.model.engine import PASID
from qemu_ioasid.model.iommufd import (
    READABLE,
    U32,
    U64,
    WRITEABLE,
    Access,
    Context,
    Ioas,
    Memory,
    Refused,
    require,
)

PASIDS = range(1, 1 << 20)
RING_ENTRIES = 1024


class Answer(NamedTuple):
    """An errno's name, "0", or a completion's status, then why; and the values that go with it."""

    outcome: str
    values: tuple[int | str, ...] = ()


@dataclass(eq=False)
class Entry:
    """A PASID in the parent's table: one IOAS of one iommufd, in the lists of *users* devices."""

    access: Access
    ioas: int
    users: int = 1


@dataclass(eq=False)
class File:
    """An open device file. Bound, it has an access of its own, and a list."""

    device: str
    fds: int = 1
    own: Access | None = None
    pasids: dict[int, Entry] = field(default_factory=dict)
    tail: int = 0
    overrun: bool = False
    faults: int = 0


class Mapping(NamedTuple):
    """A mapping of BAR2: it keeps the file as a fd does, and is none."""

    file: File


class Model:
    """Everything that a program's steps can touch.

    Steps are the methods that return an Answer. *fd* and *of* are slots, which hold fds: "i0" and
    on of /dev/iommu, "d0" and on of devices.
    """

    def __init__(self, memory: bytes, devices: tuple[str, ...], max_pasids: int) -> None:
        self.memory = Memory(memory)
        self.devices = devices
        self.max_pasids = max_pasids
        self.slots: dict[str, Context | File | Mapping] = {}
        self.table: dict[int, Entry] = {}

    def step(self, operation: str, arguments: dict[str, Any]) -> Answer:
        """Carry out one step."""
        try:
            answer: Answer = getattr(self, operation)(**arguments)
        except Refused as refused:
            return Answer(str(refused))
        return answer

    def kernel(self) -> dict[str, Any]:
        """What debugfs must show: the table (PASID: IOAS, users), the lists (PASID: IOAS)."""
        lists: dict[str, Any] = {device: {} for device in self.devices}
        for file in self.bound():
            lists[file.device] = {pasid: entry.ioas for pasid, entry in file.pasids.items()}
        table = {pasid: (entry.ioas, entry.users) for pasid, entry in self.table.items()}
        return {"table": table, **lists}

    def bound(self) -> list[File]:
        """The files that are bound."""
        things = self.slots.values()
        held = [thing.file if isinstance(thing, Mapping) else thing for thing in things]
        return [thing for thing in held if isinstance(thing, File) and thing.own]

    def contexts(self) -> list[Context]:
        """The iommufds that live."""
        named = [thing for thing in self.slots.values() if isinstance(thing, Context)]
        return [*named, *(file.own.context for file in self.bound() if file.own)]

    def _context(self, fd: str) -> Context:
        found = self.slots.get(fd)
        if not isinstance(found, Context):
            raise Refused("EBADF")
        return found

    def _file(self, fd: str) -> File:
        found = self.slots.get(fd)
        if not isinstance(found, File):
            raise Refused("EBADF")
        return found

    def _bound(self, fd: str) -> tuple[File, Access]:
        file = self._file(fd)
        if file.own is None:
            raise Refused("EINVAL: not bound")
        return file, file.own

    def _put(self, fd: str, thing: Context | File | Mapping) -> Answer:
        if fd in self.slots:
            self.close(fd)
        self.slots[fd] = thing
        return Answer("0")

    # --- fds ------------------------------------------------------------------------------

    def iommufd(self, fd: str) -> Answer:
        """open("/dev/iommu")"""
        return self._put(fd, Context())

    def open(self, fd: str, device: str) -> Answer:
        """open("/dev/vfio/devices/vfioN")"""
        return self._put(fd, File(device))

    def dup(self, fd: str, of: str) -> Answer:
        """dup(2): another fd of the same file"""
        thing = self._context(of) if isinstance(self.slots.get(of), Context) else self._file(of)
        thing.fds += 1
        return self._put(fd, thing)

    def mmap(self, fd: str, of: str) -> Answer:
        """mmap(2) of BAR2: the slot keeps the file, and is no fd"""
        file, _ = self._bound(of)
        file.fds += 1
        return self._put(fd, Mapping(file))

    def close(self, fd: str) -> Answer:
        """close(2), or munmap(2); the last one takes the list along"""
        require(fd in self.slots, "EBADF")
        thing = self.slots.pop(fd)
        thing = thing.file if isinstance(thing, Mapping) else thing
        thing.fds -= 1
        if thing.fds or not isinstance(thing, File):
            return Answer("0: others are left" if thing.fds else "0: the last one")
        listed = list(thing.pasids)
        for pasid in listed:
            self._leave(thing, pasid)
        if thing.own is not None:
            thing.own.destroy()
        return Answer("0: the last one, with a list" if listed else "0: the last one")

    # --- iommufd --------------------------------------------------------------------------

    def ioas_alloc(self, fd: str) -> Answer:
        """IOMMU_IOAS_ALLOC"""
        return Answer("0", (self._context(fd).enter(Ioas()),))

    def destroy(self, fd: str, ident: int) -> Answer:
        """IOMMU_DESTROY"""
        self._context(fd).destroy(ident)
        return Answer("0")

    def map(self, fd: str, ioas: int, iova: int, length: int, at: int, flags: int) -> Answer:
        """IOMMU_IOAS_MAP of the memory from *at* on, at a fixed IOVA"""
        context = self._context(fd)
        require(max(iova, length) < U64, "EOVERFLOW: 2^64 - 1")
        require(flags & (WRITEABLE | READABLE), "EINVAL: neither read nor write")
        context.ioas(ioas).map(iova, length, at, flags)
        return Answer("0", (iova,))

    def unmap(self, fd: str, ioas: int, iova: int, length: int) -> Answer:
        """IOMMU_IOAS_UNMAP"""
        return Answer("0", (self._context(fd).ioas(ioas).unmap(iova, length),))

    # --- vfio -----------------------------------------------------------------------------

    def bind(self, fd: str, iommufd: str) -> Answer:
        """VFIO_DEVICE_BIND_IOMMUFD"""
        file, context = self._file(fd), self.slots.get(iommufd)
        require(file.own is None, "EINVAL: bound")
        if not isinstance(context, Context):
            other = isinstance(context, File)
            raise Refused("EBADFD: no iommufd" if other else "EBADF: no fd")
        others = [other for other in self.bound() if other.device == file.device]
        require(not others, "EINVAL: another file is bound")
        file.own = Access(context, whole_pages=True)
        return Answer("0", (file.own.ident,))

    def attach(self, fd: str, pt_id: int) -> Answer:
        """VFIO_DEVICE_ATTACH_IOMMUFD_PT without a PASID: the device's own address space"""
        _, own = self._bound(fd)
        return Answer(own.attach(pt_id), (pt_id,))

    def detach(self, fd: str) -> Answer:
        """VFIO_DEVICE_DETACH_IOMMUFD_PT without a PASID"""
        _, own = self._bound(fd)
        outcome = "0" if own.ioas else "0: there was none"
        own.detach()
        return Answer(outcome)

    def attach_pasid(self, fd: str, pasid: int, pt_id: int) -> Answer:
        """VFIO_DEVICE_ATTACH_IOMMUFD_PT with a PASID: the only way into a list"""
        file, own = self._bound(fd)
        require(pasid, "EINVAL: PASID 0")
        require(pasid in PASIDS, "EINVAL: too large")
        entry = self.table.get(pasid)
        room = pasid in file.pasids or len(file.pasids) < self.max_pasids
        require(room, "ENOSPC: the list is full")
        if entry is None:
            access = Access(own.context, whole_pages=False)
            try:
                outcome = access.attach(pt_id)
            except Refused:
                access.destroy()
                raise
            self.table[pasid] = file.pasids[pasid] = Entry(access, pt_id)
        elif pasid in file.pasids:
            require(entry.ioas == pt_id or entry.users == 1, "EBUSY: another device shares it")
            outcome = entry.access.attach(pt_id)
            entry.ioas = pt_id
        else:
            require(entry.access.context is own.context, "EBUSY: another iommufd's")
            require(entry.ioas == pt_id, "EBUSY: another IOAS")
            outcome = "0: shared"
            file.pasids[pasid] = entry
            entry.users += 1
        return Answer(outcome, (pt_id,))

    def attach_pasid_unwritten(self, fd: str, pasid: int, pt_id: int) -> Answer:
        """As `attach_pasid`, of a struct that cannot be written: it is attached, then detached"""
        answer = self.attach_pasid(fd, pasid, pt_id)
        self.detach_pasid(fd, pasid)
        return Answer(f"EFAULT: {answer.outcome.split(': ')[1]}")

    def detach_pasid(self, fd: str, pasid: int) -> Answer:
        """VFIO_DEVICE_DETACH_IOMMUFD_PT with a PASID: it leaves this list, and no other"""
        file, _ = self._bound(fd)
        if pasid not in file.pasids:
            return Answer("0: not in the list")
        shared = file.pasids[pasid].users > 1
        self._leave(file, pasid)
        return Answer("0: shared" if shared else "0: the last user")

    def _leave(self, file: File, pasid: int) -> None:
        entry = file.pasids.pop(pasid)
        entry.users -= 1
        if not entry.users:
            entry.access.destroy()
            del self.table[pasid]

    def reset(self, fd: str) -> Answer:
        """VFIO_DEVICE_RESET: the list stays. Answers as `doorbell`"""
        file, _ = self._bound(fd)
        file.tail, file.overrun, file.faults = 0, False, 0
        return Answer("0: with a list" if file.pasids else "0", (0, 0, 0, 0))

    # --- the device -----------------------------------------------------------------------

    def doorbell(self, fd: str, by: int) -> Answer:
        """TAIL moved by what no ring holds, or by 0: answers TAIL, HEAD, STATUS and FAULT_COUNT"""
        file, _ = self._bound(fd)
        file.overrun |= by & U32 > RING_ENTRIES
        values = (file.tail, file.tail, 2 * file.overrun, file.faults)
        return Answer("0: overrun" if by else "0", values)

    def submit(
        self, fd: str, opcode: int, flags: int, pasid: int, length: int, src: int, dst: int
    ) -> Answer:
        """One descriptor: answers seq, status, pasid, error, addr and done of its completion

        and FAULT_COUNT; where it has grown, then reason and access of the log's last record.
        """
        file, own = self._bound(fd)
        file.tail += 1
        if not flags & PASID:
            ioas = own.ioas
        elif pasid in file.pasids:
            ioas = file.pasids[pasid].access.ioas
        known = "another device's" if pasid in self.table else "nobody's"
        end = engine.invalid(opcode, flags, pasid, length, src, dst)
        if end is None and flags & PASID and pasid not in file.pasids:
            end = engine.refused(known if pasid in PASIDS else "no PASID")
        if end is None:
            end = engine.work(self.memory, ioas, opcode, length, src, dst)
        status = end.outcome.split(":")[0]
        values = (file.tail, status, pasid, end.error, end.addr, end.done)
        file.faults += bool(end.reason)
        logged = (end.reason, end.access) if end.reason else ()
        return Answer(end.outcome, (*values, file.faults, *logged))
