# SPDX-License-Identifier: GPL-2.0-or-later
"""The default scenario: what was registered arrives, and nothing else does.

The first guest has at least two mdevs (a and b in the default rig), the
second at least one (c), all on one parent.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from qemu_ioasid import vtd
from qemu_ioasid.config import RigConfig
from qemu_ioasid.deadline import Deadline, calibration
from qemu_ioasid.errors import ConfigurationError
from qemu_ioasid.guestvm import device_address
from qemu_ioasid.machine import Machine
from qemu_ioasid.report import Report
from qemu_ioasid.rig import Guest, Rig, copy
from qemu_ioasid.scenarios.acts import HALF, LENGTH, OWN_IOVA, SLOT, SOURCE_AT, TARGET_AT, Acts
from qemu_ioasid.scenarios.checks import Trial
from qemu_ioasid.scenarios.witness import moved

PAGE = 4096
#: No iommufd of a rig has this many objects at a time.
FOREIGN_ID = 64
#: How long an unregister that must wait is watched for returning, in seconds.
EARLY_SECONDS = 1.0


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


class Isolation(Acts):
    """The scenario: which guests and mdevs play which part."""

    def __init__(self, rig: Rig, report: Report) -> None:
        super().__init__(rig, report)
        self.g1, self.g2 = list(rig.guests.values())[:2]
        self.a, self.b, self.c = self.g1.mdevs[0], self.g1.mdevs[1], self.g2.mdevs[0]

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
        path = f"/run/{guest.name}.pmem"
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
                self.moves(trial, guest, device, None, OWN_IOVA, offset)
            with self.checks.check(
                f"no-pasid-unmapped-{device}", f"{device} copies without a PASID, unmapped"
            ) as trial:
                guest.agent.call("ioas_unmap", name=device, iova=OWN_IOVA, length=SLOT)
                self._walk(guest, device, None, trial)
                # The fault is the attempt to read; a write is never tried.
                with self.witnesses.around(trial, reads=(OWN_IOVA + SOURCE_AT, LENGTH)):
                    (done,) = guest.submit(device, self.work(None, OWN_IOVA))
                    self.faulted(trial, done, OWN_IOVA + SOURCE_AT)

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

    def registered(self) -> None:
        """A registered PASID moves exactly the bytes asked for, on each device."""
        for guest, device in self.devices():
            with self.checks.check(
                f"registered-{device}", f"{device} of {guest.name} copies with its own PASID"
            ) as trial:
                own = self.bind(guest, device)
                trial.answer(f"register PASID {own.pasid}: 0")
                self.moves(trial, guest, device, own.pasid, own.iova, own.offset)
        self._audit("audit")

    def _audit(self, name: str) -> None:
        with self.checks.check(name, "compare the ledger with the kernel's own lists") as trial:
            audit = self.registrar.audit()
            lists = {device: self.registrar.kernel_list(device) for _, device in self.devices()}
            trial.answer(", ".join(f"{device}: {pasids}" for device, pasids in lists.items()))
            trial.require(
                audit["agrees"] and not audit["unsettled"], f"ledger and kernel differ: {audit}"
            )
            trial.require(all(lists.values()), "a list is empty that must not be")
            listed = sorted({pasid for pasids in lists.values() for pasid in pasids})
            table = self.registrar.kernel_table()
            trial.require(table == listed, f"the parent's table has {table}, the lists {listed}")
            trial.saw("the ledger, the kernel's lists and the parent's table are the same")

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
                self.refused(trial, guest, device, self.registrar.alloc(guest.name), iova)
                self.refused(trial, guest, device, (1 << 20) - 1, iova)

    def between(self) -> None:
        """What is one device's is not another's: in one VM, and between two."""
        with self.checks.check(
            "intra-vm",
            f"{self.b} names a PASID registered for {self.a} only, both {self.g1.name}'s",
        ) as trial:
            binding = self.bind(self.g1, self.a)
            self.refused(trial, self.g1, self.b, binding.pasid, binding.iova)
        with self.checks.check(
            "intra-vm-shared",
            f"register one PASID for {self.a} and {self.b}, then take it from {self.b}",
        ) as trial:
            self._shared(trial)
        with self.checks.check(
            "inter-vm-use", f"{self.c} of {self.g2.name} names a PASID that {self.g1.name} holds"
        ) as trial:
            binding = self.bind(self.g1, self.a)
            self.refused(trial, self.g2, self.c, binding.pasid, binding.iova)
        with self.checks.check(
            "inter-vm-register",
            f"register a PASID that {self.g1.name} holds for {self.c} of {self.g2.name}",
        ) as trial:
            held = self.bind(self.g1, self.a)
            own = self.registrar.ioas(self.g2.name)
            with trial.refusal("EBUSY", f"register PASID {held.pasid} for {self.c}"):
                self.registrar.raw_attach(self.c, held.pasid, own)
            self.refused(trial, self.g2, self.c, held.pasid, held.iova)
            self.registrar.destroy(self.g2.name, own)
        self._foreign_ioas()

    def _shared(self, trial: Trial) -> None:
        """Both may use what both have; neither can move it; each loses its own entry only."""
        both = self.bind(self.g1, self.a)
        self.registrar.register(self.b, self.g1.name, both.pasid, both.ioas)
        other = self.registrar.ioas(self.g1.name)
        for device in (self.a, self.b):
            self.moves(trial, self.g1, device, both.pasid, both.iova, both.offset)
            self.g1.agent.call("fill")
            with trial.refusal("EBUSY", f"replace on {device}"):
                self.registrar.raw_attach(device, both.pasid, other)
        self.registrar.unregister(self.b, both.pasid)
        self.refused(trial, self.g1, self.b, both.pasid, both.iova)
        self.moves(trial, self.g1, self.a, both.pasid, both.iova, both.offset)
        self.registrar.destroy(self.g1.name, other)

    def _foreign_ioas(self) -> None:
        with self.checks.check(
            "inter-vm-ioas-id",
            f"register, for {self.c}, an IOAS id that only {self.g1.name}'s iommufd has",
        ) as trial:
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
        self.moves(trial, self.g2, self.c, pasid, OWN_IOVA, slots[self.g2.name])
        self.registrar.unregister(self.c, pasid)

    # Afterwards

    def afterwards(self) -> None:
        """What was taken back is refused, what was replaced is the new memory only."""
        for guest, device in self.devices():
            with self.checks.check(
                f"after-unregister-{device}", f"{device} names a PASID that was unregistered"
            ) as trial:
                self._taken_back(trial, guest, device, free=False)
            with self.checks.check(
                f"after-free-{device}", f"{device} names a PASID that was unregistered and freed"
            ) as trial:
                self._taken_back(trial, guest, device, free=True)
            with self.checks.check(
                f"after-replace-{device}", f"{device} names a PASID whose IOAS was replaced"
            ) as trial:
                self._replaced(trial, guest, device)
        self._audit("audit-afterwards")

    def _taken_back(self, trial: Trial, guest: Guest, device: str, *, free: bool) -> None:
        binding = self.bind(guest, device)
        self.rig.unbind(binding)
        trial.answer("unregister: 0")
        if free:
            self.registrar.free(binding.pasid)
        self.refused(trial, guest, device, binding.pasid, binding.iova)

    def _replaced(self, trial: Trial, guest: Guest, device: str) -> None:
        old = self.bind(guest, device)
        new = self.slot(guest)
        ioas = self.registrar.ioas(guest.name)
        self.registrar.map(guest.name, ioas, old.iova, guest.gpa + new, SLOT)
        self.registrar.replace(device, old.pasid, ioas)
        trial.answer("replace: 0")
        self.moves(trial, guest, device, old.pasid, old.iova, new)
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
                f"past-the-end-{device}",
                f"{device} copies 64 bytes to, then from, the last 32 of the range",
            ) as trial:
                self._past_the_end(trial, guest, device)

    def _past_the_end(self, trial: Trial, guest: Guest, device: str) -> None:
        binding = self.bind(guest, device)
        start, edge = binding.iova, binding.iova + SLOT - 32
        with self.witnesses.around(
            trial,
            target=guest.name,
            within=(binding.offset + SLOT - 32, 32),
            reads=(start, 64),
            writes=(edge, 64),
        ):
            (done,) = guest.submit(device, copy(binding.pasid, start, edge, 64))
            self.faulted(trial, done, edge)
        with self.witnesses.around(trial, reads=(edge, 64)):
            (done,) = guest.submit(device, copy(binding.pasid, edge, start, 64))
            self.faulted(trial, done, edge)

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
            ticket = self.g1.submit_start(
                self.a,
                copy(pasid, OWN_IOVA, slow, PAGE),
                copy(pasid, OWN_IOVA, OWN_IOVA + HALF, PAGE),
            )
            self._drains(trial, handle, pasid)
            landed = host.call("slow_read", handle=handle, offset=0, length=PAGE)["hex"]
            first, second = self.g1.submit_wait(ticket)
            trial.require_status(first, "DONE")
            trial.require_status(second, "REFUSED")
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
            with self.witnesses.around(trial):
                (done,) = host.call(
                    "device_submit",
                    name=self.c,
                    descriptors=[self.work(held.pasid, held.iova)],
                    seconds=20 * calibration(),
                )
                trial.require_status(done, "REFUSED")
            trial.require(left == [], f"the list is not empty after a new open: {left}")
        with self.checks.check(
            f"after-reset-{self.c}",
            f"reset {self.c}, opened by the host side, with a PASID in its list",
        ) as trial:
            self._reset(trial)

    def _reset(self, trial: Trial) -> None:
        """A reset cancels work and keeps the list."""
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
            (done,) = host.call(
                "device_submit",
                name=self.c,
                descriptors=[self.work(pasid, OWN_IOVA)],
                seconds=20 * calibration(),
            )
            trial.require_status(done, "DONE")
        host.call("device_close", name=self.c)
        trial.require(self.registrar.kernel_list(self.c) == [], "the close did not end the list")
