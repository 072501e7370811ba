# SPDX-License-Identifier: GPL-2.0-or-later
"""What work under way means for other devices and for the ring, and what the next opener finds."""

from __future__ import annotations

from typing import Any

from qemu_ioasid.deadline import Deadline
from qemu_ioasid.scenarios.checks import Trial
from qemu_ioasid.scenarios.flight.ground import PLAIN, SLOW, Flight, fill
from qemu_ioasid.scenarios.table import Table

#: BAR2, by its number as a region.
RINGS, RINGS_SIZE = 2, 0x10000

TABLE = Table()
_BESIDE = TABLE.phase("beside work that sleeps")
_ANEW = TABLE.phase("what the next one finds")


@_BESIDE("beside", "use another device while a detach waits for work that sleeps")
def beside(flight: Flight, trial: Trial) -> None:
    """Nobody's work holds up anybody else's, nor what others register."""
    space = flight.registered()
    ticket = flight.submit(fill(space.pasid, SLOW))
    flight.asleep(space.slow)
    leaving = flight.host.start("unregister", device=flight.device, pasid=space.pasid)
    flight.blocked(space)
    other = flight.beside()
    free = other.registered()
    other.completions(trial, other.submit(fill(free.pasid, PLAIN)), "DONE")
    other.registrar.unregister(other.device, free.pasid)
    trial.require(other.holds(free.plain), "the other device's work is not whole")
    flight.waits(trial, leaving, "detach", space.slow)
    flight.completions(trial, ticket, "DONE")
    trial.saw("the other device's work whole before that of the first")


@_BESIDE("overrun", "fill the ring behind work that sleeps, and one more")
def overrun(flight: Flight, trial: Trial) -> None:
    """What is under way counts. The rest of the ring is NOPs, as it was zeroed."""
    space = flight.registered()
    ticket = flight.submit(fill(space.pasid, SLOW))
    flight.asleep(space.slow)
    entries = flight.host.call("device_registers", name=flight.device)["RING_ENTRIES"]
    flight.host.call("device_doorbell", name=flight.device, tail=entries + 1)
    tail, _ = flight.counts()
    trial.answer(f"TAIL {tail} after one too many")
    trial.require(tail == 1, "more was submitted than the ring has room for")
    flight.host.call("device_doorbell", name=flight.device, tail=entries)
    tail, _ = flight.counts()
    trial.require(tail == entries, f"TAIL is {tail} with a full ring")
    flight.host.call("slow_release", handle=space.slow)
    flight.completions(trial, ticket, "DONE")
    trial.saw("the ring full, and no fuller")


@_ANEW("rings", "open a device anew and have it take what is in its ring")
def rings(flight: Flight, trial: Trial) -> None:
    """It is zeroed: NOP, which no log has. What was there before would be refused."""
    space = flight.registered()
    flight.completions(trial, flight.submit(fill(space.pasid, PLAIN)), "DONE")
    flight.host.call("device_close", name=flight.device)
    flight.host.call("device_open", name=flight.device)
    flight.host.call("device_doorbell", name=flight.device, tail=1)
    deadline = Deadline(20, "end of the descriptor in the ring")
    while not (registers := flight.host.call("device_registers", name=flight.device))["HEAD"]:
        deadline.remaining()
    trial.answer(f"FAULT_COUNT {registers['FAULT_COUNT']}")
    trial.require(not registers["FAULT_COUNT"], "the ring has the work of before")
    trial.saw("nothing of before in the ring")


@_ANEW("pinned", "keep hold of a device's rings over a close, and have the next one use them")
def pinned(flight: Flight, trial: Trial) -> None:
    """Its work and what came of it are its own: who could write there could give it work."""
    flight.host.call("region_pin", device=flight.device, region=RINGS)
    flight.host.call("device_close", name=flight.device)
    flight.host.call("device_open", name=flight.device)
    space = flight.registered()
    flight.completions(trial, flight.submit(fill(space.pasid, PLAIN)), "DONE")
    kept = bytes.fromhex(flight.host.call("region_pinned", device=flight.device)["hex"])
    trial.require(len(kept) == RINGS_SIZE, f"{len(kept)} bytes of the rings were kept")
    trial.require(not any(kept), "who had the device before sees the next one's work")
    trial.saw("the pages of before, and nothing in them")


@_ANEW("past-the-rings", "read at the end of BAR2, and on")
def past(flight: Flight, trial: Trial) -> None:
    place: dict[str, Any] = {"name": flight.device, "region": RINGS, "offset": RINGS_SIZE - 8}
    flight.host.call("device_read", **place, length=8)
    with trial.refusal("EINVAL", "read of 8 bytes too many"):
        flight.host.call("device_read", **place, length=16)
    trial.saw("the last 8 bytes alone can be read")
