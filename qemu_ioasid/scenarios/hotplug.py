# SPDX-License-Identifier: GPL-2.0-or-later
"""The scenario ``hotplug``: a device that leaves a running guest takes its PASID list along."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from qemu_ioasid import guestvm
from qemu_ioasid.config import RigConfig
from qemu_ioasid.deadline import Deadline, calibration
from qemu_ioasid.errors import ConfigurationError
from qemu_ioasid.guestvm import device_address
from qemu_ioasid.report import Report
from qemu_ioasid.rig import Binding, Guest, Rig, copy
from qemu_ioasid.scenarios.acts import SLOT, Acts
from qemu_ioasid.scenarios.checks import Trial
from qemu_ioasid.scenarios.table import Row, Table

PAGE = 4096
#: How long an unplugging that must wait is watched for its end, in seconds.
EARLY_SECONDS = 1.0

TABLE = Table()
_UNPLUGGED = TABLE.phase("devices unplugged and plugged in again")


def parts(config: RigConfig) -> dict[str, str]:
    """Which guests and mdevs play which part. Raises ConfigurationError: it takes two guests."""
    owners = {name: guest.mdevs for name, guest in config.guests.items() if guest.mdevs}
    if len(owners) < 2:
        raise ConfigurationError(
            f"{config.path}: scenario hotplug needs two guests with an mdev each"
        )
    g1, g2 = list(owners)[:2]
    return {"g1": g1, "g2": g2, "a": owners[g1][0], "c": owners[g2][0]}


def rows(config: RigConfig) -> list[Row]:
    """The checks on a rig; raises as `parts`."""
    return TABLE.rows(config, parts(config))


def run(rig: Rig, report: Report, rows: Sequence[Row]) -> None:
    """Make the checks of *rows*; failures are in the report, a rig that broke is raised."""
    Hotplug(rig, report).run(rows)


class Hotplug(Acts):
    """The scenario on a rig. Each check leaves every device plugged in."""

    def __init__(self, rig: Rig, report: Report) -> None:
        super().__init__(rig, report)
        play = parts(rig.config)
        self.g1, self.g2 = rig.guests[play["g1"]], rig.guests[play["g2"]]
        self.a, self.c = play["a"], play["c"]

    def _forgotten(self, trial: Trial, device: str, pasid: int) -> None:
        """Require the kernel and the ledger to know nothing of *device*, or of *pasid* at all."""
        left = self.registrar.kernel_list(device)
        trial.answer(f"the kernel's list: {left}")
        trial.require(left == [], f"the list has outlived the device: {left}")
        table = self.registrar.kernel_table()
        trial.require(pasid not in table, f"the parent's table has {pasid} still: {table}")
        ledger = self.rig.host.agent.call("ledger")
        trial.require(device not in [line["device"] for line in ledger], f"the ledger has {ledger}")
        audit = self.registrar.audit()
        trial.require(audit["agrees"], f"ledger and kernel differ: {audit}")

    @contextlib.contextmanager
    def _back_afterwards(self, device: str) -> Iterator[None]:
        """*device*, which its guest lets go of in the block, is plugged in again, come what may."""
        try:
            yield
        finally:
            self.rig.plug(device)

    def _works(self, trial: Trial, device: str, before: Binding) -> None:
        """Require *device*, plugged in again, to begin with nothing, and to do what it is given."""
        guest = self.owner[device]
        left = self.registrar.kernel_list(device)
        trial.require(left == [], f"plugged in again, it begins with {left}")
        self.refused(trial, guest, device, before.pasid, before.iova)
        again = self.bind(guest, device)
        self.moves(trial, guest, device, again.pasid, again.iova, again.offset)
        self.rig.unbind(again)

    @_UNPLUGGED("unplugged-{c}", "unplug {c} with a PASID in its list, plug it in, name that PASID")
    def _unplugged(self, trial: Trial) -> None:
        held = self.bind(self.g2, self.c)
        self.moves(trial, self.g2, self.c, held.pasid, held.iova, held.offset)
        with self._back_afterwards(self.c):
            self.rig.unplug(self.c)
            self._forgotten(trial, self.c, held.pasid)
        self._works(trial, self.c, held)

    @_UNPLUGGED("asked-{a}", "ask {g1} for {a}, which it has in use, and let {g1} have its way")
    def _asked(self, trial: Trial) -> None:
        """Nothing changes until the guest lets go: QEMU has the device, and its list holds."""
        held = self.bind(self.g1, self.a)
        self.rig.host.agent.call("guest_unplug", guest=self.g1.name, device=self.a)
        self.moves(trial, self.g1, self.a, held.pasid, held.iova, held.offset)
        with self._back_afterwards(self.a):
            self._let_go(self.g1, self.a)
            self._forgotten(trial, self.a, held.pasid)
        self._works(trial, self.a, held)

    def _let_go(self, guest: Guest, device: str) -> None:
        bdf = device_address(guest.mdevs.index(device))
        guest.agent.call("device_eject", name=device, bdf=bdf)
        guestvm.unplugged(self.rig.host, guest.name, device)

    @_UNPLUGGED(
        "passed-on", "{g1} turns {a}'s slot off, unasked; {c} of {g2} gets its PASID; {a} names it"
    )
    def _passed_on(self, trial: Trial) -> None:
        held = self.bind(self.g1, self.a)
        with self._back_afterwards(self.a):
            self._let_go(self.g1, self.a)
            self._forgotten(trial, self.a, held.pasid)
            self.registrar.free(held.pasid)
            theirs = self.bind(self.g2, self.c, held.pasid)
            trial.answer(f"register PASID {held.pasid} for {self.c}: 0")
            self.moves(trial, self.g2, self.c, theirs.pasid, theirs.iova, theirs.offset)
        self.refused(trial, self.g1, self.a, held.pasid, held.iova)
        self.rig.unbind(theirs)

    @_UNPLUGGED("in-flight-unplugged", "unplug {a} in the middle of a write that sleeps")
    def _in_flight(self, trial: Trial) -> None:
        """QEMU resets what it takes out, and that waits for the write."""
        host = self.rig.host.agent
        held = self.bind(self.g1, self.a)
        slow = held.iova + SLOT
        source = self.g1.agent.call("read", offset=held.offset, length=PAGE)["hex"]
        handle = host.call(
            "slow_create", iommufd=self.g1.name, ioas=held.ioas, iova=slow, length=PAGE
        )["handle"]
        with self._back_afterwards(self.a), contextlib.ExitStack() as stack:
            # Whatever fails: a device left asleep would fail every check that follows.
            stack.callback(host.call, "slow_close", handle=handle)
            with self.witnesses.around(trial, reads=(held.iova, PAGE), writes=(slow, PAGE)):
                work = copy(held.pasid, held.iova, slow, PAGE)
                attempt = self.attempt(trial, self.g1.name, self.a, work, "DONE")
                self.g1.submit_start(self.a, work)
                self._unplugged_under(trial, handle)
                self._forgotten(trial, self.a, held.pasid)
                landed = host.call("slow_read", handle=handle, offset=0, length=PAGE)["hex"]
                trial.require(landed == source, "unplugged, with the write not whole")
                attempt.answered, attempt.outcome = "DONE", "allowed"
                trial.saw("the write was whole when the device was gone")
        self._works(trial, self.a, held)

    def _unplugged_under(self, trial: Trial, handle: int) -> None:
        """Unplug under a sleeping write: the device goes after the release, and not before."""
        host, seconds = self.rig.host.agent, 20 * calibration()
        host.call("slow_wait", handle=handle, seconds=seconds)
        host.call("guest_unplug", guest=self.g1.name, device=self.a)
        bdf = device_address(self.g1.mdevs.index(self.a))
        leaving = self.g1.agent.start("device_eject", name=self.a, bdf=bdf)
        early = leaving.ends_within(EARLY_SECONDS)
        host.call("slow_release", handle=handle)
        leaving.result(Deadline(45, f"{self.a} ejected"))
        guestvm.unplugged(self.rig.host, self.g1.name, self.a)
        trial.require(not early, "the device was gone with a write still in flight")
