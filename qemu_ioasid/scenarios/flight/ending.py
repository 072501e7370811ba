# SPDX-License-Identifier: GPL-2.0-or-later
"""A reset and a close while work is under way."""

from __future__ import annotations

from qemu_ioasid.deadline import Deadline, calibration
from qemu_ioasid.scenarios.checks import Trial
from qemu_ioasid.scenarios.flight.ground import (
    CHUNK,
    EARLY_SECONDS,
    HOLDER,
    PAGE,
    PLAIN,
    SLOW,
    SOON_SECONDS,
    Flight,
    Space,
    fill,
)
from qemu_ioasid.scenarios.table import Table

TABLE = Table()
_CHECK = TABLE.phase("a reset and a close under work")


@_CHECK("reset", "reset the device while its first work sleeps and its second is queued")
def reset(flight: Flight, trial: Trial) -> None:
    space, _ = flight.sleeping(PLAIN)
    flight.waits(trial, flight.host.start("device_reset", name=flight.device), "reset", space.slow)
    trial.require(flight.holds(space.slow), "reset returned before the write was whole")
    counts = flight.counts()
    trial.require(counts == (0, 0), f"TAIL and HEAD are {counts} after a reset")
    ticket = flight.submit(fill(space.pasid, PLAIN + PAGE))
    flight.completions(trial, ticket, "DONE")
    trial.require(not flight.holds(space.plain), "work that a reset drops has been carried out")
    trial.saw("the first work whole, the second dropped; the PASID works on")


@_CHECK("reset-killed", "kill a process that resets the device while its first work sleeps")
def reset_killed(flight: Flight, trial: Trial) -> None:
    """The device is as it was, and its work goes on."""
    space, ticket = flight.sleeping(PLAIN)
    before = flight.config()
    flight.waiting(trial, "reset")
    flight.kill(trial)
    counts = flight.counts()
    trial.require(counts == (2, 0), f"TAIL and HEAD are {counts} after that")
    trial.require(flight.config() == before, "the config space is another one after that")
    flight.release(space.slow)
    flight.completions(trial, ticket, "DONE", "DONE")
    trial.require(flight.holds(space.slow) and flight.holds(space.plain), "work is not whole")
    trial.saw("both works whole")


@_CHECK("resets", "reset the device twice while its first work sleeps, and kill the first to do so")
def resets(flight: Flight, trial: Trial) -> None:
    """The end of one reset lets no work in that another one keeps out."""
    space, _ = flight.sleeping(PLAIN)
    flight.waiting(trial, "reset")
    second = flight.host.start("device_reset", name=flight.device)
    trial.require(not second.ends_within(EARLY_SECONDS), "the second reset returned at once")
    flight.kill(trial)
    flight.waits(trial, second, "reset", space.slow)
    counts = flight.counts()
    trial.require(counts == (0, 0), f"TAIL and HEAD are {counts} after a reset")
    flight.untouched(trial, space.plain, "work that a reset drops")
    trial.saw("the first work alone")


@_CHECK("reset-log", "reset the device while work sleeps that is going to fault")
def reset_log(flight: Flight, trial: Trial) -> None:
    """Its record goes with the others; and another device's reset waits for none of this."""
    space = flight.registered()
    flight.submit(fill(space.pasid, SLOW, 3 * CHUNK))
    flight.asleep(space.slow)
    resetting = flight.host.start("device_reset", name=flight.device)
    other = flight.beside()
    beside = flight.host.start("device_reset", name=other.device)
    soon = beside.ends_within(SOON_SECONDS * calibration())
    flight.waits(trial, resetting, "reset", space.slow)
    trial.require(soon, "the other device's reset waits for this one's")
    beside.result(Deadline(20, "the other device's reset"))
    trial.require(flight.holds(space.plain), "the second chunk is not whole")
    logged = flight.registers()["FAULT_COUNT"]
    trial.require(not logged and not any(flight.log()), "a record of before is in the log")
    trial.saw("two chunks of the work, and no record of its fault")


@_CHECK("doorbell", "submit work while a process resets the device, and kill that")
def doorbell(flight: Flight, trial: Trial) -> None:
    """It is dropped; what was queued before goes on, since nothing was reset."""
    space, ticket = flight.sleeping(PLAIN)
    flight.waiting(trial, "reset")
    flight.host.call("device_doorbell", name=flight.device, tail=3)
    flight.kill(trial)
    counts = flight.counts()
    trial.require(counts == (2, 0), f"TAIL and HEAD are {counts} after that")
    flight.release(space.slow)
    flight.completions(trial, ticket, "DONE", "DONE")
    trial.saw("the work of before alone")


@_CHECK("close", "close the device while its first work sleeps and its second is queued")
def close(flight: Flight, trial: Trial) -> None:
    """The access ends, though nobody lets it go on; what is queued is not begun."""
    space, _ = flight.sleeping(PLAIN)
    _closes(flight, trial, space)


@_CHECK("close-own", "close the device while work without a PASID sleeps")
def close_own(flight: Flight, trial: Trial) -> None:
    space = flight.space()
    flight.sleeping_own(space, PLAIN)
    _closes(flight, trial, space)


def _closes(flight: Flight, trial: Trial, space: Space) -> None:
    """The device can be closed while work sleeps in *space*, and nothing of it is carried out."""
    closing = flight.host.start("device_close", name=flight.device)
    flight.ends_work(trial, closing, space.slow, "an access that sleeps")
    flight.untouched(trial, space.slow, "the access that was ended")
    flight.untouched(trial, space.plain, "work that was queued")
    trial.saw("no byte of either")


@_CHECK("close-behind-another", "close a device whose work waits for another one's that sleeps")
def close_behind_another(flight: Flight, trial: Trial) -> None:
    """They share a PASID. That work ends with the close, though what it waits for does not."""
    space, ticket = flight.sleeping()
    flight.joined()
    flight.registrar.raw_attach(flight.other, space.pasid, space.ioas)
    # The file is to be the holder's alone, so that its end is the last close.
    flight.host.call("holder_start", name=HOLDER, device=flight.other, iommufd=flight.iommufd)
    flight.host.call("file_close", name=flight.other)
    work = {"descriptors": [fill(space.pasid, PLAIN)], "seconds": 60.0}
    flight.host.start("holder_call", name=HOLDER, what="submit", args=work)
    seconds = SOON_SECONDS * calibration()
    flight.host.call("wait_worker", device=flight.other, state="D", seconds=seconds)
    closing = flight.host.start("holder_kill", name=HOLDER)
    flight.ends_work(trial, closing, space.slow, "another device's work")
    flight.completions(trial, ticket, "DONE")
    flight.untouched(trial, space.plain, "work that the close has ended")
    trial.saw("the sleeping work whole, of the other no byte")
