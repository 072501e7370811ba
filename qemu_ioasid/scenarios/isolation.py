# SPDX-License-Identifier: GPL-2.0-or-later
"""The default scenario: what was registered arrives, and nothing else does.

The first guest has at least two mdevs (a and b in the default rig), the
second at least one (c), all on one parent.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator

from qemu_ioasid import vtd
from qemu_ioasid.config import RigConfig
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import ConfigurationError
from qemu_ioasid.machine import GUEST_FOLDER, Machine, device_address
from qemu_ioasid.report import Report
from qemu_ioasid.rig import Binding, Descriptor, Guest, Rig, copy
from qemu_ioasid.scenarios.checks import Checks, Trial
from qemu_ioasid.scenarios.witness import Witnesses, moved

#: Every range bound in an arena is one slot: a copy's source at its start, its target past HALF.
SLOT = 0x10000
HALF = SLOT // 2
#: An odd length at odd places: no rounding to anything goes unseen.
LENGTH, SOURCE_AT, TARGET_AT = 4099, 5, HALF + 3
#: Where work without a PASID finds its slot in the device's own address space.
OWN_IOVA = 0x4000_0000


def check_shape(config: RigConfig) -> None:
    """Raise ConfigurationError when a rig has not the guests and mdevs this scenario needs."""
    mdevs = [len(guest.mdevs) for guest in config.guests.values()]
    if len(mdevs) < 2 or mdevs[0] < 2 or mdevs[1] < 1:
        raise ConfigurationError(
            f"{config.path}: scenario isolation needs two guests, the first with two mdevs, "
            "the second with one"
        )


def run(rig: Rig, report: Report) -> None:
    """Make all checks; failures are in the report, a rig that broke is raised."""
    Isolation(rig, report).run()


class Isolation:
    """The scenario's state: which guests play which part, and the next free slot of an arena."""

    def __init__(self, rig: Rig, report: Report) -> None:
        self.rig = rig
        self.registrar = rig.registrar
        self.report = report
        self.checks = Checks(rig, report)
        self.witnesses = Witnesses(rig)
        self.g1, self.g2 = list(rig.guests.values())[:2]
        self.a, self.b, self.c = self.g1.mdevs[0], self.g1.mdevs[1], self.g2.mdevs[0]
        # The first slot holds the nonce.
        self._slots = {guest: itertools.count(SLOT, SLOT) for guest in rig.guests}

    def slot(self, guest: Guest) -> int:
        """The offset of a slot of *guest*'s arena that no check has used."""
        offset = next(self._slots[guest.name])
        assert offset + SLOT <= guest.size, "the arena is used up"
        return offset

    def bind(self, guest: Guest, device: str, pasid: int | None = None) -> Binding:
        """Register a fresh slot of *guest* on *device*."""
        return self.rig.bind(guest.name, device, self.slot(guest), SLOT, pasid)

    def devices(self) -> Iterator[tuple[Guest, str]]:
        """Every device with its guest."""
        for guest in self.rig.guests.values():
            for device in guest.mdevs:
                yield guest, device

    def run(self) -> None:
        """All checks, in an order in which each finds what it needs."""
        phases: tuple[tuple[str, Callable[[], None]], ...] = (
            ("prepare the arenas", self.prepare),
            ("the stage", self.stage),
            ("work without a PASID", self.without_pasid),
            ("registered PASIDs", self.registered),
            ("unregistered PASIDs", self.unregistered),
            ("between devices and VMs", self.between),
            ("after unregister, free and replace", self.afterwards),
            ("work in flight, work past the end", self.edges),
            ("after the guest's death", self.death),
        )
        for name, part in phases:
            with self.report.phase(name):
                part()

    def prepare(self) -> None:
        """Give every byte of every arena a value of its own, and start the kernel's witness."""
        for guest in self.rig.guests.values():
            guest.agent.call("fill")
        self.rig.host.agent.call("trace_start")

    # The stage

    def stage(self) -> None:
        """Both levels translate in scalable mode; an address is an offset in the RAM file."""
        machines: list[Machine] = [
            self.rig.host,
            *(guest.machine for guest in self.rig.guests.values()),
        ]
        for machine in machines:
            with self.checks.check(
                f"stage-{machine.name}", "read the VT-d registers through QMP"
            ) as trial:
                found = vtd.stage(machine.qmp)
                mode = "scalable" if found.scalable else "legacy"
                trial.answer(f"translation {'on' if found.enabled else 'off'}, {mode} mode")
                trial.saw(f"root table at {found.root:#x}")
                trial.require(found.enabled, "translation is off")
                trial.require(found.scalable, "the root table is not in scalable mode")
        for guest in self.rig.guests.values():
            with self.checks.check(
                f"same-bytes-{guest.name}", "pmemsave the arena's first bytes through QMP"
            ) as trial:
                self._same_bytes(guest, trial)

    def _same_bytes(self, guest: Guest, trial: Trial) -> None:
        deadline = Deadline(20, f"pmemsave in {guest.name}")
        nonce = guest.agent.call("nonce")["hex"]
        length = len(nonce) // 2
        path = f"{GUEST_FOLDER}/{guest.name}.pmem"
        guest.machine.qmp.execute("pmemsave", deadline, val=guest.gpa, size=length, filename=path)
        saved = self.rig.host.ssh.get(path, deadline).hex()
        in_file = self.rig.host.agent.call("read", guest=guest.name, gpa=guest.gpa, length=length)[
            "hex"
        ]
        trial.answer(f"guest-physical {guest.gpa:#x}")
        trial.require(saved == nonce, "the guest's nonce is not at the address it names")
        trial.require(in_file == nonce, "the guest's nonce is not at that offset of its RAM file")
        trial.saw("the guest, QEMU and the RAM file show the same nonce")

    # Work without a PASID

    def without_pasid(self) -> None:
        """Such work goes through the guest's own virtual IOMMU, and faults without it."""
        for guest, device in self.devices():
            offset = self.slot(guest)
            with self.checks.check(
                f"no-pasid-mapped-{device}",
                f"{device} copies without a PASID, mapped by {guest.name}",
            ) as trial:
                guest.agent.call("ioas_map", name=device, iova=OWN_IOVA, offset=offset, length=SLOT)
                self._walk(guest, device, offset, trial)
                with self._exact(trial, guest, offset):
                    (done,) = guest.submit(device, self._copy(None, OWN_IOVA))
                    trial.require_status(done, "DONE")
            with self.checks.check(
                f"no-pasid-unmapped-{device}", f"{device} copies without a PASID, unmapped"
            ) as trial:
                guest.agent.call("ioas_unmap", name=device, iova=OWN_IOVA, length=SLOT)
                with self.witnesses.around(trial):
                    (done,) = guest.submit(device, self._copy(None, OWN_IOVA))
                    trial.require_status(done, "FAULT")

    def _walk(self, guest: Guest, device: str, offset: int, trial: Trial) -> None:
        read = vtd.reader(guest.machine.qmp)
        root = vtd.stage(guest.machine.qmp).root
        bdf = device_address(guest.mdevs.index(device))
        entry = vtd.pasid_entry(read, root, bdf)
        physical = vtd.translate(read, entry, OWN_IOVA)
        trial.require(
            physical == guest.gpa + offset,
            f"the guest's tables translate {OWN_IOVA:#x} to {physical:#x}, "
            f"not to {guest.gpa + offset:#x}",
        )
        trial.saw(f"walked the guest's {vtd.PGTT_NAMES[entry.pgtt]} table to {physical:#x}")

    def _copy(self, pasid: int | None, iova: int) -> Descriptor:
        return copy(pasid, iova + SOURCE_AT, iova + TARGET_AT, LENGTH)

    def _exact(
        self, trial: Trial, guest: Guest, offset: int
    ) -> contextlib.AbstractContextManager[None]:
        """Witness exactly what `_copy` moves in the slot at *offset*."""
        return self.witnesses.around(
            trial,
            target=guest.name,
            expect=moved(offset + TARGET_AT, LENGTH, offset + SOURCE_AT),
            accesses=True,
        )

    # Registered and not

    def registered(self) -> None:
        """A registered PASID moves exactly the bytes asked for, on each device."""
        for guest, device in self.devices():
            with self.checks.check(
                f"registered-{device}", f"{device} of {guest.name} copies with its own PASID"
            ) as trial:
                binding = self.bind(guest, device)
                trial.answer(f"register PASID {binding.pasid}: 0")
                with self._exact(trial, guest, binding.offset):
                    (done,) = guest.submit(device, self._copy(binding.pasid, binding.iova))
                    trial.require_status(done, "DONE")
        with self.checks.check("audit", "compare the ledger with the kernel's own lists") as trial:
            audit = self.registrar.audit()
            trial.answer(
                ", ".join(f"{d}: {self.registrar.kernel_list(d)}" for _, d in self.devices())
            )
            trial.require(audit["agrees"], f"ledger and kernel differ: {audit}")
            trial.saw("the ledger and the kernel's lists are the same")

    def _refused(self, trial: Trial, guest: Guest, device: str, pasid: int, iova: int) -> None:
        with self.witnesses.around(trial, accesses=False):
            (done,) = guest.submit(device, self._copy(pasid, iova))
            trial.require_status(done, "REFUSED")

    def unregistered(self) -> None:
        """A PASID that nobody registered is refused, allocated or not."""
        for guest, device in self.devices():
            with self.checks.check(
                f"unregistered-{device}",
                f"{device} of {guest.name} names a PASID nobody registered",
            ) as trial:
                iova = guest.agent.call("bind_request", name=device, offset=SLOT, length=SLOT)[
                    "iova"
                ]
                self._refused(trial, guest, device, self.registrar.alloc(guest.name), iova)
                self._refused(trial, guest, device, (1 << 20) - 1, iova)

    def between(self) -> None:
        """What is one device's is not another's: in one VM, and between two."""
        with self.checks.check(
            "intra-vm",
            f"{self.b} names a PASID registered for {self.a} only, both {self.g1.name}'s",
        ) as trial:
            binding = self.bind(self.g1, self.a)
            self._refused(trial, self.g1, self.b, binding.pasid, binding.iova)
        with self.checks.check(
            "inter-vm-use", f"{self.c} of {self.g2.name} names a PASID that {self.g1.name} holds"
        ) as trial:
            binding = self.bind(self.g1, self.a)
            self._refused(trial, self.g2, self.c, binding.pasid, binding.iova)
        with self.checks.check(
            "inter-vm-register",
            f"register a PASID that {self.g1.name} holds for {self.c} of {self.g2.name}",
        ) as trial:
            held = self.bind(self.g1, self.a)
            own = self.registrar.ioas(self.g2.name)
            with trial.refusal("EBUSY", f"register PASID {held.pasid} for {self.c}"):
                self.registrar.raw_attach(self.c, held.pasid, own)
            self._refused(trial, self.g2, self.c, held.pasid, held.iova)
            self.registrar.destroy(self.g2.name, own)
        self._foreign_ioas()

    def _foreign_ioas(self) -> None:
        with self.checks.check(
            "inter-vm-ioas-id",
            f"register, for {self.c}, an IOAS id that only {self.g1.name}'s iommufd has",
        ) as trial:
            mine = self.registrar.ioas(self.g2.name)
            theirs = self.registrar.ioas(self.g1.name)
            spare = [theirs]
            # Ids count up from 1 on each iommufd: go past the last one the other has given.
            while theirs <= mine + 1:
                theirs = self.registrar.ioas(self.g1.name)
                spare.append(theirs)
            pasid = self.registrar.alloc(self.g2.name)
            with trial.refusal("ENOENT", f"register IOAS {theirs}"):
                self.registrar.raw_attach(self.c, pasid, theirs)
            for ioas in spare:
                self.registrar.destroy(self.g1.name, ioas)
            self.registrar.destroy(self.g2.name, mine)
        with self.checks.check(
            "inter-vm-equal-id",
            f"register, for {self.c}, an IOAS id that names {self.g1.name}'s memory there "
            f"and {self.g2.name}'s here",
        ) as trial:
            self._equal_ids(trial)

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
        with self._exact(trial, self.g2, slots[self.g2.name]):
            (done,) = self.g2.submit(self.c, self._copy(pasid, OWN_IOVA))
            trial.require_status(done, "DONE")
        self.registrar.unregister(self.c, pasid)

    # Afterwards

    def afterwards(self) -> None:
        """What was taken back is refused, what was replaced is the new memory only."""
        for guest, device in self.devices():
            with self.checks.check(
                f"after-unregister-{device}", f"{device} names a PASID that was unregistered"
            ) as trial:
                binding = self.bind(guest, device)
                self.rig.unbind(binding)
                self._refused(trial, guest, device, binding.pasid, binding.iova)
            with self.checks.check(
                f"after-free-{device}", f"{device} names a PASID that was freed"
            ) as trial:
                self.registrar.free(binding.pasid)
                self._refused(trial, guest, device, binding.pasid, binding.iova)
            with self.checks.check(
                f"after-replace-{device}", f"{device} names a PASID whose IOAS was replaced"
            ) as trial:
                self._replaced(guest, device, trial)

    def _replaced(self, guest: Guest, device: str, trial: Trial) -> None:
        old = self.bind(guest, device)
        new = self.slot(guest)
        ioas = self.registrar.ioas(guest.name)
        self.registrar.map(guest.name, ioas, old.iova, guest.gpa + new, SLOT)
        self.registrar.replace(device, old.pasid, ioas)
        trial.answer("replace: 0")
        with self._exact(trial, guest, new):
            (done,) = guest.submit(device, self._copy(old.pasid, old.iova))
            trial.require_status(done, "DONE")
        # The old address space is nobody's now, so it can go.
        self.registrar.destroy(guest.name, old.ioas)

    # Edges

    def edges(self) -> None:
        """Work in flight ends before unregister returns; work past the end stays inside."""
        with self.checks.check(
            "in-flight", f"unregister while {self.a} is in the middle of a write that sleeps"
        ) as trial:
            self._in_flight(trial)
        for guest, device in self.devices():
            with self.checks.check(
                f"past-the-end-{device}", f"{device} copies 64 bytes with 32 left in the range"
            ) as trial:
                binding = self.bind(guest, device)
                with self.witnesses.around(
                    trial, target=guest.name, within=(binding.offset + SLOT - 32, 32)
                ):
                    work = copy(binding.pasid, binding.iova, binding.iova + SLOT - 32, 64)
                    (done,) = guest.submit(device, work)
                    trial.require_status(done, "FAULT")

    def _in_flight(self, trial: Trial) -> None:
        """The target is memory of the host side that sleeps until released (userfaultfd)."""
        host = self.rig.host.agent
        slot, slow_iova = self.slot(self.g1), OWN_IOVA + SLOT
        ioas = self.registrar.ioas(self.g1.name)
        self.registrar.map(self.g1.name, ioas, OWN_IOVA, self.g1.gpa + slot, SLOT)
        handle = host.call(
            "slow_create", iommufd=self.g1.name, ioas=ioas, iova=slow_iova, length=4096
        )["handle"]
        pasid = self.registrar.alloc(self.g1.name)
        self.registrar.register(self.a, self.g1.name, pasid, ioas)
        source = self.g1.agent.call("read", offset=slot, length=4096)["hex"]
        with self.witnesses.around(trial):
            ticket = self.g1.submit_start(
                self.a,
                copy(pasid, OWN_IOVA, slow_iova, 4096),
                copy(pasid, OWN_IOVA, OWN_IOVA + HALF, 4096),
            )
            host.call("slow_wait", handle=handle, seconds=20)
            leaving = self.registrar.unregister_start(self.a, pasid)
            state = host.call("wait_blocked", device=self.a, pasid=pasid, seconds=20)["state"]
            trial.answer(f"unregister under way: entry {state}")
            early = state != "closed" or leaving.done()
            host.call("slow_release", handle=handle)
            leaving.result(Deadline(30, "return of unregister"))
            landed = host.call("slow_read", handle=handle, offset=0, length=4096)["hex"]
            first, second = self.g1.submit_wait(ticket)
            trial.require(not early, "unregister returned with a write still in flight")
            trial.require_status(first, "DONE")
            trial.require_status(second, "REFUSED")
            trial.require(landed == source, "the write had not ended when unregister returned")
        trial.saw("the write was whole when unregister returned, the next one refused")
        host.call("slow_close", handle=handle)

    # Death

    def death(self) -> None:
        """The list dies with the last close of the device: a new open starts with none."""
        with self.checks.check(
            f"after-death-{self.c}",
            f"kill {self.g2.name}'s QEMU, open {self.c} again and name the old PASID",
        ) as trial:
            held = self.bind(self.g2, self.c)
            host = self.rig.host.agent
            self.rig.stop_guest(self.g2.name)
            self.witnesses.gone(self.g2.name)
            host.call("device_open", name=self.c)
            left = self.registrar.kernel_list(self.c)
            trial.answer(f"the kernel's list after the new open: {left}")
            with self.witnesses.around(trial, accesses=False):
                (done,) = host.call(
                    "device_submit",
                    name=self.c,
                    descriptors=[self._copy(held.pasid, held.iova)],
                    seconds=20,
                )
                trial.require_status(done, "REFUSED")
            host.call("device_close", name=self.c)
            trial.require(left == [], f"the list is not empty after a new open: {left}")
