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
from typing import Any, NamedTuple

from qemu_ioasid.deadline import Deadline, calibration
from qemu_ioasid.report import Report
from qemu_ioasid.rig import Completion, Descriptor, Guest, Rig
from qemu_ioasid.scenarios.acts import LENGTH, SLOT, SOURCE_AT, TARGET_AT
from qemu_ioasid.scenarios.checks import Trial
from qemu_ioasid.scenarios.stage import TwoGuests
from qemu_ioasid.scenarios.witness import moved

#: Grants of one arena are neighbours in their address spaces as they are in the arena.
BASE = 1 << 32
WIDTH = 1 << 20
#: The mdev that no guest has.
SPARE = "spare"


class Ending(NamedTuple):
    """How work ends: status and errno of its completion, reason and access in the fault log."""

    status: str
    error: str = ""
    reason: str = ""
    access: str = "NONE"


DONE = Ending("DONE")
DIFFERENT = Ending("DIFFERENT")
REFUSED = Ending("REFUSED", "EACCES", "NOT_LISTED")
#: By what a copy fails at.
UNMAPPED = {
    "source": Ending("FAULT", "ENOENT", "UNMAPPED", "READ"),
    "target": Ending("FAULT", "ENOENT", "UNMAPPED", "WRITE"),
}
NO_RIGHT = Ending("FAULT", "EPERM", "NO_RIGHT", "WRITE")


def invalid(reason: str) -> Ending:
    """The descriptor itself is wrong."""
    return Ending("INVALID", "EINVAL", reason)


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


class Ground(TwoGuests):
    """A rig with registrations to attack. Devices *a* and *b* are *g1*'s, *c* is *g2*'s."""

    def __init__(self, rig: Rig, report: Report) -> None:
        super().__init__(rig, report, "attacks")
        self.host = rig.host.agent
        self._owners: dict[int, str] = {}
        self._granted: dict[str, Grant] = {}
        #: How many records each device's fault log has had, where that is known.
        self._logged: dict[str, int] = {}
        #: The IOAS that is the spare mdev's own, while it is open.
        self.spare_own = 0

    # What is registered

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
        self.host.several(
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
        made, given = self.host.several(
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
        self.host.several(
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
        if device not in self._granted:
            guest = self.owner[device]
            offset = self.slots(guest, 3)
            middle, end = offset + SLOT, offset + 2 * SLOT
            own = self.mapped(guest, guest.name, (middle, SLOT))
            around = self.mapped(guest, guest.name, (offset, SLOT), (end, SLOT))
            self.enter(device, guest, around)
            pasid = self.enter(device, guest, own)
            self._granted[device] = Grant(
                device, guest.name, guest.name, pasid, own, BASE + middle, middle, SLOT
            )
        return self._granted[device]

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
    def wide(self) -> Grant:
        """A grant of a that holds more than one chunk."""
        return self.grant(self.a, slots=5)

    @functools.cached_property
    def equal(self) -> tuple[Grant, Grant]:
        """A grant of a, and what c's would be of the IOAS that has the same number there.

        Each maps a slot of its own guest's, both at one address.
        """
        one, two = self.registrar.ioas(self.g1.name), self.registrar.ioas(self.g2.name)
        while one != two:
            if one < two:
                one = self.registrar.ioas(self.g1.name)
            else:
                two = self.registrar.ioas(self.g2.name)
        here, there = self.slot(self.g1), self.slot(self.g2)
        op, args = self.mapping(self.g2, self.g2.name, one, there, SLOT, True)
        self.host.several(
            self.mapping(self.g1, self.g1.name, one, here, SLOT, True),
            (op, {**args, "iova": BASE + here}),
        )
        pasid = self.enter(self.a, self.g1, one)
        name = self.g1.name
        ours = Grant(self.a, name, name, pasid, one, BASE + here, here, SLOT)
        name = self.g2.name
        theirs = replace(ours, device=self.c, guest=name, iommufd=name, offset=there)
        return ours, theirs

    # The kernel's books

    def books(self) -> dict[str, Any]:
        """Every device's list and the parent's table, as the kernel shows them."""
        devices = list(self.owner)
        *lists, table = self.host.several(
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
        found, table = self.host.several(("kernel_list", {"device": device}), ("kernel_table", {}))
        pasids = [row["pasid"] for row in found]
        trial.answer(f"{device}'s list: {pasids}")
        trial.require(pasids == expected, f"{device}'s list must be {expected}, is {pasids}")
        known = {row["pasid"] for row in table}
        trial.require(
            known.issuperset(expected), f"the parent's table has {sorted(known)} without {expected}"
        )

    # Work

    def does(
        self,
        trial: Trial,
        by: str,
        device: str,
        work: Descriptor,
        ending: Ending,
        at: int = 0,
    ) -> Completion:
        """Have *device* do *work* for *by*, and require it to end so, and to be logged so.

        *by* is a guest, or "host", which has *device* open then; *at* the address to blame.
        """
        agent = self.host if by == "host" else self.rig.guests[by].agent
        if device not in self._logged:
            told = agent.call("device_registers", name=device)
            self._logged[device] = told["FAULT_COUNT"]
        attempt = self.attempt(trial, by, device, work, ending.status)
        submitted = {"name": device, "descriptors": [work], "seconds": 20 * calibration()}
        (done,), log = agent.several(
            ("device_submit" if by == "host" else "submit", submitted),
            ("device_faults", {"name": device, "since": self._logged.pop(device)}),
            deadline=Deadline(25, f"completion of {device}"),
        )
        self._logged[device] = log["count"]
        trial.settle(attempt, done)
        trial.require(
            done["pasid"] == (work["pasid"] or 0), f"the completion names PASID {done['pasid']}"
        )
        self._ended(trial, done, ending, at)
        self._told(trial, done, ending, log["faults"])
        return dict(done)

    @staticmethod
    def _ended(trial: Trial, done: Completion, ending: Ending, at: int) -> None:
        """Require a completion to have the errno and the address it must have."""
        found = errno.errorcode.get(done["error"], "") if done["error"] else ""
        trial.require(
            found == ending.error,
            f"the completion's error must be {ending.error or 0}, is {found or done['error']}",
        )
        if ending.status != "DIFFERENT":
            trial.require(
                done["addr"] == at, f"the completion blames {done['addr']:#x}, not {at:#x}"
            )

    @staticmethod
    def _told(trial: Trial, done: Completion, ending: Ending, faults: list[Any]) -> None:
        """Require the fault log to have one record more, of what failed, or none."""
        if not ending.reason:
            trial.require(not faults, f"the fault log has {faults} for work that did not fail")
            return
        trial.require(len(faults) == 1, f"the fault log has {len(faults)} records more, not 1")
        (fault,) = faults
        trial.answer(f"logged as {fault['reason']}")
        same = {name: done[name] for name in ("pasid", "error", "addr")}
        must = {**same, "count": done["seq"] - 1, "reason": ending.reason, "access": ending.access}
        wrong = [
            f"{name} {fault[name]}, not {must[name]}" for name in must if fault[name] != must[name]
        ]
        trial.require(not wrong, f"the fault log has {', '.join(wrong)}")

    def unlogged(self, device: str) -> None:
        """*device* has done work that `does` knows nothing of, or has begun anew."""
        self._logged.pop(device, None)

    def allowed(self, trial: Trial, grant: Grant, by: str | None = None) -> None:
        """Require the copy within a grant to move its bytes, and nothing else anywhere."""
        with self.moving(trial, grant):
            work = self.work(grant.pasid, grant.iova)
            self.does(trial, by or grant.guest, grant.device, work, DONE)

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

    def denied(
        self, trial: Trial, device: str, pasid: int, iova: int, by: str | None = None
    ) -> None:
        """Require the copy at *iova* to be refused, with no trace of it anywhere."""
        by = by or self.owner[device].name
        with self.witnesses.around(trial):
            self.does(trial, by, device, self.work(pasid, iova), REFUSED)

    def faulted(self, trial: Trial, device: str, pasid: int | None, iova: int) -> None:
        """Require the copy at *iova* to end at its first byte, which is not mapped."""
        at = iova + SOURCE_AT
        with self.witnesses.around(trial, reads=(at, LENGTH)):
            by = self.owner[device].name
            self.does(trial, by, device, self.work(pasid, iova), UNMAPPED["source"], at)

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
        self.spare_own = int(self.host.call("device_open", name=SPARE)["ioas"])
        self.unlogged(SPARE)
        try:
            yield SPARE
        finally:
            self.host.call("device_close", name=SPARE)

    def spare_grant(self) -> Grant:
        """A slot of g1, registered on the spare mdev, which is open."""
        return self.grant(SPARE, guest=self.g1, iommufd=f"agent:{SPARE}")
