# SPDX-License-Identifier: GPL-2.0-or-later
"""What attacks start from: registrations that work, each made once a run, and the kernel's books.

An attack breaks one thing of a work that would be done: a device copies within a range that is
registered on it. The rows that break nothing are in the tables too.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from qemu_ioasid.deadline import Deadline, calibration
from qemu_ioasid.report import Report
from qemu_ioasid.rig import Completion, Descriptor, Guest, Rig
from qemu_ioasid.scenarios.acts import LENGTH, SLOT, SOURCE_AT, TARGET_AT, parts
from qemu_ioasid.scenarios.checks import Trial
from qemu_ioasid.scenarios.stage import Stage
from qemu_ioasid.scenarios.witness import moved

#: Grants of one arena are neighbours in their address spaces as they are in the arena.
BASE = 1 << 32
WIDTH = 1 << 20
#: The mdev that no guest has.
SPARE = "spare"


@dataclass(frozen=True)
class Grant:
    """*pasid* of *device* reaches *length* bytes at *offset* of *guest*'s arena, at *iova*."""

    device: str
    guest: str
    iommufd: str
    pasid: int
    ioas: int
    iova: int
    offset: int
    length: int

    def at(self, offset: int) -> int:
        """Where the byte at *offset* of the arena is for the device."""
        return self.iova + offset - self.offset


class Ground(Stage):
    """A rig with registrations to attack. Devices *a* and *b* are *g1*'s, *c* is *g2*'s."""

    def __init__(self, rig: Rig, report: Report) -> None:
        super().__init__(rig, report)
        play = parts(rig.config, "attacks")
        self.play = play
        self.g1, self.g2 = rig.guests[play["g1"]], rig.guests[play["g2"]]
        self.a, self.b, self.c = play["a"], play["b"], play["c"]
        self.host = rig.host.agent
        self._owners: dict[int, str] = {}
        self._granted: dict[tuple[str, str], Grant] = {}

    # What is registered

    def several(self, *calls: tuple[str, dict[str, Any]]) -> list[Any]:
        """Operations of the host side, one after another in one request."""
        answers: list[Any] = self.host.call(
            "several", calls=[{"op": op, "args": args} for op, args in calls]
        )
        return answers

    def owned_by(self, pasid: int) -> str:
        """Who *pasid* was given to, by this scenario's own book."""
        return self._owners.get(pasid, "")

    def pasid(self, owner: str) -> int:
        """A PASID that nobody registered."""
        found = self.registrar.alloc(owner)
        self._owners[found] = owner
        return found

    def free(self, pasid: int) -> None:
        """Give a PASID back."""
        self.registrar.free(pasid)
        del self._owners[pasid]

    def slots(self, guest: Guest, count: int) -> int:
        """The offset of *count* slots of *guest*'s arena, side by side, that nothing else uses."""
        first = self.slot(guest)
        for _ in range(count - 1):
            self.slot(guest)
        return first

    def mapped(
        self, guest: Guest, iommufd: str, *spans: tuple[int, int], writeable: bool = True
    ) -> int:
        """A new IOAS of *iommufd* that maps *spans* (offset, length) of *guest*'s arena."""
        ioas = self.registrar.ioas(iommufd)
        self.several(
            *(
                self.mapping(guest, iommufd, ioas, offset, length, writeable)
                for offset, length in spans
            )
        )
        return ioas

    def mapping(
        self, guest: Guest, iommufd: str, ioas: int, offset: int, length: int, writeable: bool
    ) -> tuple[str, dict[str, Any]]:
        """The operation that maps a span of *guest*'s arena where `BASE` puts it."""
        space = {"iommufd": iommufd, "ioas": ioas, "writeable": writeable, "guest": guest.name}
        place = {"iova": BASE + offset, "gpa": guest.gpa + offset, "length": length}
        return "ioas_map_guest", {**space, **place}

    def grant(
        self,
        device: str,
        *,
        guest: Guest | None = None,
        iommufd: str | None = None,
        slots: int = 1,
        writeable: bool = True,
    ) -> Grant:
        """Register fresh slots of *guest* (the device's own) on *device*, and a fresh PASID."""
        guest = guest or self.owner[device]
        iommufd = iommufd or guest.name
        offset, length = self.slots(guest, slots), slots * SLOT
        made, given = self.several(
            ("ioas_alloc", {"iommufd": iommufd}), ("pasid_alloc", {"owner": iommufd})
        )
        grant = Grant(
            device,
            guest.name,
            iommufd,
            given["pasid"],
            made["ioas"],
            BASE + offset,
            offset,
            length,
        )
        self._owners[grant.pasid] = guest.name
        self.several(
            self.mapping(guest, iommufd, grant.ioas, offset, length, writeable),
            ("register", self._entry(grant)),
        )
        return grant

    def _entry(self, grant: Grant) -> dict[str, Any]:
        target = {"device": grant.device, "iommufd": grant.iommufd}
        return {**target, "pasid": grant.pasid, "ioas": grant.ioas}

    def standing(self, device: str) -> Grant:
        """The grant of *device* that attacks go out from, and must not spoil.

        The slots on both sides of it are registered on the same device, by another PASID, at the
        addresses on both sides.
        """
        key = device, "standing"
        if key not in self._granted:
            guest = self.owner[device]
            offset = self.slots(guest, 3)
            middle, end = offset + SLOT, offset + 2 * SLOT
            own = self.mapped(guest, guest.name, (middle, SLOT))
            around = self.mapped(guest, guest.name, (offset, SLOT), (end, SLOT))
            self.enter(device, guest, around)
            pasid = self.enter(device, guest, own)
            self._granted[key] = Grant(
                device, guest.name, guest.name, pasid, own, BASE + middle, middle, SLOT
            )
        return self._granted[key]

    def enter(self, device: str, guest: Guest, ioas: int) -> int:
        """Register an IOAS of *guest* on its *device*; the PASID."""
        pasid = self.pasid(guest.name)
        self.registrar.register(device, guest.name, pasid, ioas)
        return pasid

    def leave(self, grant: Grant) -> None:
        """Unregister a grant; its PASID stays allocated."""
        self.registrar.unregister(grant.device, grant.pasid)

    def sibling(self, device: str) -> str:
        """Another device of the same guest; "" where it has none."""
        return next((each for each in self.owner[device].mdevs if each != device), "")

    def stranger(self, device: str) -> str:
        """A device of the other guest."""
        return self.a if self.owner[device] is self.g2 else self.c

    @functools.cached_property
    def equal(self) -> tuple[Grant, int]:
        """A grant of a, and an IOAS of g2's iommufd that has the same number there."""
        one, two = self.registrar.ioas(self.g1.name), self.registrar.ioas(self.g2.name)
        while one != two:
            if one < two:
                one = self.registrar.ioas(self.g1.name)
            else:
                two = self.registrar.ioas(self.g2.name)
        offset = self.slot(self.g1)
        self.several(
            self.mapping(self.g1, self.g1.name, one, offset, SLOT, True),
            self.mapping(self.g2, self.g2.name, one, offset, SLOT, True),
        )
        pasid = self.enter(self.a, self.g1, one)
        name = self.g1.name
        return Grant(self.a, name, name, pasid, one, BASE + offset, offset, SLOT), two

    # The kernel's books

    def books(self) -> dict[str, Any]:
        """Every device's list and the parent's table, as the kernel shows them."""
        devices = list(self.owner)
        *lists, table = self.several(
            *(("kernel_list", {"device": device}) for device in devices), ("kernel_table", {})
        )
        return {"table": table, **dict(zip(devices, lists, strict=True))}

    @contextlib.contextmanager
    def unchanged(self, trial: Trial) -> Iterator[None]:
        """Require the kernel's books to be after the block what they were before it."""
        before = self.books()
        yield
        after = self.books()
        changed = [name for name in after if after[name] != before[name]]
        trial.require(
            not changed,
            "; ".join(f"{name}: {before[name]} became {after[name]}" for name in changed),
        )

    def require_list(self, trial: Trial, device: str, expected: list[int]) -> None:
        """Require *device*'s list to be *expected*, and no PASID besides to be in the table."""
        found, table = self.several(("kernel_list", {"device": device}), ("kernel_table", {}))
        pasids = [row["pasid"] for row in found]
        trial.answer(f"{device}'s list: {pasids}")
        trial.require(pasids == expected, f"{device}'s list must be {expected}, is {pasids}")
        known = {row["pasid"] for row in table}
        trial.require(
            known.issuperset(expected), f"the parent's table has {sorted(known)} without {expected}"
        )

    # Work

    def does(
        self, trial: Trial, by: str, device: str, work: Descriptor, expected: str
    ) -> Completion:
        """As `submit`, *by* a guest or by "host", which has *device* open then."""
        if by != "host":
            return self.submit(trial, self.rig.guests[by], device, work, expected)
        attempt = self.attempt(trial, by, device, work, expected)
        (done,) = self.host.call(
            "device_submit", name=device, descriptors=[work], seconds=20 * calibration()
        )
        trial.settle(attempt, done)
        return dict(done)

    def allowed(self, trial: Trial, grant: Grant, by: str | None = None) -> None:
        """Require the copy within a grant to move its bytes, and nothing else anywhere."""
        with self.moving(trial, grant):
            work = self.work(grant.pasid, grant.iova)
            self.does(trial, by or grant.guest, grant.device, work, "DONE")

    @contextlib.contextmanager
    def moving(self, trial: Trial, grant: Grant) -> Iterator[None]:
        """Require the block to make the copy within a grant, and to do nothing else."""
        with self.witnesses.around(
            trial,
            target=grant.guest,
            expect=moved(grant.offset + TARGET_AT, LENGTH, grant.offset + SOURCE_AT),
            reads=(grant.iova + SOURCE_AT, LENGTH),
            writes=(grant.iova + TARGET_AT, LENGTH),
        ):
            yield

    @staticmethod
    def second(grant: Grant) -> Grant:
        """The second slot of a grant of two, for a copy that moves bytes once more."""
        return replace(grant, iova=grant.iova + SLOT, offset=grant.offset + SLOT)

    def denied(
        self, trial: Trial, device: str, pasid: int, iova: int, by: str | None = None
    ) -> None:
        """Require the copy at *iova* to be refused, with no trace of it anywhere."""
        by = by or self.owner[device].name
        with self.witnesses.around(trial):
            done = self.does(trial, by, device, self.work(pasid, iova), "REFUSED")
            self.errno_is(trial, done, "EACCES")

    @staticmethod
    def errno_is(trial: Trial, done: Completion, name: str) -> None:
        """Require a completion to have this errno."""
        found = errno.errorcode.get(done["error"], str(done["error"]))
        trial.require(found == name, f"the completion's error must be {name}, is {found}")

    # The mdev that no guest has

    @contextlib.contextmanager
    def spare(self, *, opened: bool = True) -> Iterator[str]:
        """An mdev that the host side opens itself; closed with the block, whatever it holds."""
        if SPARE not in self.rig.mdevs:
            made = self.host.call("mdev_create", name=SPARE, uuid=str(uuid.uuid4()))
            self.rig.mdevs[SPARE] = made["uuid"]
        if not opened:
            yield SPARE
            return
        self.host.call("device_open", name=SPARE)
        try:
            yield SPARE
        finally:
            self.host.call("device_close", name=SPARE)

    def spare_grant(self) -> Grant:
        """A slot of g1, registered on the spare mdev, which is open."""
        return self.grant(SPARE, guest=self.g1, iommufd=f"agent:{SPARE}")

    def deadline(self, what: str) -> Deadline:
        """For one event of a check."""
        return Deadline(45, what)
