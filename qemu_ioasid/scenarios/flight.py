# SPDX-License-Identifier: GPL-2.0-or-later
"""The scenario ``flight``: what becomes of work that is under way when everything else changes.

The host side drives the mdevs itself, in a host VM without guests. The first piece of work writes
to memory that puts it to sleep (userfaultfd), so that each moment is as long as is wanted. What
is queued behind it, and where that lands, tells what the driver did.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

from qemu_ioasid import config
from qemu_ioasid.client import Pending
from qemu_ioasid.config import RigConfig
from qemu_ioasid.deadline import Deadline, calibration
from qemu_ioasid.errors import ConfigurationError
from qemu_ioasid.model.engine import FILL
from qemu_ioasid.report import Report
from qemu_ioasid.rig import Descriptor, Rig
from qemu_ioasid.scenarios.checks import Checks, Trial, told
from qemu_ioasid.scenarios.table import Row, Table

RIG = config.DEFAULT.with_name("host-only.toml")
PAGE = 4096
#: The engine works in such pieces.
CHUNK = 64 * 1024
#: Where an address space has the memory that sleeps, and, from its end on, memory that does not.
SLOW = 0x1000_0000
PLAIN = SLOW + CHUNK
#: What a fill stores.
PATTERN = 0x5A5A_5A5A_5A5A_5A5A
STORED = "5a"
#: BAR2, by its number as a region.
RINGS, RINGS_SIZE = 2, 0x10000
#: How long what must wait is watched for returning.
EARLY_SECONDS = 0.5
#: How long what must not wait may take.
SOON_SECONDS = 10.0

TABLE = Table()
_LEAVING = TABLE.phase("a PASID leaves, or moves, under work")
_ENDING = TABLE.phase("a reset and a close under work")
_ANEW = TABLE.phase("what the next one finds")


@dataclass(frozen=True)
class Space:
    """An IOAS and a PASID for it; handles of its memory that sleeps and of that which does not."""

    ioas: int
    pasid: int
    slow: int
    plain: int


def rows(config: RigConfig) -> list[Row]:
    """The checks; raises ConfigurationError for a rig without two mdevs that no guest has."""
    if len(config.spare) < 2:
        raise ConfigurationError(
            f"{config.path}: scenario flight needs two mdevs that no guest has"
        )
    return TABLE.rows(config, {})


def run(rig: Rig, report: Report, rows: Sequence[Row]) -> None:
    """Make the checks of *rows*; failures are in the report, a rig that broke is raised."""
    checks = Checks(rig, report)
    for phase, group in itertools.groupby(rows, lambda row: row.phase):
        with report.phase(phase):
            for row in group:
                with checks.check(row.name, row.tried) as trial, Flight(rig).opened() as flight:
                    row.act(flight, trial)


def _fill(pasid: int, iova: int, length: int = PAGE) -> Descriptor:
    return {"opcode": FILL, "pasid": pasid, "src": PATTERN, "dst": iova, "length": length}


class Flight:
    """Two mdevs of a rig that the host side has to itself; it opens the first."""

    def __init__(self, rig: Rig) -> None:
        self.host = rig.host.agent
        self.registrar = rig.registrar
        self.device, self.other = rig.config.spare[:2]
        self.iommufd = f"agent:{self.device}"

    @contextlib.contextmanager
    def opened(self) -> Iterator[Self]:
        """The device, open; with the block goes all that was made in it, asleep or not."""
        self.host.call("device_open", name=self.device)
        try:
            yield self
        finally:
            self.host.call("reset")

    # --- what the checks are made of ------------------------------------------------------

    def _memory(self, ioas: int, iova: int) -> int:
        """A chunk of memory at *iova* that puts accesses to sleep; its handle."""
        place: dict[str, Any] = {
            "iommufd": self.iommufd,
            "ioas": ioas,
            "iova": iova,
            "length": CHUNK,
        }
        return int(self.host.call("slow_create", **place)["handle"])

    def _space(self) -> Space:
        """An IOAS with both kinds of memory, and a PASID that is to name it."""
        ioas = self.registrar.ioas(self.iommufd)
        slow, plain = self._memory(ioas, SLOW), self._memory(ioas, PLAIN)
        self.host.call("slow_release", handle=plain)
        return Space(ioas, self.registrar.alloc(self.iommufd), slow, plain)

    def _registered(self) -> Space:
        space = self._space()
        self.registrar.register(self.device, self.iommufd, space.pasid, space.ioas)
        return space

    def _submit(self, *work: Descriptor) -> int:
        """Give the device *work*; a ticket for `_completions`."""
        return int(
            self.host.call("device_submit_start", name=self.device, descriptors=work)["ticket"]
        )

    def _asleep(self, handle: int) -> None:
        """Return when an access sleeps in the memory of *handle*."""
        self.host.call("slow_wait", handle=handle, seconds=20 * calibration())

    def _blocked(self, space: Space) -> None:
        """Return when the kernel's list says that work by a PASID is refused, or has to wait."""
        seconds = SOON_SECONDS * calibration()
        self.host.call("wait_blocked", device=self.device, pasid=space.pasid, seconds=seconds)

    def _completions(self, trial: Trial, ticket: int, *expected: str) -> None:
        """Require the work of *ticket* to end so."""
        found = self.host.call("device_submit_wait", ticket=ticket, seconds=20 * calibration())
        trial.answer(", ".join(told(each) for each in found))
        statuses = [str(each["status"]) for each in found]
        trial.require(
            statuses == list(expected), f"the work must end as {expected}, ended as {statuses}"
        )

    def _holds(self, handle: int, at: int = 0) -> bool:
        """Whether the page at *at* of released memory has been filled; else it is as it was."""
        found = self.host.call("slow_read", handle=handle, offset=at, length=PAGE)["hex"]
        return bool(found == STORED * PAGE)

    def _untouched(self, trial: Trial, handle: int, what: str) -> None:
        found = self.host.call("slow_read", handle=handle, offset=0, length=CHUNK)["hex"]
        trial.require(found == "00" * CHUNK, f"{what} has been carried out")

    def _state(self, pasid: int) -> str:
        """What the kernel's list says of *pasid*; "" when it is not there."""
        found = self.host.call("kernel_list", device=self.device)
        return next((str(each["state"]) for each in found if each["pasid"] == pasid), "")

    def _waits(self, trial: Trial, call: Pending, what: str, handle: int) -> Any:
        """Require *call* to return after the release of the memory of *handle*, and not before."""
        early = call.ends_within(EARLY_SECONDS)
        self.host.call("slow_release", handle=handle)
        answer = call.result(Deadline(45, f"return of {what}"))
        trial.answer(f"{what}: 0")
        trial.require(not early, f"{what} returned with work in flight")
        return answer

    # --- a PASID leaves, or moves, under work ---------------------------------------------

    @_LEAVING("detach", "detach a PASID while its first work sleeps and its second is queued")
    def _detach(self, trial: Trial) -> None:
        space = self._registered()
        ticket = self._submit(_fill(space.pasid, SLOW), _fill(space.pasid, PLAIN))
        self._asleep(space.slow)
        # In one request: what it finds is as things are when the detach returns.
        leaving = self.host.start_several(
            ("unregister", {"device": self.device, "pasid": space.pasid}),
            ("device_registers", {"name": self.device}),
        )
        self._blocked(space)
        _, registers = self._waits(trial, leaving, "detach", space.slow)
        trial.require(registers["HEAD"] >= 1, "detach returned before the completion was stored")
        self._completions(trial, ticket, "DONE", "REFUSED")
        self._untouched(trial, space.plain, "work that was refused")
        trial.require(self._holds(space.slow), "the first work is not whole")
        trial.saw("the first work whole and completed, the second one nowhere")

    @_LEAVING("detach-killed", "kill a process that detaches a PASID whose work sleeps")
    def _detach_killed(self, trial: Trial) -> None:
        """That ends the access, and no other: the next one sleeps as long as it must."""
        one, other = self._registered(), self._registered()
        ticket = self._submit(_fill(one.pasid, SLOW), _fill(other.pasid, SLOW))
        self._asleep(one.slow)
        self.host.call("holder_start", name="holder", device=self.device, iommufd=self.iommufd)
        leaving = self.host.start(
            "holder_call", name="holder", what="detach", args={"pasid": one.pasid}
        )
        self._blocked(one)
        trial.require(not leaving.ends_within(EARLY_SECONDS), "detach returned with work in flight")
        self.host.call("holder_kill", name="holder")
        trial.answer("killed")
        self._asleep(other.slow)
        self.host.call("slow_release", handle=other.slow)
        self._completions(trial, ticket, "FAULT", "DONE")
        trial.require(self._holds(other.slow), "the second work is not whole")
        trial.saw("the second work whole")

    @_LEAVING("replace", "replace a PASID's IOAS while its first work sleeps and its second waits")
    def _replace(self, trial: Trial) -> None:
        """No piece of work is in both; and nobody joins a PASID that is on its way."""
        old, new = self._registered(), self._space()
        ticket = self._submit(_fill(old.pasid, SLOW, CHUNK + PAGE), _fill(old.pasid, PLAIN + PAGE))
        self._asleep(old.slow)
        moving = self.host.start("replace", device=self.device, pasid=old.pasid, ioas=new.ioas)
        self._blocked(old)
        trial.require(self._state(old.pasid) == "paused", "the list does not say that work waits")
        self.host.call("file_open", name="joining", device=self.other)
        self.host.call("raw_bind", device="joining", iommufd=self.iommufd)
        with trial.refusal("EBUSY", "attach of another device meanwhile"):
            self.registrar.raw_attach("joining", old.pasid, old.ioas)
        self._waits(trial, moving, "replace", old.slow)
        self._completions(trial, ticket, "DONE", "DONE")
        places = {
            "the first work's second part is not in the old memory": self._holds(old.plain),
            "the second work is in the old memory": not self._holds(old.plain, PAGE),
            "the first work's second part is in the new memory": not self._holds(new.plain),
            "the second work is not in the new memory": self._holds(new.plain, PAGE),
        }
        wrong = [text for text, holds in places.items() if not holds]
        trial.require(not wrong, "; ".join(wrong))
        trial.saw("the first work in the old memory alone, the second in the new")

    # --- a reset and a close under work ---------------------------------------------------

    @_ENDING("reset", "reset the device while its first work sleeps and its second is queued")
    def _reset(self, trial: Trial) -> None:
        space = self._registered()
        self._submit(_fill(space.pasid, SLOW), _fill(space.pasid, PLAIN))
        self._asleep(space.slow)
        self._waits(trial, self.host.start("device_reset", name=self.device), "reset", space.slow)
        trial.require(self._holds(space.slow), "reset returned before the write was whole")
        registers = self.host.call("device_registers", name=self.device)
        counts = registers["TAIL"], registers["HEAD"]
        trial.require(counts == (0, 0), f"TAIL and HEAD are {counts} after a reset")
        ticket = self._submit(_fill(space.pasid, PLAIN + PAGE))
        self._completions(trial, ticket, "DONE")
        trial.require(not self._holds(space.plain), "work that a reset drops has been carried out")
        trial.saw("the first work whole, the second dropped; the PASID works on")

    @_ENDING("close", "close the device while its first work sleeps and its second is queued")
    def _close(self, trial: Trial) -> None:
        """The access ends, though nobody lets it go on; what is queued is not begun."""
        space = self._registered()
        self._submit(_fill(space.pasid, SLOW), _fill(space.pasid, PLAIN))
        self._asleep(space.slow)
        closing = self.host.start("device_close", name=self.device)
        soon = closing.ends_within(SOON_SECONDS * calibration())
        # Whatever became of it, nothing may sleep on.
        self.host.call("slow_release", handle=space.slow)
        closing.result(Deadline(45, "return of close"))
        trial.answer("close: 0")
        trial.require(soon, "close waits for an access that sleeps")
        self._untouched(trial, space.slow, "the access that was ended")
        self._untouched(trial, space.plain, "work that was queued")
        trial.saw("no byte of either")

    # --- what the next one finds ----------------------------------------------------------

    @_ANEW("rings", "open a device anew and have it take what is in its ring")
    def _rings(self, trial: Trial) -> None:
        """It is zeroed: NOP, which no log has. What was there before would be refused."""
        space = self._registered()
        self._completions(trial, self._submit(_fill(space.pasid, PLAIN)), "DONE")
        self.host.call("device_close", name=self.device)
        self.host.call("device_open", name=self.device)
        self.host.call("device_doorbell", name=self.device, tail=1)
        deadline = Deadline(20, "end of the descriptor in the ring")
        while not (registers := self.host.call("device_registers", name=self.device))["HEAD"]:
            deadline.remaining()
        trial.answer(f"FAULT_COUNT {registers['FAULT_COUNT']}")
        trial.require(not registers["FAULT_COUNT"], "the ring has the work of before")
        trial.saw("nothing of before in the ring")

    @_ANEW("past-the-rings", "read at the end of BAR2, and on")
    def _past(self, trial: Trial) -> None:
        place: dict[str, Any] = {"name": self.device, "region": RINGS, "offset": RINGS_SIZE - 8}
        self.host.call("device_read", **place, length=8)
        with trial.refusal("EINVAL", "read of 8 bytes too many"):
            self.host.call("device_read", **place, length=16)
        trial.saw("the last 8 bytes alone can be read")
