# SPDX-License-Identifier: GPL-2.0-or-later
"""A PASID leaves, or moves to other memory, while work by it is under way."""

from __future__ import annotations

from typing import Any

from qemu_ioasid.client import Pending
from qemu_ioasid.deadline import Deadline, calibration
from qemu_ioasid.scenarios.checks import Trial, told
from qemu_ioasid.scenarios.flight.ground import (
    BUSY,
    CHUNK,
    LOG,
    PAGE,
    PLAIN,
    REGISTERS,
    SLOW,
    SOON_SECONDS,
    Flight,
    Space,
    fill,
)
from qemu_ioasid.scenarios.table import Table

#: PDMA_FAULT_ENDED (include/uapi/linux/pdma.h), as it is in memory.
ENDED = "0a000000"

TABLE = Table()
_CHECK = TABLE.phase("a PASID leaves, or moves, under work")


@_CHECK("detach", "detach a PASID while its first work sleeps and its second is queued")
def detach(flight: Flight, trial: Trial) -> None:
    space, ticket = flight.sleeping(PLAIN)
    shown = flight.listed(space.pasid)["inflight"], flight.registers()["STATUS"] & BUSY
    trial.require(shown == (1, BUSY), f"work in flight and STATUS are shown as {shown}")
    # In one request: what it finds is as things are when the detach returns.
    leaving = flight.host.start_several(
        ("unregister", {"device": flight.device, "pasid": space.pasid}),
        ("device_registers", {"name": flight.device}),
    )
    flight.blocked(space)
    _, registers = flight.waits(trial, leaving, "detach", space.slow)
    trial.require(registers["HEAD"] >= 1, "detach returned before the completion was stored")
    flight.completions(trial, ticket, "DONE", "REFUSED")
    flight.untouched(trial, space.plain, "work that was refused")
    trial.require(flight.holds(space.slow), "the first work is not whole")
    trial.saw("the first work whole and completed, the second one nowhere")


@_CHECK("detach-killed", "kill a process that detaches a PASID whose work sleeps")
def detach_killed(flight: Flight, trial: Trial) -> None:
    """That ends the access, and no other: the next one sleeps as long as it must."""
    one, other = flight.registered(), flight.registered()
    ticket = flight.submit(fill(one.pasid, SLOW), fill(other.pasid, SLOW))
    flight.asleep(one.slow)
    flight.waiting(trial, "detach", pasid=one.pasid)
    flight.blocked(one)
    flight.kill(trial)
    flight.asleep(other.slow)
    flight.release(other.slow)
    flight.completions(trial, ticket, "FAULT", "DONE")
    trial.require(flight.holds(other.slow), "the second work is not whole")
    flight.logged_as_ended(trial)
    trial.saw("the second work whole")


@_CHECK(
    "detach-behind-another", "kill a process that detaches a PASID whose work waits for another's"
)
def detach_behind_another(flight: Flight, trial: Trial) -> None:
    """Two devices share the PASID, and the other one's work sleeps: that is not ended."""
    space, ticket = flight.sleeping()
    other = flight.joined()
    other.registrar.raw_attach(other.device, space.pasid, space.ioas)
    work = [fill(space.pasid, PLAIN)]
    waiting = flight.host.start("file_submit", device=other.device, descriptors=work, seconds=60)
    seconds = SOON_SECONDS * calibration()
    flight.host.call("wait_worker", device=other.device, state="D", seconds=seconds)
    other.waiting(trial, "detach", pasid=space.pasid)
    other.kill(trial)
    (done,) = waiting.result(Deadline(45, "end of the work that waits"))
    trial.require(done["status"] == "FAULT", f"that work ended as {told(done)}")
    place: dict[str, Any] = {"region": REGISTERS, "how": "read", "offset": LOG + 4, "length": 4}
    found = flight.host.call("file_access", device=other.device, like=other.device, **place)
    trial.require(found["hex"] == ENDED, f"it is logged with the reason {found['hex']}")
    flight.release(space.slow)
    flight.completions(trial, ticket, "DONE")
    flight.untouched(trial, space.plain, "the work that was ended")
    trial.saw("the sleeping work whole, of the other no byte")


@_CHECK("replace", "replace a PASID's IOAS while its first work sleeps and its second waits")
def replace(flight: Flight, trial: Trial) -> None:
    """No piece of work is in both; and nobody joins a PASID that is on its way."""
    old, new = flight.registered(), flight.space()
    ticket = flight.submit(fill(old.pasid, SLOW, CHUNK + PAGE), fill(old.pasid, PLAIN + PAGE))
    flight.asleep(old.slow)
    moving = flight.host.start("replace", device=flight.device, pasid=old.pasid, ioas=new.ioas)
    flight.blocked(old)
    shown = flight.listed(old.pasid)["state"], flight.tabled(old.pasid)["state"]
    trial.require(shown == ("paused", "busy"), f"list and table say {shown} meanwhile")
    joining = flight.joined()
    with trial.refusal("EBUSY", "attach of another device meanwhile"):
        flight.registrar.raw_attach(joining.device, old.pasid, old.ioas)
    flight.waits(trial, moving, "replace", old.slow)
    flight.completions(trial, ticket, "DONE", "DONE")
    places = {
        "the first work's second part is not in the old memory": flight.holds(old.plain),
        "the second work is in the old memory": not flight.holds(old.plain, PAGE),
        "the first work's second part is in the new memory": not flight.holds(new.plain),
        "the second work is not in the new memory": flight.holds(new.plain, PAGE),
    }
    wrong = [text for text, holds in places.items() if not holds]
    trial.require(not wrong, "; ".join(wrong))
    trial.saw("the first work in the old memory alone, the second in the new")


@_CHECK("replace-killed", "kill a process that replaces a PASID's IOAS while its work sleeps")
def replace_killed(flight: Flight, trial: Trial) -> None:
    """Nothing has moved, and the work goes on: what sleeps, and what is queued."""
    new = flight.space()
    old, ticket = flight.sleeping(PLAIN)
    flight.waiting(trial, "attach", pasid=old.pasid, ioas=new.ioas)
    flight.kill(trial)
    state = flight.listed(old.pasid)["state"]
    trial.require(state == "open", f"the list says {state!r} after that")
    state = flight.tabled(old.pasid)["state"]
    trial.require(state == "ready", f"the table says {state!r} after that")
    _unmoved(flight, trial, ticket, old, new)


def _unmoved(flight: Flight, trial: Trial, ticket: int, old: Space, new: Space) -> None:
    """The work of *ticket* goes on, all of it in the old memory."""
    flight.release(old.slow)
    flight.completions(trial, ticket, "DONE", "DONE")
    trial.require(flight.holds(old.slow) and flight.holds(old.plain), "the old memory lacks work")
    flight.untouched(trial, new.plain, "work in the new memory")
    trial.saw("both works in the old memory, none in the new")


@_CHECK("replace-fails", "replace a PASID's IOAS by one there is not while its work sleeps")
def replace_fails(flight: Flight, trial: Trial) -> None:
    """What waits meanwhile goes on in the old memory."""
    space, ticket = flight.sleeping(PLAIN)
    args: dict[str, object] = {"device": flight.device, "pasid": space.pasid, "ioas": 1 << 20}
    moving = flight.host.start("raw_attach", **args)
    flight.blocked(space)
    with trial.refusal("ENOENT", "replace"):
        flight.waits(trial, moving, "replace", space.slow)
    flight.completions(trial, ticket, "DONE", "DONE")
    trial.require(flight.holds(space.slow) and flight.holds(space.plain), "work is not whole")
    trial.saw("both works in the old memory")


@_CHECK("own", "replace the IOAS of work without a PASID while the first such work sleeps")
def own(flight: Flight, trial: Trial) -> None:
    old, new = flight.space(), flight.space()
    flight.host.call("raw_attach", device=flight.device, ioas=old.ioas)
    ticket = flight.submit(fill(None, SLOW, CHUNK + PAGE), fill(None, PLAIN + PAGE))
    flight.asleep(old.slow)
    moving = flight.host.start("raw_attach", device=flight.device, ioas=new.ioas)
    flight.waits(trial, moving, "attach", old.slow)
    flight.completions(trial, ticket, "DONE", "DONE")
    trial.require(flight.holds(old.plain), "the first work's second part is not in the old memory")
    trial.require(flight.holds(new.plain, PAGE), "the second work is not in the new memory")
    trial.saw("the first work in the old memory, the second in the new")


@_CHECK("own-killed", "kill a process that replaces that IOAS while such work sleeps")
def own_killed(flight: Flight, trial: Trial) -> None:
    """As with a PASID: nothing has moved, and the work goes on."""
    new = flight.space()
    old = flight.registered()
    ticket = flight.sleeping_own(old, PLAIN)
    flight.waiting(trial, "attach", pasid=None, ioas=new.ioas)
    flight.kill(trial)
    _unmoved(flight, trial, ticket, old, new)


@_CHECK("own-detach", "detach that IOAS while the first such work sleeps and the second is queued")
def own_detach(flight: Flight, trial: Trial) -> None:
    """A PASID that names the same IOAS is not in its way, and goes on."""
    space = flight.registered()
    ticket = flight.sleeping_own(space, PLAIN)
    leaving = flight.host.start("raw_detach", device=flight.device)
    flight.waits(trial, leaving, "detach", space.slow)
    flight.completions(trial, ticket, "DONE", "FAULT")
    trial.require(flight.holds(space.slow), "the first work is not whole")
    flight.untouched(trial, space.plain, "work without an address space")
    flight.completions(trial, flight.submit(fill(space.pasid, PLAIN)), "DONE")
    trial.saw("the first work whole, the second one nowhere; the PASID works on")


@_CHECK("own-detach-killed", "kill a process that detaches that IOAS while such work sleeps")
def own_detach_killed(flight: Flight, trial: Trial) -> None:
    """That ends the access, before anybody lets it go on."""
    space = flight.registered()
    ticket = flight.sleeping_own(space)
    flight.waiting(trial, "detach", pasid=None)
    flight.kill(trial)
    flight.completions(trial, ticket, "FAULT")
    flight.logged_as_ended(trial)
    flight.release(space.slow)
    flight.untouched(trial, space.slow, "the access that was ended")
    trial.saw("no byte of it")


@_CHECK("others", "register, replace and detach other PASIDs while a PASID's work sleeps")
def others(flight: Flight, trial: Trial) -> None:
    """None of that waits for work that has nothing to do with it."""
    other, new = flight.space(), flight.space()
    space, ticket = flight.sleeping(PLAIN)
    deadline = Deadline(SOON_SECONDS, "registration beside work that sleeps")
    args: dict[str, object] = {"device": flight.device, "pasid": other.pasid}
    for op, more in (
        ("register", {"iommufd": flight.iommufd, "ioas": other.ioas}),
        ("replace", {"ioas": new.ioas}),
        ("unregister", {}),
        ("raw_attach", {"ioas": new.ioas, "pasid": None}),
        ("raw_detach", {"pasid": None}),
    ):
        call = flight.host.start(op, **{**args, **more})
        soon = call.ends_within(deadline.remaining())
        if not soon:
            flight.release(space.slow)
        trial.require(soon, f"{op} waits for another PASID's work")
        call.result(deadline)
        trial.answer(f"{op}: 0")
    trial.require(flight.counts() == (2, 0), "the work did not sleep meanwhile")
    flight.release(space.slow)
    flight.completions(trial, ticket, "DONE", "DONE")
    trial.saw("the work asleep all the while, and then whole")


@_CHECK("first-joins", "join a PASID while its first registration is being made")
def first_joins(flight: Flight, trial: Trial) -> None:
    """That waits for work in the same memory."""
    space = flight.registered()
    coming = flight.registrar.alloc(flight.iommufd)
    ticket = flight.submit(fill(space.pasid, SLOW))
    flight.asleep(space.slow)
    call = flight.host.start("raw_attach", device=flight.device, pasid=coming, ioas=space.ioas)
    deadline = Deadline(20, "the entry of a PASID that is being registered")
    while not flight.tabled(coming):
        deadline.remaining()
    _join(flight, trial, call, space, coming, "attach")
    flight.completions(trial, ticket, "DONE")
    flight.registrar.raw_attach(flight.other, coming, space.ioas)
    trial.saw("the PASID free for others after the attach, and not before")


@_CHECK("last-leaves", "join a PASID while the last device that has it leaves")
def last_leaves(flight: Flight, trial: Trial) -> None:
    """It is nobody's before its access is gone; that waits for work in the same memory."""
    space = flight.registered()
    leaving = flight.registrar.alloc(flight.iommufd)
    flight.registrar.register(flight.device, flight.iommufd, leaving, space.ioas)
    ticket = flight.submit(fill(space.pasid, SLOW))
    flight.asleep(space.slow)
    call = flight.host.start("unregister", device=flight.device, pasid=leaving)
    deadline = Deadline(20, "the end of a PASID in the list that it leaves")
    while flight.listed(leaving):
        deadline.remaining()
    _join(flight, trial, call, space, leaving, "detach")
    flight.completions(trial, ticket, "DONE")
    flight.registrar.raw_attach(flight.other, leaving, space.ioas)
    trial.saw("the PASID free for others after the detach, and not before")


def _join(flight: Flight, trial: Trial, call: Pending, space: Space, pasid: int, what: str) -> None:
    """The other device must not join *pasid* while *call*, which waits for memory, is under way."""
    joining = flight.joined()
    deadline = Deadline(SOON_SECONDS, f"attach of another device under {what}")
    args: dict[str, object] = {"device": joining.device, "pasid": pasid, "ioas": space.ioas}
    join = flight.host.start("raw_attach", **args)
    soon = join.ends_within(deadline.remaining())
    flight.waits(trial, call, what, space.slow)
    trial.require(soon, "who joins waits for the memory, and has the PASID meanwhile")
    with trial.refusal("EBUSY", "attach of another device meanwhile"):
        join.result(deadline)


@_CHECK("unmap", "unmap memory while work sleeps in it")
def unmap(flight: Flight, trial: Trial) -> None:
    space, ticket = flight.sleeping()
    where: dict[str, object] = {"ioas": space.ioas, "iova": SLOW, "length": CHUNK}
    leaving = flight.host.start("ioas_unmap", iommufd=flight.iommufd, **where)
    flight.waits(trial, leaving, "unmap", space.slow)
    trial.require(flight.holds(space.slow), "unmap returned before the write was whole")
    flight.completions(trial, ticket, "DONE")
    flight.completions(trial, flight.submit(fill(space.pasid, SLOW)), "FAULT")
    trial.saw("the first work whole; none after the unmap")
