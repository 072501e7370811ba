# SPDX-License-Identifier: GPL-2.0-or-later
"""The default scenario: what was registered arrives, and nothing else does.

The first guest has at least two mdevs (a and b in the default rig), the
second at least one (c), all on one parent.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from qemu_ioasid import vtd
from qemu_ioasid.config import RigConfig
from qemu_ioasid.deadline import Deadline, calibration
from qemu_ioasid.guestvm import device_address
from qemu_ioasid.report import Report
from qemu_ioasid.rig import Binding, Guest, Rig, copy
from qemu_ioasid.scenarios import stage
from qemu_ioasid.scenarios.acts import HALF, LENGTH, OWN_IOVA, SLOT, SOURCE_AT, TARGET_AT, parts
from qemu_ioasid.scenarios.checks import Trial
from qemu_ioasid.scenarios.stage import TwoGuests
from qemu_ioasid.scenarios.table import Row, Table
from qemu_ioasid.scenarios.witness import moved

PAGE = 4096
#: No iommufd of a rig has this many objects at a time.
FOREIGN_ID = 64
#: How long an unregister that must wait is watched for returning, in seconds.
EARLY_SECONDS = 1.0

TABLE = Table()
_WITHOUT = TABLE.phase("work without a PASID")
_REGISTERED = TABLE.phase("registered PASIDs")
_UNREGISTERED = TABLE.phase("unregistered PASIDs")
_BETWEEN = TABLE.phase("between devices and VMs")
_AFTERWARDS = TABLE.phase("after unregister, free and replace")
_EDGES = TABLE.phase("work in flight, work past the end")
_DEATH = TABLE.phase("after the guest's death")


def rows(config: RigConfig) -> list[Row]:
    """The checks on a rig; raises as `parts`."""
    return [*stage.rows(config), *TABLE.rows(config, parts(config, "isolation"))]


def run(rig: Rig, report: Report, rows: Sequence[Row]) -> None:
    """Make the checks of *rows*; failures are in the report, a rig that broke is raised."""
    Isolation(rig, report).run(rows)


class Isolation(TwoGuests):
    """The scenario on a rig."""

    def __init__(self, rig: Rig, report: Report) -> None:
        super().__init__(rig, report, "isolation")

    # Work without a PASID goes through the guest's own virtual IOMMU, and faults without it

    @contextlib.contextmanager
    def _own(self, trial: Trial, device: str) -> Iterator[int]:
        """A slot mapped at OWN_IOVA in *device*'s own address space; gives its offset."""
        guest = self.owner[device]
        offset = self.slot(guest)
        guest.agent.call("ioas_map", name=device, iova=OWN_IOVA, offset=offset, length=SLOT)
        try:
            self._walk(guest, device, offset, trial)
            yield offset
        finally:
            guest.agent.call("ioas_unmap", name=device, iova=OWN_IOVA, length=SLOT)

    @_WITHOUT("no-pasid-mapped-{device}", "{device} copies without a PASID, mapped by {guest}")
    def _mapped(self, trial: Trial, device: str) -> None:
        with self._own(trial, device) as offset:
            self.moves(trial, self.owner[device], device, None, OWN_IOVA, offset)

    @_WITHOUT("no-pasid-unmapped-{device}", "{device} copies without a PASID, unmapped")
    def _unmapped(self, trial: Trial, device: str) -> None:
        guest = self.owner[device]
        with self._own(trial, device):
            pass
        self._walk(guest, device, None, trial)
        # The fault is the attempt to read; a write is never tried.
        with self.witnesses.around(trial, reads=(OWN_IOVA + SOURCE_AT, LENGTH)):
            self.faults(trial, guest, device, self.work(None, OWN_IOVA), OWN_IOVA + SOURCE_AT)

    def _walk(self, guest: Guest, device: str, offset: int | None, trial: Trial) -> None:
        """Require the guest's own tables to map OWN_IOVA to *offset*, or None: not to map it."""
        read = vtd.reader(guest.machine.qmp)
        root = vtd.stage(guest.machine.qmp).root
        bdf = device_address(guest.mdevs.index(device))
        try:
            entry = vtd.pasid_entry(read, root, bdf)
            physical = vtd.translate(read, entry, OWN_IOVA)
        except vtd.NotPresent as missing:
            trial.require(offset is None, f"the guest's tables do not map {OWN_IOVA:#x}: {missing}")
            trial.saw(f"the guest's tables have no {missing}")
            return
        trial.require(
            offset is not None and physical == guest.gpa + offset,
            f"the guest's tables translate {OWN_IOVA:#x} to {physical:#x}",
        )
        trial.saw(f"walked the guest's {vtd.PGTT_NAMES[entry.pgtt]} table to {physical:#x}")

    # Registered and not

    @_REGISTERED("registered-{device}", "{device} of {guest} copies with its own PASID")
    def _registered(self, trial: Trial, device: str) -> None:
        guest = self.owner[device]
        own = self.bind(guest, device)
        trial.answer(f"register PASID {own.pasid}: 0")
        self.moves(trial, guest, device, own.pasid, own.iova, own.offset)

    @_REGISTERED("audit", "compare the ledger with the kernel's own lists")
    def _audit(self, trial: Trial) -> None:
        """With a PASID registered on each device, all books agree."""
        for device, guest in self.owner.items():
            if not self.registrar.kernel_list(device):
                self.bind(guest, device)
        audit = self.registrar.audit()
        lists = {device: self.registrar.kernel_list(device) for device in self.owner}
        trial.answer(", ".join(f"{device}: {pasids}" for device, pasids in lists.items()))
        trial.require(
            audit["agrees"] and not audit["unsettled"], f"ledger and kernel differ: {audit}"
        )
        trial.require(all(lists.values()), "a list is empty that must not be")
        listed = sorted({pasid for pasids in lists.values() for pasid in pasids})
        table = self.registrar.kernel_table()
        trial.require(table == listed, f"the parent's table has {table}, the lists {listed}")
        trial.saw("the ledger, the kernel's lists and the parent's table are the same")

    @_UNREGISTERED("unregistered-{device}", "{device} of {guest} names a PASID nobody registered")
    def _unregistered(self, trial: Trial, device: str) -> None:
        guest = self.owner[device]
        iova = guest.agent.call("bind_request", name=device, offset=SLOT, length=SLOT)["iova"]
        self.refused(trial, guest, device, self.registrar.alloc(guest.name), iova)
        self.refused(trial, guest, device, (1 << 20) - 1, iova)

    # What is one device's is not another's: in one VM, and between two

    @_BETWEEN("intra-vm", "{b} names a PASID registered for {a} only, both {g1}'s")
    def _intra_vm(self, trial: Trial) -> None:
        binding = self.bind(self.g1, self.a)
        self.refused(trial, self.g1, self.b, binding.pasid, binding.iova)

    @_BETWEEN("intra-vm-shared", "register one PASID for {a} and {b}, then take it from {b}")
    def _shared(self, trial: Trial) -> None:
        """Both may use what both have; neither can move it; each loses its own entry only."""
        both = self.bind(self.g1, self.a)
        self.registrar.register(self.b, self.g1.name, both.pasid, both.ioas)
        other = self.registrar.ioas(self.g1.name)
        for device in (self.a, self.b):
            self.moves(trial, self.g1, device, both.pasid, both.iova, both.offset)
            self.fill(self.g1)
            with trial.refusal("EBUSY", f"replace on {device}"):
                self.registrar.raw_attach(device, both.pasid, other)
        self.registrar.unregister(self.b, both.pasid)
        self.refused(trial, self.g1, self.b, both.pasid, both.iova)
        self.moves(trial, self.g1, self.a, both.pasid, both.iova, both.offset)
        self.registrar.destroy(self.g1.name, other)

    @_BETWEEN("inter-vm-use", "{c} of {g2} names a PASID that {g1} holds")
    def _inter_vm_use(self, trial: Trial) -> None:
        binding = self.bind(self.g1, self.a)
        self.refused(trial, self.g2, self.c, binding.pasid, binding.iova)

    @_BETWEEN("inter-vm-register", "register a PASID that {g1} holds for {c} of {g2}")
    def _inter_vm_register(self, trial: Trial) -> None:
        held = self.bind(self.g1, self.a)
        own = self.registrar.ioas(self.g2.name)
        with trial.refusal("EBUSY", f"register PASID {held.pasid} for {self.c}"):
            self.registrar.raw_attach(self.c, held.pasid, own)
        self.refused(trial, self.g2, self.c, held.pasid, held.iova)
        self.registrar.destroy(self.g2.name, own)

    @_BETWEEN("inter-vm-ioas-id", "register, for {c}, an IOAS id that only {g1}'s iommufd has")
    def _foreign_ioas(self, trial: Trial) -> None:
        # An iommufd gives the lowest free id, so the other one's are below its few objects.
        spare = [self.registrar.ioas(self.g1.name)]
        while spare[-1] <= FOREIGN_ID:
            spare.append(self.registrar.ioas(self.g1.name))
        offset = self.slot(self.g1)
        self.registrar.map(self.g1.name, spare[-1], OWN_IOVA, self.g1.gpa + offset, SLOT)
        pasid = self.registrar.alloc(self.g2.name)
        with trial.refusal("ENOENT", f"register IOAS {spare[-1]}"):
            self.registrar.raw_attach(self.c, pasid, spare[-1])
        self.refused(trial, self.g2, self.c, pasid, OWN_IOVA)
        for ioas in spare:
            self.registrar.destroy(self.g1.name, ioas)

    @_BETWEEN(
        "inter-vm-equal-id",
        "register, for {c}, an IOAS id that names {g1}'s memory there and {g2}'s here",
    )
    def _equal_ids(self, trial: Trial) -> None:
        """On both iommufds an IOAS of one number, each mapping its guest's slot at one IOVA."""
        one, two = self.registrar.ioas(self.g1.name), self.registrar.ioas(self.g2.name)
        while one != two:
            if one < two:
                one = self.registrar.ioas(self.g1.name)
            else:
                two = self.registrar.ioas(self.g2.name)
        slots = {guest.name: self.slot(guest) for guest in (self.g1, self.g2)}
        for guest in (self.g1, self.g2):
            self.registrar.map(guest.name, one, OWN_IOVA, guest.gpa + slots[guest.name], SLOT)
        pasid = self.registrar.alloc(self.g2.name)
        self.registrar.register(self.c, self.g2.name, pasid, one)
        trial.answer(f"register IOAS {one} of both: 0")
        self.moves(trial, self.g2, self.c, pasid, OWN_IOVA, slots[self.g2.name])
        self.registrar.unregister(self.c, pasid)

    # What was taken back is refused, what was replaced is the new memory only

    @_AFTERWARDS("after-unregister-{device}", "{device} names a PASID that was unregistered")
    def _unregister(self, trial: Trial, device: str) -> None:
        self._taken_back(trial, device, free=False)

    @_AFTERWARDS("after-free-{device}", "{device} names a PASID that was unregistered and freed")
    def _free(self, trial: Trial, device: str) -> None:
        self._taken_back(trial, device, free=True)

    def _taken_back(self, trial: Trial, device: str, *, free: bool) -> None:
        guest = self.owner[device]
        binding = self.bind(guest, device)
        self.rig.unbind(binding)
        trial.answer("unregister: 0")
        if free:
            self.registrar.free(binding.pasid)
        self.refused(trial, guest, device, binding.pasid, binding.iova)

    @_AFTERWARDS("after-replace-{device}", "{device} names a PASID whose IOAS was replaced")
    def _replace(self, trial: Trial, device: str) -> None:
        guest = self.owner[device]
        old = self.bind(guest, device)
        new = self._replaced(old)
        trial.answer("replace: 0")
        self.moves(trial, guest, device, old.pasid, old.iova, new)
        # The old address space is nobody's now, so it can go.
        self.registrar.destroy(guest.name, old.ioas)

    def _replaced(self, old: Binding) -> int:
        """Have a binding name a fresh slot; gives its offset."""
        guest = self.rig.guests[old.guest]
        new = self.slot(guest)
        ioas = self.registrar.ioas(guest.name)
        self.registrar.map(guest.name, ioas, old.iova, guest.gpa + new, SLOT)
        self.registrar.replace(old.device, old.pasid, ioas)
        return new

    @_AFTERWARDS("audit-afterwards", "compare the ledger with the kernel's own lists")
    def _audit_afterwards(self, trial: Trial) -> None:
        """With PASIDs taken back and replaced on each device, all books agree still."""
        for device, guest in self.owner.items():
            self.rig.unbind(self.bind(guest, device))
            self._replaced(self.bind(guest, device))
        self._audit(trial)

    # Work in flight ends before unregister returns; work past the end stays inside

    @_EDGES("in-flight", "unregister while {a} is in the middle of a write that sleeps")
    def _in_flight(self, trial: Trial) -> None:
        """The target is memory of the host side that sleeps until released (userfaultfd)."""
        host = self.rig.host.agent
        slot, slow = self.slot(self.g1), OWN_IOVA + SLOT
        ioas = self.registrar.ioas(self.g1.name)
        self.registrar.map(self.g1.name, ioas, OWN_IOVA, self.g1.gpa + slot, SLOT)
        pasid = self.registrar.alloc(self.g1.name)
        self.registrar.register(self.a, self.g1.name, pasid, ioas)
        source = self.g1.agent.call("read", offset=slot, length=PAGE)["hex"]
        with contextlib.ExitStack() as stack:
            handle = host.call(
                "slow_create", iommufd=self.g1.name, ioas=ioas, iova=slow, length=PAGE
            )["handle"]
            # Whatever fails: a device left asleep would fail every check that follows.
            stack.callback(host.call, "slow_close", handle=handle)
            stack.enter_context(
                self.witnesses.around(trial, reads=(OWN_IOVA, PAGE), writes=(slow, PAGE))
            )
            work = (
                copy(pasid, OWN_IOVA, slow, PAGE),
                copy(pasid, OWN_IOVA, OWN_IOVA + HALF, PAGE),
            )
            attempts = [
                self.attempt(trial, self.g1.name, self.a, each, expected)
                for each, expected in zip(work, ("DONE", "REFUSED"), strict=True)
            ]
            ticket = self.g1.submit_start(self.a, *work)
            self._drains(trial, handle, pasid)
            landed = host.call("slow_read", handle=handle, offset=0, length=PAGE)["hex"]
            for attempt, done in zip(attempts, self.g1.submit_wait(ticket), strict=True):
                trial.settle(attempt, done)
            trial.require(landed == source, "the write had not ended when unregister returned")
            trial.saw("the write was whole when unregister returned, the next one refused")

    def _drains(self, trial: Trial, handle: int, pasid: int) -> None:
        """Unregister under a sleeping write: it returns after the release, and not before."""
        host, seconds = self.rig.host.agent, 20 * calibration()
        host.call("slow_wait", handle=handle, seconds=seconds)
        leaving = self.registrar.unregister_start(self.a, pasid)
        entered = host.call("wait_blocked", device=self.a, pasid=pasid, seconds=seconds)
        trial.answer(f"unregister under way: entry {entered['state']}")
        early = entered["state"] != "closed" or leaving.ends_within(EARLY_SECONDS)
        host.call("slow_release", handle=handle)
        leaving.result(Deadline(45, "return of unregister"))
        trial.answer("unregister: 0")
        trial.require(not early, "unregister returned with a write still in flight")

    @_EDGES(
        "past-the-end-{device}", "{device} copies 64 bytes to, then from, the last 32 of the range"
    )
    def _past_the_end(self, trial: Trial, device: str) -> None:
        guest = self.owner[device]
        binding = self.bind(guest, device)
        start, edge = binding.iova, binding.iova + SLOT - 32
        with self.witnesses.around(
            trial,
            target=guest.name,
            within=(binding.offset + SLOT - 32, 32),
            reads=(start, 64),
            writes=(edge, 64),
        ):
            self.faults(trial, guest, device, copy(binding.pasid, start, edge, 64), edge)
        with self.witnesses.around(trial, reads=(edge, 64)):
            self.faults(trial, guest, device, copy(binding.pasid, edge, start, 64), edge)

    # The list dies with the last close of the device: a new open starts with none

    @contextlib.contextmanager
    def _inherited(self) -> Iterator[None]:
        """The device of a guest that is dead, opened by the host side."""
        host = self.rig.host.agent
        self.rig.stop_guest(self.g2.name)
        self.witnesses.gone(self.g2.name)
        host.call("device_open", name=self.c)
        try:
            yield
        finally:
            host.call("device_close", name=self.c)

    @_DEATH("after-death-{c}", "kill {g2}'s QEMU, open {c} again and name the old PASID")
    def _death(self, trial: Trial) -> None:
        held = self.bind(self.g2, self.c)
        with self._inherited():
            left = self.registrar.kernel_list(self.c)
            trial.answer(f"the kernel's list after the new open: {left}")
            with self.witnesses.around(trial):
                self.submit_by_host(trial, self.c, self.work(held.pasid, held.iova), "REFUSED")
            trial.require(left == [], f"the list is not empty after a new open: {left}")

    @_DEATH("after-reset-{c}", "reset {c}, opened by the host side, with a PASID in its list")
    def _reset(self, trial: Trial) -> None:
        """A reset cancels work and keeps the list."""
        with self._inherited():
            self._kept(trial)
        trial.require(self.registrar.kernel_list(self.c) == [], "the close did not end the list")

    def _kept(self, trial: Trial) -> None:
        host = self.rig.host.agent
        iommufd = f"agent:{self.c}"
        ioas = self.registrar.ioas(iommufd)
        slot = self.slot(self.g1)
        # Memory of the guest that lives, so that both witnesses see what the device moves.
        host.call(
            "ioas_map_guest",
            iommufd=iommufd,
            ioas=ioas,
            iova=OWN_IOVA,
            gpa=self.g1.gpa + slot,
            length=SLOT,
            guest=self.g1.name,
        )
        pasid = self.registrar.alloc(iommufd)
        self.registrar.register(self.c, iommufd, pasid, ioas)
        host.call("device_reset", name=self.c)
        kept = self.registrar.kernel_list(self.c)
        trial.answer(f"the kernel's list after the reset: {kept}")
        trial.require(kept == [pasid], "the reset did not keep the list")
        with self.witnesses.around(
            trial,
            target=self.g1.name,
            expect=moved(slot + TARGET_AT, LENGTH, slot + SOURCE_AT),
            reads=(OWN_IOVA + SOURCE_AT, LENGTH),
            writes=(OWN_IOVA + TARGET_AT, LENGTH),
        ):
            self.submit_by_host(trial, self.c, self.work(pasid, OWN_IOVA), "DONE")
