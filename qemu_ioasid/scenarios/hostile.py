# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest that does anything at all to its devices: nobody else may come to harm, or to wait.

What it does is in agent/storm.py, from a seed that is told. The storm runs in the first guest, on
two of its devices at once; the second guest is the one that must not notice.
"""

from __future__ import annotations

import contextlib
import errno
import secrets
import statistics
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from qemu_ioasid.client import Pending
from qemu_ioasid.config import RigConfig
from qemu_ioasid.deadline import Deadline, calibration
from qemu_ioasid.errors import InfrastructureError
from qemu_ioasid.model.engine import FILL
from qemu_ioasid.report import Report
from qemu_ioasid.rig import Binding, Rig, copy
from qemu_ioasid.scenarios.acts import OWN_IOVA, parts
from qemu_ioasid.scenarios.checks import Skipped, Trial
from qemu_ioasid.scenarios.stage import TwoGuests
from qemu_ioasid.scenarios.table import Row, Table

OPERATIONS = 200_000
#: What a storm may reach: this much of the first guest's arena, by a PASID on each device.
ROOM = 1 << 20
#: How many times longer the other guest's work may take while a storm runs.
SLOWER = 10
#: Pieces of work that a median is taken of, and the bytes of each: so many that moving them, and
#: not the host's tick, is what takes the time.
SAMPLES, BYTES = 15, ROOM // 2
#: A storm's operations take so long at most, in seconds of the reference machine each.
OPERATION_SECONDS = 0.004
#: For a ring full of work, likewise.
RING_SECONDS = 60.0
#: Between two resets under a storm, in seconds.
RESET_PAUSE = 0.05
#: The cap that the list is tried with.
CAP = 8
_MODULE = "vfio_pdma"

TABLE = Table()
_STORM = TABLE.phase("a hostile guest")
_AFTER = TABLE.phase("everybody else, afterwards")
_SHARE = TABLE.phase("the shared engine")
_FILE = TABLE.phase("the device file itself")


def rows(config: RigConfig) -> list[Row]:
    """The checks on a rig; raises as `acts.parts`."""
    return TABLE.rows(config, parts(config, "hostile"))


def run(
    rig: Rig,
    report: Report,
    rows: Sequence[Row],
    seed: int | None = None,
    operations: int = OPERATIONS,
) -> None:
    """Make the checks of *rows*; failures are in the report, a rig that broke is raised."""
    chosen = secrets.randbits(32) if seed is None else seed
    report.say(f"seed {chosen}: qemu-ioasid run hostile --seed {chosen} --operations {operations}")
    Hostile(rig, report, chosen, operations).run(rows)


class Hostile(TwoGuests):
    """The scenario on a rig."""

    def __init__(self, rig: Rig, report: Report, seed: int, operations: int) -> None:
        super().__init__(rig, report, "hostile")
        self.seed, self.operations = seed, operations
        self._room: dict[str, Binding] = {}

    def _given(self) -> dict[str, Binding]:
        """What each device has a PASID for: a part of the upper half of its guest's arena."""
        if not self._room:
            for device, offset, length in (
                (self.a, self.g1.size - ROOM, ROOM // 2),
                (self.b, self.g1.size - ROOM // 2, ROOM // 2),
                (self.c, self.g2.size - ROOM, ROOM),
            ):
                guest = self.owner[device].name
                self._room[device] = self.rig.bind(guest, device, offset, length)
        return self._room

    def _start(self, device: str, operations: int | None, *, judged: bool = True) -> Pending:
        """A storm on *device*, which knows its own PASID, its sibling's and the other guest's.

        *operations* None: the longest copies, until it is told to stop.
        """
        given = self._given()
        known = [given[device], *(each for each in given.values() if each.device != device)]
        targets = [
            {"pasid": each.pasid, "iova": each.iova, "length": each.length} for each in known
        ]
        return self.owner[device].agent.start(
            "storm",
            name=device,
            seed=self.seed + list(given).index(device),
            operations=operations,
            targets=targets,
            seconds=RING_SECONDS * calibration(),
            rings=True,
            judged=judged,
        )

    def _deadline(self) -> Deadline:
        seconds = 90 + self.operations * OPERATION_SECONDS
        return Deadline(seconds, f"end of {self.operations} operations")

    @_STORM("storm", "{g1} does anything at all to {a} and {b}, which it has one PASID each for")
    def _storm(self, trial: Trial) -> None:
        """Its own memory changes where the PASIDs reach, and no other byte of anybody does."""
        # Interrupts cost a guest more than all the rest: one device in ten acts raises them.
        shares = {self.a: self.operations - self.operations // 10, self.b: self.operations // 10}
        self.g1.agent.call("irq_start", name=self.b)
        with self._watched(trial):
            under_way = {device: self._start(device, share) for device, share in shares.items()}
            for device, pending in under_way.items():
                self._made(trial, device, pending.result(self._deadline()), shares[device])
        self.g1.agent.call("irq_stop", name=self.b)

    @_STORM("storm-reset", "{g1} does anything at all to {a}, which its VMM resets over and over")
    def _storm_reset(self, trial: Trial) -> None:
        """As a guest's reboots do; it has no other way to reset the device."""
        due, resets = self.operations // 10, 0
        with self._watched(trial):
            pending, deadline = self._start(self.a, due, judged=False), self._deadline()
            while not pending.ends_within(RESET_PAUSE):
                deadline.remaining()
                self.rig.host.agent.call("raw_reset", device=self.a)
                resets += 1
            made = pending.result(deadline)
            # The last one may have come when the storm was over.
            self.g1.agent.call("device_resume", name=self.a)
            self._made(trial, self.a, made, due)
        trial.answer(f"{resets} resets meanwhile")
        trial.require(resets > 0, "the storm was over before the first reset")

    def _made(self, trial: Trial, device: str, made: dict[str, Any], due: int) -> None:
        """Tell what a storm did, and require it to have been one."""
        wrong = made.pop("wrong")
        refused = {
            what: errno.errorcode.get(number, str(number))
            for what, number in made.pop("refused").items()
        }
        told = ", ".join(f"{count} {what}" for what, count in made.items())
        trial.answer(f"{device}: {told}; not to be had: {refused}")
        trial.require(not wrong, f"{device} ended work otherwise than the ABI has it: {wrong}")
        trial.require(made["operations"] >= due, "the storm ended early")

    def _silent(self, trial: Trial) -> None:
        """Require the host's kernel to have said nothing since it was asked last."""
        said = self.rig.host.agent.call("news")["news"]
        trial.require(not said, f"the host's kernel says: {said}")
        trial.saw("the host's kernel said nothing")

    @contextlib.contextmanager
    def _watched(self, trial: Trial) -> Iterator[None]:
        """Require what the block does to change the first guest's room, and no other byte."""
        host, guests = self.rig.host.agent, (self.g1, self.g2)
        self._given()
        self.witnesses.stale()
        host.call("news")
        # A trace of every access would lose some.
        host.call("trace_stop")
        for guest in guests:
            nonce = guest.agent.call("watch")["nonce"]
            seen = host.call("watch", guest=guest.name, gpa=guest.gpa, length=guest.size)
            if seen["nonce"] != nonce:
                raise InfrastructureError(f"{guest.name}: its nonce is not in its RAM file")
        try:
            yield
        finally:
            host.call("trace_start")
        for guest in guests:
            room = guest.size - (ROOM if guest is self.g1 else 0)
            for view, found in (
                ("inside", guest.agent.call("changes")),
                ("the host", host.call("changes", guest=guest.name)),
            ):
                spans = [(each["offset"], each["length"]) for each in found["changed"]]
                stray = [f"+{at:#x}, {length} bytes" for at, length in spans if at < room]
                trial.require(not stray, f"LEAK: {guest.name} from {view}: {stray[:4]} changed")
                trial.saw(f"{guest.name} from {view}: {len(spans)} changes, each in its room")
        self._silent(trial)

    @_AFTER("works-{device}", "{device} of {guest} copies with a PASID of its own")
    def _works(self, trial: Trial, device: str) -> None:
        guest = self.owner[device]
        own = self.bind(guest, device)
        self.moves(trial, guest, device, own.pasid, own.iova, own.offset)

    @_AFTER("unregistered-{device}", "{device} of {guest} names a PASID nobody registered")
    def _unregistered(self, trial: Trial, device: str) -> None:
        guest = self.owner[device]
        self.refused(trial, guest, device, self.registrar.alloc(guest.name), 1 << 32)

    @_AFTER("audit", "compare the ledger with the kernel's own lists")
    def _audit(self, trial: Trial) -> None:
        self._given()
        audit = self.registrar.audit()
        trial.answer(f"{audit}")
        trial.require(audit["agrees"] and not audit["unsettled"], "ledger and kernel differ")

    @_SHARE("latency", "{g2} copies on {c} while {g1} has {a} and {b} copy all that they take")
    def _latency(self, trial: Trial) -> None:
        """The median as the other guest measures it, before and during the storm."""
        self.witnesses.stale()
        quiet = self._median()
        devices = (self.a, self.b)
        under_way = [self._start(device, None) for device in devices]
        try:
            self._under_way(devices)
            stormy = self._median()
        finally:
            early = [each for each in under_way if each.ends_within(0)]
            for device in devices:
                self.g1.agent.call("storm_stop", name=device)
        copied = [each.result(self._deadline())["descriptors"] for each in under_way]
        times = stormy / quiet
        trial.answer(
            f"median of {SAMPLES} copies of {BYTES} bytes: {quiet * 1e3:.1f} ms alone, "
            f"{stormy * 1e3:.1f} ms beside {copied} copies of as many"
        )
        trial.saw(f"{times:.1f} times as long")
        trial.require(not early, "the storm was over before the measurement was")
        trial.require(times <= SLOWER, f"more than {SLOWER} times as long")

    def _under_way(self, devices: Sequence[str]) -> None:
        for device in devices:
            seconds = 60 * calibration()
            deadline = Deadline(65, f"storm on {device}, under way")
            self.g1.agent.call("storm_wait", name=device, seconds=seconds, deadline=deadline)

    def _median(self) -> float:
        own = self._given()[self.c]
        answer = self.g2.agent.call(
            "submit_timed",
            name=self.c,
            descriptor=copy(own.pasid, own.iova, own.iova + BYTES, BYTES),
            count=SAMPLES,
            seconds=20 * calibration(),
            deadline=Deadline(120, f"{SAMPLES} copies in {self.g2.name}"),
        )
        return float(statistics.median(answer["seconds"]))

    # Without guests, and without a VMM between whoever is hostile and the driver

    def _opened(self, *devices: str) -> dict[str, dict[str, Any]]:
        """Fresh mdevs on a host without guests, opened by the host side."""
        host = self.rig.host.agent
        self.rig.dismantle()
        opened = {}
        for device in devices:
            self.rig.mdevs[device] = str(uuid.uuid4())
            host.call("mdev_create", name=device, uuid=self.rig.mdevs[device])
            opened[device] = host.call("device_open", name=device)
        return opened

    def _close(self, devices: Iterable[str]) -> None:
        for device in devices:
            self.rig.host.agent.call("device_close", name=device)

    def _furnish(self, device: str, iommufd: str) -> tuple[int, int]:
        """ROOM / 2 bytes of the host side's memory for *device*; the PASID and the memory."""
        host = self.rig.host.agent
        ioas, pasid = self.registrar.ioas(iommufd), self.registrar.alloc(iommufd)
        made = host.call("slow_create", iommufd=iommufd, ioas=ioas, iova=OWN_IOVA, length=ROOM // 2)
        host.call("slow_release", handle=made["handle"])
        self.registrar.register(device, iommufd, pasid, ioas)
        return pasid, int(made["handle"])

    @_FILE(
        "storm-file", "the host side does anything at all to the file of {a}, with no VMM between"
    )
    def _storm_file(self, trial: Trial) -> None:
        """In the second half the device finds its own rings in its address space."""
        host = self.rig.host.agent
        opened = self._opened(self.a, self.b)
        given = {device: self._furnish(device, told["iommufd"]) for device, told in opened.items()}
        pasid, kept = given[self.b]
        fill = {"opcode": FILL, "pasid": pasid, "src": secrets.randbits(64), "dst": OWN_IOVA}
        self.submit_by_host(trial, self.b, {**fill, "length": ROOM // 2}, "DONE")
        before = host.call("slow_read", handle=kept, offset=0, length=ROOM // 2)
        host.call("news")
        known = [(given[device][0], OWN_IOVA, ROOM // 2) for device in (self.a, self.b)]
        for rings in (False, True):
            made = host.call(
                "storm",
                name=self.a,
                seed=self.seed,
                operations=self.operations // 2,
                targets=[
                    dict(zip(("pasid", "iova", "length"), each, strict=True)) for each in known
                ],
                seconds=RING_SECONDS * calibration(),
                rings=rings,
                deadline=self._deadline(),
            )
            self._made(trial, self.a, made, self.operations // 2)
        after = host.call("slow_read", handle=kept, offset=0, length=ROOM // 2)
        trial.require(after == before, f"LEAK: the memory of {self.b} changed")
        trial.saw(f"the {ROOM // 2} bytes of {self.b} are what they were")
        for _, handle in given.values():
            host.call("slow_close", handle=handle)
        self._close(opened)
        self._silent(trial)

    @_FILE(
        "cap", "register one PASID more than a list may hold, with max_pasids of the module at 8"
    )
    def _cap(self, trial: Trial) -> None:
        """The module is loaded anew, with a small cap."""
        if self.rig.host.parts is None:
            raise Skipped("the module of this machine is not the rig's to load anew")
        self.rig.dismantle()
        self.rig.host.ssh.output(
            f"rmmod {_MODULE} && insmod /run/modules/{_MODULE}.ko max_pasids={CAP}",
            Deadline(60, "module loaded anew"),
        )
        opened = self._opened(self.a, self.b)

        def register(device: str, pasid: int) -> None:
            iommufd, ioas = opened[device]["iommufd"], opened[device]["ioas"]
            self.registrar.register(device, iommufd, pasid, ioas)

        for pasid in range(1, CAP + 1):
            register(self.a, pasid)
        for pasid in (CAP + 1, CAP + 2):
            with trial.refusal("ENOSPC", f"register number {CAP + 1} on {self.a}"):
                register(self.a, pasid)
        listed = self.registrar.kernel_list(self.a)
        trial.require(listed == list(range(1, CAP + 1)), f"the list is {listed} then")
        # Each list has a cap of its own, and room again when one has left.
        register(self.b, CAP + 1)
        self.registrar.unregister(self.a, 1)
        register(self.a, CAP + 2)
        trial.answer(f"on {self.b}: 0; on {self.a}, when one has left: 0")
        self._close(opened)
        trial.saw(f"the kernel's list had {CAP} entries, and none was lost")
