# SPDX-License-Identifier: GPL-2.0-or-later
"""Which step may come next: drawn so that PASIDs, ids and addresses meet as often as they can."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from qemu_ioasid.model.engine import CHUNK, COMPARE, COPY, FILL, INTERRUPT, MAX_LENGTH, NOP, PASID
from qemu_ioasid.model.iommufd import (
    EXTENT,
    FIXED,
    PAGE,
    READ_PAGE,
    READABLE,
    U32,
    U64,
    WRITEABLE,
    Access,
    Context,
    Ioas,
)
from qemu_ioasid.model.program import DEVICES, Step
from qemu_ioasid.model.rules import PASIDS as VALID
from qemu_ioasid.model.rules import File, Model

T = TypeVar("T")
#: One of several, whichever; the first is the simplest.
Pick = Callable[[Sequence[Any]], Any]

PASIDS = (1, 2, 3, VALID[-1])
NO_PASIDS = (0, VALID.stop, U32)
IDS = (1, 2, 3, 4, 5, 6, 0, 99)
IOVAS = (0x10000, 0x11000, 0x100000, 0, 0x20010, U64 - PAGE + 1)
LENGTHS = (PAGE, 0x20000, 0x20000, 2 * PAGE, 0x40, 0x10000)
SIZES = (16, 1, 200, 5, PAGE, 0x10000, 0x10001, 0x10001, 0x18000)
FILES = ("d0", "d1", "d2", "d3", "d4")
IOMMUFDS = ("i0", "i1", "i2")

#: How often each is tried once it can do something.
WEIGHTS = {
    "submit": 64,
    "attach_pasid": 24,
    "attach_pasid_unwritten": 10,
    "detach_pasid": 8,
    "unmap": 8,
    "destroy": 4,
    "detach": 4,
    "reset": 4,
    "doorbell": 3,
    "close": 4,
    "dup": 2,
    "mmap": 2,
}


def following(model: Model, pick: Pick) -> Step:
    """A step for *model* as it stands."""
    draw = _Draw(model, pick)
    operation = pick(draw.operations())
    return operation, getattr(draw, operation)()


class _Draw:
    """Arguments for one step: what the model has first, and then what it has not."""

    def __init__(self, model: Model, pick: Pick) -> None:
        self.model = model
        self.pick = pick
        slots = model.slots
        self.iommufds = [fd for fd in IOMMUFDS if fd in slots]
        self.files = [fd for fd in FILES if isinstance(slots.get(fd), File)]
        self.bound = [fd for fd in self.files if self._file(fd).own is not None]

    def operations(self) -> list[str]:
        """The names to draw from, each as often as it is to come."""
        able = {"iommufd": True, "open": True, "bind": self.files and self.iommufds}
        able |= {"close": self.files, "mmap": self.files, "dup": self.files}
        able |= dict.fromkeys(("ioas_alloc", "destroy", "map", "unmap"), self.iommufds)
        weights = {**WEIGHTS, **self._wanted()}
        # The most wanted first: it is the simplest choice
        names = sorted(weights, key=lambda name: -weights[name])
        return [name for name in names if able.get(name, self.bound) for _ in range(weights[name])]

    def _wanted(self) -> dict[str, int]:
        """More of what the others need to come to anything."""
        bound = [self._file(fd) for fd in self.bound]
        unbound = {self._file(fd).device for fd in self.files} - {file.device for file in bound}
        spaces = [self._space(fd, each) for fd in self.iommufds for each in self._spaces(fd)]
        lacking = [file for file in bound if file.own and file.own.ioas is None]
        return {
            "iommufd": 1 if len(self.iommufds) > 1 else 10 if self.iommufds else 80,
            "open": 6 if len(self.files) > 2 else 20,
            "bind": 24 if unbound else 2,
            "ioas_alloc": 2 if len(spaces) > 3 else 16,
            "map": 8 if all(space and space.areas for space in spaces) else 24,
            "attach": 12 if lacking else 4,
        }

    def _file(self, fd: str) -> File:
        found = self.model.slots[fd]
        assert isinstance(found, File)
        return found

    def _mostly(self, usual: Sequence[T], other: Sequence[T], share: int = 8) -> T:
        """One of the *usual*, and once in *share* of the *other*; all when there is none usual."""
        often = [*usual] * (max(1, -(-share * len(other) // len(usual))) if usual else 0)
        return self.pick([*often, *other])  # type: ignore[no-any-return]

    def _device_fd(self, share: int = 12) -> dict[str, Any]:
        unbound = [fd for fd in self.files if fd not in self.bound]
        return {"fd": self._mostly(self.bound, unbound, share)}

    def _spaces(self, fd: str) -> list[int]:
        context = self.model.slots.get(fd)
        return _ids(context) if isinstance(context, Context) else []

    # --- fds ------------------------------------------------------------------------------

    def iommufd(self) -> dict[str, Any]:
        return {"fd": self.pick([fd for fd in IOMMUFDS if fd not in self.iommufds] or IOMMUFDS)}

    def open(self) -> dict[str, Any]:
        free = [fd for fd in FILES if fd not in self.model.slots]
        unopened = {self._file(fd).device for fd in self.files}
        fresh = [device for device in DEVICES if device not in unopened]
        return {"fd": self.pick(free or FILES), "device": self._mostly(fresh, DEVICES)}

    def dup(self) -> dict[str, Any]:
        of = self.pick([*self.files, *self.iommufds])
        family = FILES if of in FILES else IOMMUFDS
        free = [fd for fd in family if fd not in self.model.slots]
        return {"fd": self.pick(free or family), "of": of}

    def mmap(self) -> dict[str, Any]:
        free = [fd for fd in FILES if fd not in self.model.slots]
        return {"fd": self.pick(free or FILES), "of": self._device_fd(3)["fd"]}

    def close(self) -> dict[str, Any]:
        return {"fd": self._mostly([fd for fd in FILES if fd in self.model.slots], self.iommufds)}

    # --- iommufd --------------------------------------------------------------------------

    def ioas_alloc(self) -> dict[str, Any]:
        return {"fd": self.pick(self.iommufds)}

    def destroy(self) -> dict[str, Any]:
        fd, ident = self._object()
        return {"fd": fd, "ident": self._mostly([ident], self._accesses(fd), 4)}

    def _accesses(self, fd: str) -> list[int]:
        context = self.model.slots.get(fd)
        objects = context.objects if isinstance(context, Context) else {}
        return [ident for ident, thing in objects.items() if isinstance(thing, Access)]

    def _object(self) -> tuple[str, int]:
        fd = self._mostly([fd for fd in self.iommufds if self._spaces(fd)], self.iommufds, 16)
        return fd, self._mostly(self._spaces(fd), IDS)

    def map(self) -> dict[str, Any]:
        fd, ioas = self._object()
        if _mapped(self._space(fd, ioas)):
            # Rather one that has nothing yet
            fd, ioas = self._object()
        length = self._mostly(LENGTHS, (0, U64), 10)
        rights = self._mostly((READABLE | WRITEABLE,), (READABLE, WRITEABLE, 0), 2)
        at = self.pick((0, 0x10000, 0x8000, PAGE, 16, READ_PAGE - PAGE, READ_PAGE - PAGE))
        return {
            "fd": fd,
            "ioas": ioas,
            "iova": self._mostly(IOVAS, (U64,), 24),
            "length": length,
            "at": max(0, min(at, EXTENT - length)),
            "flags": FIXED | rights,
        }

    def unmap(self) -> dict[str, Any]:
        fd, ioas = self._object()
        space = self._space(fd, ioas)
        exact = [(area.iova, area.end - area.iova) for area in space.areas] if space else []
        wide = [(iova, length + PAGE) for iova, length in exact] + [(0, 0x110000)]
        wide += [(iova + 16, length) for iova, length in exact if length > 16]
        odd = [(0x10000, PAGE), (0x10000, 0), (0, U64), (U64, 1), (1, U64 - 1), (PAGE, U64 - PAGE)]
        iova, length = self._mostly([*exact, *wide], odd, 2)
        return {"fd": fd, "ioas": ioas, "iova": iova, "length": length}

    def _space(self, fd: str, ident: int) -> Ioas | None:
        context = self.model.slots.get(fd)
        found = context.objects.get(ident) if isinstance(context, Context) else None
        return found if isinstance(found, Ioas) else None

    # --- vfio -----------------------------------------------------------------------------

    def bind(self) -> dict[str, Any]:
        unbound = [fd for fd in self.files if fd not in self.bound]
        fd = self._mostly(unbound, self.files)
        return {"fd": fd, "iommufd": self._mostly(self.iommufds, ("i9", self.files[0]), 8)}

    def _pt_id(self, fd: str) -> int:
        file = self.model.slots.get(fd)
        own = file.own if isinstance(file, File) else None
        spaces = _ids(own.context) if own else []
        mapped = [each for each in spaces if own and _mapped(own.context.objects[each])]
        return self._mostly([*mapped, *mapped, *spaces], IDS, 6)

    def attach(self) -> dict[str, Any]:
        args = self._device_fd()
        return {**args, "pt_id": self._pt_id(args["fd"])}

    def detach(self) -> dict[str, Any]:
        return self._device_fd(3)

    def attach_pasid(self) -> dict[str, Any]:
        fd = self._device_fd()["fd"]
        file = self.model.slots.get(fd)
        listed = list(file.pasids) if isinstance(file, File) else []
        held = [pasid for pasid in self.model.table if pasid not in listed]
        new = [pasid for pasid in PASIDS if pasid not in self.model.table]
        shared = [pasid for pasid in listed if self.model.table[pasid].users > 1]
        pasid = self._mostly([*listed, *held, *shared * 4, *new * 2], NO_PASIDS, 10)
        pt_id = self._pt_id(fd)
        if pasid in held:
            pt_id = self.pick((self.model.table[pasid].ioas, pt_id))
        return {"fd": fd, "pasid": pasid, "pt_id": pt_id}

    def attach_pasid_unwritten(self) -> dict[str, Any]:
        return self.attach_pasid()

    def detach_pasid(self) -> dict[str, Any]:
        args = self._device_fd()
        file = self.model.slots.get(args["fd"])
        listed = list(file.pasids) if isinstance(file, File) else []
        return {**args, "pasid": self._mostly(listed, (*PASIDS, *NO_PASIDS), 4)}

    def reset(self) -> dict[str, Any]:
        return self._device_fd(3)

    def doorbell(self) -> dict[str, Any]:
        return {**self._device_fd(3), "by": self.pick((-1, 0, 1025))}

    # --- the device -----------------------------------------------------------------------

    def submit(self) -> dict[str, Any]:
        fd, pasid = self._mostly(self._ways(), [(self._device_fd()["fd"], self._stray())], 3)
        space = self._meant(fd, pasid)
        length = self.pick(SIZES)
        work = {
            "opcode": self.pick((COPY, COPY, FILL, COMPARE, COMPARE)),
            "flags": 0 if pasid is None else PASID,
            "pasid": pasid or 0,
            "length": length,
            "src": self._address(space, length),
            "dst": self._address(space, length),
        }
        if work["opcode"] == COMPARE and self.pick((True, False)):
            # Anything else hardly ever is as long as it is equal
            work["dst"] = work["src"]
        return {"fd": fd, **work, **self._oddity()}

    def _ways(self) -> list[tuple[str, int | None]]:
        """Devices and what they may name, where it leads to memory."""
        found: list[tuple[str, int | None]] = []
        for fd in self.bound:
            file = self._file(fd)
            for pasid, entry in file.pasids.items():
                found += [(fd, pasid)] * _mapped(entry.access.ioas)
            if file.own and _mapped(file.own.ioas):
                found.append((fd, None))
        return found

    def _stray(self) -> int | None:
        held = list(self.model.table)
        found: int | None = self.pick([*held, *held, *held, *PASIDS, *NO_PASIDS, None])
        return found

    def _oddity(self) -> dict[str, int]:
        """What is wrong with it; mostly nothing."""
        oddities: list[dict[str, int]] = [
            {"opcode": NOP},
            {"opcode": NOP, "length": 0},
            {"opcode": COMPARE + 1},
            {"flags": PASID | INTERRUPT},
            {"flags": INTERRUPT << 1},
            {"flags": INTERRUPT, "pasid": 1},
            {"length": 0},
            {"length": MAX_LENGTH + 1},
            {"length": MAX_LENGTH},
            {"src": U64, "length": 2},
            {"dst": U64 - 14, "length": 16},
        ]
        nothing: list[dict[str, int]] = [{}]
        return self._mostly(nothing, oddities, 5)

    def _meant(self, fd: str, pasid: int | None) -> Ioas | None:
        """The address space that the work is after, whether it may use it or not."""
        file = self.model.slots.get(fd)
        if pasid in self.model.table:
            return self.model.table[pasid].access.ioas
        own = file.own if isinstance(file, File) else None
        return own.ioas if own else None

    def _address(self, space: Ioas | None, length: int) -> int:
        """Inside an area, at its end, across it, or where none is."""
        usual, edges = [], [0x18000, 0]
        for area in space.areas if space else []:
            size = area.end - area.iova
            usual += [area.iova, area.iova + 5, area.iova + size // 2]
            edges += [area.end - length, area.end - length + 1]
            if area.at + size > READ_PAGE:
                hole = area.iova + READ_PAGE - area.at
                edges += [hole - 16, hole + PAGE - 16]
        return self._mostly(usual, edges, 2 if length <= CHUNK else 1) & U64


def _mapped(thing: Ioas | Access | None) -> bool:
    return isinstance(thing, Ioas) and bool(thing.areas)


def _ids(context: Context) -> list[int]:
    return [ident for ident, thing in context.objects.items() if isinstance(thing, Ioas)]
