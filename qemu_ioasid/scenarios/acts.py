# SPDX-License-Identifier: GPL-2.0-or-later
"""What scenarios have devices do, with the witnesses around it."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Sequence

from qemu_ioasid.config import RigConfig
from qemu_ioasid.deadline import calibration
from qemu_ioasid.errors import ConfigurationError
from qemu_ioasid.report import Attempt, Report
from qemu_ioasid.rig import Binding, Completion, Descriptor, Guest, Rig, copy
from qemu_ioasid.scenarios.checks import Checks, Trial
from qemu_ioasid.scenarios.table import Row
from qemu_ioasid.scenarios.witness import Witnesses, moved

#: Every range bound in an arena is one slot: a copy's source at its start, its target past HALF.
SLOT = 0x4000
HALF = SLOT // 2
#: An odd length at odd places: no rounding to anything goes unseen.
LENGTH, SOURCE_AT, TARGET_AT = 4099, 5, HALF + 3
#: Where work without a PASID finds its slot in the device's own address space.
OWN_IOVA = 0x4000_0000


def parts(config: RigConfig, scenario: str) -> dict[str, str]:
    """Which guests and mdevs play which part in *scenario*.

    Raises ConfigurationError when a rig has not the guests and mdevs it needs.
    """
    mdevs = [guest.mdevs for guest in config.guests.values()]
    if len(mdevs) < 2 or len(mdevs[0]) < 2 or len(mdevs[1]) < 1:
        raise ConfigurationError(
            f"{config.path}: scenario {scenario} needs two guests, the first with two mdevs, "
            "the second with one"
        )
    g1, g2 = list(config.guests)[:2]
    return {"g1": g1, "g2": g2, "a": mdevs[0][0], "b": mdevs[0][1], "c": mdevs[1][0]}


class Acts:
    """A rig under a scenario: its registrar, witnesses and checks, and each arena's next slot."""

    def __init__(self, rig: Rig, report: Report) -> None:
        self.rig = rig
        self.registrar = rig.registrar
        self.report = report
        self.checks = Checks(rig, report)
        self.witnesses = Witnesses(rig)
        # The first slot holds the nonce.
        self._slots = {guest: itertools.count(SLOT, SLOT) for guest in rig.guests}
        #: Every device's guest.
        self.owner = {device: guest for guest in rig.guests.values() for device in guest.mdevs}

    def run(self, rows: Sequence[Row]) -> None:
        """Make the checks of *rows*, phase by phase."""
        with self.report.phase("prepare the arenas"):
            # Every byte of every arena gets a value of its own, and the kernel's witness listens.
            for guest in self.rig.guests.values():
                self.fill(guest)
            self.rig.host.agent.call("trace_start")
        for phase, group in itertools.groupby(rows, lambda row: row.phase):
            with self.report.phase(phase):
                self.checks.make(list(group), self)

    def fill(self, guest: Guest) -> None:
        """Give every byte of *guest*'s arena a value that no copy has put there."""
        self.witnesses.stale()
        guest.agent.call("fill")

    def slot(self, guest: Guest) -> int:
        """The offset of a slot of *guest*'s arena that no check has used."""
        return next(self._slots[guest.name])

    def bind(self, guest: Guest, device: str, pasid: int | None = None) -> Binding:
        """Register a fresh slot of *guest* on *device*."""
        return self.rig.bind(guest.name, device, self.slot(guest), SLOT, pasid)

    def work(self, pasid: int | None, iova: int) -> Descriptor:
        """The copy within the slot mapped at *iova* that most checks try."""
        return copy(pasid, iova + SOURCE_AT, iova + TARGET_AT, LENGTH)

    def moves(
        self, trial: Trial, guest: Guest, device: str, pasid: int | None, iova: int, offset: int
    ) -> None:
        """Require `work` to move its bytes in the slot at *offset*, and nothing else anywhere."""
        with self.witnesses.around(
            trial,
            target=guest.name,
            expect=moved(offset + TARGET_AT, LENGTH, offset + SOURCE_AT),
            reads=(iova + SOURCE_AT, LENGTH),
            writes=(iova + TARGET_AT, LENGTH),
        ):
            self.submit(trial, guest, device, self.work(pasid, iova), "DONE")

    def owned_by(self, pasid: int) -> str:
        """Who *pasid* was given to; "" when it is nobody's."""
        return self.registrar.owner(pasid)

    def attempt(
        self, trial: Trial, by: str, device: str, work: Descriptor, expected: str
    ) -> Attempt:
        """Note *work* that *by* is about to give *device*; `Trial.settle` takes the completion."""
        pasid = work["pasid"]
        owner = by if pasid is None else self.owned_by(pasid)
        trial.attempts.append(Attempt(device, by, pasid, owner, expected))
        return trial.attempts[-1]

    def submit(
        self, trial: Trial, guest: Guest, device: str, work: Descriptor, expected: str
    ) -> Completion:
        """Have *device* do *work* for *guest*, and require it to end with status *expected*."""
        attempt = self.attempt(trial, guest.name, device, work, expected)
        (done,) = guest.submit(device, work)
        trial.settle(attempt, done)
        return done

    def submit_by_host(self, trial: Trial, device: str, work: Descriptor, expected: str) -> None:
        """As `submit`, of a device that the host side has opened."""
        attempt = self.attempt(trial, "host", device, work, expected)
        (done,) = self.rig.host.agent.call(
            "device_submit", name=device, descriptors=[work], seconds=20 * calibration()
        )
        trial.settle(attempt, done)

    def faults(
        self, trial: Trial, guest: Guest, device: str, work: Descriptor, address: int
    ) -> None:
        """Require *work* to end where *address* is not mapped."""
        done = self.submit(trial, guest, device, work, "FAULT")
        trial.require(
            done["error"] == errno.ENOENT and done["addr"] == address,
            f"the fault must be ENOENT at {address:#x}",
        )

    def refused(self, trial: Trial, guest: Guest, device: str, pasid: int, iova: int) -> None:
        """Require `work` to be refused, with no trace of it anywhere."""
        with self.witnesses.around(trial):
            self.submit(trial, guest, device, self.work(pasid, iova), "REFUSED")
